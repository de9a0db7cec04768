"""What SEP itself makes of an image, and the demand that a run makes the same of it."""

import numpy as np
import sep
from astropy.io import fits

from contract import SEP_FIELDS

DEFAULT_KERNEL = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32)


def direct(image, *, mask=None, noise="float_globalrms", mesh=None, **keywords):
    """Return background, rms, objects and map as SEP itself gives them."""
    background = sep.Background(image, mask=mask, **(mesh or {}))
    if isinstance(noise, str):
        noise = {
            "float_globalrms": background.globalrms,
            "array_rms": background.rms(),
            "none": None,
        }[noise]
    defaults = {"thresh": 1.5, "filter_kernel": DEFAULT_KERNEL, "segmentation_map": True}
    objects, segmentation = sep.extract(
        image - background.back(), **{**defaults, "err": noise, "mask": mask, **keywords}
    )
    return background.back(), background.rms(), objects, segmentation


def assert_same_objects(result, objects):
    """Demand that a run's catalogue has, bit for bit, the fields of SEP's objects."""
    assert result.code == 0, result.err
    catalog = result.catalog
    assert len(catalog) == len(objects)
    for name in SEP_FIELDS:
        np.testing.assert_array_equal(catalog[name], objects[name], err_msg=name)


def assert_same(result, expected):
    """Demand that a run's products are, bit for bit, those of a direct call."""
    background, rms, objects, segmentation = expected
    assert_same_objects(result, objects)
    np.testing.assert_array_equal(result.image("segmentation"), segmentation)
    np.testing.assert_array_equal(result.image("background"), background)
    np.testing.assert_array_equal(result.image("rms"), rms)


def assert_subtracted(path, image, expected):
    """Demand that a background-subtracted image is, bit for bit, that of a direct call."""
    np.testing.assert_array_equal(fits.getdata(path), image - expected[0])
