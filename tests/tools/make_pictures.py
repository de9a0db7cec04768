"""Write the pictures that README and form show of the tool's work, with the tool itself.

docs/sources.png    the Hubble Deep Field's sources, for the README
picture.xml         those of the simulated sky, for the help of the form: as a token that holds the
                    picture, since Galaxy serves no file for a help in Markdown
"""

import base64
import io
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "source_extractor.py"
HELP_WIDTH = 480


def overlay(name, *options):
    """Return the picture of the sources in an image of the test data."""
    with TemporaryDirectory() as directory:
        command = [sys.executable, TOOL, ROOT / "test-data" / name, "-q", "-o", directory]
        subprocess.run([*command, *options], check=True)
        return Image.open(Path(directory, "sources.png")).convert("RGB")


def main():
    """Write both."""
    picture = overlay("hubble_deep_field.tiff", "--thresh", "3").quantize(128)
    picture.save(ROOT / "docs/sources.png", optimize=True)

    picture = overlay("sky.fits")
    picture = picture.resize((HELP_WIDTH, round(picture.height * HELP_WIDTH / picture.width)))
    webp = io.BytesIO()
    picture.save(webp, "webp", quality=75, method=6)
    data = base64.b64encode(webp.getvalue()).decode()
    (ROOT / "picture.xml").write_text(
        "<macros>\n"
        "    <!-- Written by tests/tools/make_pictures.py -->\n"
        f'    <token name="@PICTURE@">data:image/webp;base64,{data}</token>\n'
        "</macros>\n"
    )


if __name__ == "__main__":
    main()
