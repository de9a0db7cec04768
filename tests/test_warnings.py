"""Warnings of what is likely a mistake: a product as image, a mask that hides the quiet part."""

import re

import numpy as np
import pytest
import sep
import tifffile
from astropy.io import fits
from matplotlib.image import imread

from common import SHAPE, extract, insert_cards
from files import patched_tiff
from sky import blobs
from source_extractor import InputError, product_of, read_image, read_mask, read_noise

# A product of an earlier run as image

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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", ROLES)
def test_a_product_is_no_image_unless_allowed_but_serves_as_mask_and_noise(
    products, told, role, form
):
    path = products / f"{role}.{form}"
    if role == "subtracted":
        read_image(path)
    else:
        pattern = rf"{re.escape(path.name)}.*: it is the {role} product of .*--allow-product"
        with pytest.raises(InputError, match=pattern):
            read_image(path)
        read_image(path, allow_product=True)
    read_mask(path, None, None, 1e6, None, None, SHAPE)
    if role in ("background", "rms"):
        read_noise(path, None, None, "stddev", None, SHAPE)
    assert told == []


def test_a_product_to_measure_on_is_refused_too(run, products):
    images = products / "subtracted.fits", "--measure-image", products / "rms.tiff"
    run(*images).assert_refused("rms.tiff", "--allow-product")
    assert run(*images, "--allow-product").code == 0


# Where warnings are seen


@pytest.mark.parametrize("name", [r"a$\frac$.fits", "a\udcff.fits"])
def test_a_warning_on_the_picture_may_hold_any_name(run, write, stars, name):
    result = run(insert_cards(write(stars.astype(np.int16), name), b"BLANK   = '12'"))
    assert result.code == 0
    assert "BLANK" in result.err


def test_warnings_are_reported_after_the_sources_the_weightiest_first(run, write):
    image = textured()
    image[:, :40] = 0  # padding; the waves are larger than a box
    result = run(write(image), "--bw", 8, "--bh", 8, "--err-option", "array_rms")
    first, *lines = result.out.splitlines()
    warned = [line.split(maxsplit=1)[1] for line in lines if line.startswith("warning")]
    assert first.startswith("sources ")
    assert lines[len(warned)].startswith("image ")
    assert len(warned) >= 2
    assert "--blank 0" in warned[0]
    assert warned[-1].startswith("with noise for each pixel")
    told = re.findall("warning: (?:.*fits.*PRIMARY: )?(.*)", result.err)
    assert sorted(warned) == sorted(told)


def test_the_picture_shows_the_weightiest_warning_even_if_quiet(run, write, stars):
    pictures = []
    for padding in (0, 64):
        stars[:, :padding] = 0
        path = write(stars, f"{padding}.fits")
        pictures.append(imread(run(path, "-q").directory / "sources.png")[..., :3])
    plain, warned = pictures
    assert len(warned) > len(plain)
    red = (warned[..., 0] > 0.9) & (warned[..., 1] < 0.3)
    assert red[: len(warned) - len(plain) + 10].any()


def test_what_another_program_made_is_no_product():
    others = "swarp 2.41: background", "skysub.py 1.0.0 (sep 1.4.1): background", "rms"
    assert not any(map(product_of, (*others, "source_extractor.py 1: stars")))


# A mask that raises the noise

SIDE, BOX = 320, 32
MESH = ("--bw", BOX, "--bh", BOX)


def sky_of(noise, quiet=192):
    """Return a square sky, noise 1 in its first columns and another in the others."""
    sigma = np.where(np.arange(SIDE) < quiet, 1, noise)
    return np.random.default_rng(6).normal(100, sigma, (SIDE, SIDE)).astype(np.float32)


def textured():
    """Return a square sky, quiet but for bright waves in its last columns."""
    waves = 30 * np.sin(np.arange(SIDE) / 2) * (np.arange(SIDE) >= 224)
    return sky_of(1) + waves.astype(np.float32)


def factors_told(result):
    assert result.code == 0
    text = r"warning: .*the mask makes the noise ([\d.]+) times that of the whole image"
    return [float(factor) for factor in re.findall(text, result.err)]


def raised_by_masking(image, columns, box=BOX):
    """Return how many times its global RMS an image's is with its first columns masked.

    The background of what is masked is that of the rest, as it is taken off.
    """
    mask = np.zeros(image.shape, bool)
    mask[:, :columns] = True
    masked = sep.Background(image, mask=mask, bw=box, bh=box)
    whole = sep.Background(image - masked.back(), bw=box, bh=box)
    return masked.globalrms / whole.globalrms


@pytest.mark.parametrize(
    ("image", "quiet", "box", "option"),
    [
        pytest.param(sky_of(2.5), 192, BOX, "float_globalrms", id="2.5 times"),
        pytest.param(sky_of(12, 224), 224, BOX, "array_rms", id="12 times"),
        pytest.param(textured(), 224, BOX, "float_globalrms", id="texture"),
        pytest.param(sky_of(12, 176), 176, 8, "float_globalrms", id="small boxes"),
    ],
)
def test_a_mask_of_the_quiet_part_costs_a_warning_with_its_factor(
    run, write, image, quiet, box, option
):
    options = ("--bw", box, "--bh", box, "--err-option", option)
    expected = raised_by_masking(image, quiet, box)
    assert expected > 2
    found = factors_told(run(write(image), "--mask-box", 0, quiet - 1, 0, SIDE - 1, *options))
    assert found == [pytest.approx(expected, abs=0.06)]


def test_a_mask_that_does_not_double_the_noise_costs_none(run, write):
    image = sky_of(1.8)
    assert 1.5 < raised_by_masking(image, 192) < 2
    assert factors_told(run(write(image), "--mask-box", 0, 191, 0, SIDE - 1, *MESH)) == []


def test_a_mask_over_bright_stars_costs_none(run, write):
    centres = (70, 90), (240, 60), (160, 230)
    image = sky_of(1) + blobs((SIDE, SIDE), *centres, level=0, noise=0, peak=5e4, a=15, b=15)
    boxes = [("--mask-box", x - 50, x + 50, y - 50, y + 50) for x, y in centres]
    assert factors_told(run(write(image), *sum(boxes, ()), *MESH)) == []


def test_what_has_no_value_is_no_mask(run, write):
    image = sky_of(12)
    image[:, :192] = np.nan
    assert factors_told(run(write(image), *MESH)) == []


@pytest.mark.parametrize(("boxes", "warned"), [(4, False), (6, True)])
def test_less_than_a_twentieth_masked_costs_none(run, write, boxes, warned):
    image = np.full((SIDE, SIDE), np.nan, np.float32)
    image[:BOX, : boxes * BOX] = sky_of(1)[:BOX, : boxes * BOX]
    image[BOX : 2 * BOX, : 3 * BOX] = 12 * sky_of(1)[:BOX, : 3 * BOX]
    result = run(write(image), "--mask-box", 0, boxes * BOX - 1, 0, BOX - 1, *MESH)
    assert len(factors_told(result)) == warned


# What a library remarks on a file


def test_what_a_library_remarks_on_a_file_is_one_warning(tmp_path, told, stars):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, stars, metadata=None)
    path.write_bytes(patched_tiff(path.read_bytes(), "ResolutionUnit", 77))
    read_image(path)
    (text,) = told
    assert re.match(r"image\.tif: read with warnings: [^<]*77 is not a valid RESUNIT", text)


def test_a_blank_that_is_no_number_is_told(write, told, stars):
    read_image(insert_cards(write(stars.astype(np.int16)), b"BLANK   = '12'"))
    assert any(re.match(r"image\.fits.*BLANK", text) for text in told)


@pytest.mark.parametrize(
    "card",
    [b"OBSERVER= 'B\xe9'", b"BLANK   =                    0", b"ESO-LOG 00:00:00> DATE = '1992'"],
)
def test_what_changes_no_pixel_is_not_told(write, told, stars, card):
    read_image(insert_cards(write(stars), card))
    assert told == []
