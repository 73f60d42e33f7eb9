"""From frames to objects: detector and motion boxes, and space-time cubes in memory-mapped records.

One record of a cube file holds uint8 `appearance` [frames, C, S, S] (C as in the source: 1 grey, 3 BGR), float16
`flow` [flows, 2, S, S] in pixels, `box` (x1, y1, x2, y2), `frame` (its number in the video) and `speed` (mean flow
magnitude inside the box, pixels per frame).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from common.cache import FrameCache, VideoFiles
from common.flow import sources
from common.io import optional_module, short_hash, write_json
from common.objects import detectors
from common.pool import tick
from common.readers.video import Video

MAX_ASPECT, GROW = 10, 2  # motion boxes: longest side over shortest, and pixels added on every side


@dataclass
class Settings:
    """Everything that decides what a cube file holds; boxes in pixels, areas in square pixels."""

    boxes: str = "motion"
    tile: bool = False
    flow: str = "dis"
    flow_scale: float = 0  # frames are enlarged so much before the flow; 0: the default of common.flow.sources
    flow_updates: int = 12  # of RAFT
    flow_precision: str = "fp32"  # of RAFT
    min_score: float = 0.5
    min_area: float = 100
    covered: float = 0.6  # drop a box covered more than this by a larger one
    motion: str = "difference"  # motion boxes from frame differences, or from optical "flow"
    motion_blur: int = 3
    motion_threshold: float = 18  # grey levels; with flow the squared length in px²
    motion_area: float = 100
    motion_close: int = 0  # join moving parts up to this many pixels apart (0: as published)
    frames: tuple = (-4, -3, -2, -1, 0)  # relative to the box's frame
    flows: tuple = (-3, -2, -1, 0)
    size: int = 32
    first_pair: tuple = (0, 0)  # frames whose flow replaces the missing one of frame 0

    def key(self) -> str:
        """Hash for the name of the folder of the cubes. Raises UserError for wrong boxes or flow."""
        d = {
            **asdict(self),
            "boxes": detectors.fingerprint(self.boxes),
            "flow": sources.fingerprint(*self.flow_settings()),
        }
        for name in ("flow_scale", "flow_updates", "flow_precision"):  # part of the fingerprint
            del d[name]
        for name in ("motion", "first_pair"):  # newer fields: without their defaults, older cache keys stay valid
            if d[name] == getattr(Settings, name):
                del d[name]
        return short_hash(d)

    def flow_settings(self) -> tuple:
        """As common.flow.sources.fingerprint() and common.flow.cache.FlowCache take them."""
        return self.flow, self.flow_scale, self.flow_updates, self.flow_precision


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """[n, 4+] -> [n], px²; both corners are inside."""
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def drop_covered(boxes: np.ndarray, limit: float) -> np.ndarray:
    """Keep boxes [n, 4] not covered more than `limit` of their area by a larger one; the smallest first."""
    boxes = boxes[np.argsort(box_areas(boxes), kind="stable")]
    size = np.minimum(boxes[:, None, 2:], boxes[:, 2:]) - np.maximum(boxes[:, None, :2], boxes[:, :2]) + 1
    share = np.maximum(size, 0).prod(2) / box_areas(boxes)[:, None]
    return boxes[~(np.triu(share, 1) > limit).any(1)]


def object_boxes(detections: np.ndarray, s: Settings) -> np.ndarray:
    """Detections [n, 5] -> boxes [m, 4] that are sure, large and uncovered enough."""
    keep = (detections[:, 4] > s.min_score) & (box_areas(detections) >= s.min_area)
    return drop_covered(detections[keep, :4], s.covered)


def blurred_gray(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H, W] after a Gaussian of `size` pixels, odd."""
    return cv2.GaussianBlur(sources.gray(frame), (size, size), 0)


def motion_boxes(before: np.ndarray, now: np.ndarray, after: np.ndarray, exclude, s: Settings) -> np.ndarray:
    """Boxes [n, 4] of motion outside the boxes `exclude` [m, 4]; the three frames are blurred uint8 [H, W]."""
    difference = cv2.add(cv2.absdiff(now, before), cv2.absdiff(after, now))
    moving = (difference > s.motion_threshold).astype(np.uint8)
    if s.motion_close:
        moving = cv2.morphologyEx(moving, cv2.MORPH_CLOSE, np.ones((s.motion_close, s.motion_close), np.uint8))
    return contour_boxes(moving, exclude, s.motion_area)


def flow_boxes(flow: np.ndarray, exclude, s: Settings) -> np.ndarray:
    """Boxes [n, 4] of motion outside the boxes `exclude` [m, 4] by optical flow, float32 [H, W, 2] in pixels."""
    moving = (flow[..., 0] ** 2 + flow[..., 1] ** 2 > s.motion_threshold).astype(np.uint8)
    return contour_boxes(moving, exclude, s.motion_area)


def contour_boxes(moving: np.ndarray, exclude, min_area: float) -> np.ndarray:
    """Boxes float32 [n, 4] around what is 1 in an image outside the boxes `exclude` (blanked in it); all grown."""
    for x1, y1, x2, y2 in exclude:
        moving[max(0, int(y1) - GROW) : int(y2) + GROW + 1, max(0, int(x1) - GROW) : int(x2) + GROW + 1] = 0
    boxes, (height, width) = [], moving.shape
    for contour in cv2.findContours(moving, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
        x, y, w, h = cv2.boundingRect(contour)
        if (w + 1) * (h + 1) > min_area and max(w, h) < MAX_ASPECT * min(w, h):
            x2, y2 = min(width - 1, x + w + GROW), min(height - 1, y + h + GROW)
            boxes.append((max(0, x - GROW), max(0, y - GROW), x2, y2))
    return np.array(boxes, np.float32).reshape(-1, 4)


def cube_dtype(s: Settings, channels: int) -> np.dtype:
    appearance = ("appearance", "u1", (len(s.frames), channels, s.size, s.size))
    flows = ("flow", "<f2", (len(s.flows), 2, s.size, s.size))
    return np.dtype([appearance, flows, ("box", "<f4", (4,)), ("frame", "<i4"), ("speed", "<f4")])


def crop_all(pictures: list[np.ndarray], corners: list, size: int) -> np.ndarray:
    """Crop n boxes out of all pictures [H, W, C] and resize them: [n, len(pictures), C, size, size].

    corners: n of (x1, y1, x2, y2), where x2 and y2 are the first ones outside.
    """
    merged = [cv2.merge([p[y1:y2, x1:x2] for p in pictures]) for x1, y1, x2, y2 in corners]  # one resize for all
    crops = np.stack([cv2.resize(crop, (size, size)) for crop in merged])
    return crops.reshape(len(corners), size, size, len(pictures), -1).transpose(0, 3, 4, 1, 2)


def cubes_of_video(frames: np.ndarray, detections, s: Settings, flow_into: Callable) -> Iterator[np.ndarray]:
    """Yield the records of every frame, in order: structured [n] (n may be 0).

    frames uint8 [T, H, W, C]; detections: list of [n, 5] per frame, or None; flow_into: a PairFlow or StoredFlow.
    """
    last, (h, w) = len(frames) - 1, frames.shape[1:3]
    dtype = cube_dtype(s, frames.shape[3])
    flow_of, blurred = {}, {}
    for t in range(len(frames)):
        flow_numbers = [min(max(t + d, 0), last) for d in s.flows]
        needed = sorted({*flow_numbers, t})
        missing = [k for k in needed if k not in flow_of]
        if missing:
            flow_of = {k: v for k, v in flow_of.items() if k >= needed[0]} | dict(zip(missing, flow_into(missing)))
        boxes = np.zeros((0, 4), np.float32) if detections is None else object_boxes(detections[t], s)
        if s.motion == "flow":
            moving = flow_boxes(flow_of[t], boxes, s)
        else:
            around = (max(t - 1, 0), t, min(t + 1, last))
            blurred = {k: blurred[k] if k in blurred else blurred_gray(frames[k], s.motion_blur) for k in around}
            moving = motion_boxes(*(blurred[k] for k in around), boxes, s)
        boxes = np.concatenate([boxes, moving]).astype(np.float32)
        out = np.empty(len(boxes), dtype)
        if len(boxes):
            low = np.clip(np.ceil(boxes[:, :2]), 0, [w - 1, h - 1]).astype(int)
            high = np.clip(np.ceil(boxes[:, 2:]), low + 1, [w, h]).astype(int)
            corners = np.hstack([low, high]).tolist()
            pictures = [frames[min(max(t + d, 0), last)] for d in s.frames]
            out["appearance"] = crop_all(pictures, corners, s.size)
            out["flow"] = crop_all([flow_of[k] for k in flow_numbers], corners, s.size)
            crops = [flow_of[t][y1:y2, x1:x2] for x1, y1, x2, y2 in corners]
            # by numpy: the last bit of cv2.magnitude depends on where its buffers lie in memory
            out["speed"] = [np.sqrt(np.square(crop).sum(2)).mean(dtype=np.float64) for crop in crops]
            out["frame"], out["box"] = t, boxes
        tick()
        yield out


class BoxFiles(VideoFiles):
    """Boxes of a network, float32 [n, 5] (x1, y1, x2, y2, score) per video. info(video): {"source", "count": of every
    frame}."""

    what = "cached boxes"

    def __init__(self, cache: FrameCache, folder, spec: str, tile: bool, device: str):
        super().__init__(Path(folder) / f"boxes-{short_hash([detectors.fingerprint(spec), tile])}")
        self.action = f"detecting objects with {spec}"
        self.cache, self.spec = cache, spec
        self.tile, self.device = tile, device

    def make(self, videos: list[Video], workers: int, show: bool) -> dict[str, str]:
        workers = workers if self.spec.startswith("onnx") else 1
        return self.run_jobs(_detect, videos, lambda v: self.cache.info(v)["frames"], workers, "detect", show)


class CubeStore(VideoFiles):
    """Boxes and cubes of one dataset under `folder`, per video; finished videos are skipped.

    info(video): {"source", "cubes", "frames", "channels"}.
    """

    what, action = "cube file", "cutting cubes"

    def __init__(self, cache: FrameCache, folder, settings: Settings, device: str = "cpu"):
        super().__init__(Path(folder) / f"cubes-{settings.key()}")
        self.cache, self.s = cache, settings
        self.device = device
        self.flows = None
        if sources.is_learned(settings.flow):
            networks = optional_module("common.flow.cache", f"--flow {settings.flow}", "choose dis")
            self.flows = networks.FlowCache(cache, folder, *settings.flow_settings(), device)
        self.boxes = BoxFiles(cache, folder, settings.boxes, settings.tile, device)

    def make(self, videos: list[Video], workers: int, show: bool) -> dict[str, str]:
        failed = {}
        if detectors.check(self.s.boxes) in detectors.MODELS:
            videos, failed = self.boxes.build(videos, workers, show)
        if self.flows:
            videos, without_flow = self.flows.build(videos, workers, show)
            failed |= without_flow
        write_json(self.folder / "settings.json", asdict(self.s))
        return failed | self.run_jobs(_cut, videos, lambda v: self.cache.info(v)["frames"], workers, "cubes", show)

    def flow_into(self, video: Video, frames: np.ndarray) -> sources.PairFlow | sources.StoredFlow:
        """What gives the optical flow of one video. Raises UserError."""
        s = self.s
        if self.flows:
            return self.flows.read(video, frames.shape, s.first_pair)
        if s.flow.startswith(sources.FILES):
            return sources.flow_from_files(s.flow.removeprefix(sources.FILES), video, frames.shape, s.first_pair)
        dis = sources.make_dis(s.flow, sources.flow_scale(s.flow, s.flow_scale, *frames.shape[1:3]))
        return sources.PairFlow(frames, dis, s.first_pair)

    def detections(self, video: Video, frames: int) -> list[np.ndarray] | None:
        """float32 [n, 5] of each of the `frames`; None where there are motion boxes only. Raises UserError."""
        kind, _, path = self.s.boxes.partition(":")
        if kind == "motion":
            return None
        if kind == "file":
            return detectors.boxes_from_file(path, video, frames)
        return np.split(self.boxes.array(video), np.cumsum(self.boxes.info(video)["count"])[:-1])


def _detect(job):
    files, video = job
    detect = detectors.networks(files.spec).make_detector(files.spec, files.device, files.tile)
    frames, count = files.cache.frames(video), []

    def parts():
        for i in range(0, len(frames), 8):
            boxes = detect(list(frames[i : i + 8]))
            count.extend(map(len, boxes))
            tick(len(boxes))
            yield np.concatenate(boxes).astype(np.float32)

    files.write(video, parts(), lambda shape: {"count": count})


def _cut(job):
    store, video = job
    frames = store.cache.frames(video)
    detections = store.detections(video, len(frames))
    cubes = cubes_of_video(frames, detections, store.s, store.flow_into(video, frames))

    def describe(shape):
        return {"cubes": shape[0], "frames": len(frames), "channels": frames.shape[3]}

    store.write(video, cubes, describe, cube_dtype(store.s, frames.shape[3]))
