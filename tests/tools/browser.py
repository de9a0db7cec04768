"""Take pictures of the tool in Galaxy, as its users see it, with headless Chromium.

    python tests/tools/browser.py OUTDIR

Needs Debian's packages `chromium` and `chromium-driver`.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bioblend.galaxy import GalaxyInstance
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.wait import WebDriverWait

from galaxy import ROOT, Galaxy, running_galaxy

TOOL_ID = "source_extractor"
IMAGE = ROOT / "test-data" / "sky.fits"
WIDTH, HEIGHT = 1400, 1000
TIMEOUT = 60
JOB_TIMEOUT = 300


@contextmanager
def browser() -> Iterator[Chrome]:
    """Start headless Chromium with a profile of its own, and close it at the end.

    Yields
    ------
    Chrome
        The browser's driver.
    """
    with TemporaryDirectory(prefix="chromium-") as profile:
        options = ChromeOptions()
        options.binary_location = _installed("chromium")
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        driver = Chrome(options, ChromeService(_installed("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def _installed(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        sys.exit(f"browser.py: error: {program} is not installed")
    return path


def take_pictures(galaxy: Galaxy, driver: Chrome, image: Path, directory: Path) -> None:
    """Take pictures of the form, and of what a run of the tool leaves in the history.

    Parameters
    ----------
    galaxy : Galaxy
        Where the tool is.
    driver : Chrome
        The browser.
    image : Path
        What to run the tool on.
    directory : Path
        Where the pictures go: `form.png` and `form-open.png` with sections folded and unfolded,
        `history.png` with the overlay beside the history, `catalog.png` with the table.
    """
    user = GalaxyInstance(galaxy.url, galaxy.user_key)
    history = user.histories.create_history("Extract sources")["id"]
    uploaded = user.tools.upload_file(str(image), history)["outputs"][0]["id"]
    user.datasets.wait_for_dataset(uploaded, maxwait=JOB_TIMEOUT, interval=0.5)

    driver.get(f"{galaxy.url}/history/set_as_current?id={history}")
    driver.get(f"{galaxy.url}/?tool_id={TOOL_ID}&version=latest")
    _wait_for(driver, "#execute:not(.g-disabled)")
    _picture_panel(driver, directory / "form.png")
    for header in driver.find_elements(By.CSS_SELECTOR, "#center .portlet-header.cursor-pointer"):
        header.click()
    _picture_panel(driver, directory / "form-open.png")

    run = user.tools.run_tool(history, TOOL_ID, {"image": {"src": "hda", "id": uploaded}})
    outputs = {output["output_name"]: output["id"] for output in run["outputs"]}
    for output in outputs.values():
        user.datasets.wait_for_dataset(output, maxwait=JOB_TIMEOUT, interval=0.5)

    driver.set_window_size(WIDTH, HEIGHT)
    driver.get(f"{galaxy.url}/datasets/{outputs['overlay']}/preview")
    _wait_for(driver, "#center .image-wrapper img")
    _wait_for(driver, f"#dataset-{outputs['catalog']}[data-state=ok]").click()
    _wait_for(driver, f"#dataset-{outputs['catalog']} .dataset-peek")
    driver.save_screenshot(directory / "history.png")
    driver.get(f"{galaxy.url}/datasets/{outputs['catalog']}/preview")
    _wait_for(driver, "#center .dataset-display tbody td")
    driver.save_screenshot(directory / "catalog.png")


def _wait_for(driver: Chrome, selector: str) -> WebElement:
    located = expected_conditions.visibility_of_element_located((By.CSS_SELECTOR, selector))
    return WebDriverWait(driver, TIMEOUT).until(located, f"the page does not show {selector}")


def _picture_panel(driver: Chrome, path: Path) -> None:
    """Take a picture of the middle panel, in a window high enough to show all of it."""
    panel = driver.find_element(By.CSS_SELECTOR, "#center > .overflow-auto")
    driver.set_window_size(WIDTH, HEIGHT)
    height, shown = (int(panel.get_property(f"{name}Height")) for name in ("scroll", "client"))
    driver.set_window_size(WIDTH, HEIGHT + height - shown)
    panel.screenshot(str(path))


def main(argv: list[str] | None = None) -> int:
    """Start a Galaxy and take the pictures.

    Parameters
    ----------
    argv : list of str, optional
        Command line, by default the process's own.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(description="Take pictures of the tool in Galaxy.")
    parser.add_argument("directory", type=Path, metavar="OUTDIR", help="where the pictures go")
    parser.add_argument("--image", type=Path, default=IMAGE, help="image to run the tool on")
    args = parser.parse_args(argv)
    args.directory.mkdir(parents=True, exist_ok=True)
    with running_galaxy() as galaxy, browser() as driver:
        take_pictures(galaxy, driver, args.image, args.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
