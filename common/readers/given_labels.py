"""--labels: frame labels to take instead of a dataset's own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from common.io import UserError, load_array, load_arrays, optional_module
from common.readers.dataset import OTHER_VERSION, Dataset, canonical_video_name
from common.readers.labels import FOLDER, csv_ranges, entries_of_videos, frame_labels, read_masks


def use_labels(data: Dataset, path: Path) -> None:
    """Take frame labels of a Dataset from `path` instead, each by its video's name.

    path: an .npz of 0/1 per frame, an .npy of all test frames in order, a csv (video,start,end), a .mat (ped2.mat), or
    a folder with one file of labels or masks, or one folder of masks, per video. Raises UserError.
    """
    names = {v.name for v in data.test}
    canonical_name = partial(canonical_video_name, data.name)
    data._labels, data.label_source = {}, str(path)
    data.other_labels = None
    if path.suffix.lower() == ".csv":
        data._labels = csv_ranges(path, names, canonical_name)
        return
    if path.suffix.lower() == ".npy":
        data._labels = cut_by_video(data, path)
        return
    if path.suffix.lower() == ".mat":
        published = optional_module("common.readers.published", f"--labels {path}", "write a csv")
        data._labels = published.mat_ranges(path)
        return
    if not path.is_dir():
        arrays = load_arrays(path, "label file")
        keys = named_once(path, [(canonical_name(k), k) for k in arrays])
        data._labels = {name: partial(arrays.get, k) for name, k in keys.items()}
        return
    entries = sorted(path.iterdir())
    mask_folders = [p for p in entries if p.is_dir() and p.name.lower().endswith("_gt")]
    if mask_folders:  # UCSD: folders of frames lie beside those of masks
        entries = [p for p in entries if p in mask_folders or not p.is_dir()]
    pairs, others = entries_of_videos(entries, (".npy", ".npz", ".txt", ".mat", FOLDER), names, canonical_name)
    files = named_once(path, pairs)
    if not files:
        example, content = min(names, default="(there is none)"), ", ".join(others[:5]) or "nothing"
        missing = "no .npy, .npz, .txt, .mat or folder named after a test video"
        raise UserError(f"--labels {path} holds {missing} such as {example}; it holds {content}")
    if others:
        print(f"note: --labels {path}: {len(others)} entries belong to no test video, such as {others[0]}", flush=True)
    masks = {name for name, file in files.items() if holds_masks(path / file)}
    for name, file in files.items():
        data._labels[name] = partial(read_masks if name in masks else frame_labels, path / file)
    normal = sorted(names - set(files)) if masks else []  # sets of masks leave normal videos out
    data._labels.update({name: [] for name in normal})
    if normal:
        count = f"{len(normal)} test videos have no mask in {path} and count as normal"
        print(f"note: {count}, such as {normal[0]}", flush=True)


def cut_by_video(data: Dataset, path: Path) -> dict[str, Callable]:
    """A vector of 0/1 over the frames of all test videos in order -> {video: function that returns its part}."""
    y, lengths = load_array(path, "frame labels").reshape(-1), [v.expected_frames() for v in data.test]
    if data.test != sorted(data.test, key=lambda v: v.name):  # 9, 10: other tools may have read 10 before 9
        raise UserError(f"--labels {path}: the order of its videos is ambiguous, give an .npz with their names")
    if len(y) != sum(lengths):
        raise UserError(f"--labels {path} holds {len(y)} numbers for {sum(lengths)} test frames: {OTHER_VERSION}")
    return {v.name: partial(np.array, part) for v, part in zip(data.test, np.split(y, np.cumsum(lengths)[:-1]))}


def named_once(path: Path, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """{video: entry} of the pairs that `path` holds. Raises UserError where a video has two entries."""
    out = {}
    for name, entry in pairs:
        if name in out:
            both = f"{out[name]} and {entry} are both labels of video {name}"
            raise UserError(f"--labels {path}: {both}; keep one of them")
        out[name] = entry
    return out


def holds_masks(path: Path) -> bool:
    if path.is_dir() or path.suffix in (".mat", ".npz"):
        return True
    return path.suffix == ".npy" and load_array(path, "labels", mmap=True).ndim == 3
