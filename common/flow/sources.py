"""Where optical flow between consecutive frames comes from: OpenCV's DIS at once, RAFT from a cache, or files."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np

from common.io import UserError, load_array, reading, stamp
from common.readers.pictures import as_channels
from common.readers.video import Video, natural

DIS = ("dis", "dis-fast", "dis-fine")
RAFT = ("raft-small", "raft-large")
FILES = "files:"
KINDS = f"{', '.join(DIS)}, {', '.join(f'{name}[:FILE]' for name in RAFT)}, or {FILES}DIR with one made elsewhere"
HELP = f"optical flow: {KINDS}"
PUBLISHED_SIDE = 1024  # pixels of the longer side, to which frames are enlarged before a learned flow


def is_learned(method: str) -> bool:
    """Whether a network computes it: then it is cached for every video."""
    return method.partition(":")[0] in RAFT


def fingerprint(method: str, scale: float = 0, updates: int = 12, precision: str = "fp32") -> str | list:
    """What distinguishes the cubes of two flows: the method, of files also their content or common.io.stamp, and of a
    network all that it is computed with. Raises UserError for wrong settings."""
    name, _, path = method.partition(":")
    if name in RAFT:
        content = ""
        if path:
            if not Path(path).is_file():
                raise UserError(f"--flow {method}: there is no file {path}; name its weights with --flow {name}:FILE")
            with reading("--flow weights", path, "cannot be read"):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        return [name, content, scale, updates, precision]
    if method in DIS:
        return method if scale in (0, 1) else [method, scale]
    if name + ":" != FILES:
        raise UserError(f"--flow {method} is not known; choose one of {KINDS}")
    if not Path(path).is_dir():
        raise UserError(f"--flow {method}: there is no such folder")
    if scale:
        raise UserError(f"--flow-scale {scale:g} enlarges frames before a flow is computed: not with --flow {FILES}…")
    return [method, *stamp(path, sorted(str(p.relative_to(path)) for p in Path(path).rglob("*.npy")))]


def flow_scale(method: str, scale: float, height: int, width: int) -> float:
    """How much frames of this size are enlarged: `scale`, or by default (0) to PUBLISHED_SIDE for a network."""
    return scale or (PUBLISHED_SIDE / max(height, width) if is_learned(method) else 1.0)


def gray(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H, W], contiguous."""
    return np.ascontiguousarray(as_channels(frame, 1)[:, :, 0])


def make_dis(method: str = "dis", scale: float = 1.0) -> Callable:
    """-> function(previous, next: uint8 [H, W, C]) -> float32 [H, W, 2] in pixels, computed on frames enlarged `scale`
    times."""
    is_fast = method == "dis-fast"
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST if is_fast else cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    if method == "dis-fine":  # down to full resolution instead of half: for objects of a few dozen pixels
        dis.setFinestScale(0)

    def flow(a, b):
        height, width = a.shape[:2]
        a, b = gray(a), gray(b)
        if scale != 1:
            a, b = (cv2.resize(x, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for x in (a, b))
        if min(a.shape) < 16:  # below DIS's patch pyramid
            return np.zeros((height, width, 2), np.float32)
        out = dis.calc(a, b, None)
        return out if scale == 1 else cv2.resize(out, (width, height), interpolation=cv2.INTER_AREA) / scale

    return flow


class PairFlow:
    """Flow into frames of one video from the frame before: called with frame numbers, gives float32 [H, W, 2] of each.

    frames uint8 [T, H, W, C]; flow: from make_dis(); first_pair: the frames whose flow stands for that of frame 0.
    """

    def __init__(self, frames: np.ndarray, flow: Callable, first_pair: tuple = (0, 0)):
        self.frames, self.flow = frames, flow
        self.first_pair = first_pair

    def __call__(self, numbers: Iterable[int]) -> list[np.ndarray]:
        last = len(self.frames) - 1
        pairs = [self.first_pair if t == 0 else (t - 1, t) for t in numbers]
        return [self.flow(self.frames[min(a, last)], self.frames[min(b, last)]) for a, b in pairs]


class StoredFlow:
    """As PairFlow, from arrays. flows: [T, H, W, 2], or T files with one [H, W, 2] each; entry t holds the flow from
    frame t-1 to t in pixels, the first one is not used.

    shape: of the video's frames, [T, H, W, C]; path: named in errors. Raises UserError, also when called.
    """

    def __init__(self, flows, path: Path, shape: tuple, first_pair: tuple = (0, 0)):
        if len(flows) != shape[0]:
            raise UserError(f"optical flow {path} is of {len(flows)} frames, the video has {shape[0]}")
        self.flows, self.path = flows, path
        self.shape, self.first_pair = (*shape[1:3], 2), first_pair

    def __call__(self, numbers: Iterable[int]) -> list[np.ndarray]:
        first = 0 if self.first_pair == (0, 0) else min(1, len(self.flows) - 1)
        return [self.read(t or first) for t in numbers]

    def read(self, t: int) -> np.ndarray:
        if t == 0:
            return np.zeros(self.shape, np.float32)
        x = self.flows[t]
        x = load_array(x, "optical flow") if isinstance(x, Path) else x
        if x.shape != self.shape or x.dtype.kind != "f" or not np.isfinite(x).all():
            expected = f"expected finite numbers {list(self.shape)}, got shape {x.shape} of type {x.dtype}"
            raise UserError(f"optical flow {self.path}, frame {t}: {expected}")
        return np.asarray(x, np.float32)


def flow_from_files(folder, video: Video, shape: tuple, first_pair: tuple = (0, 0)) -> StoredFlow:
    """<folder>/<split>/<video>.npy or <folder>/<video>.npy [T, H, W, 2], or a folder of that name with one [H, W, 2]
    per frame. Raises UserError."""
    folders = [Path(folder, video.split, video.name), Path(folder, video.name)]
    files = [p.with_name(p.name + ".npy") for p in folders]
    path = next((p for p in files + folders if p.exists()), None)
    if path is None:
        raise UserError(f"--flow {FILES}{folder}: no {video.split}/{video.name}.npy, nor a folder of that name")
    if path.is_dir():
        return StoredFlow(sorted(path.glob("*.npy"), key=natural), path, shape, first_pair)
    flows = load_array(path, "optical flow", mmap=True)
    return StoredFlow(flows if flows.ndim else [], path, shape, first_pair)
