"""Frame-level, region-level, track-level and pixel-level measures. labels: 1 = abnormal; scores: higher = more abnormal.

All are exact under ties, and a ValueError says what is missing where a measure is not defined.
"""

import cv2
import numpy as np


def sk():
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


def auc(labels, scores):
    """Area under the ROC curve."""
    return float(sk().roc_auc_score(*_check(labels, scores)))


def micro_auc(labels, scores):
    """AUC over the frames of all videos together; lists of arrays, one per video."""
    return auc(_join(labels), _join(scores))


def macro_auc(labels, scores):
    """-> (mean over videos, AUC per video, number of one-class videos).

    To every video one frame (label 0, score 0) and one (label 1, score 1) is added (Georgescu et al. 2021); where scores
    leave [0, 1], the video's own extremes take the place of 0 and 1, so that the added frames stay the outermost.
    """
    if not len(labels):
        raise ValueError("no videos to measure")
    each = []
    for y, s in zip(labels, scores):
        s = np.asarray(s, np.float64)
        each.append(auc(np.r_[0, y, 1], np.r_[min(0.0, s.min(initial=0)), s, max(1.0, s.max(initial=1))]))
    return float(np.mean(each)), each, sum(len(np.unique(y)) < 2 for y in labels)


def auc_abnormal_videos(labels, scores):
    """AUC over the frames of the videos that hold an abnormal frame."""
    picked = [i for i, y in enumerate(labels) if np.any(y)]
    if not picked:
        raise ValueError("no video holds an abnormal frame")
    return auc(_join([labels[i] for i in picked]), _join([scores[i] for i in picked]))


def average_precision(labels, scores):
    return float(sk().average_precision_score(*_check(labels, scores)))


def pr_auc(labels, scores):
    """Area under the precision-recall curve by trapezoids."""
    precision, recall, _ = sk().precision_recall_curve(*_check(labels, scores))
    return float(sk().auc(recall, precision))


def eer(labels, scores):
    """Equal error rate -> (interpolated on the ROC curve, false positive rate at the point nearest to equality)."""
    fpr, tpr, _ = sk().roc_curve(*_check(labels, scores))
    gap = 1 - tpr - fpr  # falls from 1 to -1 along the curve
    i = int(np.argmax(gap <= 0))  # first point past equality
    if gap[i] == 0 or i == 0:
        interpolated = fpr[i]
    else:
        share = gap[i - 1] / (gap[i - 1] - gap[i])
        interpolated = fpr[i - 1] + share * (fpr[i] - fpr[i - 1])
    return float(interpolated), float(fpr[np.argmin(np.abs(gap))])


def false_alarm_rate(labels, scores, threshold=0.5):
    """Share of the normal frames that score above `threshold`."""
    labels, scores = np.asarray(labels).reshape(-1), np.asarray(scores).reshape(-1)
    if not (labels == 0).any():
        raise ValueError("no normal frames: the false alarm rate needs some")
    return float((scores[labels == 0] > threshold).mean())


def _join(parts):
    return np.concatenate([np.asarray(p).reshape(-1) for p in parts]) if len(parts) else np.zeros(0)


# ------------------------------------------------------------------------- regions and tracks (Ramachandra & Jones 2020)


def iou(a, b):
    """IoU of boxes in inclusive pixels: [n, 4], [m, 4] -> [n, m]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    w = np.minimum(a[:, None, 2], b[:, 2]) - np.maximum(a[:, None, 0], b[:, 0]) + 1
    h = np.minimum(a[:, None, 3], b[:, 3]) - np.maximum(a[:, None, 1], b[:, 1]) + 1
    both = np.maximum(w, 0) * np.maximum(h, 0)

    def area(x):
        return (x[:, 2] - x[:, 0] + 1) * (x[:, 3] - x[:, 1] + 1)

    return both / (area(a)[:, None] + area(b) - both)


def rbdc_tbdc(tracks, detections, frames, alpha=0.1, beta=0.1):
    """Region- and track-based detection criteria -> (RBDC, TBDC), each the area for 0..1 false positives per frame.

    tracks: per video [n, 6] id, frame, x1, y1, x2, y2; detections: per video [m, 6] frame, x1, y1, x2, y2, score;
    frames: number of all test frames. A region is found from the threshold down to which some detection of its frame
    overlaps it with IoU >= beta; a track, from the one down to which at least alpha of its regions are found. A
    detection that overlaps no region of its frame is a false positive.
    """
    if frames <= 0:
        raise ValueError("no frames to measure")
    region_scores, track_scores, false = [], [], []
    for t, d in zip(tracks, detections):
        t, d = np.asarray(t, np.float64).reshape(-1, 6), np.asarray(d, np.float64).reshape(-1, 6)
        found = np.full(len(t), -np.inf)
        free = np.ones(len(d), bool)
        for frame in np.intersect1d(t[:, 1], d[:, 0]):
            ti, di = np.flatnonzero(t[:, 1] == frame), np.flatnonzero(d[:, 0] == frame)
            hit = iou(t[ti, 2:], d[di, 1:5]) >= beta
            found[ti] = np.where(hit, d[di, 5], -np.inf).max(1)
            free[di] = ~hit.any(0)
        region_scores.append(found)
        false.append(d[free, 5])
        for track in np.unique(t[:, 0]):
            s = np.sort(found[t[:, 0] == track])[::-1]
            track_scores.append(s[max(1, int(np.ceil(alpha * len(s) - 1e-9))) - 1])
    regions, false = _join(region_scores), np.sort(_join(false))
    if not len(regions):
        raise ValueError("no ground-truth regions: RBDC and TBDC need some")
    return (_area(regions, false, frames), _area(np.array(track_scores), false, frames))


def _area(found, false, frames):
    """found: score of each target (-inf: never); false: sorted scores of false positives."""
    thresholds = np.unique(np.concatenate([found[np.isfinite(found)], false]))[::-1]
    y = np.searchsorted(np.sort(-found), -thresholds, side="right") / len(found)
    x = (len(false) - np.searchsorted(false, thresholds, side="left")) / frames
    x, y = np.r_[0.0, x], np.r_[0.0, y]
    if x[-1] < 1:
        x, y = np.r_[x, 1.0], np.r_[y, y[-1]]
    cut = np.searchsorted(x, 1.0, side="right")  # points at x <= 1, and the crossing if the curve goes on
    if cut < len(x):
        at_one = np.interp(1.0, x[cut - 1 : cut + 1], y[cut - 1 : cut + 1])
        x, y = np.r_[x[:cut], 1.0], np.r_[y[:cut], at_one]
    return float(np.trapezoid(y, x))


def tracks_from_masks(masks, min_pixels=1):
    """Regions of one video's pixel masks, linked over consecutive frames by overlap: bool [T, H, W] -> [n, 6]."""
    rows, before, next_id = [], None, 0
    for f, mask in enumerate(masks):
        n, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        ids, taken = np.full(n, -1), set()
        for c in range(1, n):
            if stats[c, cv2.CC_STAT_AREA] < min_pixels:
                continue
            old = before[components == c] if before is not None else np.zeros(0, int)
            old = old[old >= 0]
            candidates = (
                [i for i in np.argsort(-np.bincount(old)) if (old == i).any() and i not in taken] if len(old) else []
            )
            ids[c] = candidates[0] if candidates else next_id
            next_id += not candidates
            taken.add(int(ids[c]))
            x, y, w, h = stats[c, :4]
            rows.append((ids[c], f, x, y, x + w - 1, y + h - 1))
        before = ids[components]
    return np.array(rows, np.float32).reshape(-1, 6)


# ----------------------------------------------------------------------------- pixels (Li, Mahadevan, Vasconcelos 2014)


def paint(boxes, scores, shape, empty=-np.inf):
    """Every box [n, 4] painted with its score, the maximum where they overlap -> float32 [H, W]."""
    out = np.full(shape, empty, np.float32)
    for i in np.argsort(scores, kind="stable"):
        x1, y1, x2, y2 = np.asarray(boxes[i]).astype(int)
        out[max(0, y1) : y2 + 1, max(0, x1) : x2 + 1] = scores[i]
    return out


def pixel_frame_score(score_map, mask, share=0.4):
    """The threshold up to which a frame counts as detected (abnormal: `share` of its abnormal pixels; normal: any pixel)."""
    if not mask.any():
        return float(score_map.max())
    inside = np.sort(score_map[mask])[::-1]
    return float(inside[int(np.ceil(share * len(inside))) - 1])


def pixel_auc(labels, frame_scores):
    """AUC of pixel_frame_score over all frames; -inf (no box there) counts as below everything."""
    s = np.asarray(frame_scores, np.float64)
    finite = s[np.isfinite(s)]
    return auc(labels, np.where(np.isfinite(s), s, (finite.min() if len(finite) else 0.0) - 1))
