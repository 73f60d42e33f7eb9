"""Optical flow between consecutive frames in pixels: OpenCV's DIS on the CPU, torchvision's RAFT, or from files."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from common.io import UserError, load_array, stamp
from common.pictures import as_channels
from common.video import Video, natural

METHODS = ("dis", "dis-fast", "dis-fine", "raft-small", "raft-large")
FILES = "files:"
KINDS = f"{', '.join(METHODS)}, or {FILES}DIR with one made elsewhere"
HELP = f"optical flow: {KINDS}"
BATCH = 8  # pairs at once on the device


def fingerprint(method: str) -> str | list:
    """What distinguishes the cubes of two flows: the name, of files also common.io.stamp. Raises UserError if wrong."""
    if method in METHODS:
        return method
    folder = Path(method.removeprefix(FILES))
    if not method.startswith(FILES):
        raise UserError(f"--flow {method} is not known; choose one of {KINDS}")
    if not folder.is_dir():
        raise UserError(f"--flow {method}: there is no such folder")
    return [method, *stamp(folder, sorted(str(p.relative_to(folder)) for p in folder.rglob("*.npy")))]


def gray(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H, W], contiguous."""
    return np.ascontiguousarray(as_channels(frame, 1)[:, :, 0])


def uses_device(method: str) -> bool:
    return method.startswith("raft")


@lru_cache(maxsize=2)
def make_flow(method: str = "dis", device: str = "cpu") -> Callable:
    """-> function(list of pairs (previous, next) of uint8 [H, W, C]) -> list of float32 [H, W, 2]. Raises UserError."""
    if method not in METHODS:
        raise UserError(f"--flow {method} cannot be computed; choose one of {', '.join(METHODS)}")
    return _raft(method, device) if uses_device(method) else _dis(method)


class PairFlow:
    """Flow into frames of one video from the frame before: called with frame numbers, gives float32 [H, W, 2] of each.

    frames uint8 [T, H, W, C]; flow: from make_flow(); first_pair: the frames whose flow stands for that of frame 0;
    batch: how many pairs are best computed at once.
    """

    def __init__(self, frames: np.ndarray, flow: Callable, first_pair: tuple = (0, 0), batch: int = 1):
        self.frames, self.flow = frames, flow
        self.first_pair, self.batch = first_pair, batch

    def __call__(self, numbers: Iterable[int]) -> list[np.ndarray]:
        last = len(self.frames) - 1
        pairs = [self.first_pair if t == 0 else (t - 1, t) for t in numbers]
        return self.flow([(self.frames[min(a, last)], self.frames[min(b, last)]) for a, b in pairs])


class FlowFiles:
    """As PairFlow, from files: <folder>/<split>/<video>.npy or <folder>/<video>.npy [T, H, W, 2], or a folder of that
    name with one [H, W, 2] per frame; entry t holds the flow from frame t-1 to t in pixels, the first one is not used.

    shape: of the video's frames, [T, H, W, C]. Raises UserError, also when called.
    """

    batch = 1

    def __init__(self, folder, video: Video, shape: tuple, first_pair: tuple = (0, 0)):
        self.shape, self.first_pair = (*shape[1:3], 2), first_pair
        folders = [Path(folder, video.split, video.name), Path(folder, video.name)]
        files = [p.with_name(p.name + ".npy") for p in folders]
        self.path = next((p for p in files + folders if p.exists()), None)
        if self.path is None:
            raise UserError(f"--flow {FILES}{folder}: no {video.split}/{video.name}.npy, nor a folder of that name")
        if self.path.is_dir():
            self.flows = sorted(self.path.glob("*.npy"), key=natural)
        else:
            flows = load_array(self.path, "optical flow", mmap=True)
            self.flows = flows if flows.ndim else []
        if len(self.flows) != shape[0]:
            raise UserError(f"optical flow {self.path} is of {len(self.flows)} frames, the video has {shape[0]}")

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


def _dis(method):
    is_fast = method == "dis-fast"
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST if is_fast else cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    if method == "dis-fine":  # down to full resolution instead of half: for objects of a few dozen pixels
        dis.setFinestScale(0)

    def one(a, b):
        if min(a.shape[:2]) < 16:  # below DIS's patch pyramid
            return np.zeros((*a.shape[:2], 2), np.float32)
        return dis.calc(gray(a), gray(b), None)

    return lambda pairs: [one(a, b) for a, b in pairs]


def _raft(method, device):
    import torch
    import torch.nn.functional as F
    from torchvision.models import get_model, get_model_weights

    name = method.replace("-", "_")
    weights = get_model_weights(name).DEFAULT
    try:
        net = get_model(name, weights=weights).to(device).eval()
    except OSError as e:
        way_out = f"put {weights.url} into ~/.cache/torch/hub/checkpoints, or use --flow dis"
        raise UserError(f"--flow {method}: its weights could not be downloaded ({e}); {way_out}") from None

    @torch.inference_mode()
    def run(pairs):
        flows = []
        for i in range(0, len(pairs), BATCH):
            previous, following = zip(*pairs[i : i + BATCH])
            frames = np.stack([*previous, *following])
            h, w = frames.shape[1:3]
            rgb = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).flip(1).float() / 127.5 - 1  # [-1, 1]
            bottom, right = (max(128, -(-n // 8) * 8) - n for n in (h, w))  # RAFT: multiples of 8, at least 128
            rgb = F.pad(rgb.expand(-1, 3, -1, -1), (0, right, 0, bottom), mode="replicate")
            flow = net(*rgb.chunk(2))[-1][:, :, :h, :w]
            flows += list(flow.permute(0, 2, 3, 1).float().cpu().numpy())
        return flows

    return run
