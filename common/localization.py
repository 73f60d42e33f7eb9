"""Where in a frame: RBDC, TBDC and pixel-level AUC of boxes with scores, higher = more abnormal.

Optional: an evaluation without this file has measures of frames only. A ValueError says what is missing where a
measure is not defined.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from common.io import UserError
from common.metrics import auc
from common.readers.dataset import Dataset
from common.readers.video import Decoder, Video


def measure(data: Dataset, detections: dict, labels: dict, skip: int = 0) -> dict:
    """RBDC, TBDC and pixel-level AUC of boxes with scores.

    detections: video -> [n, 6] frame, x1, y1, x2, y2, score; labels: video -> uint8 [T]; skip: frames that are left out
    at the start of every video. A video without masks and tracks counts where its labels say that all of it is normal.
    """
    out, videos = {}, {v.name: v for v in data.test}
    has_regions = has_masks = False
    from_masks, total = False, 0
    tracks, boxes = [], []
    pixel_scores, pixel_labels = [], []
    for name, d in sorted(detections.items()):
        frames = len(labels[name])
        try:
            masks, regions = data.masks(videos[name]), data.tracks(videos[name])
            if masks is not None:
                check_masks(masks, videos[name], None if data.cut_ranges else frames)
        except UserError as e:
            out.setdefault("unreadable_regions", {})[name] = str(e)
            continue
        has_masks = has_masks or masks is not None
        if masks is not None or regions is not None:
            has_regions = True
        elif labels[name].any():
            continue
        else:
            regions = np.zeros((0, 6))
            masks = np.broadcast_to(False, (frames, *d[:, [4, 3]].max(0, initial=0).astype(int) + 1))
        if regions is None:
            regions, from_masks = tracks_from_masks(masks), True
        tracks.append(regions[(skip <= regions[:, 1]) & (regions[:, 1] < frames)])
        d = d[np.argsort(d[:, 0], kind="stable")]
        boxes.append(d[d[:, 0] >= skip])
        edges = np.searchsorted(d[:, 0], np.arange(frames + 1))
        for t in range(skip, 0 if masks is None else min(frames, len(masks))):
            in_frame = d[edges[t] : edges[t + 1]]
            painted = paint(in_frame[:, 1:5], in_frame[:, 5], masks[t].shape)
            pixel_scores.append(pixel_frame_score(painted, masks[t]))
            pixel_labels.append(masks[t].any())
        total += max(0, frames - skip)
    if not has_regions:
        return out
    out["videos_with_regions"] = len(tracks)
    try:
        out["rbdc"], out["tbdc"] = rbdc_tbdc(tracks, boxes, total)
        out["tracks"] = "from masks: connected components, linked by overlap" if from_masks else "of the dataset"
        if has_masks:
            out["pixel_auc"] = pixel_auc(pixel_labels, pixel_scores)
    except ValueError as e:
        out["undefined_localization"] = str(e)
    return out


def check_masks(masks: np.ndarray, video: Video, frames: int | None) -> None:
    """Raises UserError where masks [T, H, W] are not of so many frames (None: any), or not of the size of its first."""
    if frames is not None and len(masks) != frames:
        raise UserError(f"masks of {len(masks)} frames, the video has {frames}")
    size = next(iter(Decoder(video))).shape[:2]
    if masks.shape[1:] != size:
        (h, w), (height, width) = masks.shape[1:], size
        raise UserError(f"masks of {w}×{h} pixels, the video has {width}×{height}")


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
    frames: number of all test frames. A region is detected at thresholds up to the highest score of its frame's
    detections with IoU >= beta; a track, where at least alpha of its regions are. A detection that overlaps no region
    of its frame is a false positive.
    """
    if frames <= 0:
        raise ValueError("no frames to measure")
    region_scores, track_scores = [], []
    false_scores = []
    for t, d in zip(tracks, detections):
        t, d = np.asarray(t, np.float64).reshape(-1, 6), np.asarray(d, np.float64).reshape(-1, 6)
        t, d = t[np.argsort(t[:, 1], kind="stable")], d[np.argsort(d[:, 0], kind="stable")]
        scores = np.full(len(t), -np.inf)  # of each region
        is_false = np.ones(len(d), bool)
        for frame in np.intersect1d(t[:, 1], d[:, 0]):
            ti, di = (slice(*np.searchsorted(x, (frame, frame + 1))) for x in (t[:, 1], d[:, 0]))
            hit = iou(t[ti, 2:], d[di, 1:5]) >= beta
            scores[ti] = np.where(hit, d[di, 5], -np.inf).max(1)
            is_false[di] = ~hit.any(0)
        region_scores.append(scores)
        false_scores.append(d[is_false, 5])
        by_track = np.argsort(t[:, 0], kind="stable")
        for s in np.split(scores[by_track], np.flatnonzero(np.diff(t[by_track, 0])) + 1) if len(t) else ():
            s = np.sort(s)[::-1]
            track_scores.append(s[max(1, int(np.ceil(alpha * len(s) - 1e-9))) - 1])
    regions = np.concatenate([np.zeros(0), *region_scores])
    false_scores = np.sort(np.concatenate([np.zeros(0), *false_scores]))
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


def paint(boxes: np.ndarray, scores: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Every box [n, 4] painted with its score, the maximum where they overlap -> float32 [H, W]."""
    out = np.full(shape, -np.inf, np.float32)
    for i in np.argsort(scores, kind="stable"):
        x1, y1, x2, y2 = np.asarray(boxes[i]).astype(int)
        out[max(0, y1) : max(0, y2 + 1), max(0, x1) : max(0, x2 + 1)] = scores[i]
    return out


def pixel_frame_score(score_map: np.ndarray, mask: np.ndarray, share: float = 0.4) -> float:
    """The highest threshold at which a frame counts as detected: an abnormal one when `share` of its abnormal pixels
    reach it, a normal one when any pixel does."""
    if not mask.any():
        return float(score_map.max())
    inside = np.sort(score_map[mask])[::-1]
    return float(inside[int(np.ceil(share * len(inside))) - 1])


def pixel_auc(labels: np.ndarray, frame_scores: np.ndarray) -> float:
    """AUC of pixel_frame_score over all frames; -inf (no box there) counts as below everything."""
    s = np.asarray(frame_scores, np.float64)
    finite = s[np.isfinite(s)]
    return auc(labels, np.where(np.isfinite(s), s, (finite.min() if len(finite) else 0.0) - 1))
