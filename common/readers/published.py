"""Published datasets: where their folders are, in any of the layouts in circulation, and labels in MATLAB files."""

from functools import partial
from pathlib import Path

import numpy as np

from common.io import UserError
from common.readers.dataset import Dataset, canonical_video_name, normalized_name
from common.readers.datasets import ALIASES
from common.readers.labels import Ranges, read_mat
from common.readers.splits import SPLITS, TEST, TRAIN, split_folders, videos
from common.readers.video import shortened

WRAPPERS = ("ucsdanomalydatasetv1p2", "ucsdanomalydataset", "ucsd")  # folders that hold a dataset's folder


def find_videos(name: str, data_root: Path) -> Dataset:
    """A dataset's videos, as yet without labels, found at data_root or three folders below. Raises UserError."""
    root, folders = locate(name, data_root)
    canonical_name = partial(canonical_video_name, name)
    train, test = (videos(folders[split], split, canonical_name) for split in SPLITS)
    return Dataset(name, root, train, test)


def locate(name: str, data_root: Path) -> tuple[Path, dict[str, list[Path]]]:
    """-> (root of the dataset, {split: its folders}), at data_root or three folders below. Raises UserError."""

    def called(folders, names):
        return sorted(p for f in folders for p in f.iterdir() if p.is_dir() and normalized_name(p.name) in names)

    level, roots = [data_root], []
    for _ in range(3):
        roots += called(level, ALIASES[name])
        level = called(level, (*ALIASES[name], *WRAPPERS))
    # the data root may hold several datasets, and other videos: it counts after the folders named after this one
    folders = {root: {split: split_folders(root, split) for split in SPLITS} for root in [*roots, data_root]}
    for root in sorted(folders, key=lambda root: not folders[root]["train"]):
        names = {normalized_name(root.name), normalized_name(root.resolve().name)}
        if folders[root]["test"] and (folders[root]["train"] or root != data_root or names & set(ALIASES[name])):
            return root, folders[root]
    content = sorted(p.name + ("/" if p.is_dir() else "") for p in data_root.iterdir())
    looked = f"a training folder ({TRAIN[0]}, {TRAIN[-1]}, …) and a testing folder ({TEST[0]}, {TEST[-1]}, …)"
    raise UserError(
        f"{name} was not found under --data-root {data_root}: looked in {', '.join(map(str, folders))} for {looked} "
        f"with videos or folders of frames; found {shortened(content, 12)}"
    )


def mat_ranges(path: Path) -> Ranges:
    """`gt` of ped2.mat and avenue.mat: per video 2×k, 1-based inclusive."""
    out = {}
    for i, cell in enumerate(read_mat(path, "gt").reshape(-1), 1):
        pairs = np.asarray(cell)
        is_ranges = pairs.ndim == 2 and len(pairs) == 2 and pairs.dtype.kind in "iuf" and np.isfinite(pairs).all()
        if pairs.size and not is_ranges:
            shape = f"ranges of shape {pairs.shape} and type {pairs.dtype}"
            raise UserError(f"{path}: video {i} has {shape}, expected whole numbers 2×k")
        pairs = pairs.astype(np.int64).reshape(2, -1) - 1
        out[f"{i:02d}"] = [(int(a), int(b)) for a, b in pairs.T]
    return out
