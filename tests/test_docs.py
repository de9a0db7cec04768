"""README and docs say what is true: of options, columns, files and examples."""

import csv
import itertools
import re
from operator import attrgetter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.patches import Ellipse

import source_extractor
from make_pictures import TUTORIAL
from source_extractor import COLUMNS, build_parser, check_usage, option_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
README, OPTIONS, CATALOG = (
    (ROOT / name).read_text() for name in ("README.md", "docs/options.md", "docs/catalog.md")
)


def test_the_readme_is_short_and_has_the_test_command_of_continuous_integration():
    assert len(README.encode()) <= 9216
    command = "&& .venv-test/bin/pytest && .venv-test/bin/python tests/tools/galaxy.py"
    assert re.search(rf"^    .*{re.escape(command)}$", README, re.MULTILINE)


# Files and links


def anchors(page):
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_files_that_are_mentioned_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in (link for link in links if not link.startswith("https://")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    paths = re.findall(r"\b(?:tests|test-data|workflows|docs)/[\w./-]*\w", text)
    for path in (*paths, *re.findall(r"`(\w+\.(?:xml|py))`", text)):
        assert (ROOT / path).exists(), path


def test_every_page_and_picture_is_reached_from_the_readme():
    linked = {link for page in PAGES for link in re.findall(r"\]\(([^)\s#]+)", page.read_text())}
    docs = ROOT / "docs"
    for path in (str(path.relative_to(docs)) for path in docs.rglob("*.*")):
        assert {path, f"docs/{path}"} & linked, path


def test_the_tutorial_counts_the_sources_that_its_steps_find(run, data):
    tutorial = (ROOT / "docs/tutorial.md").read_text()
    counts = {
        name: len(run(data / image, *options).catalog)
        for name, (image, *options) in TUTORIAL.items()
    }
    assert counts["mask"] == len(run(data / "sky.fits", "--mask", data / "sky_mask.fits").catalog)
    for name, count in counts.items():
        assert f"{count} sources" in tutorial, name
    for name in ("default", "threshold", "galaxies", "contrast"):
        ((cells, pictures),) = re.findall(rf"(\|.*\|)\n.*\n(\|.*/{name}\.jpg.*)", tutorial)
        column = next(n for n, cell in enumerate(pictures.split("|")) if f"/{name}.jpg" in cell)
        assert f"{counts[name]} sources" in cells.split("|")[column], name


def test_the_tutorial_calls_settings_as_the_form_does():
    tutorial = (ROOT / "docs/tutorial.md").read_text()
    form = "".join(path.read_text() for path in ROOT.glob("*.xml"))
    names = re.findall(r"^> .*?\*([A-Z][^*\n]+)\*(?:: `|: Yes|: No)", tutorial, re.MULTILINE)
    assert len(names) >= 8
    for name in names:
        assert f'label="{name}"' in form, name


def test_the_form_has_the_settings_of_the_example():
    form = "".join(path.read_text() for path in ROOT.glob("*.xml"))
    rows = re.findall(r"^\| (\*.*)$", README, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        for name in re.findall(r"\*([^*|]+)\*", row):
            assert re.search(rf'(label|title)="{re.escape(name)}[":]', form), name


# Options


ACTIONS = {option_of(a.dest): a for a in build_parser()._actions if a.option_strings}
DEFAULTS = {
    option: action.default
    for option, action in ACTIONS.items()
    if action.nargs != 0 and action.default not in (None, [], ())
}


def test_every_option_and_its_default_is_documented():
    rows = [line.split("|") for line in OPTIONS.splitlines() if line.startswith("| `-")]
    for option in ACTIONS:
        assert re.search(rf"^\| .*`{option}[`\s]", OPTIONS, re.MULTILINE), option
    for option, default in DEFAULTS.items():
        names, defaults = next(row[1:3] for row in rows if f"`{option}`" in row[1])
        options = re.findall(r"`(--[\w-]+)", names)
        written = dict(zip(options, defaults.replace("`", "").split(","), strict=True))
        assert written[option].strip() == str(default), option


# Columns


HELP = ElementTree.parse(ROOT / "source_extractor.xml").findtext("help")


def rows_from(text, first):
    """Return the cells of a table, from the row whose first cell is `first`.

    The table is Markdown in a page, and of comma-separated values in the form's help.
    """
    rows = [[cell.strip() for cell in row.strip(" |").split("|")] for row in text.splitlines()]
    if text is HELP:
        plain = text.replace("``", "`").splitlines()
        rows = list(csv.reader((row.strip() for row in plain), skipinitialspace=True))
    start = next(n for n, row in enumerate(rows) if row and row[0] == first)
    return list(itertools.takewhile(lambda row: len(row) > 1, rows[start:]))


@pytest.mark.parametrize("text", [CATALOG, HELP], ids=["page", "help"])
def test_page_and_help_describe_every_column_with_its_unit(text):
    written = {"pixel2": "pixel²", "pixel-2": "pixel⁻²", None: ""}
    written |= dict.fromkeys(("measure", "image sum", "measure sum"), "image")
    columns = {column.name: written.get(column.unit, column.unit) for column in COLUMNS}
    columns["kron_radius"] = "a, b"
    rows = rows_from(text, "`id`")
    units = [(name, unit) for names, unit, *_ in rows for name in re.findall(r"`(\w+)`", names)]
    assert units == list(columns.items())
    assert all(meaning for _, _, meaning, *_ in rows)


def test_page_and_help_have_the_same_rows_of_columns_and_flags():
    for first in ("`id`", "1"):
        page, form = ([row[:2] for row in rows_from(text, first)] for text in (CATALOG, HELP))
        assert page == form


# Examples


def commands(text):
    """Return the arguments of each call of the tool in a text's code."""
    code = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    code += re.findall(r"`(source_extractor [^-`][^`]*)`", text)
    for line in code:
        for command in line.split(" && "):
            name, *arguments = command.split()
            if Path(name).name in ("source_extractor", "source_extractor.py"):
                yield arguments


EXAMPLES = {page.name: list(commands(page.read_text())) for page in PAGES}


def test_examples_are_right_usage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(EXAMPLES["README.md"]) >= 7
    assert EXAMPLES["options.md"]
    for arguments in (arguments for examples in EXAMPLES.values() for arguments in examples):
        assert check_usage(build_parser().parse_args(arguments)) is None, arguments


def test_the_snippet_draws_the_ellipses_of_the_catalogue(run, data, tmp_path, monkeypatch):
    catalog = pd.read_csv(run(data / "sky.fits").directory / "catalog.tsv", sep="\t")
    (tmp_path / "test-data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    (snippet,) = re.findall(r"```python\n(.*?)```", CATALOG, re.DOTALL)
    names = {}
    exec(snippet, names)
    ellipses = [patch for patch in names["axes"].patches if isinstance(patch, Ellipse)]
    drawn = pd.DataFrame([(*e.center, e.width, e.height, np.radians(e.angle)) for e in ellipses])
    plt.close(names["figure"])
    expected = catalog[["x", "y", "a", "b", "theta"]].to_numpy() * (1, 1, 6, 6, 1)
    np.testing.assert_allclose(drawn, expected, rtol=1e-12)


def test_the_contrast_splits_as_the_page_says(run, data):
    found = {c: len(run(data / "sky.fits", "--deblend-cont", c).catalog) for c in (0.005, 0.0001)}
    for contrast, sources in found.items():
        assert re.search(rf"\b{contrast:f}".rstrip("0") + rf" finds {sources}\b", OPTIONS)


# The script


def test_the_map_in_the_script_names_its_sections_in_order():
    text = Path(source_extractor.__file__).read_text()
    sections = re.findall(r"^# -+\n# (.+)\n# -+$", text, re.MULTILINE)
    rows = re.findall(r"^    ([A-Z][\w ,]+?)  +\S", source_extractor.__doc__, re.MULTILINE)
    assert len(sections) > 10
    assert ", ".join(rows) == ", ".join(dict.fromkeys(s.partition(":")[0] for s in sections))


def test_the_functions_that_avoid_seps_traps_exist():
    rows = re.findall(r"\| (`[^|]*) \|\n", (ROOT / "docs" / "sep.md").read_text())
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert len(named) > 10
    for name in named:
        assert attrgetter(name)(source_extractor)
