"""report.html: one self-contained page per run, with metrics, ROC, a sortable list of videos, and for each video its score over
time with key frames, a threshold and the events above it. No network, no other file but the overlay videos it links to.
"""
import base64
import itertools
import json
import math
from pathlib import Path

import cv2
import numpy as np

from common.files import replacing
from common.plots import heat, ranges
from common.video import as_channels

LIMIT = 12e6                   # bytes of pictures in one page, over all videos
MOST = 60                      # key frames of a video
WIDTH = 240                    # their width, px
SHARE = 0.05                   # frames above the threshold that the page starts with
POINTS = 200                   # of a ROC


def rounded(values):
    """Four digits, None for NaN: what JSON and a screen need."""
    return [None if not math.isfinite(x) else float(f"{x:.4g}") for x in np.asarray(values, np.float64).tolist()]


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
            out.append({"name": title, "area": auc(a, b), "points": [rounded(p) for p in np.stack([a, b], axis=1)[keep]]})
    return roc, pr


def picture(frame, boxes, span):
    """A frame as JPEG, boxes [n, 6] (frame, x1, y1, x2, y2, score) coloured from green at span[0] to red at span[1]."""
    h, w = frame.shape[:2]
    scale = WIDTH / w
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.resize(as_channels(frame, 3), (WIDTH, max(1, round(h * scale))), interpolation=way)
    for _, x1, y1, x2, y2, s in boxes[np.argsort(boxes[:, 5])]:
        share = (s - span[0]) / max(1e-12, span[1] - span[0])
        cv2.rectangle(image, (int(x1 * scale), int(y1 * scale)), (int(x2 * scale), int(y2 * scale)), heat(share), 2 if share >= 1 else 1)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 70])[1].tobytes()


def key_frames(frames, count, peak, boxes, span, limit):
    """Frames at equal distances, and the one of the highest score. -> [(number, base64 JPEG)], at most `limit` bytes.

    frames: uint8 [H, W, C] each, a list or whatever yields them in order; boxes [n, 6] or None.
    """
    wanted = sorted({*np.linspace(0, count - 1, min(MOST, count)).round().astype(int).tolist(), peak})
    if hasattr(frames, "__getitem__"):
        chosen = ((t, frames[t]) for t in wanted)
    else:
        among = set(wanted)
        chosen = ((t, f) for t, f in enumerate(itertools.islice(frames, count)) if t in among)
    none = np.zeros((0, 6), np.float32)
    done = [(t, picture(f, none if boxes is None else boxes[boxes[:, 0] == t], span)) for t, f in chosen]
    step = max(1, math.ceil(sum(len(p) for _, p in done) * 4 / 3 / limit))
    return [(t, base64.b64encode(p).decode()) for i, (t, p) in enumerate(done) if i % step == 0 or t == peak]


def video_entry(name, raw, score, *, labels, auc, frames, fps, boxes, span, limit, overlay):
    finite = np.isfinite(score)
    peak = int(np.nanargmax(score)) if finite.any() else 0
    both = np.r_[np.asarray(raw, np.float64), score[finite]]
    both = both[np.isfinite(both)]
    return {"name": name, "fps": fps or 0, "auc": auc, "overlay": overlay, "raw": rounded(raw), "score": rounded(score), "peak": peak,
            "low": float(both.min(initial=0)), "top": float(both.max(initial=0)), "high": float(score[peak]) if finite.any() else 0.0,
            "truth": None if labels is None else ranges(labels),
            "shots": [] if frames is None else key_frames(frames, len(score), peak, boxes, span, limit)}


def write(path, title, scores, smoothed, *, facts=(), notes=(), labels=None, columns=None, rows=(), curves=None, auc_per_video=None,
          detections=None, pictures=None, overlays=None):
    """Write one page.

    scores, smoothed {video: [T]}; facts: words under the title; notes [(kind, sentence)]; labels {video: 0/1 [T]}; columns {method: {key:
    number}} and rows [(key, title)] make the table, curves {title: {video: [T]}} ROC and PR; detections {video: [n, 6]}; pictures(video
    name) -> (frames, fps); overlays {video: path relative to the page}.
    """
    labels, limit = labels or {}, LIMIT / max(1, len(scores))
    boxes = np.concatenate([d[:, 5] for d in detections.values()]) if detections else np.zeros(0)
    span = tuple(np.percentile(boxes, (50, 99.5))) if len(boxes) else (0.0, 1.0)
    videos = []
    for name in sorted(scores):
        frames, fps = pictures(name) if pictures else (None, 0)
        videos.append(video_entry(name, scores[name], np.asarray(smoothed[name], np.float64), labels=labels.get(name),
                                  auc=(auc_per_video or {}).get(name), frames=frames, fps=fps, boxes=(detections or {}).get(name),
                                  span=span, limit=limit, overlay=(overlays or {}).get(name)))
    everything = np.concatenate([np.asarray(s, np.float64) for s in smoothed.values()])
    everything = everything[np.isfinite(everything)]
    roc, pr = area_curves(curves, labels) if labels and curves else ([], [])
    columns = columns or {}
    measures = [[text, [c.get(key) for c in columns.values()]] for key, text in rows]
    data = {"title": title, "facts": list(facts), "notes": list(notes), "columns": list(columns),
            "measures": [m for m in measures if any(x is not None for x in m[1])], "roc": roc, "pr": pr,
            "threshold": float(np.quantile(everything, 1 - SHARE)) if len(everything) else 0.0, "videos": videos}
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    with replacing(path) as tmp:      # a name of a video may hold "</script>"
        tmp.write_text(page.replace("/*DATA*/", text.replace("<", "\\u003c")), encoding="utf-8")
