"""What makes a result suspect, or explains it: labels that look shifted or contradict others, AUC by kind of event.

Optional: an evaluation without this file says nothing of these.
"""

from pathlib import Path

import numpy as np

from common.io import UserError, read_table, reading
from common.metrics import auc
from common.readers.dataset import Dataset

SUSPICIOUS = 0.02  # report shifted labels if moving them raises micro AUC by more than this


def diagnose(data: Dataset, labels: dict, smoothed: dict) -> dict:
    """Entries of metrics.json about labels {video: uint8 [T]} and smoothed scores {video: float [T], NaN where left
    out}. Raises UserError for a damaged events.csv."""
    out = {}
    if differs := disagreement(data, labels):
        out["other_labels"] = differs
    if kinds := read_events(data):
        out["auc_per_event"] = per_event(smoothed, labels, kinds)
    try:
        gain, frames = shift_gain(smoothed, labels)
    except ValueError:  # one kind of frames only, or scores that are no numbers
        return out
    if gain > SUSPICIOUS:
        out["labels_look_shifted"] = {"frames": frames, "micro_auc_would_rise_by": gain}
    return out


def notes(result: dict) -> list[str]:
    """The entries of diagnose() as sentences."""
    out = []
    if result.get("auc_per_event"):
        kinds = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in result["auc_per_event"].items())
        out.append(f"micro AUC by kind of event: {kinds}")
    if "labels_look_shifted" in result:
        shift = result["labels_look_shifted"]
        out.append(
            f"WARNING: micro AUC would be {100 * shift['micro_auc_would_rise_by']:.1f} points higher with all labels "
            f"moved by {shift['frames']:+d} frames: are labels and frames of the same version? (nothing was moved)"
        )
    return out + ([result["other_labels"]] if "other_labels" in result else [])


def disagreement(data: Dataset, labels: dict[str, np.ndarray]) -> str | None:
    """How far a second source of labels differs from {video name: uint8 [frames]}, in a sentence, or None."""
    other, labels_of = data.other_labels or ("", {})
    differing, unreadable = [], []
    for name in sorted(set(labels) & set(labels_of)):
        frames = len(labels[name])
        try:
            y = data.labels_per_frame(name, labels_of[name], other, frames)
        except UserError as e:
            unreadable.append(str(e))
            continue
        both = min(len(y), frames)
        differing.append(int((y[:both] != labels[name][:both]).sum()) + abs(len(y) - frames))
    sentences, source = [], data.label_source
    if videos := sum(n > 0 for n in differing):
        sentences.append(
            f"{other} differs from {source} (the one in use) in {sum(differing)} frames of {videos} videos"
        )
    if unreadable:
        count = len(unreadable)
        sentences.append(f"{other} could not be compared with {source} in {count} videos: {unreadable[0]}")
    return "; ".join(sentences) or None


def read_events(data: Dataset) -> list[tuple[str, str, int, int]]:
    """[(video, kind, first frame, end)] of the demo's events.csv; a file of that name elsewhere may be anything.

    Raises UserError.
    """
    path = Path(data.root) / "events.csv"
    if data.name != "demo" or not path.is_file():
        return []
    with reading("events", path, "have no columns video, event, start, end", (KeyError, ValueError)):
        (_, names), *rows = read_table(path, "events")
        rows = [dict(zip(names, row)) for _, row in rows]
        return [(r["video"], r["event"], int(r["start"]), int(r["end"])) for r in rows]


def per_event(smoothed: dict, labels: dict, events: list) -> dict:
    """Micro AUC of each kind's frames against the normal frames of all videos. events: [(video, kind, first, end)]

    -> {kind: AUC}
    """
    scores_of_kind = {}
    for video, kind, first, end in events:
        if video in labels:
            abnormal = labels[video][first:end] > 0
            scores_of_kind.setdefault(kind, []).append(smoothed[video][first:end][abnormal])
    normal = np.concatenate([smoothed[k][labels[k] == 0] for k in labels])
    normal, out = normal[np.isfinite(normal)], {}
    for kind, parts in sorted(scores_of_kind.items()):
        s = np.concatenate(parts)
        s = s[np.isfinite(s)]
        if len(s) and len(normal):
            out[kind] = auc(np.r_[np.ones(len(s)), np.zeros(len(normal))], np.r_[s, normal])
    return out


def shift_gain(smoothed: dict, labels: dict, most: int = 10) -> tuple[float, int]:
    """How much micro AUC would rise if all labels were moved by a few frames: the largest (gain, frames).

    A sign that labels and frames do not belong together; the shift is never used. Raises ValueError where micro AUC is
    not defined. A gain that still grows at `most` frames is a trend of the scores, no shift, and counts as none.
    """
    finite = {k: np.isfinite(s) for k, s in smoothed.items()}
    s = np.concatenate([smoothed[k][finite[k]] for k in labels])

    def micro_auc(shift):
        moved = []
        for k, y in labels.items():
            sources = np.clip(np.arange(len(y)) - shift, 0, len(y) - 1)  # the ends are repeated
            moved.append(y[sources][finite[k]])
        return auc(np.concatenate(moved), s)

    base, gains = micro_auc(0), [(0.0, 0)]
    for shift in range(-most, most + 1):
        try:
            gains.append((micro_auc(shift) - base, shift))
        except ValueError:  # one kind of frames only is left in so short a video
            pass
    gain, shift = max(gains)
    return (gain, shift) if abs(shift) < most else (0.0, 0)
