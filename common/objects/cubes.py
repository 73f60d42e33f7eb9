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

    def key(self):
        d = {**asdict(self), "boxes": detectors.fingerprint(self.boxes), "flow": optical_flow.fingerprint(self.flow)}
        for f in fields(self):  # fields that came later leave the names of older files alone
            if f.name in ("motion", "first_pair") and d[f.name] == f.default:
                del d[f.name]
        return hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()[:10]


# ----------------------------------------------------------------------------------------------------------- boxes


def drop_covered(boxes, limit):
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


def object_boxes(found, s):
    """Detections [n, 5] -> boxes [m, 4] that are sure, large and uncovered enough."""
    area = (found[:, 2] - found[:, 0] + 1) * (found[:, 3] - found[:, 1] + 1)
    keep = (found[:, 4] > s.min_score) & (area >= s.min_area)
    return drop_covered(found[keep, :4], s.covered)


def motion_boxes(before, now, after, known, s):
    """Boxes [n, 4] of what moves outside the `known` boxes; the three frames are blurred uint8 [H, W]."""
    difference = cv2.add(cv2.absdiff(now, before), cv2.absdiff(after, now))
    moving = (difference > s.motion_threshold).astype(np.uint8)
    if s.motion_close:
        moving = cv2.morphologyEx(moving, cv2.MORPH_CLOSE, np.ones((s.motion_close, s.motion_close), np.uint8))
    return contour_boxes(outside(moving, known), s.motion_area)


def flow_boxes(flow, known, s):
    """Boxes [n, 4] of what moves outside the `known` boxes by optical flow, float32 [H, W, 2] in pixels."""
    moving = (flow[..., 0] ** 2 + flow[..., 1] ** 2 > s.motion_threshold).astype(np.uint8)
    return contour_boxes(outside(moving, known), s.motion_area)


def outside(moving, known):
    """Blank the `known` boxes, grown by 2 px, in a 0/1 image (in place)."""
    for x1, y1, x2, y2 in known:
        moving[max(0, int(y1) - 2) : int(y2) + 3, max(0, int(x1) - 2) : int(x2) + 3] = 0
    return moving


def contour_boxes(binary, min_area, max_aspect=10, grow=2):
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


def record(s, channels):
    return np.dtype(
        [
            ("appearance", "u1", (len(s.frames), channels, s.size, s.size)),
            ("flow", "<f2", (len(s.flows), 2, s.size, s.size)),
            ("box", "<f4", (4,)),
            ("frame", "<i4"),
            ("speed", "<f4"),
        ]
    )


class Ring:
    """The pictures of a video around t as channels of one array, so that a box is cropped out of all of them at once.

    steps: their distances from t. Each picture [H, W, C] is copied once, over the one that has fallen behind.
    """

    def __init__(self, steps):
        self.slots, self.held, self.array = max(steps) - min(steps) + 1, {}, None

    def put(self, number, picture):
        slot = number % self.slots
        if self.held.get(slot) == number:
            return
        if self.array is None:
            self.channels = picture.shape[2]
            self.array = np.empty((*picture.shape[:2], self.slots * self.channels), picture.dtype)
        self.array[:, :, slot * self.channels : (slot + 1) * self.channels] = picture
        self.held[slot] = number

    def cut(self, lo, hi, numbers, size, out):
        """Boxes of the pictures `numbers`, resized, into `out` [n, len(numbers), C, size, size]. lo, hi: corners (x, y), hi outside."""
        parts = np.empty((len(lo), size, size, self.slots * self.channels), self.array.dtype)
        for part, (x1, y1), (x2, y2) in zip(parts, lo, hi):
            part.reshape(size, size, -1)[:] = cv2.resize(self.array[y1:y2, x1:x2], (size, size)).reshape(part.shape)
        parts = parts.reshape(len(lo), size, size, self.slots, self.channels).transpose(3, 0, 4, 1, 2)
        for i, number in enumerate(numbers):
            out[:, i] = parts[number % self.slots]


def cut(boxes, frames, flows, t, at, flow, s, dtype):
    """Records of frame t's boxes. frames, flows: Rings of what is around it; flow: into it, float32 [H, W, 2]."""
    out = np.empty(len(boxes), dtype)
    out["frame"], out["box"] = t, boxes
    h, w = flow.shape[:2]
    lo = np.clip(np.ceil(boxes[:, :2]), 0, [w - 1, h - 1]).astype(int)
    hi = np.clip(np.ceil(boxes[:, 2:]), lo + 1, [w, h]).astype(int)
    lo, hi = lo.tolist(), hi.tolist()
    frames.cut(lo, hi, [at(t + d) for d in s.frames], s.size, out["appearance"])
    flows.cut(lo, hi, [at(t + d) for d in s.flows], s.size, out["flow"])
    for i, ((x1, y1), (x2, y2)) in enumerate(zip(lo, hi)):
        part = flow[y1:y2, x1:x2]
        out["speed"][i] = cv2.mean(cv2.magnitude(part[..., 0], part[..., 1]))[0]
    return out


def cubes_of_video(frames, found, s, flow_into):
    """Yield the records of every frame, in order: structured [n] (n may be 0).

    frames uint8 [T, H, W, C]; found: list of [n, 5] detections per frame, or None; flow_into: of flow_of_video.
    """
    last = len(frames) - 1
    at = lambda t: min(max(t, 0), last)
    dtype = record(s, frames.shape[3])
    flow_of, blurred, pictures, motions = {}, {}, Ring(s.frames), Ring(s.flows)
    blur = lambda t: cv2.GaussianBlur(np.ascontiguousarray(gray(frames[t])), (s.motion_blur, s.motion_blur), 0)
    for t in range(len(frames)):
        wanted = sorted({at(t + d) for d in s.flows} | {t})
        missing = [k for k in wanted if k not in flow_of]
        if missing:
            missing += range(missing[-1] + 1, min(missing[-1] + flow_into.batch, len(frames)))
            flow_of = {k: v for k, v in flow_of.items() if k >= wanted[0]} | dict(zip(missing, flow_into(missing)))
        boxes = object_boxes(found[t], s) if found is not None else np.zeros((0, 4), np.float32)
        if s.motion == "flow":
            moving = flow_boxes(flow_of[t], boxes, s)
        else:
            blurred = {k: blurred[k] if k in blurred else blur(k) for k in (at(t - 1), t, at(t + 1))}
            moving = motion_boxes(blurred[at(t - 1)], blurred[t], blurred[at(t + 1)], boxes, s)
        boxes = np.concatenate([boxes, moving]).astype(np.float32)
        if not len(boxes):
            yield np.empty(0, dtype)
            continue
        for d in s.frames:
            pictures.put(at(t + d), frames[at(t + d)])
        for d in s.flows:
            motions.put(at(t + d), flow_of[at(t + d)])
        yield cut(boxes, pictures, motions, t, at, flow_of[t], s, dtype)


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

    what = "cube file"

    def __init__(self, cache, folder, settings, device="cpu"):
        super().__init__(Path(folder) / f"cubes-{settings.key()}")
        self.cache, self.s, self.device = cache, settings, device
        self.boxes_folder = Path(folder) / (
            "boxes-"
            + hashlib.sha256(json.dumps([detectors.fingerprint(settings.boxes), settings.tile]).encode()).hexdigest()[
                :10
            ]
        )

    def records(self, video):
        """Structured memory map [n]."""
        info = self.info(video)
        if info["cubes"] == 0:  # nothing to map
            return np.empty(0, record(self.s, info["channels"]))
        return self.array(video)

    def build(self, videos, workers, show=True):
        """Make what is missing. -> (videos that are there, {video key: why} of those that failed)."""
        fresh, failed = self.missing(videos)
        if not fresh:
            return [v for v in videos if v.key not in failed], failed
        s, length = self.s, {v.key: self.cache.info(v)["frames"] for v in fresh}
        if detectors.check(s.boxes) in ("onnx", "torchvision", "mmdet"):
            todo = [v for v in fresh if not self._has_boxes(v)]
            if todo:
                if show:
                    print(f"detecting objects in {len(todo)} videos with {s.boxes}", flush=True)
                _, errors = map_videos(
                    _detect,
                    [(self, v) for v in todo],
                    workers=1 if detectors.uses_device(s.boxes) else workers,
                    total=sum(length[v.key] for v in todo),
                    label="detect",
                    show=show,
                )
                failed.update({todo[i].key: e for i, e in errors})
                fresh = [v for v in fresh if v.key not in failed]
        write_json(self.folder / "settings.json", asdict(s))
        if show:
            print(f"cutting cubes of {len(fresh)} of {len(videos)} videos into {self.folder}", flush=True)
        _, errors = map_videos(
            _cut,
            [(self, v) for v in fresh],
            workers=1 if optical_flow.uses_device(s.flow) else workers,
            total=sum(length[v.key] for v in fresh),
            label="cubes",
            show=show,
        )
        failed.update({fresh[i].key: e for i, e in errors})
        return [v for v in videos if v.key not in failed], failed

    def _boxes_path(self, video):
        return self.boxes_folder / video.split / f"{safe_filename(video.name)}.npz"

    def _has_boxes(self, video):
        path = self._boxes_path(video)
        return path.exists() and json.loads(str(load_arrays(path, "cached boxes")["source"])) == video.fingerprint()

    def detections(self, video, frames):
        """list of [n, 5] per frame, or None with motion boxes alone."""
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
    frames, found, source = store.cache.frames(video), [], json.dumps(video.fingerprint())
    for i in range(0, len(frames), 8):
        found += detect(list(frames[i : i + 8]))
        tick(len(found) - i)
    save_arrays(
        store._boxes_path(video),
        {
            "boxes": np.concatenate(found).astype(np.float32),
            "count": np.array([len(f) for f in found], np.int32),
            "source": source,
        },
    )


def _cut(job):
    store, video = job
    frames = store.cache.frames(video)
    found, flow_into = store.detections(video, len(frames)), flow_of_video(frames, video, store.s, store.device)

    def parts():
        for part in cubes_of_video(frames, found, store.s, flow_into):
            tick()
            yield part

    store.write(
        video,
        parts(),
        lambda shape: {"cubes": shape[0], "frames": len(frames), "channels": frames.shape[3]},
        record(store.s, frames.shape[3]),
    )
