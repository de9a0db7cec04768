"""Measuring on another image: detection from the one, photometry from the other."""

import numpy as np
import pytest
import sep
import tifffile
from numpy.testing import assert_allclose, assert_array_equal

from common import rows_at
from contract import DETECTION
from truth import INDEPENDENT

ALWAYS = INDEPENDENT


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("fits", "--gain 2 --aperture-diameters 5"),
        ("fits", "--err-option array_rms --thresh 5 --mask-box 70 84 50 64"),
        ("tiff", "--background-passes 2"),
    ],
)
def test_measuring_on_a_copy_changes_nothing(run, write, stars, tmp_path, form, options):
    image, copy = write(stars), tmp_path / f"copy.{form}"
    if form == "tiff":
        tifffile.imwrite(copy, stars)
    else:
        copy.write_bytes(image.read_bytes())
    alone, both = (
        (run(image, *options.split(), *more).directory / "catalog.tsv").read_text()
        for more in ((), ("--measure-image", copy))
    )
    assert both == alone


def test_detection_comes_from_the_image_and_photometry_from_the_other(run, write, stars):
    image = write(stars)
    names = ("background", "rms", "segmentation")
    result = run(image, "--aperture-diameters", 6)
    alone, maps = result.catalog, [result.image(name) for name in names]
    bright = write(2 * stars + 1000, "bright.fits")
    result = run(image, "--aperture-diameters", 6, "--measure-image", bright)
    for name, expected in zip(names, maps, strict=True):
        assert_array_equal(result.image(name), expected)
    assert_array_equal(result.catalog[DETECTION], alone[DETECTION])
    double = ["flux_auto", "fluxerr_auto", "flux_aper_6", "fluxerr_aper_6", "rms"]
    assert_allclose(result.catalog[double], 2 * alone[double], rtol=1e-3)
    same = ["kron_radius", "snr", "flux_radius", "xwin", "ywin"]
    assert_allclose(result.catalog[same], alone[same], rtol=1e-3)
    assert_allclose(result.catalog["background"], 2 * alone["background"] + 1000, atol=0.05)


def test_the_kron_ellipse_is_that_of_the_detection_image(run, write, stars):
    image = write(stars)
    blank = np.random.default_rng(8).normal(50, 2, stars.shape).astype(np.float32)
    alone = run(image).catalog
    catalog = run(image, "--measure-image", write(blank, "blank.fits")).catalog
    assert_array_equal(catalog["kron_radius"], alone["kron_radius"])
    assert_allclose(catalog["fluxerr_auto"], 2 * alone["fluxerr_auto"], rtol=0.05)
    assert (catalog["snr"].abs() < 5).all()


def test_planes_and_hdus_of_the_measured_image_are_chosen_on_their_own(run, data):
    stack = data / "stack.fits"
    options = ("--hdu", "SCI", "--plane", 0, "--measure-image", stack, "--measure-hdu", "SCI")
    single, empty, double = (run(stack, *options, "--measure-plane", n).catalog for n in range(3))
    assert_array_equal(single[DETECTION], double[DETECTION])
    assert (double["flux_auto"] / single["flux_auto"]).median() == pytest.approx(2, rel=0.05)
    assert np.abs(empty["snr"]).max() < 5


def test_a_negative_flux_has_no_magnitude_and_a_negative_snr(run, write, stars):
    catalog = run(write(stars), "--measure-image", write(200 - stars, "dark.fits")).catalog
    assert (catalog["flux_auto"] < 0).all()
    assert (catalog["snr"] < 0).all()
    unknown = ["mag_auto", "magerr_auto", "flux_radius", "xwin", "ywin"]
    assert catalog[unknown].isna().all(axis=None)


def test_missing_pixels_of_the_measured_image_cost_only_themselves(run, write, stars):
    other = stars.copy()
    other[59:61, 83:86] = np.nan
    other[22:39, 32:49] = np.nan
    image = write(stars)
    alone = run(image).catalog
    options = ("--measure-image", write(other, "other.fits"), "--bridge", 0)
    catalog = run(image, *options).catalog
    assert_array_equal(catalog[DETECTION], alone[DETECTION])
    part, lost, whole = rows_at(catalog, [80, 40, 120], [60, 30, 100]).itertuples()
    assert part.flag_auto & sep.APER_HASMASKED
    assert 0.5 < part.flux_auto / whole.flux_auto < 1
    assert np.isfinite([part.fluxerr_auto, part.mag_auto, part.flux_radius, part.xwin]).all()
    assert lost.flag_auto & sep.APER_ALLMASKED
    assert np.isnan([lost.flux_auto, lost.fluxerr_auto, lost.mag_auto, lost.snr, lost.xwin]).all()
    assert whole.flag_auto == 0
    assert whole.flux_auto == pytest.approx(1005, rel=0.05)


def test_another_shape_and_an_image_without_values_are_refused_by_name(run, write, stars):
    image, narrow = write(stars), write(stars[:, :150], "narrow.fits")
    run(image, "--measure-image", narrow).assert_refused(narrow, "150 x 120", "160 x 120")
    blank = write(np.full_like(stars, np.nan), "blank.fits")
    run(image, "--measure-image", blank).assert_refused(blank)


def test_a_constant_image_can_be_measured(run, write, stars):
    other = write(np.full_like(stars, 7), "flat.fits")
    result = run(write(stars), "--measure-image", other)
    assert result.code == 0
    assert len(result.catalog) == 6
    assert (result.catalog["flux_auto"] == 0).all()
    assert result.catalog[["mag_auto", "snr"]].isna().all(axis=None)


def test_an_absolute_threshold_is_for_the_detection_image_alone(run, write, crowded):
    options = "--err-option", "none", "--thresh", 5, "--background-passes", 2
    detection = write(crowded, "detection.fits")
    others = [write(crowded * factor, f"{factor}.fits") for factor in (1, 100)]
    one, hundred = (run(detection, *options, "--measure-image", other).catalog for other in others)
    assert_allclose(hundred["flux_auto"], 100 * one["flux_auto"], rtol=1e-3, atol=1)


def test_what_only_the_image_lacks_is_measured_on_the_other(run, write, stars):
    holed, whole = stars.copy(), write(stars)
    holed[30, 41] = np.nan
    both = (
        rows_at(run(*paths, "--thresh", 5, "--aperture-diameters", 6).catalog, [40], [30])
        for paths in ((whole,), (write(holed, "holed.fits"), "--measure-image", whole))
    )
    assert_allclose(*(rows["flux_aper_6"] for rows in both), rtol=0.02)
