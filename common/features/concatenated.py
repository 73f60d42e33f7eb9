"""UCF-Crime's form: the clips of all videos in one array, and an index with the first and last clip of each video."""

import re
from pathlib import Path

import numpy as np

from common.features.data import FeatureVideo
from common.io import UserError, load_array


def read_concatenated(path: Path, other_path: Path | None, split: str) -> list[FeatureVideo]:
    """The videos of the array `path`. other_path: the array of the other split, if any. Raises UserError."""
    array = load_array(path, "features", mmap=True)
    if array.ndim not in (2, 3):
        raise UserError(f"features {path}: expected [clips, crops, width], got an array of shape {array.shape}")
    other_clips = len(load_array(other_path, "features", mmap=True)) if other_path else None
    rows = find_index(path, len(array), other_clips, split)
    if rows is None:
        missing = f"nalist_{split}.npy with each video's first and last clip"
        print(f"note: {path.name} has no index ({missing}): it is taken for one video, and windows may cross videos")
        return [FeatureVideo(path.stem, split, [array], path=path)]
    if (rows[1:, 0] == rows[:-1, 1]).all() and (len(rows) > 1 or rows.max() == len(array)):
        rows = rows - [0, 1]  # the index has ends, which are exclusive
    if rows[0, 0] != 0 or rows[-1, 1] != len(array) - 1 or (rows[1:, 0] != rows[:-1, 1] + 1).any():
        raise UserError(f"the index of {path}: expected videos from clip 0 to its last one, without gaps or overlaps")
    return [FeatureVideo(f"{split}{i:04d}", split, [array], int(a), int(b), path) for i, (a, b) in enumerate(rows)]


def find_index(path: Path, clips: int, other_clips: int | None, split: str) -> np.ndarray | None:
    """The index beside `path` that ends where its array does: int64 [videos, 2], or None. Raises UserError."""
    indexes = {file: read_index(file) for file in sorted(path.parent.glob("*nalist*.npy"))}

    def ends_at(file, clips):
        return clips is not None and indexes[file].max() in (clips - 1, clips)

    fits = [file for file in indexes if ends_at(file, clips)]
    if len(fits) > 1 or (fits and ends_at(fits[0], other_clips)):
        with_split = [file for file in fits if re.search("train|test", file.name, re.I)]
        named = [file for file in with_split if re.search(split, file.name, re.I)]
        if len(named) > 1 or not with_split:
            raise UserError(f"index {fits[0]} fits several arrays: call it nalist_train.npy or nalist_test.npy")
        fits = named
    if fits:
        return indexes[fits[0]]
    for file, rows in indexes.items():
        if not ends_at(file, other_clips) or re.search(split, file.name, re.I):
            raise UserError(
                f"index {file} ends at clip {rows.max()}, but {path.name} has {clips}: it is another version"
            )
    return None


def read_index(file: Path) -> np.ndarray:
    rows = load_array(file, "index of videos")
    is_index = rows.ndim == 2 and rows.shape[1] == 2 and rows.size and rows.dtype.kind in "iuf"
    if not is_index or not (0 <= rows[:, 0]).all() or not (rows[:, 0] <= rows[:, 1]).all() or np.isinf(rows).any():
        raise UserError(f"index {file}: expected [videos, 2] of the first and last clips of each video")
    return rows.astype(np.int64)
