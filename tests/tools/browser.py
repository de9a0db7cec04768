"""Use the tool in Galaxy as people do, in headless Chromium, and check what comes of it.

    python tests/tools/browser.py            # fill in the form, run it, run it again
    python tests/tools/browser.py OUTDIR     # take pictures of the tool as well

Needs Debian's packages `chromium` and `chromium-driver`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent

import numpy as np
from astropy.io import fits
from bioblend.galaxy import GalaxyInstance
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.wait import WebDriverWait

from galaxy import ROOT, WORKFLOWS, Galaxy, Outcome, report, running_galaxy

TOOL_ID = "source_extractor"
IMAGE = ROOT / "test-data" / "sky.fits"
WIDTH, HEIGHT, HEIGHT_OF_FORM = 1400, 1100, 5000
TIMEOUT = 60
JOB = {"maxwait": 300, "interval": 0.5}

# The page's parts, as CSS selectors.
MIDDLE, PANEL = "#center", "#center > .overflow-auto"
RUN = "#center #execute"
READY = f"{RUN}:not(.g-disabled)"
FOLDED = "#center .portlet-header:has(+ .portlet-content[style*='display: none'])"
ADD_RECTANGLE = "#center button[data-title^='Click to add Rectangle']"
FIELD_ID = "form-element-"
FIELD, FIELDS = f"#center [id='{FIELD_ID}{{}}']", f"#center [id^='{FIELD_ID}']"
REFUSED = ".alert"
SELECT, SELECTED, OPTION = ".multiselect", "[data-selected-value]", "[data-option-value='{}']"
SWITCH, SWITCH_LABEL, TYPED = "input[type=checkbox]", ".custom-control-label", "input.ui-input"
PICTURE = "#center img"
SEARCH, FOUND = "[data-description='filter text input']", "a[href*='tool_id={}']"
RUN_WORKFLOW = "#center #run-workflow:not(.g-disabled)"
STARTED = "#center .donemessagelarge a[href^='/jobs/']"
DATASET, RUN_AGAIN, PEEK = "#dataset-{}[data-state=ok]", ".rerun-btn", ".dataset-peek"
PREVIEW = "#center .image-wrapper img"

# What to set in the form, at least one field of each kind, and the same for a shell. A whole
# number in a field for fractions is shown as 2.0 when the form is opened again.
SIDES = "xmin", "xmax", "ymin", "ymax"
PLACES = {0: ("4", "140", "215", "351"), 1: ("232", "351", "12", "130")}
SETTINGS = {
    **{f"masking|mask_box_{k}|{SIDES[i]}": PLACES[k][i] for k in PLACES for i in range(4)},
    **{"settings|thresh": "2.0", "settings|background_passes": "2", "detection|gain": "4.5"},
    **{"settings|kernel|filter_case": "gaussian", "settings|kernel|filter_fwhm": "3.5"},
    **{"deblending|clean": False, "photometry|aperture_diameters": "5 10"},
    "outputs|regions": True,
}
WRONG = {"photometry|aperture_diameters": "5 x"}
OPTIONS = """
--thresh 2 --mask-box 4 140 215 351 --mask-box 232 351 12 130 --background-passes 2 --gain 4.5
--filter-case gaussian --filter-fwhm 3.5 --no-clean --aperture-diameters 5 10 --regions regions.reg
"""
WORDS = (
    *("source extractor", "sextractor", "sep", "photometry", "segmentation", "nuclei", "stars"),
    *("galaxies", "voronoi"),
)
PRODUCTS = ("catalog.tsv", "regions.reg", "segmentation.fits", "background.fits", "rms.fits")


@contextmanager
def browser() -> Iterator[Chrome]:
    """Start headless Chromium with a profile of its own, and close it at the end."""
    with TemporaryDirectory(prefix="chromium-") as profile:
        options = ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for argument in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"),
            *("disable-quic", "disable-background-networking", "disable-component-update"),
            *("disable-sync", f"user-data-dir={profile}"),
        ):
            options.add_argument(f"--{argument}")
        with Chrome(options, ChromeService("/usr/bin/chromedriver")) as driver:
            yield driver


def check(galaxy: Galaxy, driver: Chrome) -> Iterator[Outcome]:
    """Find the tool, fill in the form, run it and run it again; run the workflow."""
    start = time.monotonic()
    try:
        for name, problems in _findings(galaxy, driver):
            yield Outcome(name, not problems, "\n".join(problems), time.monotonic() - start)
            start = time.monotonic()
    except WebDriverException as error:
        shown = driver.find_element(By.CSS_SELECTOR, MIDDLE).text[:500]
        report = f"{error.msg}; it shows:\n{indent(shown, '    ')}"
        yield Outcome("a way through the pages", False, report, time.monotonic() - start)


def _findings(galaxy: Galaxy, driver: Chrome) -> Iterator[tuple[str, list[str]]]:
    """Name what was looked at, and list what is wrong with it."""
    user = GalaxyInstance(galaxy.url, galaxy.user_key)
    history, image = _history_with_image(user)
    driver.set_window_size(WIDTH, HEIGHT_OF_FORM)
    _open_form(galaxy, driver, history)
    yield "the search finds the tool by what it does", _words_without_tool(driver)
    _unfold(driver)
    defaults = _values(driver)
    yield "the help shows its picture", _pictures_not_shown(driver)

    for _ in PLACES:
        _find(driver, ADD_RECTANGLE).click()
    _fill_in(driver, WRONG)
    _find(driver, RUN).click()
    _find(driver, FIELD.format(*WRONG) + REFUSED)
    started = user.jobs.get_jobs(history_id=history, tool_id=TOOL_ID)
    yield "the form refuses what is no number", [f"job {job['id']} started" for job in started]

    _fill_in(driver, SETTINGS)
    _find(driver, READY).click()
    job = _started_job(driver, user)
    yield "the form starts a job that succeeds", _failure(job)
    if job["state"] != "ok":
        return
    with TemporaryDirectory(prefix="products-") as directory:
        for product, same in _compare_with_shell(user, job, Path(directory)):
            yield f"the job and a shell make the same {product}", [] if same else ["they differ"]

    catalog = DATASET.format(job["outputs"]["catalog"]["id"])
    _find(driver, catalog).click()
    _find(driver, f"{catalog} {RUN_AGAIN}").click()
    _find(driver, READY)
    _unfold(driver)
    yield "run again restores the form", _differences(_values(driver), defaults | SETTINGS)
    _find(driver, READY).click()
    again = _started_job(driver, user)
    differences = _differences(again["params"], job["params"])
    yield "run again repeats the job", [*_failure(again), *differences]

    workflow = _open_workflow(galaxy, driver, user, history, image)
    _find(driver, RUN_WORKFLOW).click()
    yield "the workflow starts from its page and succeeds", _workflow_problems(user, workflow)


def _words_without_tool(driver: Chrome) -> list[str]:
    """Type words into the search of the tools; return those that don't lead to this one."""
    box, missing = _find(driver, SEARCH), []
    shown = expected_conditions.visibility_of_element_located
    found = shown((By.CSS_SELECTOR, FOUND.format(TOOL_ID)))
    for word in WORDS:
        box.clear()
        box.send_keys("no such tool")
        WebDriverWait(driver, TIMEOUT).until_not(found)
        box.clear()
        box.send_keys(word)
        try:
            _find(driver, FOUND.format(TOOL_ID))
        except TimeoutException:
            missing.append(word)
    box.clear()
    return missing


def _open_workflow(
    galaxy: Galaxy, driver: Chrome, user: GalaxyInstance, history: str, image: str
) -> str:
    """Open the page that runs the workflow on a list of one image; return the workflow's id."""
    elements = [{"name": "sky", "src": "hda", "id": image}]
    images = {"collection_type": "list", "name": "images", "element_identifiers": elements}
    user.histories.create_dataset_collection(history, images)
    text = next(WORKFLOWS.glob("*.gxwf.yml")).read_text()
    imported = {"class": "GalaxyWorkflow", "yaml_content": text}
    workflow = user.workflows.import_workflow_dict(imported)["id"]
    driver.get(f"{galaxy.url}/workflows/run?id={workflow}")
    _find(driver, RUN_WORKFLOW)
    return workflow


def _workflow_problems(user: GalaxyInstance, workflow: str) -> list[str]:
    """Wait for the run of a workflow; return what isn't green."""
    deadline = time.monotonic() + JOB["maxwait"]
    while time.monotonic() < deadline:
        for run in user.invocations.get_invocations(workflow_id=workflow):
            states = user.invocations.get_invocation_summary(run["id"])["states"]
            if states and states.keys() <= {"ok", "error", "paused", "deleted"}:
                return [
                    f"{number} jobs: {state}" for state, number in states.items() if state != "ok"
                ]
        time.sleep(JOB["interval"])
    return ["it doesn't end"]


def _history_with_image(user: GalaxyInstance) -> tuple[str, str]:
    """Make a history, upload an image, and return the ids of both."""
    history = user.histories.create_history("Extract sources")["id"]
    uploaded = user.tools.upload_file(str(IMAGE), history)["outputs"][0]["id"]
    user.datasets.wait_for_dataset(uploaded, **JOB)
    return history, uploaded


def _open_form(galaxy: Galaxy, driver: Chrome, history: str) -> None:
    driver.get(f"{galaxy.url}/history/set_as_current?id={history}")
    driver.get(f"{galaxy.url}/?tool_id={TOOL_ID}&version=latest")
    _find(driver, READY)


def _unfold(driver: Chrome) -> None:
    for header in driver.find_elements(By.CSS_SELECTOR, FOLDED):
        header.click()


def _values(driver: Chrome) -> dict[str, str | bool]:
    """Read the fields of the form, by their names."""
    fields = driver.find_elements(By.CSS_SELECTOR, FIELDS)
    return {field.get_attribute("id").removeprefix(FIELD_ID): _value(field) for field in fields}


def _value(field: WebElement) -> str | bool:
    for switch in field.find_elements(By.CSS_SELECTOR, SWITCH):
        return switch.is_selected()
    for selected in field.find_elements(By.CSS_SELECTOR, SELECTED):
        return selected.get_attribute("data-selected-value")
    return field.find_element(By.CSS_SELECTOR, TYPED).get_property("value")


def _fill_in(driver: Chrome, settings: Mapping[str, str | bool]) -> None:
    """Switch, select or type what differs from the form."""
    for name, value in settings.items():
        selector = FIELD.format(name)
        field = _find(driver, selector)
        if isinstance(value, bool):
            if _value(field) != value:
                field.find_element(By.CSS_SELECTOR, SWITCH_LABEL).click()
        elif field.find_elements(By.CSS_SELECTOR, SELECT):
            field.find_element(By.CSS_SELECTOR, SELECT).click()
            _find(driver, f"{selector} {OPTION.format(value)}").click()
        else:
            typed = field.find_element(By.CSS_SELECTOR, TYPED)
            typed.clear()
            typed.send_keys(value)


def _pictures_not_shown(driver: Chrome) -> list[str]:
    pictures = driver.find_elements(By.CSS_SELECTOR, PICTURE)
    WebDriverWait(driver, TIMEOUT).until(
        lambda _: all(picture.get_property("complete") for picture in pictures),
        "the page does not finish loading its pictures",
    )
    hidden = (picture for picture in pictures if picture.get_property("naturalWidth") == 0)
    found = [f"{picture.get_attribute('alt')}: not shown" for picture in hidden]
    return found if pictures else ["there is none"]


def _started_job(driver: Chrome, user: GalaxyInstance) -> dict:
    """Wait for the job that the page says it has started, and return its details."""
    job = _find(driver, STARTED).get_attribute("href").split("/")[-2]
    user.jobs.wait_for_job(job, **JOB, check=False)
    return user.jobs.show_job(job, full_details=True)


def _failure(job: dict) -> list[str]:
    return [] if job["state"] == "ok" else [f"{job['state']}: {job['stderr']}"]


def _compare_with_shell(user: GalaxyInstance, job: dict, directory: Path) -> Iterator[tuple]:
    """Run the script with the options of the form; yield each product's name, and if it agrees."""
    command = [sys.executable, ROOT / "source_extractor.py", IMAGE, *OPTIONS.split(), "--quiet"]
    subprocess.run(command, cwd=directory, check=True)
    keywords = {"use_default_filename": False, "maxwait": JOB["maxwait"]}
    for name in PRODUCTS:
        theirs, ours, product = directory / f"galaxy-{name}", directory / name, Path(name).stem
        user.datasets.download_dataset(job["outputs"][product]["id"], str(theirs), **keywords)
        if theirs.suffix == ".fits":
            yield product, np.array_equal(fits.getdata(theirs), fits.getdata(ours))
        else:
            yield product, theirs.read_bytes() == ours.read_bytes()


def _differences(found: Mapping, expected: Mapping) -> list[str]:
    return [
        f"{name}: {found.get(name)!r} instead of {expected.get(name)!r}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]


def take_pictures(galaxy: Galaxy, driver: Chrome, directory: Path) -> None:
    """Take pictures of search, form, workflow, and history after a run with some products."""
    user = GalaxyInstance(galaxy.url, galaxy.user_key)
    history, uploaded = _history_with_image(user)
    _open_form(galaxy, driver, history)
    _picture_panel(driver, directory / "form.png")
    driver.set_window_size(WIDTH, HEIGHT)
    _find(driver, SEARCH).send_keys("voronoi")
    _find(driver, FOUND.format(TOOL_ID))
    driver.save_screenshot(directory / "search.png")
    _open_workflow(galaxy, driver, user, history, uploaded)
    driver.save_screenshot(directory / "workflow.png")

    inputs = {"image": {"src": "hda", "id": uploaded}, "outputs|seeds": True}
    run = user.tools.run_tool(history, TOOL_ID, inputs)
    outputs = {output["output_name"]: output["id"] for output in run["outputs"]}
    for output in outputs.values():
        user.datasets.wait_for_dataset(output, **JOB)

    for name in ("overview", "overlay"):
        driver.get(f"{galaxy.url}/datasets/{outputs[name]}/preview")
        _find(driver, PREVIEW)
        catalog = DATASET.format(outputs["catalog"])
        _find(driver, catalog).click()
        _find(driver, f"{catalog} {PEEK}")
        driver.save_screenshot(directory / f"history_{name}.png")


def _find(driver: Chrome, selector: str) -> WebElement:
    located = expected_conditions.visibility_of_element_located((By.CSS_SELECTOR, selector))
    return WebDriverWait(driver, TIMEOUT).until(located, f"the page does not show {selector}")


def _picture_panel(driver: Chrome, path: Path) -> None:
    """Take a picture of the middle panel, in a window high enough to show all of it."""
    panel = driver.find_element(By.CSS_SELECTOR, PANEL)
    driver.set_window_size(WIDTH, HEIGHT)
    height, shown = (int(panel.get_property(f"{name}Height")) for name in ("scroll", "client"))
    driver.set_window_size(WIDTH, HEIGHT + height - shown)
    panel.screenshot(str(path))


def main() -> int:
    """Start a Galaxy, check the form, and take the pictures if a directory is given."""
    parser = argparse.ArgumentParser(description="Use the tool in Galaxy with a browser.")
    parser.add_argument("directory", type=Path, nargs="?", metavar="OUTDIR", help="for pictures")
    args = parser.parse_args()
    with browser() as driver, running_galaxy() as galaxy:
        if args.directory:
            args.directory.mkdir(parents=True, exist_ok=True)
            take_pictures(galaxy, driver, args.directory)
        return report(check(galaxy, driver))


if __name__ == "__main__":
    sys.exit(main())
