"""Simulated skies whose every source is known.

A source is a sum of elliptical Gaussians, because a Gaussian convolved with a Gaussian is again
one: the variances add. Moffat and Sersic profiles are turned into such sums, so a galaxy seen
through a Moffat point-spread function needs no numerical convolution, and its total flux is exact.

The point-spread function is the effective one, whose value at a pixel's centre is the pixel's flux.
With a FWHM of two pixels or more the pixels of a source add up to its flux to 0.1 %.

Positions are SEP's: x is the column, y the row, 0-based, pixel centres at integers; arrays have
the shape (ny, nx), and theta runs from +x towards +y, in radians. Lengths are in pixels, fluxes and
levels in image units.
"""

from functools import cache
from math import ceil, comb, floor, gamma, log, pi, sqrt

import numpy as np
from astropy.table import Table, vstack
from astropy.wcs import WCS

FLUX_CUT = 1e-6  # part of a source's flux that may fall outside the box of one of its Gaussians
PROFILE = ("fwhm", "beta", "n", "a", "b")  # columns that a source's Gaussians are made of
LOG_STEP = 0.4  # between the widths of the Gaussians of one profile


def stars(x, y, flux, *, fwhm=3.0, beta=np.inf):
    """Return stars as a source table; parameters are numbers or arrays.

    `flux` is the total; `fwhm`, 2 or more, is that of the point-spread function, and `beta` its
    Moffat exponent, greater than 1, infinite for a Gaussian.
    """
    return _source_table("star", x, y, flux, fwhm, beta, np.nan, 0.0, 0.0, 0.0)


def galaxies(x, y, flux, *, n=1.0, a=3.0, b=3.0, theta=0.0, fwhm=3.0, beta=np.inf):
    """Return galaxies of the Sersic index `n` as a source table; see `stars`.

    `a` and `b` are the semi-axes, and `theta` the angle, of the ellipse that holds half of the
    light before the point-spread function.
    """
    return _source_table("galaxy", x, y, flux, fwhm, beta, n, a, b, theta)


def _source_table(kind, *columns):
    values = np.broadcast_arrays(*(np.atleast_1d(np.asarray(c, dtype=float)) for c in columns))
    names = ("x", "y", "flux", "fwhm", "beta", "n", "a", "b", "theta")
    table = Table([v.copy() for v in values], names=names)
    table.add_column(np.full(len(table), kind, dtype="U6"), name="kind", index=0)
    return table


def grid_positions(shape, spacing, *, seed=0):
    """Return x and y of isolated sources: a square grid, each moved by less than a pixel.

    The outermost keep half of the `spacing` (an integer) from the edge; the random offsets are
    -0.5 to 0.5 in x and y.
    """
    rows, columns = (np.arange(size // spacing) * spacing + spacing // 2 for size in shape)
    y, x = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    dx, dy = np.random.default_rng(seed).uniform(-0.5, 0.5, (2, x.size))
    return x + dx, y + dy


def random_sources(
    shape,
    number,
    *,
    seed=0,
    flux=(50.0, 5000.0),
    slope=1.0,
    galaxy_fraction=0.5,
    radius=(1.0, 3.0),
    **psf,
):
    """Return a source table of stars and galaxies anywhere in the image; `psf` as for `stars`.

    Counts of sources over a total flux go as flux**-slope. Half of the galaxies have n = 1, half
    n = 4; `radius` is the range of their half-light semi-major axes, with axis ratios of 0.3 to 1.
    """
    rng = np.random.default_rng(seed)
    ny, nx = shape
    x, y = rng.uniform(-0.5, nx - 0.5, number), rng.uniform(-0.5, ny - 0.5, number)
    low, high = np.power(flux, -slope)
    fluxes = rng.uniform(high, low, number) ** (-1 / slope)
    n = rng.choice([1.0, 4.0], number)
    a = rng.uniform(*radius, number)
    b = a * rng.uniform(0.3, 1.0, number)
    theta = rng.uniform(-pi / 2, pi / 2, number)
    extended = rng.random(number) < galaxy_fraction
    shapes = {"n": n[extended], "a": a[extended], "b": b[extended], "theta": theta[extended]}
    points = stars(x[~extended], y[~extended], fluxes[~extended], **psf)
    return vstack([points, galaxies(x[extended], y[extended], fluxes[extended], **shapes, **psf)])


def blobs(shape, *centres, seed=3, level=100.0, noise=1.0, peak=60.0, a=2.0, b=2.0, theta=0.0):
    """Return a float32 image of elliptical Gaussians of RMS `a` and `b` in white noise."""
    image = np.random.default_rng(seed).normal(level, noise, shape)
    y, x = np.indices(shape)
    for x0, y0 in centres:
        along = (x - x0) * np.cos(theta) + (y - y0) * np.sin(theta)
        across = (y - y0) * np.cos(theta) - (x - x0) * np.sin(theta)
        image += peak * np.exp(-((along / a) ** 2 + (across / b) ** 2) / 2)
    return image.astype(np.float32)


def tan_wcs(shape, *, ra=150.0, dec=2.0, scale=0.262):
    """Return a gnomonic WCS (ICRS, north up, east left) about (ra, dec); `scale` in arcsec."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.radesys = "ICRS"
    wcs.wcs.crval = [ra, dec]
    wcs.wcs.crpix = [(size + 1) / 2 for size in shape[::-1]]
    wcs.wcs.cdelt = [-scale / 3600, scale / 3600]
    wcs.array_shape = shape
    return wcs


def light(shape, sources, *, level=0.0, gradient=(0.0, 0.0)):
    """Return a float32 image of a source table without noise.

    The background is `level` at the centre; it rises by `gradient` over the image in x and in y.
    """
    ny, nx = shape
    rise_x = gradient[0] * ((np.arange(nx) + 0.5) / nx - 0.5)
    rise_y = gradient[1] * ((np.arange(ny) + 0.5) / ny - 0.5)
    image = (level + rise_x + rise_y[:, None]).astype(np.float32)
    for x, y, flux, theta, *profile in _rows(sources, "x", "y", "flux", "theta", *PROFILE):
        _draw(image, x, y, flux, theta, *_gaussians(*profile))
    return image


def simulate(
    shape, sources, *, seed=0, noise=1.0, noise_fwhm=0.0, gain=None, wcs=None, **background
):
    """Return a float32 image of a source table, and the table with what else is true of it.

    The `background` is that of `light`. `noise` is the standard deviation of Gaussian noise, which
    is correlated by a Gaussian of the FWHM `noise_fwhm`, or white if that is 0. With a `gain`
    (electrons for one image unit) sources and background have Poisson noise too.

    Columns are added for ``ra`` and ``dec`` in degrees, nan without `wcs`, and for ``r50``, the
    radius of the circle that holds half of the flux.
    """
    rng = np.random.default_rng(seed)
    image = light(shape, sources, **background)
    if gain is not None:
        image = (rng.poisson(np.maximum(image, 0) * gain) / gain).astype(np.float32)
    image += noise * unit_noise(shape, rng, noise_fwhm)
    truth = sources.copy()
    truth["r50"] = [_half_light_radius(*_gaussians(*row)) for row in _rows(sources, *PROFILE)]
    truth["ra"], truth["dec"] = (
        (np.nan, np.nan) if wcs is None else wcs.all_pix2world(truth["x"], truth["y"], 0)
    )
    return image, truth


def _rows(sources, *names):
    """Rows of some columns of a source table, much faster than those of the table itself."""
    return zip(*(sources[name].tolist() for name in names), strict=True)


def _gaussians(fwhm, beta, n, a, b):
    """A source as a sum of Gaussians: parts of the flux, variances along both axes (pixel**2)."""
    fractions, variances = _point_spread(fwhm, beta)
    if np.isnan(n):
        return fractions, variances, variances
    light, squares = _sersic(n)
    fractions = np.outer(light, fractions).ravel()
    along, across = (np.add.outer(r * r * squares, variances).ravel() for r in (a, b))
    return fractions, along, across


@cache
def _point_spread(fwhm, beta):
    """Gaussian or Moffat profile as a sum of round Gaussians: parts of the flux, variances.

    A Moffat profile (1 + r**2 / alpha**2)**-beta is a mixture of Gaussians of the variances
    alpha**2 / (2 t), where t has a Gamma distribution.
    """
    if fwhm < 2:
        raise ValueError(f"fwhm is {fwhm} pixels; less than 2 is not sampled well enough")
    if np.isinf(beta):
        return np.ones(1), np.array([fwhm**2 / (8 * log(2))])
    alpha = fwhm / (2 * sqrt(2 ** (1 / beta) - 1))
    least = (1e-4 * gamma(beta)) ** (1 / (beta - 1))
    t = np.exp(np.arange(log(least), log(beta + 12), 2 * LOG_STEP))
    weights = t ** (beta - 1) * np.exp(-t)
    return weights / weights.sum(), alpha**2 / (2 * t)


@cache
def _sersic(n):
    """Sersic profile as a sum of round Gaussians: parts of the flux, variances in units of r_e**2.

    The transform is that of Shajib (2019, MNRAS 488, 1387, section 2); b_n is the expansion by
    Ciotti & Bertin (1999, A&A 352, 447). Gaussians narrower than 0.03 r_e or wider than 6 r_e are
    left out; the rest are scaled so that half of their light falls within r_e again.
    """
    b_n = 2 * n - 1 / 3 + 4 / (405 * n) + 46 / (25515 * n**2)
    order = 12
    node = np.sqrt(2 * order * log(10) / 3 + 2j * pi * np.arange(2 * order + 1))
    binomials = np.cumsum([comb(order, k) for k in range(order)]) / 2**order
    weight = np.concatenate([[0.5], np.ones(order), binomials[::-1]])
    weight *= (-1.0) ** np.arange(2 * order + 1)
    sigma = np.exp(np.arange(log(0.03), log(6), LOG_STEP))
    profile = np.exp(-b_n * np.multiply.outer(sigma, node) ** (1 / n)).real
    light = np.maximum(profile @ weight, 0) * sigma**2
    light /= light.sum()
    bright = light > 1e-4
    light, variances = light[bright] / light[bright].sum(), sigma[bright] ** 2
    return light, variances / _half_light_radius(light, variances, variances) ** 2


def _half_light_radius(fractions, along, across):
    """Radius of the circle that holds half the flux of concentric, aligned elliptical Gaussians.

    The radial integral is analytic; the other one is the mean over the angles of a quarter turn.
    """
    angle = (np.arange(16) + 0.5) * pi / 32
    steepness = np.cos(angle) ** 2 / along[:, None] + np.sin(angle) ** 2 / across[:, None]
    weight = (fractions / np.sqrt(along * across))[:, None] / (steepness * angle.size)
    weight /= weight.sum()
    low, high = 0.0, 2 * sqrt(along.max())
    for _ in range(30):
        middle = (low + high) / 2
        if np.sum(weight * np.exp(-steepness * middle**2 / 2)) > 0.5:
            low = middle
        else:
            high = middle
    return middle


def _draw(image, x, y, flux, theta, fractions, along, across):
    """Add one source to the image, each of its Gaussians in as small a box as it needs."""
    cos, sin = np.cos(theta), np.sin(theta)
    xx = along * cos**2 + across * sin**2
    yy = along * sin**2 + across * cos**2
    xy = (along - across) * sin * cos
    area = np.sqrt(along * across)
    reach = np.sqrt(2 * np.log(np.maximum(fractions / FLUX_CUT, 1)))
    for i, fraction in enumerate(fractions):
        rows = _span(y, reach[i] * sqrt(yy[i]), image.shape[0])
        columns = _span(x, reach[i] * sqrt(xx[i]), image.shape[1])
        dy = ((np.arange(rows.start, rows.stop) - y) / area[i]).astype(np.float32)[:, None]
        dx = ((np.arange(columns.start, columns.stop) - x) / area[i]).astype(np.float32)
        exponent = (xy[i] * dx) * dy - (yy[i] / 2) * dx**2 - (xx[i] / 2) * dy**2
        image[rows, columns] += flux * fraction / (2 * pi * area[i]) * np.exp(exponent)


def _span(centre, reach, size):
    start = min(max(ceil(centre - reach), 0), size)
    return slice(start, min(max(floor(centre + reach) + 1, start), size))


def unit_noise(shape, rng, fwhm=0.0):
    """Return Gaussian noise of variance 1, smoothed by a Gaussian of that FWHM.

    It is periodic at the edges.
    """
    noise = rng.standard_normal(shape, dtype=np.float32)
    if fwhm == 0:
        return noise
    variance = fwhm**2 / (8 * log(2))
    square = np.fft.fftfreq(shape[0])[:, None] ** 2 + np.fft.fftfreq(shape[1]) ** 2
    transfer = np.exp(-2 * pi**2 * variance * square)
    smooth = np.fft.ifft2(np.fft.fft2(noise) * transfer).real
    return (smooth / np.sqrt(np.mean(transfer**2))).astype(np.float32)


def stacked_noise(shape, rng):
    """Return the noise, of variance 1, of nine images shifted by linear interpolation and added."""
    stack = np.zeros(shape)
    for y, x in rng.random((9, 2)):  # parts of a pixel
        rows = rng.normal(size=(shape[0] + 1, shape[1] + 1))
        rows = (1 - y) * rows[:-1] + y * rows[1:]
        stack += (1 - x) * rows[:, :-1] + x * rows[:, 1:]
    return stack / stack.std()
