"""Smoothing of frame scores. Every filter takes one video's scores, float [T], and returns float64 [T].

A filter is written `name:parameters` on the command line, for example median:17, gaussian:3, none.
"""

from collections.abc import Callable

import numpy as np

from common.io import UserError


def median(x: np.ndarray, width: float = 17) -> np.ndarray:
    """Median of `width` frames, zero beyond the ends (HF2-VAD). An even width, which has no center, grows by one."""
    from scipy import ndimage

    return ndimage.median_filter(np.asarray(x, np.float64), int(width) // 2 * 2 + 1, mode="constant", cval=0.0)


def gaussian(x: np.ndarray, sigma: float = 3) -> np.ndarray:
    """Gaussian of standard deviation `sigma` frames, mirrored at the ends."""
    from scipy import ndimage

    return ndimage.gaussian_filter1d(np.asarray(x, np.float64), sigma)


def moving_average(x: np.ndarray, width: float = 10) -> np.ndarray:
    """Mean of `width` frames, zero beyond the ends (LBR-SPR)."""
    width, x = int(width), np.asarray(x, np.float64)
    return np.convolve(x, np.ones(width) / width, "full")[(width - 1) // 2 :][: len(x)]


def aedmae(x: np.ndarray, size: float = 38, sigma: float = 11) -> np.ndarray:
    """The sampled Gaussian of AED-MAE: not normalised, zero beyond the ends, its peak one frame before the center."""
    half = int(size) // 2 - 1
    offset = np.arange(-half, half + 1)
    kernel = np.exp(-(((offset + 1) / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
    return np.correlate(np.pad(np.asarray(x, np.float64), half), kernel, "valid")


def none(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)


FILTERS = {"median": median, "gaussian": gaussian, "moving_average": moving_average, "aedmae": aedmae, "none": none}


def parse(spec: str) -> Callable[[np.ndarray], np.ndarray]:
    """ "median:17" -> function of one video's scores, float [T] -> float64 [T]. Raises UserError."""
    name, *numbers = str(spec).split(":")
    try:
        values = [float(v) for v in numbers]
    except ValueError:
        values = [0.0]
    if name not in FILTERS or any(not 0 < v < 1e6 for v in values):
        example = f"write one of {', '.join(FILTERS)} with its numbers, for example median:17"
        raise UserError(f"--smoothing {spec} is not known; {example}")

    def apply(x):
        return FILTERS[name](x, *values) if len(x) else none(x)

    try:
        apply(np.zeros(4))
    except TypeError:
        raise UserError(f"--smoothing {spec}: too many numbers for {name}") from None
    except ValueError:
        raise UserError(f"--smoothing {spec}: a width of at least 1 is needed, 2 for aedmae") from None
    return apply


def minmax(x: np.ndarray) -> np.ndarray:
    """To [0, 1] over the array; all zeros where it is constant."""
    x = np.asarray(x, np.float64)
    span = np.ptp(x) if len(x) else 0
    return (x - x.min()) / span if span > 0 else np.zeros_like(x)
