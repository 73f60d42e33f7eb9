"""Measures of frames. labels: 1 = abnormal; scores: higher = more abnormal.

All are exact under ties, and a ValueError says what is missing where a measure is not defined.
"""

from collections.abc import Sequence
from types import ModuleType

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
    return auc(*(np.concatenate(parts) for parts in zip(*abnormal)))


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
