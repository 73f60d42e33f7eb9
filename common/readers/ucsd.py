"""UCSD Ped1 and Ped2 (Mahadevan et al. 2010)."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from common.io import UserError, load_arrays, reading
from common.readers.dataset import Dataset, canonical_video_name, choose_labels, search
from common.readers.labels import Ranges, read_masks
from common.readers.published import find_videos, mat_ranges


def read_dataset(name: str, data_root: Path) -> Dataset:
    """Its videos, masks and labels. Raises UserError where they are missing or damaged."""
    data = find_videos(name, data_root)
    data.label_forms = f"{name}.mat, UCSD{name}.m, or a folder Test*_gt of masks for every test video"
    folders = {canonical_video_name(name, p.name[:-3]): p for p in search(data.root, r"test\d+_gt") if p.is_dir()}
    packed = search(data.root, r"pixel_masks_packed\.npz")
    if folders:
        data.mask_source = "Test*_gt images"
        data._masks = {k: partial(read_masks, p) for k, p in folders.items()}
    elif packed:
        data.mask_source = packed[0].name
        data._masks = packed_masks(packed[0])
    readers = {rf"{name}\.mat": mat_ranges, rf"ucsd{name}\.m": matlab_ranges}
    files = [(p, read) for pattern, read in readers.items() for p in search(data.root, pattern)]
    choose_labels(data, [(p.name, read(p)) for p, read in files[:1]])
    return data


def matlab_ranges(path: Path) -> Ranges:
    """UCSDped2.m: one line `….gt_frame = [61:180, …];` per video, 1-based inclusive."""
    out = {}
    for line in path.read_text(errors="replace").splitlines():
        assignment = re.search(r"gt_frame\s*=\s*\[([^\]]*)\]", line.split("%")[0])
        if assignment:
            pairs = re.findall(r"(\d+)\s*:\s*(\d+)", assignment[1])
            out[f"{len(out) + 1:02d}"] = [(int(a) - 1, int(b) - 1) for a, b in pairs]
    if not out:
        raise UserError(f"{path} holds no line with gt_frame = [first:last]")
    return out


def packed_masks(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """{video: function that returns its masks, bool [T, H, W]} of an .npz of bits, uint8 [T, H, width / 8]."""
    with reading("pixel masks", path, "cannot be read", Exception), np.load(path, allow_pickle=False) as z:
        return {name: partial(unpack, path, name) for name in z.files if name not in ("height", "width")}


def unpack(path: Path, name: str) -> np.ndarray:
    arrays = load_arrays(path, "pixel masks", (name, "width"))
    bits, width = arrays[name], arrays["width"]
    if bits.dtype != np.uint8 or bits.ndim != 3 or width.shape != () or not 0 < int(width) <= 8 * bits.shape[2]:
        raise UserError(f"pixel masks {path}: {name} must be packed bits, uint8 [T, H, width / 8]")
    return np.unpackbits(bits, axis=-1, count=int(width)).astype(bool)
