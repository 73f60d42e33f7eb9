"""From frames to objects: detector and motion boxes, and space-time cubes in memory-mapped records.

One record of a cube file holds uint8 `appearance` [frames, C, S, S] (C as in the source: 1 grey, 3 BGR), float16
`flow` [flows, 2, S, S] in pixels, `box` (x1, y1, x2, y2), `frame` (its number in the video) and `speed` (mean flow
magnitude inside the box, pixels per frame).
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from common.cache import VideoFiles
from common.io import load_arrays, safe_filename, save_arrays, write_json
from common.objects import detectors
from common.objects import flow as optical_flow
from common.objects.flow import gray
from common.pool import map_videos, tick


@dataclass
class Settings:
    """Everything that decides what a cube file holds; boxes in pixels, areas in square pixels."""

    boxes: str = "motion"
    tile: bool = False
    flow: str = "dis"
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
    first_pair: tuple = (0, 0)  # the frames whose flow stands for that of frame 0, which has no predecessor

    def key(self) -> str:
        """Names the cube files of these settings."""
        d = {**asdict(self), "boxes": detectors.fingerprint(self.boxes), "flow": optical_flow.fingerprint(self.flow)}
        for f in fields(self):  # omit newer fields at their default, so that old files stay valid
            if f.name in ("motion", "first_pair") and d[f.name] == f.default:
                del d[f.name]
        return short_hash(d)


def short_hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


# ----------------------------------------------------------------------------------------------------------- boxes


def drop_covered(boxes: np.ndarray, limit: float) -> np.ndarray:
    """Keep boxes [n, 4+] not covered more than `limit` of their own area by a larger one (areas counted with +1)."""
    if len(boxes) < 2:
        return boxes
    boxes = boxes[np.argsort((boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1), kind="stable")]
    x1, y1, x2, y2 = boxes[:, :4].T
    area = (x2 - x1 + 1) * (y2 - y1 + 1)
    w = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1) + 1
    h = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1) + 1
    share = np.maximum(w, 0) * np.maximum(h, 0) / area[:, None]
    return boxes[~(np.triu(share, 1) > limit).any(1)]


def object_boxes(detections: np.ndarray, s: Settings) -> np.ndarray:
    """Detections [n, 5] -> boxes [m, 4] of high score, large and uncovered enough."""
    area = (detections[:, 2] - detections[:, 0] + 1) * (detections[:, 3] - detections[:, 1] + 1)
    keep = (detections[:, 4] > s.min_score) & (area >= s.min_area)
    return drop_covered(detections[keep, :4], s.covered)


def motion_boxes(before, now, after, exclude, s: Settings) -> np.ndarray:
    """Boxes [n, 4] of what moves outside the boxes `exclude`; the three frames are blurred uint8 [H, W]."""
    difference = cv2.add(cv2.absdiff(now, before), cv2.absdiff(after, now))
    moving = (difference > s.motion_threshold).astype(np.uint8)
    if s.motion_close:
        moving = cv2.morphologyEx(moving, cv2.MORPH_CLOSE, np.ones((s.motion_close, s.motion_close), np.uint8))
    return contour_boxes(blank(moving, exclude), s.motion_area)


def flow_boxes(flow: np.ndarray, exclude, s: Settings) -> np.ndarray:
    """Boxes [n, 4] of what moves outside the boxes `exclude` by optical flow, float32 [H, W, 2] in pixels."""
    moving = (flow[..., 0] ** 2 + flow[..., 1] ** 2 > s.motion_threshold).astype(np.uint8)
    return contour_boxes(blank(moving, exclude), s.motion_area)


def blank(moving, boxes):
    """Blank boxes, grown by 2 px, in a 0/1 image (in place)."""
    for x1, y1, x2, y2 in boxes:
        moving[max(0, int(y1) - 2) : int(y2) + 3, max(0, int(x1) - 2) : int(x2) + 3] = 0
    return moving


def contour_boxes(binary: np.ndarray, min_area: float, max_aspect: float = 10, grow: int = 2) -> np.ndarray:
    """Boxes [n, 4] of the external contours of a 0/1 image, grown and clipped to the image."""
    h, w = binary.shape
    contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    out = []
    for c in contours:
        x, y, bw, bh = cv2.boundingRect(c)
        if (bw + 1) * (bh + 1) > min_area and max(bw, bh) < max_aspect * min(bw, bh):
            out.append((max(0, x - grow), max(0, y - grow), min(w - 1, x + bw + grow), min(h - 1, y + bh + grow)))
    return np.array(out, np.float32).reshape(-1, 4)


# ----------------------------------------------------------------------------------------------------------- cubes


def cube_dtype(s, channels):
    return np.dtype(
        [
            ("appearance", "u1", (len(s.frames), channels, s.size, s.size)),
            ("flow", "<f2", (len(s.flows), 2, s.size, s.size)),
            ("box", "<f4", (4,)),
            ("frame", "<i4"),
            ("speed", "<f4"),
        ]
    )


class FrameRing:
    """The pictures of a video around a frame, as channels of one array, so that a box is cropped out of all of them at once.

    offsets: their distances from the frame. Each picture [H, W, C] is copied once, over the oldest one.
    """

    def __init__(self, offsets):
        self.slots, self.numbers, self.array = max(offsets) - min(offsets) + 1, {}, None

    def put(self, number, picture):
        slot = number % self.slots
        if self.numbers.get(slot) == number:
            return
        if self.array is None:
            self.channels = picture.shape[2]
            self.array = np.empty((*picture.shape[:2], self.slots * self.channels), picture.dtype)
        self.array[:, :, slot * self.channels : (slot + 1) * self.channels] = picture
        self.numbers[slot] = number

    def crop(self, corners, numbers, size, out):
        """Boxes of the pictures `numbers`, resized, into `out` [n, len(numbers), C, size, size].

        corners: [(x1, y1, x2, y2)] of each box, x2 and y2 exclusive.
        """
        crops = np.empty((len(corners), size, size, self.slots * self.channels), self.array.dtype)
        for crop, (x1, y1, x2, y2) in zip(crops, corners):
            crop.reshape(size, size, -1)[:] = cv2.resize(self.array[y1:y2, x1:x2], (size, size)).reshape(crop.shape)
        crops = crops.reshape(len(corners), size, size, self.slots, self.channels).transpose(3, 0, 4, 1, 2)
        for i, number in enumerate(numbers):
            out[:, i] = crops[number % self.slots]


def mean_speed(flow, x1, y1, x2, y2):
    """By numpy: the last bit of cv2.magnitude depends on where its buffers lie in memory."""
    return np.sqrt(np.square(flow[y1:y2, x1:x2]).sum(2)).mean(dtype=np.float64)


def cubes_of_video(frames: np.ndarray, detections: list | None, s: Settings, flow_into):
    """Yield the records of every frame, in order: structured [n] (n may be 0).

    frames uint8 [T, H, W, C]; detections: [n, 5] per frame, or None; flow_into: a PairFlow or FlowFiles.
    """
    dtype, (count, height, width) = cube_dtype(s, frames.shape[3]), frames.shape[:3]
    flows, blurred, pictures, motions = {}, {}, FrameRing(s.frames), FrameRing(s.flows)

    def clamp(t):
        return min(max(t, 0), count - 1)

    def blur(t):
        return cv2.GaussianBlur(np.ascontiguousarray(gray(frames[t])), (s.motion_blur, s.motion_blur), 0)

    for t in range(count):
        needed = sorted({clamp(t + d) for d in s.flows} | {t})
        missing = [k for k in needed if k not in flows]
        if missing:
            missing += range(missing[-1] + 1, min(missing[-1] + flow_into.batch, count))
            flows = {k: v for k, v in flows.items() if k >= needed[0]} | dict(zip(missing, flow_into(missing)))
        boxes = np.zeros((0, 4), np.float32) if detections is None else object_boxes(detections[t], s)
        if s.motion == "flow":
            moving = flow_boxes(flows[t], boxes, s)
        else:
            blurred = {k: blurred[k] if k in blurred else blur(k) for k in (clamp(t - 1), t, clamp(t + 1))}
            moving = motion_boxes(blurred[clamp(t - 1)], blurred[t], blurred[clamp(t + 1)], boxes, s)
        boxes = np.concatenate([boxes, moving]).astype(np.float32)
        records = np.empty(len(boxes), dtype)
        if len(boxes):
            records["frame"], records["box"] = t, boxes
            low = np.clip(np.ceil(boxes[:, :2]), 0, [width - 1, height - 1]).astype(int)
            high = np.clip(np.ceil(boxes[:, 2:]), low + 1, [width, height]).astype(int)
            corners = np.concatenate([low, high], axis=1).tolist()
            for ring, source, offsets, field in (
                (pictures, frames, s.frames, "appearance"),
                (motions, flows, s.flows, "flow"),
            ):
                numbers = [clamp(t + d) for d in offsets]
                for k in numbers:
                    ring.put(k, source[k])
                ring.crop(corners, numbers, s.size, records[field])
            records["speed"] = [mean_speed(flows[t], *box) for box in corners]
        yield records


@lru_cache(maxsize=2)
def _detector(spec, device, min_score, tile):
    return detectors.make_detector(spec, device, min_score, tile)


@lru_cache(maxsize=2)
def _flow(method, device):
    return optical_flow.make_flow(method, device)


def flow_of_video(frames, video, s, device="cpu"):
    """common.objects.flow's PairFlow or FlowFiles of one video."""
    if s.flow.startswith(optical_flow.FILES):
        return optical_flow.FlowFiles(s.flow.removeprefix(optical_flow.FILES), video, frames.shape, s.first_pair)
    return optical_flow.PairFlow(frames, _flow(s.flow, device), s.first_pair, optical_flow.batch_of(s.flow))


class CubeStore(VideoFiles):
    """Boxes and cubes of one dataset under `folder`, per video; finished videos are skipped.

    info(video): {"source", "cubes", "frames", "channels"}.
    """

    what, action = "cube file", "cutting cubes"

    def __init__(self, cache, folder, settings, device="cpu"):
        super().__init__(Path(folder) / f"cubes-{settings.key()}")
        self.cache, self.s, self.device = cache, settings, device
        self.boxes_folder = Path(folder) / f"boxes-{short_hash([detectors.fingerprint(settings.boxes), settings.tile])}"

    def records(self, video):
        """Structured memory map [n]."""
        info = self.info(video)
        if info["cubes"] == 0:  # nothing to map
            return np.empty(0, cube_dtype(self.s, info["channels"]))
        return self.array(video)

    def make(self, videos, workers, show):
        s, failed = self.s, {}

        def run(function, todo, label, on_device):
            jobs, total = [(self, v) for v in todo], sum(self.cache.info(v)["frames"] for v in todo)
            processes = 1 if on_device else workers
            _, errors = map_videos(function, jobs, workers=processes, total=total, label=label, show=show)
            failed.update({todo[i].key: why for i, why in errors})

        if detectors.check(s.boxes) in ("onnx", "torchvision", "mmdet"):
            todo = [v for v in videos if not self._has_boxes(v)]
            if todo:
                if show:
                    print(f"detecting objects in {len(todo)} videos with {s.boxes}", flush=True)
                run(_detect, todo, "detect", detectors.uses_device(s.boxes))
        write_json(self.folder / "settings.json", asdict(s))
        run(_cut, [v for v in videos if v.key not in failed], "cubes", optical_flow.uses_device(s.flow))
        return failed

    def _boxes_path(self, video):
        return self.boxes_folder / video.split / f"{safe_filename(video.name)}.npz"

    def _has_boxes(self, video):
        path = self._boxes_path(video)
        return path.exists() and json.loads(str(load_arrays(path, "cached boxes")["source"])) == video.fingerprint()

    def detections(self, video, frames):
        """[n, 5] of every frame, or None with motion boxes only. Raises UserError."""
        kind, _, rest = self.s.boxes.partition(":")
        if kind == "motion":
            return None
        if kind == "file":
            return detectors.boxes_from_file(rest, video, frames)
        z = load_arrays(self._boxes_path(video), "cached boxes")
        return np.split(z["boxes"], np.cumsum(z["count"])[:-1])


def _detect(job):
    store, video = job
    detect = _detector(store.s.boxes, store.device, 0.05, store.s.tile)
    frames, boxes, source = store.cache.frames(video), [], json.dumps(video.fingerprint())
    for i in range(0, len(frames), 8):
        boxes += detect(list(frames[i : i + 8]))
        tick(len(boxes) - i)
    count = np.array([len(x) for x in boxes], np.int32)
    arrays = {"boxes": np.concatenate(boxes).astype(np.float32), "count": count, "source": source}
    save_arrays(store._boxes_path(video), arrays)


def _cut(job):
    store, video = job
    frames = store.cache.frames(video)
    channels = frames.shape[3]
    detections, flow_into = store.detections(video, len(frames)), flow_of_video(frames, video, store.s, store.device)

    def parts():
        for part in cubes_of_video(frames, detections, store.s, flow_into):
            tick()
            yield part

    def describe(shape):
        return {"cubes": shape[0], "frames": len(frames), "channels": channels}

    store.write(video, parts(), describe, cube_dtype(store.s, channels))
