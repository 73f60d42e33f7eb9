"""Trivial scores beside the result of a method without boxes: frame difference, and the fastest motion box by DIS flow.

Optional: evaluation.frame_baselines() uses this file where common/objects is part of the copy.
"""

import hashlib
import json
from dataclasses import replace

import cv2
import numpy as np

from common import evaluation
from common.cache import FrameCache
from common.io import UserError, load_arrays, safe_filename, save_arrays
from common.objects import flow
from common.objects.cubes import Settings, motion_boxes
from common.pool import map_videos, tick


def frame_baselines(cache: FrameCache, videos: list, workers: int) -> dict:
    """-> {title: {video name: float32 [T]}} on the frames that the method sees; computed once, kept beside them."""
    missing = [v for v in videos if not baseline_path(cache, v).exists()]
    if missing:
        total = sum(cache.info(v)["frames"] for v in missing)
        jobs = [(cache, v) for v in missing]
        _, errors = map_videos(write_baselines, jobs, workers=workers, label="trivial baselines", total=total)
        if errors:
            raise UserError(errors[0][1])
    arrays = {v.name: load_arrays(baseline_path(cache, v), "trivial baselines") for v in videos}
    return {title: {name: x[title] for name, x in arrays.items()} for title in ("frame difference", "fastest box")}


def baseline_path(cache, video):
    fingerprint = hashlib.sha256(json.dumps(video.fingerprint()).encode()).hexdigest()[:8]
    return cache.folder / "baselines" / video.split / f"{safe_filename(video.name)}-{fingerprint}.npz"


def write_baselines(job):
    cache, video = job
    frames = cache.frames(video)
    scores = {"frame difference": evaluation.frame_difference(frames), "fastest box": fastest_motion_box(frames)}
    save_arrays(baseline_path(cache, video), scores)


def fastest_motion_box(frames: np.ndarray) -> np.ndarray:
    """Largest mean DIS flow inside a frame's motion boxes. uint8 [T, H, W, C] -> float32 [T], px per frame."""
    settings, dis = Settings(), flow.make_flow("dis")
    # the default area belongs to frames of 240 × 360
    settings = replace(settings, motion_area=settings.motion_area * frames.shape[1] * frames.shape[2] / (240 * 360))
    speeds, last = np.zeros(len(frames), np.float32), len(frames) - 1

    def blurred(t):
        return cv2.GaussianBlur(np.ascontiguousarray(flow.gray(frames[min(max(t, 0), last)])), (3, 3), 0)

    for t in range(1, len(frames)):
        boxes = motion_boxes(blurred(t - 1), blurred(t), blurred(t + 1), [], settings)
        if len(boxes):
            x, y = np.moveaxis(dis([(frames[t - 1], frames[t])])[0], 2, 0)
            speed = cv2.magnitude(np.ascontiguousarray(x), np.ascontiguousarray(y))
            speeds[t] = max(speed[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1].mean() for x1, y1, x2, y2 in boxes)
        tick()
    return speeds
