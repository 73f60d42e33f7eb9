"""Object boxes for every frame, from whichever detector is at hand.

motion                              none here: motion boxes alone (see common.objects.cubes)
file:BOXES.npz                      `<training|testing>.<video>.boxes` [n, 5] and `.count` [frames]
onnx:YOLOX.onnx                     YOLOX through cv2.dnn
torchvision[:MODEL]                 a torchvision detection model, weights from torchvision's own hub
mmdet:CONFIG:CHECKPOINT             any mmdet 3 detector (optional, see requirements.txt)
"""

import pickle
import re
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from common.io import UserError, first_line, load_arrays, opencv_path

KINDS = "motion, file:BOXES.npz, onnx:YOLOX.onnx, torchvision[:MODEL], mmdet:CONFIG:CHECKPOINT"
NONE = np.zeros((0, 5), np.float32)


def files_of(spec):
    """The files that a spec names."""
    kind, _, rest = spec.partition(":")
    if kind == "mmdet":
        return re.split(r":(?![\\/])", rest)  # C:\\… and C:/… are drives
    return [rest] if kind in ("file", "onnx") else []


def check(spec):
    """Refuse a wrong --boxes before any work is done. -> the kind."""
    kind, _, rest = spec.partition(":")
    if kind not in ("motion", "file", "onnx", "torchvision", "mmdet") or (kind in ("file", "onnx") and not rest):
        raise UserError(f"--boxes {spec} is not known; choose one of {KINDS}")
    if kind == "mmdet" and len(files_of(spec)) != 2:
        raise UserError(f"--boxes {spec}: expected mmdet:CONFIG:CHECKPOINT")
    for path in files_of(spec):
        if not Path(path).is_file():
            raise UserError(f"--boxes {spec}: {path} does not exist")
    return kind


def uses_device(spec):
    return spec.partition(":")[0] in ("torchvision", "mmdet")


def fingerprint(spec):
    """What makes boxes of one spec differ from another's: the spec, and its files' sizes and times."""
    kind = check(spec)
    if kind not in ("file", "onnx", "mmdet"):
        return [spec]
    out = [kind]
    for path in files_of(spec):
        s = Path(path).stat()
        out += [Path(path).name, s.st_size, s.st_mtime_ns]
    return out


def boxes_from_file(path, video, frames):
    """Boxes of one video -> list of float32 [n, 5] (x1, y1, x2, y2, score), one per frame."""
    arrays = _npz(str(path))
    split = "training" if video.split == "train" else "testing"
    boxes, count = (arrays.get(f"{split}.{video.name}.{k}") for k in ("boxes", "count"))
    if boxes is None or count is None:
        raise UserError(f"boxes file {path} has no {split}.{video.name}.boxes and .count")
    if len(count) != frames:
        raise UserError(
            f"boxes file {path}: video {split}.{video.name} has {len(count)} frames there, {frames} on disk"
        )
    if (
        boxes.ndim != 2
        or boxes.shape[1] != 5
        or boxes.dtype.kind not in "iuf"
        or (count < 0).any()
        or count.sum() != len(boxes)
    ):
        raise UserError(f"boxes file {path}: {split}.{video.name}.boxes must be [n, 5] with n the sum of .count")
    if not np.isfinite(boxes).all():
        raise UserError(f"boxes file {path}: {split}.{video.name}.boxes holds NaN or infinite numbers")
    return np.split(boxes.astype(np.float32), np.cumsum(count)[:-1])


@lru_cache(maxsize=2)
def _npz(path):
    return load_arrays(path, "boxes file")


def make_detector(spec, device="cpu", min_score=0.05, tile=False):
    """-> function(list of uint8 [H, W, C] frames) giving a list of float32 [n, 5]."""
    kind, _, rest = spec.partition(":")
    detect = {"onnx": _onnx, "torchvision": _torchvision, "mmdet": _mmdet}[kind](rest, device, min_score)
    bgr = lambda f: f if f.shape[2] == 3 else np.repeat(f, 3, axis=2)
    if not tile:
        return lambda frames: detect([bgr(f) for f in frames])
    return lambda frames: [_tiled(detect, bgr(f)) for f in frames]


def _tiled(detect, frame):
    """The frame and four overlapping quarters (60 % of each side), merged: finds objects of a few pixels."""
    h, w = frame.shape[:2]
    th, tw = int(np.ceil(0.6 * h)), int(np.ceil(0.6 * w))
    places = [(y, x) for y in (0, h - th) for x in (0, w - tw)]
    results = detect([frame] + [np.ascontiguousarray(frame[y : y + th, x : x + tw]) for y, x in places])
    merged = [results[0]]
    for (y, x), r in zip(places, results[1:]):
        # a box that ends at an inner border of its quarter is a part of an object: a neighbour sees the whole
        inner = ((r[:, 0] > 2) | (x == 0)) & ((r[:, 1] > 2) | (y == 0))
        inner &= ((r[:, 2] < tw - 3) | (x + tw == w)) & ((r[:, 3] < th - 3) | (y + th == h))
        merged.append(r[inner] + np.array([x, y, x, y, 0], np.float32))
    return suppress(np.concatenate(merged), 0.5)


def suppress(boxes, iou):
    """Non-maximum suppression over all classes together. [n, 5] -> [m, 5]."""
    if not len(boxes):
        return NONE
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:4] - boxes[:, :2]], 1)
    keep = cv2.dnn.NMSBoxes(xywh.astype(np.float64).tolist(), boxes[:, 4].astype(np.float64).tolist(), 0.0, iou)
    return boxes[np.array(keep, dtype=np.int64).reshape(-1)]


def _onnx(path, _device, min_score, size=416):
    try:
        net = cv2.dnn.readNetFromONNX(opencv_path(path))
    except cv2.error as e:
        raise UserError(f"--boxes onnx:{path}: OpenCV cannot read this model ({first_line(e)})") from None
    grid = np.concatenate(
        [np.stack(np.meshgrid(np.arange(size // s), np.arange(size // s)), -1).reshape(-1, 2) for s in (8, 16, 32)]
    ).astype(np.float32)
    stride = np.concatenate([np.full((size // s) ** 2, s, np.float32) for s in (8, 16, 32)])[:, None]

    def one(frame):
        h, w = frame.shape[:2]
        r = min(size / h, size / w)
        canvas = np.full((size, size, 3), 114, np.uint8)
        small = cv2.resize(frame, (max(1, int(w * r)), max(1, int(h * r))), interpolation=cv2.INTER_LINEAR)
        canvas[: small.shape[0], : small.shape[1]] = small
        net.setInput(canvas.transpose(2, 0, 1)[None].astype(np.float32))
        out = net.forward().reshape(-1, 85)
        if len(out) != len(grid):
            raise UserError(f"--boxes onnx:{path}: expected YOLOX output [1, {len(grid)}, 85], got {out.shape}")
        score = out[:, 4] * out[:, 5:].max(1)
        keep = score > min_score
        center = (out[keep, :2] + grid[keep]) * stride[keep] / r
        half = np.exp(out[keep, 2:4]) * stride[keep] / r / 2
        boxes = np.concatenate([center - half, center + half], 1)
        boxes = np.clip(boxes, 0, [w - 1, h - 1, w - 1, h - 1])
        return suppress(np.concatenate([boxes, score[keep, None]], 1).astype(np.float32), 0.45)

    return lambda frames: [one(f) for f in frames]


def _torchvision(name, device, min_score):
    import torch
    from torchvision.models import detection

    name = name or "fasterrcnn_resnet50_fpn_v2"
    build = getattr(detection, name, None)
    if build is None:
        raise UserError(f"--boxes torchvision:{name}: torchvision has no detection model of that name")
    try:
        net = build(weights="DEFAULT", box_score_thresh=min_score)
    except (OSError, TypeError) as e:
        raise UserError(
            f"--boxes torchvision:{name}: its weights could not be loaded ({first_line(e)}); run once where "
            "there is a network and copy ~/.cache/torch/hub/checkpoints, or use --boxes motion"
        ) from None
    net = net.to(device).eval()

    @torch.inference_mode()
    def detect(frames):
        batch = [
            torch.from_numpy(np.ascontiguousarray(f[:, :, ::-1])).to(device).permute(2, 0, 1).float() / 255
            for f in frames
        ]
        return [torch.cat([r["boxes"], r["scores"][:, None]], 1).cpu().numpy() for r in net(batch)]

    return detect


class _Log:
    """Stands for the log that mmdet's trainings write beside the weights, which nobody reads here."""

    def __setstate__(self, state):
        pass


def _no_attribute(owner, name):
    """Stands for getattr in such a log."""


def _mmdet(rest, device, min_score):
    import torch

    config, checkpoint = files_of(f"mmdet:{rest}")
    try:
        from mmdet.apis import inference_detector, init_detector
    except ImportError as e:
        raise UserError(
            f"--boxes mmdet:… needs mmdet ({first_line(e)}); requirements.txt says how to install it"
        ) from None
    rebuild = np._core.multiarray._reconstruct
    log = [
        (_Log, "mmengine.logging.history_buffer.HistoryBuffer"),
        (_no_attribute, "builtins.getattr"),
        rebuild,
        (rebuild, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        bytes,
        *(type(np.dtype(t)) for t in ("f4", "f8", "i8")),
    ]
    try:
        with torch.serialization.safe_globals(log):
            net = init_detector(config, checkpoint, device=str(device))
    except pickle.UnpicklingError:
        raise UserError(
            f"--boxes mmdet: {checkpoint} is damaged, or holds objects that would run code on loading: refused; keep its "
            "state_dict alone in a file of its own"
        ) from None
    except Exception as e:  # configurations run code of their own, which raises many kinds
        raise UserError(f"--boxes mmdet:{rest}: the detector could not be made ({first_line(e)})") from None

    def detect(frames):
        out = []
        for result in inference_detector(net, list(frames)):
            p = result.pred_instances
            r = np.concatenate([p.bboxes.cpu().numpy(), p.scores.cpu().numpy()[:, None]], 1).astype(np.float32)
            out.append(r[r[:, 4] > min_score])
        return out

    return detect
