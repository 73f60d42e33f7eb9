"""What the axes of arrays of features are: [clips, crops, width], [crops, clips, width] or [clips, width]."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.io import UserError

CROPS = {5, 10}  # that feature extractors make of a frame, besides one


def crops_come_first(arrays: dict[Path, np.ndarray], other_split: Callable[[], list[np.ndarray]]) -> bool:
    """Whether arrays are [crops, clips, width]: all videos have the same number of crops, but not of clips.

    arrays: those with three axes; other_split: loads those of the other split, which are asked where these do not tell.
    Raises UserError where the axes cannot be told apart.
    """
    first, second = ({x.shape[axis] for x in arrays.values()} for axis in (0, 1))
    if first != {1} and max(len(first), len(second)) == 1 and first | second <= CROPS:
        more = [x for x in other_split() if x.ndim == 3]
        first, second = ({x.shape[axis] for x in [*arrays.values(), *more]} for axis in (0, 1))
    if len(first) != 1 or not first <= CROPS | {1}:
        return False
    if first != {1} and len(second) == 1 and second <= CROPS:
        path, x = next(iter(arrays.items()))
        raise UserError(
            f"features {path}: which axis of {x.shape} are the crops cannot be told: save each crop in a file, "
            "name__0.npy … [clips, width]"
        )
    return not (len(second) == 1 and second <= CROPS | {1})


def check_not_transposed(arrays: dict[Path, np.ndarray]) -> None:
    """Raises UserError for [width, clips]: all videos have the same width, but not the same number of clips."""
    first = {x.shape[0] for x in arrays.values() if x.ndim == 2}
    last = {x.shape[-1] for x in arrays.values()}
    if len(first) == 1 and (len(last) > 1 or (min(first) % 256 == 0 and min(last) % 8)):
        path, x = next(iter(arrays.items()))
        raise UserError(f"features {path} {x.shape} look like [width, clips]: transpose them to [clips, width]")
