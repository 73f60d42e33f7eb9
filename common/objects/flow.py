"""Optical flow between consecutive frames, in pixels: OpenCV's DIS on the CPU, torchvision's RAFT on the device, or from files."""

from pathlib import Path

import cv2
import numpy as np

from common.io import UserError, load_array, stamp
from common.video import natural

METHODS = ("dis", "dis-fast", "dis-fine", "raft-small", "raft-large")
FILES = "files:"
HELP = f"optical flow: {', '.join(METHODS)}, or {FILES}DIR with one made elsewhere"
BATCH = 8  # pairs at once on the device


def check(method):
    """Refuse a wrong --flow before any work is done."""
    if method.startswith(FILES):
        if not Path(method.removeprefix(FILES)).is_dir():
            raise UserError(f"--flow {method}: there is no such folder")
    elif method not in METHODS:
        raise UserError(f"--flow {method} is not known; choose one of {', '.join(METHODS)}, {FILES}DIR")


def fingerprint(method):
    """What makes cubes of one flow differ from another's: its name; of files also common.io.stamp."""
    check(method)
    if not method.startswith(FILES):
        return method
    folder = Path(method.removeprefix(FILES))
    return [method, *stamp(folder, sorted(str(p.relative_to(folder)) for p in folder.rglob("*.npy")))]


def gray(frame):
    """uint8 [H, W, C] -> uint8 [H, W]."""
    return frame[:, :, 0] if frame.shape[2] == 1 else cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)


def uses_device(method):
    return method.startswith("raft")


def batch_of(method):
    """Pairs that are best computed at once."""
    return BATCH if uses_device(method) else 1


def make_flow(method="dis", device="cpu"):
    """-> function(pairs) of a list of (previous, next) uint8 [H, W, C] giving a list of float32 [H, W, 2]."""
    if method not in METHODS:
        raise UserError(f"--flow {method} cannot be computed; choose one of {', '.join(METHODS)}")
    return _raft(method, device) if uses_device(method) else _dis(method)


class PairFlow:
    """Flow into frames of one video from the frame before: called with frame numbers, gives float32 [H, W, 2] of each.

    frames uint8 [T, H, W, C]; flow: what make_flow gave; first_pair: the frames whose flow stands for that of frame 0.
    """

    def __init__(self, frames, flow, first_pair=(0, 0), batch=1):
        self.frames, self.flow, self.first_pair, self.batch = frames, flow, first_pair, batch

    def __call__(self, numbers):
        last = len(self.frames) - 1
        pairs = [tuple(self.frames[min(i, last)] for i in (self.first_pair if t == 0 else (t - 1, t))) for t in numbers]
        return self.flow(pairs)


class FlowFiles:
    """The same from files: <folder>/<split>/<video>.npy or <folder>/<video>.npy [T, H, W, 2], or a folder of that name with one
    [H, W, 2] per frame; entry t holds the flow from frame t-1 to t in pixels, the first one is not used."""

    batch = 1

    def __init__(self, folder, video, shape, first_pair=(0, 0)):
        self.shape, self.first_pair = tuple(shape), first_pair
        places = [Path(folder, video.split, video.name), Path(folder, video.name)]
        file = next((f for p in places if (f := p.with_name(p.name + ".npy")).is_file()), None)
        if file:
            self.parts = load_array(file, "optical flow", mmap=True)
        else:
            place = next((p for p in places if p.is_dir()), None)
            if place is None:
                raise UserError(
                    f"--flow {FILES}{folder}: there is no {video.split}/{video.name}.npy, nor a folder of that name"
                )
            self.parts = sorted(place.glob("*.npy"), key=natural)
        self.path, count = file or place, len(self.parts) if isinstance(self.parts, list) or self.parts.ndim else 0
        if count != shape[0]:
            raise UserError(f"optical flow {self.path} is of {count} frames, the video has {shape[0]}")

    def __call__(self, numbers):
        return [self.read(t if t > 0 or self.first_pair == (0, 0) else min(1, self.shape[0] - 1)) for t in numbers]

    def read(self, t):
        if t == 0:
            return np.zeros((*self.shape[1:3], 2), np.float32)
        x = self.parts[t]
        x = load_array(x, "optical flow") if isinstance(x, Path) else x
        if x.shape != (*self.shape[1:3], 2) or x.dtype.kind != "f" or not np.isfinite(x).all():
            raise UserError(
                f"optical flow {self.path}, frame {t}: expected finite numbers [{self.shape[1]}, {self.shape[2]}, 2], got "
                f"shape {x.shape} of type {x.dtype}"
            )
        return np.asarray(x, np.float32)


def _dis(method):
    dis = cv2.DISOpticalFlow_create(
        cv2.DISOPTICAL_FLOW_PRESET_FAST if method == "dis-fast" else cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
    )
    if method == "dis-fine":  # down to full resolution instead of half: for objects of a few dozen pixels
        dis.setFinestScale(0)

    def one(a, b):
        if min(a.shape[:2]) < 16:  # below DIS's patch pyramid
            return np.zeros((*a.shape[:2], 2), np.float32)
        return dis.calc(np.ascontiguousarray(gray(a)), np.ascontiguousarray(gray(b)), None)

    return lambda pairs: [one(a, b) for a, b in pairs]


def _raft(method, device):
    import torch
    import torch.nn.functional as F
    from torchvision.models import optical_flow

    small = method == "raft-small"
    weights = (optical_flow.Raft_Small_Weights if small else optical_flow.Raft_Large_Weights).DEFAULT
    try:
        net = (optical_flow.raft_small if small else optical_flow.raft_large)(weights=weights)
    except OSError as e:
        raise UserError(
            f"--flow {method}: its weights could not be downloaded ({e}); fetch {weights.url} where there "
            "is a network, put it into ~/.cache/torch/hub/checkpoints, or use --flow dis"
        ) from None
    net = net.to(device).eval()

    @torch.inference_mode()
    def run(pairs):
        out = []
        for i in range(0, len(pairs), BATCH):
            part = pairs[i : i + BATCH]
            h, w = part[0][0].shape[:2]
            a, b = (torch.from_numpy(np.stack([p[k] for p in part])).to(device) for k in (0, 1))
            both = torch.cat([a, b]).permute(0, 3, 1, 2).flip(1).float() / 127.5 - 1  # BGR -> RGB, [-1, 1]
            both = both.expand(-1, 3, -1, -1)
            bottom, right = max(0, 128 - h, -h % 8), max(0, 128 - w, -w % 8)  # RAFT wants multiples of 8, at least 128
            bottom, right = bottom + (-(h + bottom)) % 8, right + (-(w + right)) % 8
            both = F.pad(both, (0, right, 0, bottom), mode="replicate")
            flow = net(*both.chunk(2))[-1][:, :, :h, :w]
            out += list(flow.permute(0, 2, 3, 1).float().cpu().numpy())
        return out

    return run
