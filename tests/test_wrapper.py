"""The script, the wrapper and the package say the same."""

import copy
import math
import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

import source_extractor
from source_extractor import PRODUCTS, build_parser, catalog_columns, option_of

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHED = yaml.safe_load((ROOT / ".shed.yml").read_text())
WORKFLOW = yaml.safe_load((ROOT / "workflows/extract-sources.gxwf.yml").read_text())

ACTIONS = {option_of(a.dest): a for a in build_parser()._actions if a.option_strings}
ALWAYS = {name for name, product in PRODUCTS.items() if product.default}
IN_THE_FORM = {
    option: action
    for option, action in ACTIONS.items()
    if action.dest
    not in ALWAYS | {"output_dir", "form", "verbose", "quiet", "threads", "version", "help"}
}
# What a user of Galaxy sees at once, and which of its datasets it shows, differ from a shell.
OTHER_DEFAULTS = {"--image-format": "input", "--overview": True, "--auto": "sextractor"}


def expanded(element, macros):
    """Return a copy of an element with its macros put in, as Galaxy does."""
    whole = copy.copy(element)
    whole[:] = []
    for child in element:
        if child.tag == "expand":
            macro = ElementTree.tostring(macros[child.get("macro")], encoding="unicode")
            for name, value in child.attrib.items():
                macro = macro.replace(f"@{name.upper()}@", escape(value, {'"': "&quot;"}))
            whole.extend(expanded(ElementTree.fromstring(macro), macros))
        else:
            whole.append(expanded(child, macros))
    return whole


WRAPPER = ElementTree.parse(ROOT / "source_extractor.xml").getroot()
IMPORTED = [file.text for file in WRAPPER.iter("import")]
FILES = [WRAPPER, *(ElementTree.parse(ROOT / name).getroot() for name in IMPORTED)]
TOKENS = {token.get("name"): token.text for file in FILES for token in file.iter("token")}
TOOL = expanded(WRAPPER, {macro.get("name"): macro for file in FILES for macro in file.iter("xml")})
INPUTS, COMMAND = TOOL.find("inputs"), TOOL.findtext("command")
PARAMETERS = {param.get("argument"): param for param in INPUTS.iter("param")}
NUMBERS = [name for name, param in PARAMETERS.items() if param.get("type") in ("integer", "float")]


def accepts(option, *values):
    try:
        build_parser().parse_args(["image.fits", option, *map(str, values)])
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


def test_the_sections_are_in_the_order_of_the_work():
    image, settings, *sections = INPUTS
    assert (image.get("name"), settings.get("name")) == ("image", "settings")
    assert [section.get("name") for section in sections] == [
        *("input", "masking", "mesh", "detection", "deblending", "photometry"),
        "outputs",
    ]


def test_all_masking_is_in_its_section():
    masking = INPUTS.find("section[@name='masking']")
    names = [child.get("name") or child.get("argument") for child in masking]
    assert names == ["mask_image", "mask_box", "--blank", "--bridge"]
    assert "--mask-box" in masking.find("repeat").get("help")
    outside = {*PARAMETERS} - {param.get("argument") for param in masking.iter("param")}
    assert not any("mask" in option for option in outside)


def test_every_side_of_a_rectangle_is_a_whole_number_and_explained():
    sides = list(INPUTS.find(".//repeat[@name='mask_box']"))
    assert [side.get("name").upper() for side in sides] == list(ACTIONS["--mask-box"].metavar)
    assert len({side.get("help") for side in sides} - {None, ""}) == 4
    for side in sides:
        assert (side.get("type"), side.get("min"), side.get("optional")) == ("integer", "0", None)


def test_parameters_and_options_are_called_one_way():
    assert all(option_of(action.dest) in action.option_strings for action in ACTIONS.values())
    for option, param in PARAMETERS.items():
        if option:
            assert param.get("name") in (None, IN_THE_FORM[option].dest)


@pytest.mark.parametrize("option", [o for o in IN_THE_FORM if o != "--mask-box"])
def test_the_form_starts_from_the_defaults(option):
    param = PARAMETERS[option]
    default = OTHER_DEFAULTS.get(option, IN_THE_FORM[option].default)
    match param.get("type"):
        case "select":
            chosen = [o.get("value") for o in param.iter("option") if o.get("selected")]
            assert chosen == [str(default)]
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
    if option in ("--fw", "--fh"):
        assert not accepts(option, 4)
        assert "% 2 == 1" in param.findtext("validator")


@pytest.mark.parametrize("param", [p for p in INPUTS.iter("param") if p.get("type") == "text"])
def test_no_text_can_leave_its_quotes(param):
    pattern = re.compile(param.findtext("validator"))
    for text in ("'; rm *; '", "SCI'", "$(id)", "`id`", "a\nb", "$HOME", "-o", "a;b", 'a"b', "\\"):
        assert not pattern.match(text)


@pytest.mark.parametrize(
    ("option", "taken", "refused"),
    [
        ("--aperture-diameters", ("5", " 5 10.5 .5 ", "10000"), ("0", "5 10001", "5 7 5.0", "5,7")),
        ("--mask-bits", ("1", " 1 2 1024 "), ("0", "-1", "1,2")),
        ("--blank", ("0", " -32768 1e30 ", "-.5 2E-3"), ("nan", "")),
    ],
)
def test_the_form_takes_the_lists_that_the_script_takes(option, taken, refused):
    regex, *expressions = PARAMETERS[option].iter("validator")
    for text in taken + refused:
        accepted = re.match(regex.text, text)
        for expression in expressions:
            accepted = accepted and eval(expression.text, {"value": text})
        assert bool(accepted) == (text in taken)
    for text in taken:
        values = [[value] for value in text.split()] if option == "--blank" else [text.split()]
        assert all(accepts(option, *words) for words in values)


HDU_OPTIONS = [option for option in PARAMETERS if option and option.endswith("hdu")]


@pytest.mark.parametrize("option", HDU_OPTIONS)
def test_hdu_names_are_taken_and_reach_the_script_as_they_were_typed(option):
    pattern = re.compile(PARAMETERS[option].findtext("validator"))
    for text in (
        *("0", "12", " 3 ", "SCI", "SCI,2", "im1", "2MASS", "WEIGHT_MAP", "CCD-3", "N15.1"),
        *("данные", "科学,2", "صورة", "SCI#1", "[SCI]", "{a} & b|c", "50% *?!", "a,b", "~x", "<y>"),
    ):
        assert pattern.match(text), text
    assert PARAMETERS[option].find("sanitizer").get("sanitize") == "false"
    name = IN_THE_FORM[option].dest
    quoted = rf"{option} \$\{{quote\(str\(\$[\w.]+\.{name}\)\.strip\(' '\)\)\}}\n"
    assert len(re.findall(quoted, COMMAND)) == len(re.findall(rf"{option}\b", COMMAND)) == 1
    assert "#from shlex import quote\n" in COMMAND


def test_every_product_is_an_output_and_written_where_it_is_taken_from():
    outputs = {output.get("name"): output for output in TOOL.find("outputs")}
    assert outputs.keys() == PRODUCTS.keys()
    for name, product in PRODUCTS.items():
        condition = None if product.default else f"outputs['{name}']"
        assert outputs[name].findtext("filter") == condition
        file = outputs[name].get("from_work_dir")
        assert re.findall(rf"{option_of(name)} (.*)\n", COMMAND) == [file]


def test_numbers_of_columns_agree():
    names = [column.name for column in catalog_columns(())]
    assert TOKENS["@COLUMNS@"] == str(len(names))
    assert TOKENS["@COLUMNS_TWO_APERTURES@"] == str(len(catalog_columns((7.5, 30.0))))
    (listed,) = TOOL.findall(".//metadata[@name='column_names']")
    assert listed.get("value").split(",") == names
    for file in FILES:
        for counted in (*file.iter("has_n_columns"), *file.findall(".//metadata[@name='columns']")):
            assert counted.get("n", counted.get("value")) in TOKENS
    tests = (ROOT / "workflows/extract-sources.gxwf-tests.yml").read_text()
    counts = re.findall(r"that: has_n_columns\s+n: (\d+)", tests)
    assert counts == [str(len(names))] * 2


def test_version_and_requirements_agree():
    assert TOKENS["@TOOL_VERSION@"] == source_extractor.__version__
    assert PROJECT["dynamic"] == ["version"]
    bounds = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    pins = {r.text.removesuffix("-base"): r.get("version") for r in TOOL.iter("requirement")}
    del pins["python"]
    assert pins.keys() == bounds.keys()
    assert all(bounds[name].contains(version) for name, version in pins.items())


def chosen_in(select):
    return next(o.get("value") for o in select.iter("option") if o.get("selected"))


def form_state(part):
    """Return the values that a part of the form starts with, by name; files are left out."""
    state = {}
    for item in part:
        name = item.get("name") or item.get("argument", "").lstrip("-").replace("-", "_")
        match item.get("type", item.tag):
            case "section":
                state[name] = form_state(item)
            case "repeat":
                state[name] = []
            case "conditional":
                selected = chosen_in(item.find("param"))
                (fields,) = (when for when in item.iter("when") if when.get("value") == selected)
                state[name] = form_state(item[:1]) | form_state(fields)
            case "select":
                state[name] = chosen_in(item)
            case "boolean":
                state[name] = item.get("checked") == "true"
            case "integer" | "float":
                state[name] = item.get("value") and float(item.get("value"))
            case "text":
                state[name] = item.get("value")
    return state


def test_the_workflow_has_the_version_of_the_tool_and_all_values_of_the_form():
    step = WORKFLOW["steps"]["extract"]
    version = TOOL.get("version")
    for name, text in TOKENS.items():
        version = version.replace(name, text)
    assert step["tool_version"] == version
    threshold = WORKFLOW["inputs"]["threshold"]
    assert (threshold["optional"], threshold["default"]) == (False, 1.5)
    step["state"]["settings"]["thresh"] = threshold["default"]
    assert step["state"] == form_state(INPUTS)


def test_the_repository_names_its_owner_and_holds_what_the_tool_needs():
    organization = dict(TOOL.find("creator/organization").attrib)
    assert organization["identifier"] == SHED["owner"]
    assert WORKFLOW["creator"] == [{"class": "Organization"} | organization]
    needed = {"source_extractor.py", "source_extractor.xml", "test-data/", *IMPORTED}
    assert needed <= set(SHED["include"])
    assert all((ROOT / name).exists() for name in SHED["include"])


def test_the_help_shows_a_picture_of_sources():
    (place,) = re.findall(r"\.\. image:: /(\S+)\n +:alt: .{20,}\n", TOOL.findtext("help"))
    assert place.startswith("static/images/")
    with Image.open(ROOT / place) as image:
        image.load()


def test_the_test_data_are_less_than_a_megabyte():
    assert sum(path.stat().st_size for path in (ROOT / "test-data").iterdir()) < 1_000_000


def test_messages_name_options_as_the_form_does():
    words = source_extractor.words_of(ROOT / "source_extractor.xml")
    assert words("use --bw 532 --bh 532") == (
        'use "Background: Width of the background boxes" 532 '
        '"Background: Height of the background boxes" 532'
    )
    assert words("raise --thresh, or --hdu") == (
        'raise "Detection threshold", or "Input: Extension (HDU) of the image"'
    )
    assert words("--mask-box 1 2 3 4") == '"Masking: Rectangle to mask" 1 2 3 4'
    assert words("--threads; a--hdu.fits") == "--threads; a--hdu.fits"
    assert words("gaussian --filter-fwhm 4") == 'gaussian "Full width at half maximum" 4'


def test_running_out_of_memory_has_its_own_exit_code():
    code = int(TOOL.find("command").get("oom_exit_code"))
    assert code == source_extractor.OutOfMemoryError.exit_code == 3


def test_long_texts_are_checked_in_linear_time():
    # In quadratic time this would take half an hour.
    for param in INPUTS.iter("param"):
        if param.get("type") == "text":
            assert not re.match(param.findtext("validator"), "1" * 10**6 + "\n")


def test_every_test_file_is_used():
    users = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("workflows/*"), ROOT / "source_extractor.xml"]
    texts = "\n".join(path.read_text() for path in users if path.name != "make_test_data.py")
    for path in (ROOT / "test-data").iterdir():
        assert path.name in texts, path.name
