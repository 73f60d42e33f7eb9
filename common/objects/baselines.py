"""Trivial scores beside the result of a method without boxes: frame difference, and flow (DIS) in motion boxes.

Optional: evaluation.frame_baselines() uses this file where common/objects is part of the copy.
"""

from pathlib import Path

import numpy as np

from common import evaluation
from common.cache import FrameCache
from common.flow import sources
from common.io import UserError, load_arrays, safe_filename, save_arrays, short_hash
from common.objects.cubes import Settings, blurred_gray, motion_boxes
from common.pool import map_videos, tick
from common.readers.video import Video


def frame_baselines(cache: FrameCache, videos: list[Video], workers: int | None) -> dict[str, dict[str, np.ndarray]]:
    """-> {title: {video name: float32 [T]}} on the frames that the method sees, cached there. Raises UserError."""
    missing = [v for v in videos if not baseline_path(cache, v).exists()]
    if missing:
        total, jobs = sum(cache.info(v)["frames"] for v in missing), [(cache, v) for v in missing]
        _, errors = map_videos(write_baselines, jobs, workers=workers, label="trivial baselines", total=total)
        if errors:
            raise UserError(errors[0][1])
    arrays = {v.name: load_arrays(baseline_path(cache, v), "trivial baselines") for v in videos}
    return {title: {name: x[title] for name, x in arrays.items()} for title in evaluation.BASELINES}


def baseline_path(cache: FrameCache, video: Video) -> Path:
    name = f"{safe_filename(video.name)}-{short_hash(video.fingerprint())[:8]}.npz"
    return cache.folder / "baselines-2" / video.split / name


def write_baselines(job: tuple[FrameCache, Video]) -> None:
    cache, video = job
    frames = cache.frames(video)
    fastest, energy = motion_box_flow(frames)
    scores = {"frame difference": evaluation.frame_difference(frames), "fastest box": fastest, "flow energy": energy}
    save_arrays(baseline_path(cache, video), scores)


def motion_box_flow(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest mean length and largest mean square of the DIS flow inside a frame's motion boxes.

    uint8 [T, H, W, C] -> float32 [T] in px per frame, float32 [T] in px².
    """
    count, h, w = frames.shape[:3]
    settings = Settings(motion_area=Settings.motion_area * h * w / (240 * 360))  # the default is for 240 × 360 pixels
    speeds, energies = np.zeros(count, np.float32), np.zeros(count, np.float32)
    flow = sources.make_dis()
    for t in range(1, count):
        around = [blurred_gray(frames[k], settings.motion_blur) for k in (t - 1, t, min(t + 1, count - 1))]
        boxes = motion_boxes(*around, [], settings)
        if len(boxes):
            square = np.square(flow(frames[t - 1], frames[t])).sum(2)
            parts = [square[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] for x1, y1, x2, y2 in boxes]
            speeds[t] = max(np.sqrt(part).mean() for part in parts)
            energies[t] = max(part.mean() for part in parts)
        tick()
    return speeds, energies
