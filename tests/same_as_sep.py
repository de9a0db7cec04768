"""What SEP itself makes of an image, and the demand that a run makes the same of it."""

import numpy as np
import sep
from astropy.io import fits

from contract import SEP_FIELDS

DEFAULT_KERNEL = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32)
CUT = 512


def direct(image, *, mask=None, noise="float_globalrms", mesh=None, **keywords):
    """Return background, rms, objects and map as SEP itself gives them.

    Its objects are cleaned here, pair by pair, in the units in which it finds them; masked pixels
    are taken out. If it filters an image with a noise array by convolution, it gets the noise of
    the filtered image. Errors of positions are then summed here, from the noise of the pixels; and
    those of objects with masked pixels, where SEP's are infinite.
    """
    background = sep.Background(image, mask=mask, **(mesh or {}))
    if isinstance(noise, str):
        noise = {
            "float_globalrms": background.globalrms,
            "array_rms": background.rms(),
            "none": None,
        }[noise]
    defaults = {"thresh": 1.5, "filter_kernel": DEFAULT_KERNEL, "segmentation_map": True}
    keywords = {**defaults, "err": noise, "mask": mask, **keywords}
    kernel = keywords["filter_kernel"]
    cleaned, beta = keywords.pop("clean", True), keywords.pop("clean_param", 1.0)
    residual = image - background.back()
    light = residual if mask is None else np.where(mask, 0, residual)
    filtered = np.ndim(noise) and keywords.get("filter_type") == "conv" and kernel is not None
    if filtered:
        keywords["err"] = filtered_noise(noise, mask, kernel)
    objects, labels = sep.extract(residual, clean=False, **keywords)
    if np.ndim(noise):
        one = np.ones((1, 1)) if kernel is None else kernel
        set_errors(
            objects, labels, correlate(light, one / np.abs(one).sum()), noise, mask, filtered
        )
    margin = margins(objects, labels, light, **keywords)
    if cleaned and len(objects):
        objects, labels = clean_plainly(
            objects, labels, light, margin, keywords.get("minarea", 5), beta
        )
    if mask is not None:
        objects, labels = without_masked(objects, labels, light, mask, kernel)
    return background.back(), background.rms(), objects, labels


def correlate(image, kernel):
    """Return the sum of kernel times image about each pixel, nothing beyond the edge."""
    rows, columns = kernel.shape
    padded = np.pad(image.astype(np.float64), ((rows // 2,) * 2, (columns // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape)
    return np.einsum("yxij,ij->yx", windows, kernel.astype(np.float64))


def filtered_noise(noise, mask, kernel):
    """Return the root of the variance averaged by the kernel over the pixels that aren't masked."""
    good = np.ones(noise.shape) if mask is None else ~mask
    with np.errstate(invalid="ignore"):
        mean = correlate(np.where(good, noise, 0).astype(float) ** 2, np.abs(kernel))
        mean /= correlate(good, np.abs(kernel))
    return np.where(good, np.sqrt(mean), 1e30).astype(np.float32)


def set_errors(objects, labels, light, noise, mask, every):
    """Sum up the errors of the positions, of every object or those with masked pixels, in place."""
    for label, one in enumerate(objects, start=1):
        own = (labels == label) if mask is None else (labels == label) & ~mask
        if every or own.sum() < one["npix"]:
            y, x = np.nonzero(own)
            variance, dx, dy = noise[y, x].astype(float) ** 2, x - one["x"], y - one["y"]
            for name, square in (("errx2", dx * dx), ("erry2", dy * dy), ("errxy", dx * dy)):
                one[name] = np.sum(variance * square) / one["cflux"] ** 2


def margins(objects, labels, light, thresh, err, mask, filter_kernel, filter_type="matched", **_):
    """Return by how much the filtered image is above the threshold, in its own units.

    The isophotes of a matched filter on a noise array are corrected, in place.
    """
    if filter_kernel is None:
        filter_kernel, filter_type = np.ones((1, 1)), "conv"
    kernel = filter_kernel / np.abs(filter_kernel.astype(np.float64)).sum()
    if np.ndim(err) == 0 or filter_type == "conv":
        return correlate(light, kernel) - thresh * (1 if err is None else err)
    good = np.ones(light.shape, bool) if mask is None else ~mask
    precision = np.where(good, err.astype(np.float64) ** -2, 0)
    weight = np.sqrt(correlate(precision, kernel**2))
    for i, one in enumerate(objects):
        own = labels == i + 1
        one["thresh"] = thresh * np.sqrt(np.sum(kernel**2)) * err[own & good].mean(dtype=np.float64)
        one["tnpix"] = np.sum(light[own] > one["thresh"])
    with np.errstate(invalid="ignore", divide="ignore"):
        significance = correlate(light * precision, kernel) / weight
        return (significance - thresh) * np.sum(kernel**2) / weight


def as_found(values, own):
    """Return the values of an object's pixels in the order in which SExtractor finds them."""
    found, left = [], -np.inf
    for y in np.flatnonzero(own.any(axis=1)):
        x = np.flatnonzero(own[y])
        ahead = x < left
        found = [*values[y, x[ahead]], *found, *values[y, x[~ahead]]]
        left = x[0]
    return found


def rank(found, minarea):
    """Return the `minarea`-th highest, as SExtractor wants it: without the one after so many."""
    if len(found) <= minarea:
        return found[0] if len(found) == minarea else 0
    return sorted(found[:minarea] + found[minarea + 1 :])[-minarea]


def clean_plainly(objects, labels, light, margin, minarea=5, beta=1.0):
    """Clean as SExtractor does, pair by pair."""
    profiles = []
    for i, one in enumerate(objects):
        own = labels == i + 1
        values = light[own]
        half = (one["thresh"] + one["peak"]) / 2
        ratio = one["thresh"] / half
        drop = min(np.sum(values > half) - one["tnpix"], -1)
        area = np.pi * one["a"] * one["b"]
        filling = min(drop / (2 * np.log(ratio if ratio < 1 else 0.99) * area), 1)
        height = one["cflux"] / (2 * area * filling)
        alpha = ((height / one["thresh"]) ** (1 / beta) - 1) * area / one["npix"]
        profiles.append((height, alpha, rank(as_found(margin, own), minarea)))
    alive = np.ones(len(objects), bool)
    for i, one in enumerate(objects):
        if not alive[i]:
            continue
        for j in range(i + 1, len(objects)):
            other = objects[j]
            dx, dy = one["x"] - other["x"], one["y"] - other["y"]
            if not alive[j] or np.hypot(dx, dy) > 10 * (one["a"] + other["a"]):
                continue
            eater, eaten = (i, j) if other["cflux"] < one["cflux"] else (j, i)
            height, alpha, _ = profiles[eater]
            big = objects[eater]
            spread = 1 + alpha * (big["cxx"] * dx**2 + big["cyy"] * dy**2 + big["cxy"] * dx * dy)
            if 1 < spread < 1e10 and height * spread**-beta > profiles[eaten][2]:
                alive[eaten] = False
    return objects[alive], np.concatenate([[0], np.where(alive, np.cumsum(alive), 0)])[labels]


def without_masked(objects, labels, light, mask, kernel):
    """Take masked pixels out of SEP's objects; describe those that lose some by the others.

    Those beside masked pixels are flagged.
    """
    beside = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (3, 3)).any(axis=(2, 3))
    images = {"": light, "c": light}
    if kernel is not None:
        images["c"] = correlate(light, kernel / np.abs(kernel.astype(np.float64)).sum())
    labels = np.where(mask, 0, labels)
    left = np.isin(np.arange(len(objects)) + 1, labels)
    for i in np.flatnonzero(left):
        y, x = np.nonzero(labels == i + 1)
        one = objects[i]
        one["flag"] |= CUT * beside[y, x].any()
        if len(y) < one["npix"]:
            one["npix"] = len(y)
            one["xmin"], one["xmax"], one["ymin"], one["ymax"] = x.min(), x.max(), y.min(), y.max()
            for kind, image in images.items():
                top = np.argmax(image[y, x])
                one[f"x{kind}peak"], one[f"y{kind}peak"] = x[top], y[top]
                one[f"{kind}peak"], one[f"{kind}flux"] = image[y, x][top], image[y, x].sum()
    return objects[left], np.concatenate([[0], np.where(left, np.cumsum(left), 0)])[labels]


def assert_same_objects(result, objects, *, filtered=False):
    """Demand that a run's catalogue has, bit for bit, the fields of SEP's objects.

    But for rounding where SEP's own have been corrected: thresholds, and sums of cut objects; with
    a `filtered` noise array, errors of positions as well.
    """
    assert result.code == 0, result.err
    catalog = result.catalog
    assert len(catalog) == len(objects)
    whole = (objects["flag"] & CUT) == 0
    for name in SEP_FIELDS:
        found = catalog[name].to_numpy(float)
        rounding = np.where(whole, 1e-12 if name == "thresh" else 0, 1e-5)
        if filtered and (name == "thresh" or name.startswith("err")):
            rounding, least = 1e-6, 1e-9 * (name == "errxy")
        else:
            least = 0
        wrong = ~np.isclose(found, objects[name], rounding, least, equal_nan=True)
        assert not wrong.any(), (name, found[wrong], objects[name][wrong])


def assert_same(result, expected, *, filtered=False):
    """Demand that a run's products are, bit for bit, those of a direct call."""
    background, rms, objects, segmentation = expected
    assert_same_objects(result, objects, filtered=filtered)
    np.testing.assert_array_equal(result.image("segmentation"), segmentation)
    np.testing.assert_array_equal(result.image("background"), background)
    np.testing.assert_array_equal(result.image("rms"), rms)


def assert_subtracted(path, image, expected):
    """Demand that a background-subtracted image is, bit for bit, that of a direct call."""
    np.testing.assert_array_equal(fits.getdata(path), image - expected[0])
