"""report.html: one self-contained page per run, with metrics, ROC, a sortable list of videos, and for each video its score over
time with key frames, a threshold and the events above it. No network, no other file but the overlay videos it links to.
"""

import base64
import json
import math
import urllib.parse
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common.container import Clock
from common.io import atomic_write
from common.report.plots import ranges
from common.report.ranking import boxes_at, picture
from common.video import select_frames

LIMIT = 12e6  # bytes of pictures in one page, over all videos
MOST = 60  # key frames of a video
WIDTH = 240  # their width, px
SHARE = 0.05  # frames above the threshold that the page starts with
POINTS = 200  # of a ROC


def rounded(values):
    """Four digits, None for NaN: what JSON and a screen need."""
    short = ((x, float(f"{x:.4g}")) for x in np.asarray(values, np.float64).tolist())
    return [
        None if not math.isfinite(x) else y if math.isfinite(y) else x for x, y in short
    ]  # the largest floats round to infinity


def area_curves(runs, labels):
    """-> (ROC, precision-recall curve) of runs {title: {video: [T]}}: lists of {"name", "area", "points"}; frames that are NaN are
    left out."""
    from sklearn.metrics import auc, precision_recall_curve, roc_curve

    names = sorted(labels)
    y, roc, pr = np.concatenate([labels[k] for k in names]), [], []
    for title, scores in runs.items():
        s = np.concatenate([scores[k] for k in names])
        ok = np.isfinite(s)
        if len(np.unique(y[ok])) < 2:
            continue
        fpr, tpr, _ = roc_curve(y[ok], s[ok])
        precision, recall, _ = precision_recall_curve(y[ok], s[ok])
        for out, a, b in ((roc, fpr, tpr), (pr, recall[::-1], precision[::-1])):
            keep = np.unique(np.linspace(0, len(a) - 1, POINTS).astype(int))
            out.append(
                {"name": title, "area": auc(a, b), "points": [rounded(p) for p in np.stack([a, b], axis=1)[keep]]}
            )
    return roc, pr


def key_frames(frames, count, peak, boxes, span, limit):
    """Frames at equal distances, and the one of the highest score. -> [(number, base64 JPEG)], at most `limit` bytes.

    frames: as common.video.select_frames takes them; boxes(frame number) -> [n, 6].
    """
    wanted, done = {*np.linspace(0, count - 1, min(MOST, count)).round().astype(int).tolist(), peak}, []
    for t, frame in select_frames(frames, wanted if count else ()):
        image = picture(frame, boxes(t), span, WIDTH)
        done.append((t, cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 70])[1].tobytes()))
    step = max(1, math.ceil(sum(len(p) for _, p in done) * 4 / 3 / limit))
    return [(t, base64.b64encode(p).decode()) for i, (t, p) in enumerate(done) if i % step == 0 or t == peak]


def video_entry(name, raw, score, *, labels, auc, frames, clock, boxes, span, limit, overlay):
    finite = np.isfinite(score)
    peak = int(np.nanargmax(score)) if finite.any() else 0
    both = np.r_[np.asarray(raw, np.float64), score[finite]]
    both = both[np.isfinite(both)]
    times = None if clock.times is None else [round(x, 3) for x in clock.times[: len(score)].tolist()]
    return {
        "name": name,
        "fps": clock.fps,
        "times": times,
        "auc": auc,
        "overlay": overlay,
        "raw": rounded(raw),
        "score": rounded(score),
        "peak": peak,
        "low": float(both.min(initial=0)),
        "top": float(both.max(initial=0)),
        "high": float(score[peak]) if finite.any() else 0.0,
        "truth": None if labels is None else ranges(labels),
        "shots": [] if frames is None else key_frames(frames, len(score), peak, boxes, span, limit),
    }


def write(
    path,
    title,
    scores,
    smoothed,
    *,
    facts=(),
    notes=(),
    labels=None,
    columns=None,
    rows=(),
    curves=None,
    auc_per_video=None,
    detections=None,
    span=(0.0, 1.0),
    pictures=None,
    overlays=None,
    threshold=None,
):
    """Write one page.

    scores, smoothed {video: [T]}; facts: words under the title; notes [(kind, sentence)]; labels {video: 0/1 [T]}; columns {method: {key:
    number}} and rows [(key, title)] make the table, curves {title: {video: [T]}} ROC and PR; detections {video: [n, 6]}, coloured over
    `span`; pictures(video name) -> (frames or None, Clock); overlays {video: file relative to the page}; threshold: what the
    page starts with (default: 5 % of all frames lie above it).
    """
    labels, limit = labels or {}, LIMIT / max(1, len(scores))
    videos = []
    for name in tqdm(
        sorted(scores), desc="report", unit="video", dynamic_ncols=True, mininterval=2, disable=not pictures
    ):
        frames, clock = pictures(name) if pictures else (None, Clock())
        videos.append(
            video_entry(
                name,
                scores[name],
                np.asarray(smoothed[name], np.float64),
                labels=labels.get(name),
                auc=(auc_per_video or {}).get(name),
                frames=frames,
                clock=clock,
                boxes=partial(boxes_at, detections, name),
                span=span,
                limit=limit,
                overlay=overlays and urllib.parse.quote(overlays[name]),
            )
        )
    everything = np.concatenate([np.asarray(s, np.float64) for s in smoothed.values()])
    everything = everything[np.isfinite(everything)]
    if threshold is None:
        threshold = float(np.quantile(everything, 1 - SHARE)) if len(everything) else 0.0
    roc, pr = area_curves(curves, labels) if labels and curves else ([], [])
    columns = columns or {}
    measures = [[text, [c.get(key) for c in columns.values()]] for key, text in rows]
    data = {
        "title": title,
        "facts": list(facts),
        "notes": list(notes),
        "columns": list(columns),
        "measures": [m for m in measures if any(x is not None for x in m[1])],
        "roc": roc,
        "pr": pr,
        "threshold": threshold,
        "videos": videos,
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    with atomic_write(path) as tmp:  # a name of a video may hold "</script>"
        page = page.replace("/*DATA*/", text.replace("<", "\\u003c"))
        tmp.write_text(
            page, encoding="utf-8", errors="backslashreplace"
        )  # of a name that is not UTF-8, as JSON escapes it
