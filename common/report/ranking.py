"""For videos without labels: the highest peaks of the score as ranking.csv, thumbnails and one contact sheet."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from common.io import writing_table
from common.readers.container import Clock
from common.readers.pictures import as_channels, write_image
from common.readers.video import select_frames
from common.report.plots import contact_sheet, draw_box, share_of

COLUMNS = "rank video start_frame end_frame start_seconds end_seconds peak_frame score thumbnail".split()


def top_peaks(smoothed: dict[str, np.ndarray], *, top: int = 20, share: float = 0.5, gap: int = 25) -> list[tuple]:
    """The highest peaks of scores {video: [T]} -> (video, first, last, peak frame, peak score) each, highest first.

    A peak reaches as far around its frame as the score stays above `share` of the way from the median over all videos
    to its score; `gap` frames before and after it are part of no other one. Frames that are NaN are left out.
    """
    remaining = {k: np.where(np.isfinite(s), s, -np.inf).astype(np.float64) for k, s in smoothed.items() if len(s)}
    everything = np.concatenate([s[np.isfinite(s)] for s in remaining.values()] or [np.zeros(0)])
    middle, peaks = float(np.median(everything)) if len(everything) else 0.0, []
    while len(everything) and len(peaks) < top:
        video = max(remaining, key=lambda k: remaining[k].max())
        s = remaining[video]
        t = int(np.argmax(s))
        if not np.isfinite(s[t]) or (s[t] <= middle and peaks):
            break
        is_high = s >= middle + share * (s[t] - middle)
        is_high[t] = True
        below = np.flatnonzero(~is_high)
        i = np.searchsorted(below, t)
        first = int(below[i - 1]) + 1 if i else 0
        last = int(below[i]) - 1 if i < len(below) else len(s) - 1
        peaks.append((video, first, last, t, float(s[t])))
        s[max(0, first - gap) : last + gap + 1] = -np.inf
    return peaks


def picture(frame: np.ndarray, boxes: np.ndarray, color_range: tuple[float, float], width: int = 480) -> np.ndarray:
    """uint8 [h, width, 3] with boxes [n, 6] (frame, x1, y1, x2, y2, score), coloured; the highest one is thick."""
    image = as_channels(frame, 3)
    scale = width / image.shape[1]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.resize(image, (width, max(1, round(image.shape[0] * scale))), interpolation=interpolation)
    for i, box in enumerate(boxes[np.argsort(boxes[:, 5])]):
        draw_box(image, box[1:5], scale, share_of(box[5], color_range), i == len(boxes) - 1)
    return image


def boxes_at(detections: dict | None, name: str, t: int) -> np.ndarray:
    """The boxes of one frame, [n, 6]; detections {video: [n, 6] or None} or None."""
    boxes = (detections or {}).get(name)
    return np.zeros((0, 6), np.float32) if boxes is None else boxes[boxes[:, 0] == t]


def write_ranking(
    smoothed: dict[str, np.ndarray],
    out: Path,
    *,
    pictures: Callable | None = None,
    detections: dict | None = None,
    color_range: tuple[float, float] = (0.0, 1.0),
    top: int = 20,
) -> list[tuple]:
    """Write ranking.csv and, with pictures(video name) -> (frames or None, Clock), thumbnails/ and contact_sheet.png.

    smoothed {video: [T]}; detections {video: [n, 6]}, coloured over `color_range`. The first peaks are printed, all are
    returned: see top_peaks().
    """
    peaks, images = top_peaks(smoothed, top=top), {}
    clocks = {}
    for name in {p[0] for p in peaks} if pictures else ():
        frames, clocks[name] = pictures(name)
        for t, frame in select_frames(frames, {p[3] for p in peaks if p[0] == name}) if frames is not None else ():
            images[name, t] = picture(frame, boxes_at(detections, name, t), color_range)
    tiles = []
    with writing_table(out / "ranking.csv") as table:
        table.writerow(COLUMNS)
        for rank, (name, first, last, t, score) in enumerate(peaks, 1):
            thumbnail, clock = "", clocks.get(name, Clock())
            if (name, t) in images:
                thumbnail, seconds = f"thumbnails/{rank:02d}.jpg", f"  {clock.text(t, 1)} s" if clock.text(t, 1) else ""
                write_image(out / thumbnail, images[name, t])
                tiles.append((images[name, t], f"{rank}. {name}  frame {t}{seconds}  score {score:.3g}"))
            times = clock.text(first, 2), clock.text(last, 2)
            table.writerow([rank, name, first, last, *times, t, f"{score:.6g}", thumbnail])
    contact_sheet(out / "contact_sheet.png", tiles[:12])
    print("most abnormal moments:")
    for rank, (name, first, last, _, score) in enumerate(peaks[:5], 1):
        start, end = (clocks.get(name, Clock()).text(t, 1) for t in (first, last))
        seconds = f", {start}..{end} s" if start else ""
        print(f"  {rank:2d}. {score:9.4g}  {name}, frames {first}..{last}{seconds}")
    print(f"wrote {out}/ranking.csv" + (", thumbnails/, contact_sheet.png" if tiles else ""))
    return peaks
