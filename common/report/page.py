"""report.html: one self-contained page per run, with metrics, ROC, a sortable list of videos, and for each video its
score over time with key frames, a threshold and the events above it. No network, no other file but the overlay videos.
"""

import base64
import json
import math
import urllib.parse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common.io import atomic_write
from common.readers.container import Clock
from common.readers.video import select_frames
from common.report.plots import ranges, scored_frames
from common.report.ranking import boxes_at, picture

LIMIT = 12e6  # bytes of pictures in one page, over all videos
MOST = 60  # key frames of a video
WIDTH = 240  # their width, px
SHARE = 0.05  # frames above the threshold that the page starts with
POINTS = 200  # of a ROC


def rounded(values) -> list[float | None]:
    """Four digits, None for NaN: what JSON and a screen need."""
    short = ((x, float(f"{x:.4g}")) for x in np.asarray(values, np.float64).tolist())
    # the largest floats round to infinity
    return [None if not math.isfinite(x) else y if math.isfinite(y) else x for x, y in short]


def area_curves(runs: dict[str, dict], labels: dict[str, np.ndarray]) -> tuple[list[dict], list[dict]]:
    """-> (ROC, precision-recall curve) of runs: lists of {"name", "area", "points"}; see plots.scored_frames()."""
    from sklearn.metrics import auc, precision_recall_curve, roc_curve

    roc, pr = [], []
    for title, y, s in scored_frames(runs, labels):
        fpr, tpr, _ = roc_curve(y, s)
        precision, recall, _ = precision_recall_curve(y, s)
        for out, a, b in ((roc, fpr, tpr), (pr, recall[::-1], precision[::-1])):
            keep = np.unique(np.linspace(0, len(a) - 1, POINTS).astype(int))
            points = [rounded(p) for p in np.stack([a, b], axis=1)[keep]]
            out.append({"name": title, "area": auc(a, b), "points": points})
    return roc, pr


def key_frames(
    frames, count: int, peak: int, boxes: Callable, color_range: tuple[float, float], limit: float
) -> list[tuple[int, str]]:
    """Frames at equal distances, and the one of the highest score: (number, base64 JPEG), at most `limit` bytes.

    frames: as common.readers.video.select_frames takes them; boxes(frame number) -> [n, 6].
    """
    numbers, jpegs = {*np.linspace(0, count - 1, min(MOST, count)).round().astype(int).tolist(), peak}, []
    for t, frame in select_frames(frames, numbers if count else ()):
        image = picture(frame, boxes(t), color_range, WIDTH)
        jpegs.append((t, cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 70])[1].tobytes()))
    step = max(1, math.ceil(sum(len(p) for _, p in jpegs) * 4 / 3 / limit))
    return [(t, base64.b64encode(p).decode()) for i, (t, p) in enumerate(jpegs) if i % step == 0 or t == peak]


def write(
    path,
    title: str,
    scores: dict[str, np.ndarray],
    smoothed: dict[str, np.ndarray],
    *,
    facts: Sequence[str] = (),
    notes: Sequence[tuple[str, str]] = (),
    labels: dict | None = None,
    columns: dict[str, dict] | None = None,
    rows: Sequence[tuple[str, str]] = (),
    curves: dict[str, dict] | None = None,
    auc_per_video: dict[str, float] | None = None,
    detections: dict | None = None,
    color_range: tuple[float, float] = (0.0, 1.0),
    pictures: Callable | None = None,
    overlays: dict[str, str] | None = None,
    threshold: float | None = None,
) -> None:
    """Write one page.

    scores, smoothed {video: [T]}; facts: words under the title; notes [(kind, sentence)]; labels {video: 0/1 [T]};
    columns {method: {key: number}} and rows [(key, title)] make the table, curves {title: {video: [T]}} ROC and PR;
    detections {video: [n, 6]}, coloured over `color_range`; pictures(video name) -> (frames or None, Clock); overlays
    {video: file relative to the page}; threshold: the page starts with it (default: 5 % of all frames lie above it).
    """
    labels, columns = labels or {}, columns or {}
    limit, videos = LIMIT / max(1, len(scores)), []
    progress = dict(desc="report", unit="video", dynamic_ncols=True, mininterval=2, disable=not pictures)
    for name in tqdm(sorted(scores), **progress):
        frames, clock = pictures(name) if pictures else (None, Clock())
        raw, score = np.asarray(scores[name], np.float64), np.asarray(smoothed[name], np.float64)
        is_scored = np.isfinite(score)
        peak = int(np.nanargmax(score)) if is_scored.any() else 0
        drawn = np.r_[raw[np.isfinite(raw)], score[is_scored]]
        images = []
        if frames is not None:
            images = key_frames(frames, len(score), peak, partial(boxes_at, detections, name), color_range, limit)
        video = {"name": name, "fps": clock.fps, "raw": rounded(raw), "score": rounded(score), "shots": images}
        video["times"] = None if clock.times is None else [round(x, 3) for x in clock.times[: len(score)].tolist()]
        video["auc"] = (auc_per_video or {}).get(name)
        video["truth"] = ranges(labels[name]) if name in labels else None
        video["overlay"] = overlays and urllib.parse.quote(overlays[name])
        video |= {"peak": peak, "high": float(score[peak]) if is_scored.any() else 0.0}
        video |= {"low": float(drawn.min(initial=0)), "top": float(drawn.max(initial=0))}
        videos.append(video)
    if threshold is None:
        everything = np.concatenate([np.asarray(s, np.float64) for s in smoothed.values()])
        everything = everything[np.isfinite(everything)]
        threshold = float(np.quantile(everything, 1 - SHARE)) if len(everything) else 0.0
    roc, pr = area_curves(curves, labels) if labels and curves else ([], [])
    measures = [[text, [c.get(key) for c in columns.values()]] for key, text in rows]
    data = {"title": title, "facts": list(facts), "notes": list(notes), "columns": list(columns), "roc": roc, "pr": pr}
    data["measures"] = [m for m in measures if any(x is not None for x in m[1])]
    data |= {"threshold": threshold, "videos": videos}
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = page.replace("/*DATA*/", text.replace("<", "\\u003c"))  # a name of a video may hold "</script>"
    with atomic_write(path) as tmp:  # a name that is not UTF-8 is escaped as JSON does it
        tmp.write_text(page, encoding="utf-8", errors="backslashreplace")
