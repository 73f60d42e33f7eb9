"""Object boxes for every frame: which detector makes them, and boxes from a file. One of these kinds:

motion                              none: motion boxes only (see common.objects.cubes)
file:BOXES.npz                      `<training|testing>.<video>.boxes` [n, 5] and `.count` [frames]
onnx, torchvision, mmdet            a network, see networks.py, which a copy may leave out
"""

import re
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np

from common.io import UserError, load_arrays, optional_module
from common.readers.video import Video

KINDS = "motion, file:BOXES.npz, onnx:YOLOX.onnx, torchvision[:MODEL], mmdet:CONFIG:CHECKPOINT"
MODELS = ("onnx", "torchvision", "mmdet")  # the kinds of networks.py
_npz = lru_cache(maxsize=2)(load_arrays)  # one file holds the boxes of many videos


def files_of(spec: str) -> list[str]:
    """The files that a spec names."""
    kind, _, rest = spec.partition(":")
    if kind == "mmdet":
        return re.split(r":(?![\\/])", rest)  # C:\\… and C:/… are drives
    return [rest] if kind in ("file", "onnx") else []


def check(spec: str) -> str:
    """Refuse a wrong --boxes before any work is done. -> the kind. Raises UserError."""
    kind, files = spec.split(":")[0], files_of(spec)
    if kind not in ("motion", "file", *MODELS) or "" in files or (kind == "mmdet" and len(files) != 2):
        raise UserError(f"--boxes {spec} is not known; choose one of {KINDS}")
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"--boxes {spec}: {path} does not exist")
    if kind in MODELS:
        networks(spec)
    return kind


def networks(spec: str) -> ModuleType:
    """common.objects.networks, which makes the detector of this spec. Raises UserError where a copy has left it out."""
    return optional_module("common.objects.networks", f"--boxes {spec}", "choose motion or file:BOXES.npz")


def fingerprint(spec: str) -> list:
    """What distinguishes the boxes of two specs: the spec, or the names, sizes and times of its files."""
    kind, files = check(spec), [Path(path) for path in files_of(spec)]
    if not files:
        return [spec]
    return [kind, *(x for path in files for x in (path.name, path.stat().st_size, path.stat().st_mtime_ns))]


def boxes_from_file(path, video: Video, frames: int) -> list[np.ndarray]:
    """Boxes of one video: float32 [n, 5] (x1, y1, x2, y2, score) for each frame. Raises UserError."""
    arrays = _npz(str(path), "boxes file")
    name = f"{'training' if video.split == 'train' else 'testing'}.{video.name}"
    boxes, count = (arrays.get(f"{name}.{k}") for k in ("boxes", "count"))
    if boxes is None or count is None:
        raise UserError(f"boxes file {path} has no {name}.boxes and .count")
    if len(count) != frames:
        raise UserError(f"boxes file {path}: video {name} has {len(count)} frames there, {frames} on disk")
    is_table = boxes.ndim == 2 and boxes.shape[1] == 5 and boxes.dtype.kind in "iuf"
    if not is_table or (count < 0).any() or count.sum() != len(boxes) or not np.isfinite(boxes).all():
        raise UserError(f"boxes file {path}: {name}.boxes must be finite numbers [n, 5] with n the sum of .count")
    return np.split(boxes.astype(np.float32), np.cumsum(count)[:-1])
