"""SExtractor, set up with the tool's defaults.

Imports nothing but the standard library: benchmark.py has to stay a small process.
"""

import shutil

PROGRAM = next(filter(None, map(shutil.which, ("source-extractor", "sex", "sextractor"))), None)
KERNEL = "CONV NORM\n1 2 1\n2 4 2\n1 2 1\n"
SETTINGS = {
    **{"DETECT_MINAREA": 5, "DETECT_THRESH": 1.5, "ANALYSIS_THRESH": 1.5},
    **{"THRESH_TYPE": "RELATIVE", "FILTER": "Y", "WEIGHT_TYPE": "NONE"},
    **{"DEBLEND_NTHRESH": 32, "DEBLEND_MINCONT": 0.005, "CLEAN": "Y", "CLEAN_PARAM": 1.0},
    **{"MASK_TYPE": "CORRECT", "PHOT_AUTOPARAMS": "2.5, 3.5", "PHOT_FLUXFRAC": 0.5},
    **{"MAG_ZEROPOINT": 0.0, "GAIN": 0.0, "GAIN_KEY": "NONE", "PIXEL_SCALE": 1.0},
    **{"SATUR_LEVEL": 1e29, "SATUR_KEY": "NONE", "VERBOSE_TYPE": "QUIET"},
    **{"BACK_SIZE": 64, "BACK_FILTERSIZE": 3, "BACKPHOTO_TYPE": "GLOBAL"},
}


def configured(directory, columns, kernel=KERNEL, **settings):
    """Write SExtractor's files into a directory; return the command, to which an image is added.

    Its catalogue gets these columns; the settings are added to those that make it work as the tool.
    """
    (directory / "columns.param").write_text("\n".join(columns) + "\n")
    (directory / "default.conv").write_text(kernel)
    settings |= {
        "PARAMETERS_NAME": directory / "columns.param",
        "FILTER_NAME": directory / "default.conv",
    }
    lines = (f"{name} {value}\n" for name, value in (SETTINGS | settings).items())
    (directory / "sextractor.conf").write_text("".join(lines))
    return [PROGRAM, "-c", directory / "sextractor.conf"]
