"""The command line: options and their bounds, reports, warnings, errors and exit codes."""

import contextlib
import io
import itertools
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import sep
import tifffile
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

import source_extractor
from common import SCRIPT, SKY, call, exact_path, start
from contract import DEFAULTS, ONE_ERROR, one_line


def tell(*arguments):
    """Return exit code, stdout and stderr of the tool on these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call(*arguments)
    return code, out.getvalue(), err.getvalue()


def assert_refused(option, *words):
    """Assert that the arguments are wrong usage, told in one line that names the option."""
    code, out, err = tell("image.fits", *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(ONE_ERROR, err)
    assert option in err


# ---------------------------------------------------------------------------------------------
# Help, version, defaults
# ---------------------------------------------------------------------------------------------

IN_HELP = {
    "background": "background.fits",
    "rms": "rms.fits",
    "segmentation": "segmentation.fits",
    "overlay": "sources.png",
    "catalog": "catalog.tsv",
    "clean": "on",
    "hdu": "first",
    "image_format": "by file extension, else fits",
}


@pytest.fixture(scope="module")
def help_texts():
    """Return what --help says of each long option, by its name."""
    code, out, err = tell("--help")
    assert (code, err) == (0, "")
    options = out.split("\noptions:\n")[1].split("\nexamples:\n")[0]
    entries = re.split(r"\n  (?=-)", options)
    texts = {}
    for entry in entries:
        names, *text = re.split(r"\n|  +", entry.strip(), maxsplit=1)
        texts |= dict.fromkeys(re.findall(r"--[a-z-]+", names), " ".join(" ".join(text).split()))
    return texts


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_the_default_is_the_contracts(name, default):
    assert getattr(source_extractor.build_parser().parse_args(["image.fits"]), name) == default


@pytest.mark.parametrize(
    ("name", "default"),
    [
        *((name, str(value)) for name, value in DEFAULTS.items() if value and name not in IN_HELP),
        *IN_HELP.items(),
    ],
)
def test_help_tells_the_default(help_texts, name, default):
    text = help_texts["--" + name.replace("_", "-")]
    assert re.search(rf"default: {re.escape(default)}(?![\w])", text)


def test_help_groups_the_options_by_task():
    groups = ["input", "background", "detection", "filter", "deblending and cleaning"]
    out = tell("-h")[1]
    places = [out.index(f"\n{group}:\n") for group in (*groups, "output", "general")]
    assert places == sorted(places)


def examples():
    """Return the arguments of each example that ends the help text."""
    lines = source_extractor.build_parser().format_help().split("\nexamples:\n")[1].splitlines()
    commands = [line.split("source_extractor ")[1] for line in lines if "_extractor " in line]
    return [shlex.split(command) for command in commands]


def test_help_ends_with_examples():
    assert len(examples()) >= 3


@pytest.mark.parametrize("arguments", examples(), ids=" ".join)
def test_each_example_works(tmp_path, monkeypatch, arguments):
    args = source_extractor.build_parser().parse_args(arguments)
    assert source_extractor.check_usage(args) is None
    image = fits.getdata(SKY).astype(np.float32)
    hdus = [fits.PrimaryHDU(image), fits.ImageHDU(image, name="SCI")]
    hdus.append(fits.ImageHDU(np.zeros(image.shape, np.uint8), name="DQ"))
    monkeypatch.chdir(tmp_path)
    for word in arguments:
        if word.endswith(".fits"):
            fits.HDUList(hdus).writeto(word, overwrite=True)
        elif word.endswith((".tif", ".tiff")):
            tifffile.imwrite(word, image)
    assert call(*arguments, "-q") == 0


def test_version_tells_that_of_sep_too():
    expected = f"source_extractor.py {source_extractor.__version__} (sep {sep.__version__})\n"
    assert tell("--version") == (0, expected, "")


# ---------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------

TINY, BIG = "1e-300", "1e300"
BOUNDS = {
    "--plane": (["0"], ["-1", "0.5"]),
    "--maskthresh": (["-1e300", "0", BIG], []),
    "--mask-box": (["0"], ["-1", "0.5"]),
    "--bw": (["8"], ["7", "0", "-64", "64.0"]),
    "--bh": (["8"], ["7", "0", "-64", "64.0"]),
    "--fw": (["1", "99"], ["0", "-3", "2", "100", "101"]),
    "--fh": (["1", "99"], ["0", "-3", "2", "100", "101"]),
    "--fthresh": (["0", BIG], ["-1e-300", "-1"]),
    "--background-passes": (["1", "2"], ["0", "3", "1.0"]),
    "--thresh": ([TINY, BIG], ["0", "-1"]),
    "--gain": ([TINY, BIG], ["0", "-1"]),
    "--minarea": (["1", "2147483647"], ["0", "-5", "2147483648"]),
    "--filter-fwhm": ([TINY, "50"], ["0", "-2", "50.0001"]),
    "--deblend-nthresh": (["1", "64"], ["0", "-1", "65"]),
    "--deblend-cont": (["0", "1"], ["-0.001", "1.001"]),
    "--clean-param": ([TINY, BIG], ["0", "-1"]),
    "--zeropoint": (["-1e300", BIG], []),
    "--kron-factor": ([TINY, "100"], ["0", "-1", "-2.5", "100.001"]),
    "--kron-min-radius": ([TINY, "100"], ["0", "-1", "-3.5", "100.001"]),
    "--aperture-diameters": ([TINY, "10000"], ["0", "-1", "-3", "10001", "1e300"]),
    "--measure-plane": (["0"], ["-1", "0.5"]),
}


def words(option, value):
    """Return the arguments that give a value to an option."""
    return (option, value, "5", "0", "5") if option == "--mask-box" else (f"{option}={value}",)


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option in BOUNDS for value in BOUNDS[option][0]]
)
def test_a_number_on_its_bound_is_accepted(option, value):
    args = source_extractor.build_parser().parse_args(["image.fits", *words(option, value)])
    found = getattr(args, option[2:].replace("-", "_"))
    assert float(np.ravel(found)[0]) == float(value)


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option in BOUNDS for value in BOUNDS[option][1]]
)
def test_a_number_beyond_its_bound_is_refused(option, value):
    assert_refused(option, *words(option, value))


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "1e999", "", " ", "1,5", "0x10", "five", "AB"]
)
@pytest.mark.parametrize("option", BOUNDS)
def test_what_is_no_finite_number_is_refused(option, value):
    assert_refused(option, *words(option, value))


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


@settings(max_examples=25, deadline=None)
@given(
    option=st.sampled_from(sorted(BOUNDS)),
    text=st.text(st.characters(exclude_categories=["Cs"])).filter(
        lambda text: not is_number(text) and not text.startswith("-")
    ),
)
def test_any_text_that_is_no_number_is_refused_in_one_line(option, text):
    assert_refused(option, *words(option, text))


ACTIONS = [
    action
    for action in source_extractor.build_parser()._actions
    if action.dest not in ("help", "version", "image")
]
NUMBERS = st.one_of(st.integers(), st.floats()).map(str)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@st.composite
def any_option(draw):
    """Draw an option with as many values as it takes, or one more: numbers, choices and text."""
    action = draw(st.sampled_from(ACTIONS))
    values = NUMBERS | TEXTS
    if action.choices:
        values |= st.sampled_from([str(choice) for choice in action.choices])
    few = {0: 0, 4: 4, "+": 2, None: 1}[action.nargs]
    sizes = {"min_size": few, "max_size": draw(st.sampled_from([few, few, few + 1]))}
    return [draw(st.sampled_from(action.option_strings)), *draw(st.lists(values, **sizes))]


@settings(max_examples=300, deadline=None)
@given(options=st.lists(any_option(), max_size=6))
def test_whatever_the_options_one_line_tells_what_is_wrong(options):
    code, _, err = tell("no such image.fits", *itertools.chain(*options))
    assert code in (0, 1, 2)  # 0: --help may be among the text
    if code:
        assert re.fullmatch(ONE_ERROR, err)
        assert "a fault of the tool" not in err
        assert len(err) < 1200


@pytest.mark.parametrize("option", sorted(BOUNDS))
def test_a_number_of_five_thousand_digits_costs_a_short_line(option):
    for value in ("9" * 5000, "0." + "9" * 5000):
        code, _, err = tell("no such image.fits", *words(option, value))
        assert code in (1, 2)
        assert re.fullmatch(ONE_ERROR, err)
        assert len(err) < 1200


@pytest.mark.parametrize("value", ["\u0663", "\uff13"])
@pytest.mark.parametrize("option", ["--thresh", "--minarea", "--zeropoint"])
def test_digits_of_other_scripts_are_digits(option, value):
    args = source_extractor.build_parser().parse_args(["image.fits", option, value])
    assert getattr(args, option[2:]) == 3


@pytest.mark.parametrize("option", ["--maskthresh", "--zeropoint"])
@pytest.mark.parametrize("value", ["-1", "-2.5", "-.5", "-1e-05", "-3E2"])
def test_a_negative_number_may_follow_its_option(option, value):
    args = source_extractor.build_parser().parse_args(["image.fits", option, value])
    assert getattr(args, option[2:]) == float(value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--bw", 2**31),
        ("--bh", 2**31 - 1),
        ("--bw", 10**30),
        ("--bh", 10**400),
        ("--minarea", 10**400),
        ("--plane", 10**30),
        ("--mask-box", 10**400),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(str(value))} digits",
)
def test_a_huge_number_brings_no_traceback(run, write, stars, option, value):
    result = run(write(stars), *words(option, str(value)))
    if result.code:
        assert re.fullmatch(ONE_ERROR, result.err)
    else:
        assert len(result.catalog) == 6


ALL_LOW = {option: good[0] for option, (good, _) in BOUNDS.items() if option != "--measure-plane"}
ALL_HIGH = {option: good[-1] for option, (good, _) in BOUNDS.items() if option in ALL_LOW}


@pytest.mark.parametrize("values", [ALL_LOW, ALL_HIGH], ids=["lowest", "highest"])
def test_the_tool_works_with_every_number_on_its_bound(run, write, stars, values):
    arguments = [word for option, value in values.items() for word in words(option, value)]
    result = run(write(stars), *arguments)
    assert result.code == 0
    assert (result.directory / "catalog.tsv").is_file()


# ---------------------------------------------------------------------------------------------
# Wrong usage
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--err-option", "rms"),
        ("--err-option", "FILE"),
        ("--err-type", "sigma"),
        ("--filter-case", "gauss"),
        ("--filter-type", "convolve"),
        ("--image-format", "png"),
    ],
)
def test_a_wrong_choice_is_refused(option, value):
    assert_refused(option, option, value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--thr", "3"),
        ("--deblend", "3"),
        ("--filter", "none"),
        ("--catalo", "x.tsv"),
        ("--verb",),
        ("--no-cl",),
        ("--nothing",),
        ("second.fits",),
    ],
)
def test_abbreviations_and_unknown_arguments_are_refused(arguments):
    assert_refused(arguments[0], *arguments)


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (("--mask-hdu", "--mask"), ("--mask-hdu", "1")),
        (("--mask-hdu", "--mask"), ("--mask-hdu", "0")),
        (("--err-hdu", "--err-file"), ("--err-hdu", "1")),
        (("--err-option", "--err-file"), ("--err-option", "file")),
        (("--err-option", "--err-file"), ("--err-file", "noise.fits")),
        (("--err-option", "--err-file"), ("--err-file", "noise.fits", "--err-option", "none")),
        (("--filter-case", "--filter-file"), ("--filter-case", "file")),
        (("--filter-case", "--filter-file"), ("--filter-file", "kernel.conv")),
        (("--measure-hdu needs --measure-image",), ("--measure-hdu", "0")),
        (("--measure-hdu needs --measure-image",), ("--measure-hdu", "1")),
        (("--measure-plane needs --measure-image",), ("--measure-plane", "0")),
        (("--measure-plane needs --measure-image",), ("--measure-plane", "1")),
        (
            ("--mask-box 10 5 0 9 (XMIN XMAX YMIN YMAX): first column 10 is after last column 5",),
            ("--mask-box", 10, 5, 0, 9),
        ),
        (
            ("--mask-box 0 9 5 4 (XMIN XMAX YMIN YMAX): first row 5 is after last row 4",),
            ("--mask-box", 0, 9, 5, 4),
        ),
        (("--mask-box",), ("--mask-box", 0, 9)),
        (("--mask-box",), ("--mask-box", 0, 1, 2)),
        (("--aperture-diameters",), ("--aperture-diameters", 5, 8, 5.0)),
        (("--aperture-diameters",), ("--aperture-diameters", 5, 5.000000000000001)),
        (("--verbose", "--quiet"), ("-v", "-q")),
    ],
)
def test_options_that_do_not_fit_together_are_refused(names, arguments):
    assert_refused(names[0], *arguments)
    assert all(name in tell("image.fits", *arguments)[2] for name in names)


def test_without_arguments_the_one_line_names_what_is_missing():
    code, out, err = tell()
    assert (code, out) == (2, "")
    assert re.fullmatch(one_line("error", ".*IMAGE.*"), err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("no\nsuch.fits",),
        ("image.fits", "--un\nknown"),
        ("image.fits", "--thresh", "\n"),
        ("image.fits", "--catalog", "a\nb", "--overlay", "a\nb"),
        ("image.fits", "--err-option", "a\nb"),
    ],
)
def test_a_line_break_in_an_argument_does_not_break_the_line(arguments):
    code, _, err = tell(*arguments)
    assert code in (1, 2)
    assert re.fullmatch(ONE_ERROR, err)


# ---------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.?\d*(?:e[-+]\d+)?", text)]


def test_the_report_tells_what_was_read_found_and_written(run, write, stars):
    stars[:3] = np.nan
    image = write(stars)
    result = run(image)
    assert (result.code, result.err) == (0, "")
    background = sep.Background(stars, mask=np.isnan(stars))
    lines = result.out.splitlines()
    assert "image.fits[0] PRIMARY: 160 x 120 float32" in lines[0]
    assert numbers(lines[1]) == [2.5, 480]
    level, rms = numbers(lines[2])
    assert level == pytest.approx(background.globalback, rel=1e-5)
    assert rms == pytest.approx(background.globalrms, rel=1e-5)
    assert numbers(lines[3])[0] == pytest.approx(1.5 * background.globalrms, rel=1e-5)
    assert numbers(lines[4]) == [len(result.catalog)]
    assert [line.split()[1] for line in lines[5:]] == [
        *("background.fits", "rms.fits", "segmentation.fits", "sources.png", "catalog.tsv"),
        exact_path(result.directory).name,
    ]


def test_the_report_names_the_hdu_and_the_type_in_the_file(run, tmp_path, stars):
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(stars.astype(np.int16), name="SCI")]
    fits.HDUList(hdus).writeto(tmp_path / "mef.fits")
    assert "mef.fits[1] SCI: 160 x 120 int16" in run(tmp_path / "mef.fits").out


def test_the_report_tells_an_absolute_threshold(run, write, stars):
    out = run(write(stars), "--err-option", "none", "--thresh", 12.5).out
    assert re.search(r"^threshold +12\.5 \(absolute\)$", out, re.MULTILINE)


def test_verbose_adds_each_stage_with_its_time(run, write, stars):
    image = write(stars)
    plain, verbose = run(image).out.splitlines(), run(image, "-v").out.splitlines()
    stages = [line for line in verbose if re.fullmatch(r"[a-z_ ]+ +\d+\.\d\d s", line)]
    assert [line for line in verbose if line not in stages] == plain
    for word in ("read", "background", "detect|find", "catalog", "overlay"):
        assert any(re.search(word, line) for line in stages), word


CONSTANT = np.full((64, 64), 7, np.float32)


def test_warnings_are_one_line_each_on_stderr(run, write):
    result = run(write(CONSTANT))
    assert result.code == 0
    assert "warning:" not in result.out
    assert re.fullmatch(f"({one_line('warning')})+", result.err)
    assert "no sources" in result.err


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
@pytest.mark.parametrize("options", ["", "--err-option file --err-file image.fits"])
def test_what_is_said_to_a_closed_stream_goes_to_no_other(write, stars, tmp_path, closed, options):
    write(stars - 300)
    command = f'"{sys.executable}" "{SCRIPT}" image.fits {options} {closed}'
    result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    said = result.stderr if closed == ">&-" else result.stdout
    assert result.returncode == bool(options)
    assert ("error" in said) == (bool(options) and closed == ">&-")
    assert ("sources " in said) == (not options and closed == "2>&-")


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_silences_reports_and_warnings(run, write, option):
    result = run(write(CONSTANT), option)
    assert (result.code, result.out, result.err) == (0, "", "")


def test_quiet_does_not_silence_errors(run, tmp_path):
    result = run(tmp_path / "nowhere.fits", "-q")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(ONE_ERROR, result.err)


# ---------------------------------------------------------------------------------------------
# Ways to start it
# ---------------------------------------------------------------------------------------------


def test_main_takes_its_arguments_from_the_command_line(write, stars, tmp_path, monkeypatch):
    image = str(write(stars))
    monkeypatch.setattr(sys, "argv", ["source_extractor", image, "-q", "-o", str(tmp_path / "o")])
    assert source_extractor.main() == 0
    assert len(list((tmp_path / "o").iterdir())) == 5


def test_the_installed_command_is_that_of_the_script():
    project = tomllib.loads(SCRIPT.with_name("pyproject.toml").read_text())["project"]
    target = project["scripts"]["source_extractor"]
    assert pkgutil.resolve_name(target) is source_extractor.main


@pytest.mark.parametrize("option", ["-v", "-q"])
def test_a_fault_of_the_tool_is_called_so(write, stars, tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr(source_extractor, "measure", lambda *_: {}["no such"])
    assert call(write(stars), option, "-o", tmp_path / "products") == 1
    said = capsys.readouterr()
    assert re.fullmatch(ONE_ERROR, said.err)
    assert "a fault of the tool (KeyError: 'no such')" in said.err
    assert ("Traceback" in said.out) == (option == "-v")
    assert not list(tmp_path.glob("products/*"))


def test_a_run_imports_only_what_it_needs(write, stars, tmp_path):
    code = """import sys, source_extractor
print(*sys.modules)
source_extractor.main(sys.argv[1:])
print(*sys.modules)"""
    command = sys.executable, "-c", code, write(stars), "-q", "-o", tmp_path / "products"
    said = subprocess.check_output(command, cwd=SCRIPT.parent, text=True, timeout=60)
    before, after = (set(line.split()) for line in said.splitlines())
    assert not {"matplotlib", "pandas"} & before
    assert "matplotlib.figure" in after
    unneeded = {f"astropy.{part}" for part in ("coordinates", "table", "wcs")}
    assert not {"matplotlib.pyplot", "tifffile", *unneeded} & after


def test_the_script_runs_as_a_file(write, stars, tmp_path):
    done = start(write(stars), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "catalog.tsv" in done.stdout
    assert (tmp_path / "catalog.tsv").is_file()


def test_the_script_ends_with_mains_exit_code(tmp_path):
    done = start("nowhere.fits", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(one_line("error", r"nowhere\.fits: .+"), done.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_report_that_can_not_be_written_costs_no_product(write, stars, tmp_path):
    with open("/dev/full", "w") as full:
        done = start(write(stars), "-v", "-o", tmp_path / "products", stdout=full)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert len(list((tmp_path / "products").iterdir())) == 5


def test_a_file_name_that_is_not_utf_8_is_reported(stars, tmp_path):
    path = os.fsencode(tmp_path) + b"/sk\xff.fits"
    with open(path, "wb") as file:
        fits.PrimaryHDU(stars).writeto(file)
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = start(path, cwd=tmp_path, env=strict)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"image .*160 x 120", done.stdout)
