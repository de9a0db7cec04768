"""The command line: options and their bounds, reports, warnings, errors and exit codes."""

import contextlib
import io
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

import source_extractor
from common import SCRIPT, SKY, call, start
from contract import DEFAULTS, ONE_ERROR, one_line


def tell(*arguments):
    """Return exit code, stdout and stderr of the tool on these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call(*arguments)
    return code, out.getvalue(), err.getvalue()


def assert_refused(texts, *words):
    """Assert that the arguments are wrong usage, told in one line that holds these texts."""
    code, out, err = tell("image.fits", *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(ONE_ERROR, err)
    assert len(err) < 1200
    assert all(text in err for text in texts)


def parsed(option, *words):
    """Return the value of an option, as the parser takes it from these arguments."""
    args = source_extractor.build_parser().parse_args(["image.fits", *words])
    return getattr(args, option[2:].replace("-", "_"))


# Help, version, defaults

IN_HELP = {name: str(value) for name, value in DEFAULTS.items() if value} | {
    **{name: f"{name}.fits" for name in ("background", "rms", "segmentation")},
    **{"overlay": "sources.png", "catalog": "catalog.tsv", "clean": "on", "hdu": "first"},
    "image_format": "by file extension, else fits",
}


def test_the_defaults_are_those_of_the_contract():
    args = vars(source_extractor.build_parser().parse_args(["image.fits"]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def test_help_tells_the_defaults():
    texts = {a.dest: a.help % vars(a) for a in source_extractor.build_parser()._actions}
    for name, default in IN_HELP.items():
        assert re.search(rf"default: {re.escape(default)}(?![\w])", texts[name]), name


def test_help_groups_the_options_by_task_and_ends_with_examples():
    groups = ["input", "background", "detection", "filter", "deblending and cleaning"]
    code, out, err = tell("-h")
    assert (code, err) == (0, "")
    places = [out.index(f"\n{group}:\n") for group in (*groups, "output", "general", "examples")]
    assert places == sorted(places)
    assert len(examples()) >= 3


def examples():
    """Return the arguments of each example that ends the help text."""
    lines = source_extractor.build_parser().format_help().split("\nexamples:\n")[1].splitlines()
    commands = [line.split("source_extractor ")[1] for line in lines if "_extractor " in line]
    return [shlex.split(command) for command in commands]


@pytest.mark.parametrize("arguments", examples(), ids=" ".join)
def test_each_example_that_ends_the_help_works(tmp_path, monkeypatch, arguments):
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


# Bounds: values that are taken, and values that are not

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
NO_NUMBERS = "nan", "inf", "-inf", "1e999", "", " ", "\n", "1,5", "0x10", "five", "9" * 5000 + "x"


def words(option, value):
    """Return the arguments that give a value to an option."""
    return (option, value, "5", "0", "5") if option == "--mask-box" else (f"{option}={value}",)


@pytest.mark.parametrize("option", BOUNDS)
def test_numbers_are_taken_within_their_bounds_and_refused_beyond(option):
    accepted, refused = BOUNDS[option]
    for value in accepted:
        assert float(np.ravel(parsed(option, *words(option, value)))[0]) == float(value)
    for value in refused:
        assert_refused([option], *words(option, value))


@pytest.mark.parametrize("option", BOUNDS)
def test_what_is_no_finite_number_is_refused_and_five_thousand_digits_cost_a_short_line(option):
    for value in NO_NUMBERS:
        assert_refused([option], *words(option, value))
    for value in ("9" * 5000, "0." + "9" * 5000):
        code, _, err = tell("no such image.fits", *words(option, value))
        assert code in (1, 2)
        assert re.fullmatch(ONE_ERROR, err)
        assert len(err) < 1200


@pytest.mark.parametrize("value", ["-1", "-2.5", "-.5", "-1e-05", "-3E2"])
def test_a_negative_number_may_follow_its_option(value):
    assert parsed("--zeropoint", "--zeropoint", value) == float(value)


@pytest.mark.parametrize("digits", [10, 30, 400])
@pytest.mark.parametrize("option", ["--bw", "--minarea", "--plane", "--mask-box"])
def test_a_huge_number_brings_no_traceback(run, write, stars, option, digits):
    result = run(write(stars), *words(option, "9" * digits))
    if result.code:
        assert re.fullmatch(ONE_ERROR, result.err)
    else:
        assert len(result.catalog) == 6


@pytest.mark.parametrize("end", [0, -1], ids=["lowest", "highest"])
def test_the_tool_works_with_every_number_on_its_bound(run, write, stars, end):
    values = {option: accepted[end] for option, (accepted, _) in BOUNDS.items()}
    del values["--measure-plane"]
    arguments = [word for option, value in values.items() for word in words(option, value)]
    result = run(write(stars), *arguments)
    assert result.code == 0
    assert (result.directory / "catalog.tsv").is_file()


# Wrong usage


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--err-option", "rms"], ["--err-option", "FILE"], ["--err-option", "a\nb"]),
        *(["--err-type", "sigma"], ["--filter-case", "gauss"], ["--filter-type", "convolve"]),
        *(["--image-format", "png"], ["--thr", "3"], ["--deblend", "3"], ["--filter", "none"]),
        *(["--catalo", "x.tsv"], ["--verb"], ["--no-cl"], ["--nothing"], ["second.fits"]),
    ],
)
def test_wrong_choices_abbreviations_and_unknown_arguments_are_refused(arguments):
    assert_refused(arguments[:1], *arguments)


BOX = "--mask-box {} (XMIN XMAX YMIN YMAX): first {} is after last {}"
NOISE, KERNEL = ("--err-option", "--err-file"), ("--filter-case", "--filter-file")


@pytest.mark.parametrize(
    ("texts", "arguments"),
    [
        (["--mask-hdu needs --mask"], ["--mask-hdu", "0"]),
        (["--err-hdu needs --err-file"], ["--err-hdu", "1"]),
        (["--measure-hdu needs --measure-image"], ["--measure-hdu", "0"]),
        (["--measure-plane needs --measure-image"], ["--measure-plane", "0"]),
        (NOISE, ["--err-option", "file"]),
        (NOISE, ["--err-file", "noise.fits"]),
        (NOISE, ["--err-file", "noise.fits", "--err-option", "none"]),
        (KERNEL, ["--filter-case", "file"]),
        (KERNEL, ["--filter-file", "kernel.conv"]),
        ([BOX.format("10 5 0 9", "column 10", "column 5")], ["--mask-box", 10, 5, 0, 9]),
        ([BOX.format("0 9 5 4", "row 5", "row 4")], ["--mask-box", 0, 9, 5, 4]),
        (["--mask-box"], ["--mask-box", 0, 1, 2]),
        (["--aperture-diameters"], ["--aperture-diameters", 5, 8, 5.0]),
        (["--aperture-diameters"], ["--aperture-diameters", 5, 5.000000000000001]),
        (["--verbose", "--quiet"], ["-v", "-q"]),
        (["--catalog a b: "], ["--catalog", "a\nb", "--overlay", "a\nb"]),
        (["--un known"], ["--un\nknown"]),
    ],
)
def test_options_that_do_not_fit_together_are_refused(texts, arguments):
    assert_refused(texts, *arguments)


def test_without_arguments_the_one_line_names_what_is_missing():
    code, out, err = tell()
    assert (code, out) == (2, "")
    assert re.fullmatch(one_line("error", ".*IMAGE.*"), err)


# Reports


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.?\d*(?:e[-+]\d+)?", text)]


def test_the_report_tells_what_was_read_found_and_written(run, write, stars):
    stars[:3] = np.nan
    image = write(stars)
    result, verbose = run(image), run(image, "-v")
    assert (result.code, result.err) == (0, "")
    background = sep.Background(stars, mask=np.isnan(stars))
    lines = result.out.splitlines()
    assert numbers(lines[0]) == [len(result.catalog)]
    assert "image.fits[0] PRIMARY: 160 x 120 float32" in lines[1]
    assert numbers(lines[2]) == [2.5, 480]
    level, rms = numbers(lines[3])
    assert level == pytest.approx(background.globalback, rel=1e-5)
    assert rms == pytest.approx(background.globalrms, rel=1e-5)
    assert numbers(lines[4])[0] == pytest.approx(1.5 * background.globalrms, rel=1e-5)
    names = "background.fits, rms.fits, segmentation.fits, sources.png, catalog.tsv"
    assert re.fullmatch(f"written +{names}", lines[-1])
    first = "sources image masked background threshold noise detection purity seeing depth written"
    assert [line.split()[0] for line in lines] == first.split()
    told = verbose.out.splitlines()
    stages = [line for line in told if re.fullmatch(r"[a-z_ ]+ +\d+\.\d\d s", line)]
    assert [line for line in told if line not in stages] == lines
    for word in ("read", "background", "detect|find", "catalog", "overlay"):
        assert any(re.search(word, line) for line in stages), word


def test_the_report_names_the_hdu_its_type_and_an_absolute_threshold(run, tmp_path, stars):
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(stars.astype(np.int32), name="SCI")]
    fits.HDUList(hdus).writeto(tmp_path / "mef.fits")
    out = run(tmp_path / "mef.fits", "--err-option", "none", "--thresh", 12.5).out
    assert "mef.fits[1] SCI: 160 x 120 int32" in out
    assert re.search(r"^threshold +12\.5 \(absolute\)$", out, re.MULTILINE)


def test_warnings_are_one_line_each_on_stderr_and_quiet_silences_them_but_no_errors(
    run, write, tmp_path
):
    failed = run(tmp_path / "no\nsuch.fits", "-q")
    assert (failed.code, failed.out) == (1, "")
    assert re.fullmatch(ONE_ERROR, failed.err)
    image = write(np.full((64, 64), 7, np.float32))
    result = run(image)
    assert result.code == 0
    assert "warning:" not in result.out
    assert re.fullmatch(f"({one_line('warning')})+", result.err)
    assert "no sources" in result.err
    quiet = run(image, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


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


@pytest.mark.parametrize(("option", "name"), [("-v", "image.fits"), ("-q", "image.tif")])
def test_a_fault_of_the_tool_is_called_so_and_not_damage(
    stars, tmp_path, monkeypatch, capsys, option, name
):
    write = fits.writeto if "fits" in name else tifffile.imwrite
    write(tmp_path / name, stars)
    monkeypatch.setattr(source_extractor, "product_of", lambda _: {}["no such"])
    assert call(tmp_path / name, option, "-o", tmp_path / "products") == 1
    said = capsys.readouterr()
    assert re.fullmatch(ONE_ERROR, said.err)
    assert "internal error (KeyError: 'no such')" in said.err
    assert ("Traceback" in said.out) == (option == "-v")
    assert not list(tmp_path.glob("products/*"))


# Ways to start it


def test_the_installed_command_is_main_which_reads_the_command_line(monkeypatch, capsys):
    project = tomllib.loads(SCRIPT.with_name("pyproject.toml").read_text())["project"]
    command = pkgutil.resolve_name(project["scripts"]["source_extractor"])
    assert command is source_extractor.main
    monkeypatch.setattr(sys, "argv", ["source_extractor", "nowhere.fits"])
    assert command() == 1
    assert "nowhere.fits" in capsys.readouterr().err


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_report_that_can_not_be_written_costs_no_product(write, stars, tmp_path):
    with open("/dev/full", "w") as full:
        done = start(write(stars), "-v", "-o", tmp_path / "products", stdout=full)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert len(list((tmp_path / "products").iterdir())) == 5


def test_the_script_runs_as_a_file_also_if_a_file_name_is_not_utf_8(stars, tmp_path):
    path = os.fsencode(tmp_path) + b"/sk\xff.fits"
    with open(path, "wb") as file:
        fits.PrimaryHDU(stars).writeto(file)
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = start(path, cwd=tmp_path, env=strict)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^image .*160 x 120", done.stdout, re.MULTILINE)
    assert "catalog.tsv" in done.stdout
    assert (tmp_path / "catalog.tsv").is_file()
