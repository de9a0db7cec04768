"""Images as the bytes of TIFF files."""

import io
import struct

import PIL.Image
import tifffile


def tiff_bytes(data, **keywords):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, data, **({"photometric": "minisblack"} | keywords))
    return buffer.getvalue()


def pillow_bytes(data, **keywords):
    buffer = io.BytesIO()
    PIL.Image.fromarray(data).save(buffer, **({"format": "TIFF"} | keywords))
    return buffer.getvalue()


def patched_tiff(content, tag, value):
    """Return a TIFF file with another (integer) value for one of its tags."""
    buffer = io.BytesIO(content)
    with tifffile.TiffFile(buffer) as tiff:
        found = tiff.pages[0].tags[tag]
        buffer.seek(found.valueoffset)
        buffer.write(struct.pack("<I" if found.dtype == 4 else "<H", value))
    return buffer.getvalue()
