"""The script, the wrapper, the package and the README say the same."""

import copy
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from packaging.requirements import Requirement

import source_extractor
from source_extractor import ALWAYS, ON_REQUEST, build_parser, catalog_columns, option_of

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

ACTIONS = {option_of(a.dest): a for a in build_parser()._actions if a.option_strings}
IN_THE_FORM = {
    option: action
    for option, action in ACTIONS.items()
    if action.dest not in {*ALWAYS, "output_dir", "verbose", "quiet", "version", "help"}
}


def expanded(element, macros):
    """Return a copy of an element with its macros put in, as Galaxy does."""
    whole = copy.copy(element)
    whole[:] = []
    for child in element:
        if child.tag == "expand":
            macro = ElementTree.tostring(macros[child.get("macro")], encoding="unicode")
            for name, value in child.attrib.items():
                macro = macro.replace(f"@{name.upper()}@", value)
            whole.extend(expanded(ElementTree.fromstring(macro), macros))
        else:
            whole.append(expanded(child, macros))
    return whole


TOOL = ElementTree.parse(ROOT / "source_extractor.xml").getroot()
TOKENS = {token.get("name"): token.text for token in TOOL.iter("token")}
INPUTS = expanded(TOOL.find("inputs"), {macro.get("name"): macro for macro in TOOL.iter("xml")})
PARAMETERS = {param.get("argument"): param for param in INPUTS.iter("param")}
NUMBERS = [name for name, param in PARAMETERS.items() if param.get("type") in ("integer", "float")]


def accepts(option, value):
    try:
        build_parser().parse_args(["image.fits", option, str(value)])
    except SystemExit:
        return False
    return True


def lower_bound(param):
    """Return the least number of a parameter, and whether it is allowed itself."""
    for validator in param.iter("validator"):
        if validator.get("exclude_min") == "true":
            return float(validator.get("min")), False
    return float(param.get("min", -math.inf)), True


def upper_bound(param):
    limits = [v.get("max") for v in param.iter("validator")] + [param.get("max")]
    return min((float(limit) for limit in limits if limit), default=math.inf)


def test_the_form_has_every_option_and_no_other():
    form = {*filter(None, PARAMETERS), "--mask-box"}
    assert form == set(IN_THE_FORM)


def test_parameters_are_called_as_the_options_are_stored():
    for option, param in PARAMETERS.items():
        if option:
            assert param.get("name") in (None, IN_THE_FORM[option].dest)


@pytest.mark.parametrize("option", [o for o in IN_THE_FORM if o != "--mask-box"])
def test_the_form_starts_from_the_defaults(option):
    param, default = PARAMETERS[option], IN_THE_FORM[option].default
    match param.get("type"):
        case "select":
            chosen = [o.get("value") for o in param.iter("option") if o.get("selected")]
            assert chosen == [str(default or "fits")]
        case "boolean":
            assert param.get("checked", "false") == str(bool(default)).lower()
        case "integer" | "float" if default is not None:
            assert float(param.get("value")) == default
        case "data":
            assert default is None
        case _:
            assert param.get("optional") == "true"
            assert param.get("value") is None


@pytest.mark.parametrize("option", [o for o, a in IN_THE_FORM.items() if a.choices])
def test_the_form_offers_the_choices(option):
    offered = {o.get("value") for o in PARAMETERS[option].iter("option")}
    assert offered == {str(choice) for choice in IN_THE_FORM[option].choices}


@pytest.mark.parametrize("option", [name for name in NUMBERS if name])
def test_the_form_has_the_bounds_of_the_script(option):
    param = PARAMETERS[option]
    whole = param.get("type") == "integer"
    step = (lambda x, to: x + (1 if to > x else -1)) if whole else math.nextafter
    number = int if whole else float
    least, itself = lower_bound(param)
    if math.isfinite(least):
        assert accepts(option, number(least)) == itself
        assert accepts(option, number(step(least, math.inf))) or option in ("--fw", "--fh")
        assert not accepts(option, number(step(least, -math.inf)))
    else:
        assert accepts(option, -1_000_000)
    most = upper_bound(param)
    if math.isfinite(most):
        assert accepts(option, number(most))
        assert not accepts(option, number(step(most, math.inf)))
    else:
        assert accepts(option, 1_000_000)


@pytest.mark.parametrize("option", ["--fw", "--fh"])
def test_even_filters_are_refused(option):
    assert accepts(option, 5)
    assert not accepts(option, 4)
    assert "% 2 == 1" in PARAMETERS[option].findtext("validator")


@pytest.mark.parametrize("param", [p for p in INPUTS.iter("param") if p.get("type") == "text"])
def test_no_text_can_leave_its_quotes(param):
    pattern = re.compile(param.findtext("validator"))
    for text in (
        "'; rm -rf *; '",
        "SCI'",
        "$(id)",
        "`id`",
        "a\nb",
        "$HOME",
        "-o",
        "a;b",
        'a"b',
        "\\",
    ):
        assert not pattern.match(text)


def test_the_form_takes_the_diameters_that_the_script_takes():
    regex, expression = PARAMETERS["--aperture-diameters"].iter("validator")
    for text, taken in (
        ("5", True),
        (" 5 10.5 .5 ", True),
        ("10000", True),
        ("0", False),
        ("5 10001", False),
        ("5 7 5.0", False),
        ("5,7", False),
    ):
        matches = re.match(regex.text, text) and eval(expression.text, {"value": text})
        assert bool(matches) == taken


def test_hdu_names_as_files_have_them_are_taken():
    pattern = re.compile(PARAMETERS["--hdu"].findtext("validator"))
    for text in ("0", "12", "SCI", "SCI,2", "im1", "WEIGHT_MAP", "CCD-3", "N15.1"):
        assert pattern.match(text)


def test_every_product_is_an_output():
    outputs = {output.get("name") for output in TOOL.find("outputs").iter("data")}
    assert outputs == {*ALWAYS, *ON_REQUEST}


def test_versions_agree():
    assert TOKENS["@TOOL_VERSION@"] == source_extractor.__version__
    assert PROJECT["dynamic"] == ["version"]


def test_requirements_agree():
    bounds = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    pins = {r.text.removesuffix("-base"): r.get("version") for r in TOOL.iter("requirement")}
    del pins["python"]
    assert pins.keys() == bounds.keys()
    assert all(bounds[name].contains(version) for name, version in pins.items())


@pytest.mark.parametrize("option", ACTIONS)
def test_the_readme_has_every_option(option):
    assert re.search(rf"`{option}[`\s]", README)


@pytest.mark.parametrize(
    "option", [o for o, a in IN_THE_FORM.items() if a.default not in (None, [], (), True, False)]
)
def test_the_readme_has_every_default(option):
    rows = [line.split("|") for line in README.splitlines() if line.startswith("| `--")]
    row = next(row for row in rows if f"`{option}`" in row[1])
    assert str(IN_THE_FORM[option].default) in row[2]


def table_of_columns(text):
    """Return names and units of the columns in a Markdown table, in its order."""
    rows = text[text.index("| `id` |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    return [(name, unit) for names, unit in cells for name in re.findall(r"`(\w+)`", names)]


def test_readme_and_help_have_every_column_with_its_unit():
    written = {"pixel2": "pixel²", "pixel-2": "pixel⁻²", "measured": "image", None: ""}
    columns = [(c.name, written.get(c.unit, c.unit)) for c in catalog_columns(())]
    columns[columns.index(("kron_radius", ""))] = ("kron_radius", "a, b")
    assert table_of_columns(README) == columns
    assert table_of_columns(TOOL.findtext("help")) == columns


def test_every_test_file_is_used():
    users = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("workflows/*"), ROOT / "source_extractor.xml"]
    texts = "\n".join(path.read_text() for path in users if path.name != "make_test_data.py")
    for path in (ROOT / "test-data").iterdir():
        assert path.name in texts, path.name


def test_options_are_spelled_one_way():
    for action in ACTIONS.values():
        assert option_of(action.dest) in action.option_strings
