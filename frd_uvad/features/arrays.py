"""What arrays of features hold: which axes are crops, clips and width, and which clips belong to which video."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.io import UserError, load_array
from frd_uvad.features.data import FeatureVideo

Arrays = dict[Path, np.ndarray]  # {file: features}
CROPS = {5, 10}  # that feature extractors make of a frame, besides one


def crops_come_first(arrays: Arrays, load_other_split: Callable[[], Arrays]) -> bool:
    """Whether arrays are [crops, clips, width]: all videos have the same number of crops, but not of clips.

    Where these arrays do not tell, those of the other split may. Raises UserError where they do not tell either.
    """
    arrays = {p: x for p, x in arrays.items() if x.ndim == 3}
    first, second = ({x.shape[axis] for x in arrays.values()} for axis in (0, 1))
    if max(len(first), len(second)) == 1 and first | second <= CROPS:
        more = [x for x in [*arrays.values(), *load_other_split().values()] if x.ndim == 3]
        first, second = ({x.shape[axis] for x in more} for axis in (0, 1))
    if len(first) != 1 or not first <= CROPS | {1}:
        return False
    if first != {1} and len(second) == 1 and second <= CROPS:
        path, x = next(iter(arrays.items()))
        unknown = f"which axis of {x.shape} are the crops cannot be told"
        raise UserError(f"features {path}: {unknown}: save each crop in a file, name__0.npy … [clips, width]")
    return not (len(second) == 1 and second <= CROPS | {1})


def check_not_transposed(arrays: Arrays) -> None:
    """Raises UserError for [width, clips]: all videos have the same width, but not the same number of clips."""
    first = {x.shape[0] for x in arrays.values() if x.ndim == 2}
    last = {x.shape[-1] for x in arrays.values()}
    if len(first) == 1 and (len(last) > 1 or (min(first) % 256 == 0 and min(last) % 8)):
        path, x = next(iter(arrays.items()))
        raise UserError(f"features {path} {x.shape} look like [width, clips]: transpose them to [clips, width]")


def read_concatenated(path: Path, other_path: Path | None, split: str) -> list[FeatureVideo]:
    """The videos of the array `path`. other_path: the array of the other split, if any. Raises UserError."""
    array = load_array(path, "features", mmap=True)
    if array.ndim not in (2, 3):
        raise UserError(f"features {path}: expected [clips, crops, width], got an array of shape {array.shape}")
    other_clips = len(load_array(other_path, "features", mmap=True)) if other_path else -1  # no index ends there
    rows = find_index(path, len(array), other_clips, split)
    if rows is None:
        no_index = f"has no index (nalist_{split}.npy with each video's first and last clip)"
        print(f"note: {path.name} {no_index}: it is taken for one video, windows may cross videos", flush=True)
        return [FeatureVideo(path.stem, split, [array], path=path)]
    if (rows[1:, 0] == rows[:-1, 1]).all() and (len(rows) > 1 or rows.max() == len(array)):
        rows = rows - [0, 1]  # exclusive ends
    if rows[0, 0] != 0 or rows[-1, 1] != len(array) - 1 or (rows[1:, 0] != rows[:-1, 1] + 1).any():
        raise UserError(f"the index of {path}: expected videos from clip 0 to its last one, without gaps or overlaps")
    return [FeatureVideo(f"{split}{i:04d}", split, [array], int(a), int(b), path) for i, (a, b) in enumerate(rows)]


def find_index(path: Path, clips: int, other_clips: int, split: str) -> np.ndarray | None:
    """The index beside `path` that ends where its array does: int64 [videos, 2], or None. Raises UserError."""
    indexes = {file: read_index(file) for file in sorted(path.parent.glob("*nalist*.npy"))}
    fits = [file for file, rows in indexes.items() if rows.max() in (clips - 1, clips)]
    fits_other = [file for file, rows in indexes.items() if rows.max() in (other_clips - 1, other_clips)]
    if len(fits) > 1 or (fits and fits[0] in fits_other):
        with_split = [file for file in fits if re.search("train|test", file.name, re.I)]
        named = [file for file in with_split if re.search(split, file.name, re.I)]
        if len(named) > 1 or not with_split:
            raise UserError(f"index {fits[0]} fits several arrays: call it nalist_train.npy or nalist_test.npy")
        fits = named
    if fits:
        return indexes[fits[0]]
    for file, rows in indexes.items():
        if file not in fits_other or re.search(split, file.name, re.I):
            raise UserError(f"index {file} ends at clip {rows.max()}, and {path.name} has {clips}: it must end there")
    return None


def read_index(file: Path) -> np.ndarray:
    """First and last clip of each video, or its end: int64 [videos, 2]. Raises UserError."""
    rows = load_array(file, "index of videos")
    is_index = rows.ndim == 2 and rows.shape[1] == 2 and rows.size and rows.dtype.kind in "iuf"
    if not is_index or not (0 <= rows[:, 0]).all() or not (rows[:, 0] <= rows[:, 1]).all() or np.isinf(rows).any():
        raise UserError(f"index {file}: expected [videos, 2] of the first and last clips of each video")
    return rows.astype(np.int64)
