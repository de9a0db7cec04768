"""Warnings of what is likely a mistake: a product as image, a mask that hides the quiet part."""

import re

import numpy as np
import pytest
import sep
import tifffile
from astropy.io import fits

from common import SHAPE, extract, insert_cards
from contract import one_line
from files import patched_tiff
from sky import blobs

# ---------------------------------------------------------------------------------------------
# A product of an earlier run as image
# ---------------------------------------------------------------------------------------------

ROLES = ("background", "rms", "segmentation", "subtracted")
FORMS = ("fits", "fits.gz", "tiff")


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """Return the directory of an image, and of the image products made of it in each form."""
    directory = tmp_path_factory.mktemp("products")
    # Steep enough for its background to have noise itself.
    image = blobs(SHAPE, (40, 30), (110, 80)) + np.hypot(*np.indices(SHAPE), dtype=np.float32)
    fits.writeto(directory / "image.fits", image)
    for form in FORMS:
        options = [word for role in ROLES for word in (f"--{role}", directory / f"{role}.{form}")]
        extract(directory / "image.fits", "-o", directory, *options)
    return directory


def assert_told_once(result, path, role):
    """Demand success, and one warning that a file is a product of an earlier run."""
    told = rf"{re.escape(path.name)}.*: its HISTORY .* the {role} of an earlier run;.*original.*"
    assert result.code == 0
    assert re.search(one_line("warning", told), result.err)
    assert result.err.count("HISTORY") == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", ROLES)
def test_a_product_as_image_costs_a_warning(run, products, role, form):
    path = products / f"{role}.{form}"
    assert_told_once(run(path), path, role)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", ROLES)
def test_a_product_as_image_to_measure_costs_a_warning(run, products, role, form):
    path = products / f"{role}.{form}"
    result = run(products / "image.fits", "--measure-image", path)
    assert_told_once(result, path, role)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", ROLES)
def test_a_product_as_mask_costs_none(run, products, role, form):
    mask = ("--mask", products / f"{role}.{form}", "--maskthresh", 1e6)
    result = run(products / "image.fits", *mask)
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", ["background", "rms"])
def test_a_product_as_noise_costs_none(run, products, role, form):
    noise = ("--err-option", "file", "--err-file", products / f"{role}.{form}")
    result = run(products / "image.fits", *noise)
    assert result.code == 0
    assert "HISTORY" not in result.err


@pytest.mark.parametrize(
    "history",
    [
        "swarp 2.41: background",
        "skysub.py 1.0.0 (sep 1.4.1): background",
        "rms",
        "source_extractor.py 1: stars",
    ],
)
def test_what_another_program_made_costs_none(run, tmp_path, stars, history):
    header = fits.Header()
    header.add_history(history)
    fits.writeto(tmp_path / "image.fits", stars, header)
    tifffile.imwrite(tmp_path / "image.tiff", stars, description=history, metadata=None)
    for name in ("image.fits", "image.tiff"):
        result = run(tmp_path / name)
        assert (result.code, result.err) == (0, "")


# ---------------------------------------------------------------------------------------------
# A mask that raises the noise
# ---------------------------------------------------------------------------------------------

SIDE, BOX = 320, 32
MESH = ("--bw", BOX, "--bh", BOX)
NOISIER = re.compile(r"warning: .*the mask makes the noise ([\d.]+) times that of the whole image")


def sky_of(noise, quiet=192):
    """Return a square sky, noise 1 in its first columns and another in the others."""
    sigma = np.where(np.arange(SIDE) < quiet, 1, noise)
    return np.random.default_rng(6).normal(100, sigma, (SIDE, SIDE)).astype(np.float32)


def textured():
    """Return a square sky, quiet but for bright waves in its last columns."""
    waves = 30 * np.sin(np.arange(SIDE) / 2) * (np.arange(SIDE) >= 224)
    return sky_of(1) + waves.astype(np.float32)


@pytest.mark.parametrize("option", ["float_globalrms", "array_rms"])
@pytest.mark.parametrize(
    ("image", "quiet"),
    [(sky_of(2.5), 192), (sky_of(12, 224), 224), (textured(), 224)],
    ids=["2.5 times", "12 times", "texture"],
)
def test_a_mask_of_the_quiet_part_costs_a_warning_with_its_factor(run, write, image, quiet, option):
    box = ("--mask-box", 0, quiet - 1, 0, SIDE - 1)
    result = run(write(image), *box, *MESH, "--err-option", option)
    expected = raised_by_masking(image, np.s_[:, :quiet])
    assert expected > 2
    assert result.code == 0
    (factor,) = NOISIER.findall(result.err)
    assert float(factor) == pytest.approx(expected, abs=0.06)


def test_the_factor_is_that_of_small_boxes_too(run, write):
    image, box = sky_of(12, 176), 8
    result = run(write(image), "--mask-box", 0, 175, 0, SIDE - 1, "--bw", box, "--bh", box)
    (factor,) = NOISIER.findall(result.err)
    expected = raised_by_masking(image, np.s_[:, :176], box)
    assert float(factor) == pytest.approx(expected, abs=0.06)


def raised_by_masking(image, where, box=BOX):
    """Return how many times its global RMS an image's is with a part of it masked.

    The background of what is masked is that of the rest, as it is taken off.
    """
    mask = np.zeros(image.shape, bool)
    mask[where] = True
    masked = sep.Background(image, mask=mask, bw=box, bh=box)
    whole = sep.Background(image - masked.back(), bw=box, bh=box)
    return masked.globalrms / whole.globalrms


def test_a_mask_file_of_the_quiet_part_costs_the_warning_too(run, write):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, :192] = 1
    result = run(write(sky_of(12)), "--mask", write(mask, "mask.fits"), *MESH)
    assert len(NOISIER.findall(result.err)) == 1


def test_a_mask_that_does_not_double_the_noise_costs_none(run, write):
    image = sky_of(1.8)
    assert 1.5 < raised_by_masking(image, np.s_[:, :192]) < 2
    result = run(write(image), "--mask-box", 0, 191, 0, SIDE - 1, *MESH)
    assert result.code == 0
    assert not NOISIER.search(result.err)


def test_a_mask_over_bright_stars_costs_none(run, write):
    y, x = np.indices((SIDE, SIDE))
    stars = sum(
        5e4 * np.exp(-np.hypot(x - x0, y - y0) / 9) for x0, y0 in ((70, 90), (240, 60), (160, 230))
    )
    boxes = ((20, 120, 40, 140), (190, 290, 10, 110), (110, 210, 180, 280))
    options = [word for box in boxes for word in ("--mask-box", *box)]
    result = run(write(sky_of(1) + stars.astype(np.float32)), *options, *MESH)
    assert result.code == 0
    assert not NOISIER.search(result.err)


def test_what_has_no_value_is_no_mask(run, write):
    image = sky_of(12)
    image[:, :192] = np.nan
    result = run(write(image), *MESH)
    assert result.code == 0
    assert not NOISIER.search(result.err)


@pytest.mark.parametrize(("boxes", "warned"), [(4, False), (6, True)])
def test_less_than_a_twentieth_masked_costs_none(run, write, boxes, warned):
    image = np.full((SIDE, SIDE), np.nan, np.float32)
    image[:BOX, : boxes * BOX] = sky_of(1)[:BOX, : boxes * BOX]
    image[BOX : 2 * BOX, : 3 * BOX] = 12 * sky_of(1)[:BOX, : 3 * BOX]
    result = run(write(image), "--mask-box", 0, boxes * BOX - 1, 0, BOX - 1, *MESH)
    assert result.code == 0
    assert len(NOISIER.findall(result.err)) == warned


def test_what_a_library_remarks_on_a_file_is_one_warning(run, tmp_path, stars):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, stars, metadata=None)
    path.write_bytes(patched_tiff(path.read_bytes(), "ResolutionUnit", 77))
    result = run(path)
    assert result.code == 0
    told = r"image\.tif: read with warnings: [^<]*77 is not a valid RESUNIT.*"
    assert re.fullmatch(one_line("warning", told), result.err)


def test_a_blank_that_is_no_number_is_told(run, write, stars):
    path = insert_cards(write(stars.astype(np.int16)), b"BLANK   = '12'")
    assert re.search(one_line("warning", r"image\.fits.*BLANK.*"), run(path).err)


@pytest.mark.parametrize(
    "card",
    [b"OBSERVER= 'B\xe9'", b"BLANK   =                    0", b"ESO-LOG 00:00:00> DATE = '1992'"],
)
def test_what_changes_no_pixel_is_not_told(run, write, stars, card):
    result = run(insert_cards(write(stars), card))
    assert (result.code, result.err) == (0, "")
