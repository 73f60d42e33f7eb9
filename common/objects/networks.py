"""Detectors that are networks. Optional: a copy without this file has motion boxes, and boxes from a file.

onnx:YOLOX.onnx                     YOLOX through cv2.dnn
torchvision[:MODEL]                 a torchvision detection model, weights from torchvision's own hub
mmdet:CONFIG:CHECKPOINT             any mmdet 3 detector (optional, see requirements.txt)
"""

import pickle
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

from common.io import UserError, first_line, opencv_path
from common.objects.detectors import files_of
from common.readers.pictures import as_channels


@lru_cache(maxsize=2)
def make_detector(spec: str, device: str = "cpu", tile: bool = False, min_score: float = 0.05) -> Callable:
    """-> function(list of uint8 [H, W, C]) -> list of float32 [n, 5]; tile: also in quarters. Raises UserError."""
    kind, _, rest = spec.partition(":")
    detect = {"onnx": _onnx, "torchvision": _torchvision, "mmdet": _mmdet}[kind](rest, device, min_score)
    if not tile:
        return lambda frames: detect([as_channels(f, 3) for f in frames])
    return lambda frames: [_tiled(detect, as_channels(f, 3)) for f in frames]


def _tiled(detect, frame):
    """The frame and four overlapping quarters (60 % of each side), merged: finds objects of a few pixels."""
    h, w = frame.shape[:2]
    th, tw = int(np.ceil(0.6 * h)), int(np.ceil(0.6 * w))
    corners = [(y, x) for y in (0, h - th) for x in (0, w - tw)]
    whole, *quarters = detect([frame] + [np.ascontiguousarray(frame[y : y + th, x : x + tw]) for y, x in corners])
    merged = [whole]
    for (y, x), r in zip(corners, quarters):
        # a box that ends at an inner border of its quarter is a part of an object: a neighbour sees the whole
        inner = ((r[:, 0] > 2) | (x == 0)) & ((r[:, 1] > 2) | (y == 0))
        inner &= ((r[:, 2] < tw - 3) | (x + tw == w)) & ((r[:, 3] < th - 3) | (y + th == h))
        merged.append(r[inner] + np.array([x, y, x, y, 0], np.float32))
    return suppress(np.concatenate(merged), 0.5)


def suppress(boxes: np.ndarray, iou: float) -> np.ndarray:
    """Non-maximum suppression over all classes together. [n, 5] -> [m, 5]."""
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:4] - boxes[:, :2]], 1)
    keep = cv2.dnn.NMSBoxes(xywh.astype(np.float64).tolist(), boxes[:, 4].astype(np.float64).tolist(), 0.0, iou)
    return boxes[np.array(keep, np.int64).reshape(-1)]


def _onnx(path, _device, min_score):
    try:
        net = cv2.dnn.readNetFromONNX(opencv_path(path))
    except cv2.error as e:
        raise UserError(f"--boxes onnx:{path}: OpenCV cannot read this model ({first_line(e)})") from None
    size, strides = 416, (8, 16, 32)
    cells = np.array([(x, y, s) for s in strides for y in range(size // s) for x in range(size // s)], np.float32)

    def detect(frame):
        h, w = frame.shape[:2]
        r = min(size / h, size / w)
        small = cv2.resize(frame, (max(1, int(w * r)), max(1, int(h * r))), interpolation=cv2.INTER_LINEAR)
        canvas = np.full((size, size, 3), 114, np.uint8)
        canvas[: small.shape[0], : small.shape[1]] = small
        net.setInput(cv2.dnn.blobFromImage(canvas))
        out = net.forward().reshape(-1, 85)
        if len(out) != len(cells):
            raise UserError(f"--boxes onnx:{path}: expected YOLOX output [1, {len(cells)}, 85], got {out.shape}")
        score = out[:, 4] * out[:, 5:].max(1)
        keep = score > min_score
        corner, stride = cells[keep, :2], cells[keep, 2:]
        center = (out[keep, :2] + corner) * stride / r
        half = np.exp(out[keep, 2:4]) * stride / r / 2
        boxes = np.clip(np.concatenate([center - half, center + half], 1), 0, [w - 1, h - 1, w - 1, h - 1])
        return suppress(np.concatenate([boxes, score[keep, None]], 1).astype(np.float32), 0.45)

    return lambda frames: [detect(f) for f in frames]


def _torchvision(name, device, min_score):
    import torch
    from torchvision.models import detection, get_model, list_models

    name = name or "fasterrcnn_resnet50_fpn_v2"
    if name not in list_models(module=detection):
        raise UserError(f"--boxes torchvision:{name}: torchvision has no detection model of that name")
    try:
        net = get_model(name, weights="DEFAULT", box_score_thresh=min_score).to(device).eval()
    except (OSError, TypeError) as e:
        way_out = "run once where there is a network and copy ~/.cache/torch/hub/checkpoints, or use --boxes motion"
        raise UserError(
            f"--boxes torchvision:{name}: no weights could be loaded ({first_line(e)}); {way_out}"
        ) from None

    @torch.inference_mode()
    def detect(frames):
        rgb = [torch.from_numpy(f[:, :, ::-1].copy()).to(device).permute(2, 0, 1).float() / 255 for f in frames]
        return [torch.cat([r["boxes"], r["scores"][:, None]], 1).cpu().numpy() for r in net(rgb)]

    return detect


class _Log:
    """Stands for the log that mmdet's trainings write beside the weights, which is not read here."""

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
        raise UserError(f"--boxes mmdet:… needs mmdet ({first_line(e)}); see requirements.txt") from None
    rebuild = np.empty(0).__reduce__()[0]
    log = [(_Log, "mmengine.logging.history_buffer.HistoryBuffer"), (_no_attribute, "builtins.getattr")]
    log += [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, bytes]
    log += [type(np.dtype(t)) for t in ("f4", "f8", "i8")]
    try:
        with torch.serialization.safe_globals(log):
            net = init_detector(config, checkpoint, device=str(device))
    except pickle.UnpicklingError:
        reason = "is damaged, or holds objects that would run code on loading: refused; save only its state_dict"
        raise UserError(f"--boxes mmdet: {checkpoint} {reason}") from None
    except Exception as e:  # configurations run code of their own, which raises many kinds
        raise UserError(f"--boxes mmdet:{rest}: the detector could not be made ({first_line(e)})") from None

    def detect(frames):
        objects = [result.pred_instances for result in inference_detector(net, list(frames))]
        boxes = [torch.cat([o.bboxes, o.scores[:, None]], 1).float().cpu().numpy() for o in objects]
        return [b[b[:, 4] > min_score] for b in boxes]

    return detect
