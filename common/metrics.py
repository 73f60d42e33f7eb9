"""Measures of frames, regions, tracks and pixels. labels: 1 = abnormal; scores: higher = more abnormal.

All are exact under ties, and a ValueError says what is missing where a measure is not defined.
"""

from collections.abc import Sequence
from types import ModuleType

import cv2
import numpy as np


def sk() -> ModuleType:
    """scikit-learn's metrics; imported when something is measured, as it would slow down the start of every script."""
    from sklearn import metrics

    return metrics


def _check(labels, scores):
    labels, scores = np.asarray(labels).reshape(-1), np.asarray(scores, np.float64).reshape(-1)
    if len(labels) != len(scores):
        raise ValueError(f"{len(labels)} labels but {len(scores)} scores")
    if len(labels) == 0:
        raise ValueError("no frames to measure")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} scores are NaN or infinite")
    for value, name in ((0, "normal"), (1, "abnormal")):
        if not (labels == value).any():
            raise ValueError(f"no {name} frames: this measure needs both kinds")
    return labels, scores


def _join(parts):
    return np.concatenate([np.asarray(p).reshape(-1) for p in parts]) if len(parts) else np.zeros(0)


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of frames [T]; of all videos together: micro AUC."""
    return float(sk().roc_auc_score(*_check(labels, scores)))


def macro_auc(labels: Sequence, scores: Sequence) -> tuple[float, list[float], int]:
    """Lists of [T], one per video -> (mean AUC over videos, AUC per video, number of one-class videos).

    To every video one frame (label 0, score 0) and one (label 1, score 1) is added (Georgescu et al. 2021); where
    scores leave [0, 1], the video's extremes take the place of 0 and 1, so that the added frames stay the outermost.
    """
    if not len(labels):
        raise ValueError("no videos to measure")
    each = []
    for y, s in zip(labels, scores):
        s = np.asarray(s, np.float64)
        each.append(auc(np.r_[0, y, 1], np.r_[min(0.0, s.min(initial=0)), s, max(1.0, s.max(initial=1))]))
    return float(np.mean(each)), each, sum(len(np.unique(y)) < 2 for y in labels)


def auc_abnormal_videos(labels: Sequence, scores: Sequence) -> float:
    """AUC over the frames of the videos that hold an abnormal frame. Lists of [T], one per video."""
    abnormal = [(y, s) for y, s in zip(labels, scores) if np.any(y)]
    if not abnormal:
        raise ValueError("no video holds an abnormal frame")
    return auc(_join([y for y, _ in abnormal]), _join([s for _, s in abnormal]))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(sk().average_precision_score(*_check(labels, scores)))


def pr_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve by trapezoids."""
    precision, recall, _ = sk().precision_recall_curve(*_check(labels, scores))
    return float(sk().auc(recall, precision))


def eer(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Equal error rate -> (interpolated on the ROC curve, false positive rate at the point nearest to equality)."""
    fpr, tpr, _ = sk().roc_curve(*_check(labels, scores))
    gap = 1 - tpr - fpr  # falls from 1 to -1 along the curve
    i = int(np.argmax(gap <= 0))  # first point past equality
    interpolated = fpr[i]
    if gap[i] < 0 and i > 0:
        share = gap[i - 1] / (gap[i - 1] - gap[i])
        interpolated = fpr[i - 1] + share * (fpr[i] - fpr[i - 1])
    return float(interpolated), float(fpr[np.argmin(np.abs(gap))])


def false_alarm_rate(labels: np.ndarray, scores: np.ndarray, threshold: float = 0.5) -> float:
    """Share of the normal frames that score above `threshold`."""
    normal = np.asarray(scores).reshape(-1)[np.asarray(labels).reshape(-1) == 0]
    if not len(normal):
        raise ValueError("no normal frames: the false alarm rate needs some")
    return float((normal > threshold).mean())


# ------------------------------------------------------------------------ regions and tracks (Ramachandra & Jones 2020)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes in inclusive pixels: [n, 4], [m, 4] -> [n, m]."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)
    sides = np.minimum(a[..., 2:], b[:, 2:]) - np.maximum(a[..., :2], b[:, :2]) + 1
    both = np.maximum(sides, 0).prod(-1)
    areas = (a[..., 2:] - a[..., :2] + 1).prod(-1) + (b[:, 2:] - b[:, :2] + 1).prod(-1)
    return both / (areas - both)


def rbdc_tbdc(tracks: Sequence, detections: Sequence, frames: int, alpha=0.1, beta=0.1) -> tuple[float, float]:
    """Region- and track-based detection criteria -> (RBDC, TBDC), each the area for 0..1 false positives per frame.

    tracks: per video [n, 6] id, frame, x1, y1, x2, y2; detections: per video [m, 6] frame, x1, y1, x2, y2, score;
    frames: number of all test frames. A region is detected from the threshold down to which some detection of its frame
    overlaps it with IoU >= beta; a track, from the one down to which at least alpha of its regions are detected. A
    detection that overlaps no region of its frame is a false positive.
    """
    if frames <= 0:
        raise ValueError("no frames to measure")
    region_scores, track_scores = [], []
    false_scores = []
    for t, d in zip(tracks, detections):
        t, d = np.asarray(t, np.float64).reshape(-1, 6), np.asarray(d, np.float64).reshape(-1, 6)
        scores = np.full(len(t), -np.inf)  # of each region
        is_false = np.ones(len(d), bool)
        for frame in np.intersect1d(t[:, 1], d[:, 0]):
            ti, di = np.flatnonzero(t[:, 1] == frame), np.flatnonzero(d[:, 0] == frame)
            hit = iou(t[ti, 2:], d[di, 1:5]) >= beta
            scores[ti] = np.where(hit, d[di, 5], -np.inf).max(1)
            is_false[di] = ~hit.any(0)
        region_scores.append(scores)
        false_scores.append(d[is_false, 5])
        for track in np.unique(t[:, 0]):
            s = np.sort(scores[t[:, 0] == track])[::-1]
            track_scores.append(s[max(1, int(np.ceil(alpha * len(s) - 1e-9))) - 1])
    regions, false_scores = _join(region_scores), np.sort(_join(false_scores))
    if not len(regions):
        raise ValueError("no ground-truth regions: RBDC and TBDC need some")
    return _area(regions, false_scores, frames), _area(np.array(track_scores), false_scores, frames)


def _area(scores, false_scores, frames):
    """scores: of each region or track (-inf: never detected); false_scores: of false positives, sorted."""
    thresholds = np.unique(np.concatenate([scores[np.isfinite(scores)], false_scores]))[::-1]
    y = np.r_[0.0, np.searchsorted(np.sort(-scores), -thresholds, side="right") / len(scores)]
    x = np.r_[0.0, (len(false_scores) - np.searchsorted(false_scores, thresholds, side="left")) / frames]
    at_one = np.interp(1.0, x, y)  # on the line to the next point, or the last value
    return float(np.trapezoid(np.r_[y[x <= 1], at_one], np.r_[x[x <= 1], 1.0]))


def tracks_from_masks(masks: np.ndarray) -> np.ndarray:
    """Regions of one video's masks, linked over consecutive frames by overlap: bool [T, H, W] -> float32 [n, 6]."""
    rows, before = [], None
    next_id = 0
    for f, mask in enumerate(masks):
        n, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        ids, taken = np.full(n, -1), set()
        for c in range(1, n):
            old = before[components == c] if before is not None else np.zeros(0, int)
            overlap = np.bincount(old[old >= 0])  # pixels of each track of the frame before
            candidates = [i for i in np.argsort(-overlap) if overlap[i] and i not in taken]
            ids[c] = candidates[0] if candidates else next_id
            next_id += not candidates
            taken.add(int(ids[c]))
            x, y, w, h = stats[c, :4]
            rows.append((ids[c], f, x, y, x + w - 1, y + h - 1))
        before = ids[components]
    return np.array(rows, np.float32).reshape(-1, 6)


# ---------------------------------------------------------------------------- pixels (Li, Mahadevan, Vasconcelos 2014)


def paint(boxes: np.ndarray, scores: np.ndarray, shape: tuple[int, int], empty: float = -np.inf) -> np.ndarray:
    """Every box [n, 4] painted with its score, the maximum where they overlap -> float32 [H, W]."""
    out = np.full(shape, empty, np.float32)
    for i in np.argsort(scores, kind="stable"):
        x1, y1, x2, y2 = np.asarray(boxes[i]).astype(int)
        out[max(0, y1) : y2 + 1, max(0, x1) : x2 + 1] = scores[i]
    return out


def pixel_frame_score(score_map: np.ndarray, mask: np.ndarray, share: float = 0.4) -> float:
    """The threshold up to which a frame is detected: abnormal by `share` of its abnormal pixels, normal by any one."""
    if not mask.any():
        return float(score_map.max())
    inside = np.sort(score_map[mask])[::-1]
    return float(inside[int(np.ceil(share * len(inside))) - 1])


def pixel_auc(labels: np.ndarray, frame_scores: np.ndarray) -> float:
    """AUC of pixel_frame_score over all frames; -inf (no box there) counts as below everything."""
    s = np.asarray(frame_scores, np.float64)
    finite = s[np.isfinite(s)]
    return auc(labels, np.where(np.isfinite(s), s, (finite.min() if len(finite) else 0.0) - 1))
