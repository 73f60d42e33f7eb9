"""From frame scores to results: smoothing, measures, table, metrics.json."""

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import metrics, smoothing
from common.cli import ScoreOptions
from common.io import UserError, optional_module, save_arrays, writable_folder, write_json
from common.readers.dataset import Dataset, report_skipped

BASELINES = ("frame difference", "fastest box", "flow energy")  # trivial scores
ROWS = [
    ("micro_auc", "micro AUC"),
    ("macro_auc", "macro AUC"),
    ("auc_abnormal_videos", "AUC, abnormal videos"),
    ("ap", "AP"),
    ("pr_auc", "PR-AUC"),
    ("eer", "EER"),
    ("far_at_0.5", "FAR at 0.5"),
    ("rbdc", "RBDC"),
    ("tbdc", "TBDC"),
    ("pixel_auc", "pixel-level AUC"),
]


@dataclass
class Protocol:
    """What is done between raw scores and metrics; `liberties` are named in the table and in metrics.json."""

    name: str = "strict"
    smoothing: str = "median:17"
    skip: int = 0  # frames left out at the start of every video
    liberties: list = field(default_factory=list)
    across: bool = False  # smooth all videos as one, in the order of their names
    multiple: int = 1  # drop trailing frames so that the length is a multiple of this
    minmax: bool = False  # then scale every video's scores to [0, 1] by its own extremes
    probabilities: bool = False  # scores lie in [0, 1] and 0.5 means something: false alarms at 0.5 are counted


def save_scores(path, scores: dict) -> None:
    """{video: float [T]} -> scores.npz."""
    save_arrays(path, {k: np.asarray(v, np.float32) for k, v in scores.items()})


def labels_of(scores: dict, data: Dataset) -> dict[str, np.ndarray]:
    """{video: uint8 [T]} for scored videos, each checked against its scores' length; {} without labels."""
    if not data.has_labels:
        return {}
    by_name = {v.name: v for v in data.test}
    unknown = sorted(set(scores) - set(by_name))
    if unknown:
        raise UserError(
            f"scores of {', '.join(unknown[:5])} do not belong to a test video of {data.name} in {data.root}"
        )
    return {k: labels_of_video(data, by_name[k], len(s)) for k, s in scores.items()}


def labels_of_video(data: Dataset, video, frames: int) -> np.ndarray:
    """Its labels; where they do not fit, also what the header says: they may belong to the whole of a damaged file."""
    try:
        return data.labels(video, frames)
    except UserError as e:
        claimed = video.expected_frames() if video.path.is_file() else 0
        if claimed <= frames:
            raise
        decoded = f"the header of {video.path.name} promises {claimed} frames, {frames} could be decoded"
        raise UserError(f"{e} ({decoded})") from None


def frame_difference(frames: np.ndarray) -> np.ndarray:
    """Trivial baseline: mean absolute difference to the previous frame. uint8 [T, H, W, C]

    -> float32 [T], first is 0.
    """
    out = np.zeros(len(frames), np.float32)
    for t in range(1, len(frames)):
        out[t] = np.abs(frames[t].astype(np.int16) - frames[t - 1]).mean(dtype=np.float64)
    return out


def measure(scores: dict, labels: dict, protocol: Protocol) -> tuple[dict, dict]:
    """Frame-level measures of raw scores {video: [T]} -> ({measure: number}, smoothed scores, NaN where left out).

    labels: {video: uint8 [T]}, or {} for smoothing only.
    """
    smooth, names = smoothing.parse(protocol.smoothing), sorted(scores)
    parts, smoothed = {}, {}
    for k in names:
        parts[k] = slice(min(protocol.skip, len(scores[k])), len(scores[k]) // protocol.multiple * protocol.multiple)
    ss = [np.asarray(scores[k][parts[k]]) for k in names]
    if protocol.across:
        ss = np.split(smooth(np.concatenate(ss)), np.cumsum([len(s) for s in ss])[:-1])
    else:
        ss = [smooth(s) for s in ss]
    if protocol.minmax:
        ss = [smoothing.minmax(s) for s in ss]
    for k, s in zip(names, ss):
        smoothed[k] = np.full(len(scores[k]), np.nan)
        smoothed[k][parts[k]] = s
    if not labels:
        return {}, smoothed
    ys = [labels[k][parts[k]] for k in names]
    y, s = np.concatenate(ys), np.concatenate(ss)
    out = {"frames": len(y), "abnormal_frames": int(y.sum()), "videos": len(names)}
    out["one_class_videos"] = sum(len(np.unique(v)) < 2 for v in ys)
    measures = {
        "micro_auc": lambda: metrics.auc(y, s),
        "macro_auc": lambda: metrics.macro_auc(ys, ss)[0],
        "auc_abnormal_videos": lambda: metrics.auc_abnormal_videos(ys, ss),
        "ap": lambda: metrics.average_precision(y, s),
        "pr_auc": lambda: metrics.pr_auc(y, s),
        "eer": lambda: metrics.eer(y, s)[0],
        "eer_nearest": lambda: metrics.eer(y, s)[1],
        **({"far_at_0.5": lambda: metrics.false_alarm_rate(y, s, 0.5)} if protocol.probabilities else {}),
    }
    for name, function in measures.items():
        try:
            out[name] = function()
        except ValueError as e:
            out.setdefault("undefined", {})[name] = str(e)
    both = [(k, v, x) for k, v, x in zip(names, ys, ss) if len(np.unique(v)) == 2]
    out["auc_per_video"] = {k: metrics.auc(v, x) for k, v, x in both}
    return out, smoothed


@dataclass
class Evaluation:
    """What one run found: metrics is what metrics.json holds; the rest is what pictures are made of."""

    method: str
    data: Dataset
    protocol: Protocol
    scores: dict  # video -> float [T], raw
    smoothed: dict  # video -> float64 [T]; NaN where a frame is left out
    labels: dict  # video -> uint8 [T]; {} without labels
    detections: dict  # video -> float32 [n, 6]: frame, x1, y1, x2, y2, score; or None
    columns: dict  # method, then baselines: title -> {measure: number}
    baselines: dict  # title -> {video: smoothed scores}
    notes: list  # sentences
    metrics: dict


def evaluate(
    out,
    data: Dataset,
    scores: dict,
    *,
    protocol: Protocol,
    method: str,
    detections: dict | None = None,
    baselines: dict | None = None,
    extra: dict | None = None,
) -> Evaluation:
    """Measure scores {video: float [T]}, higher is more abnormal; write scores.npz, detections.npz and metrics.json
    into `out`, and print the table. -> Evaluation.

    baselines {title: scores}, smoothed with a median of 17; extra: what else metrics.json shall hold.
    """
    for name, s in scores.items():
        if wrong := np.size(s) - np.isfinite(s).sum():
            way_out = "try --precision fp32, or another checkpoint"
            raise UserError(f"{wrong} of the {len(s)} scores of video {name} are NaN or infinite: {way_out}")
    out = writable_folder(out)
    labels, began = labels_of(scores, data), time.perf_counter()
    result, smoothed = measure(scores, labels, protocol)
    if labels and detections:
        localization = optional_module("common.localization")
        if localization:
            result.update(localization.measure(data, detections, labels, protocol.skip))
        else:
            result["undefined_localization"] = "there is no common/localization.py, which measures them"
    diagnosis = optional_module("common.diagnosis") if labels else None
    if diagnosis:
        result.update(diagnosis.diagnose(data, labels, smoothed))
    result["metrics_seconds"] = time.perf_counter() - began
    columns, filtered = {method: result}, {}
    for title, s in (baselines or {}).items():
        columns[title], filtered[title] = measure(s, labels, Protocol())
    save_scores(out / "scores.npz", scores)
    if detections:
        save_scores(out / "detections.npz", detections)
    others = {title: numbers for title, numbers in columns.items() if title != method}
    report = {
        "method": method,
        "dataset": data.name,
        "protocol": protocol.name,
        "smoothing": protocol.smoothing,
        "left_out_frames_per_video": protocol.skip,
        "liberties": protocol.liberties,
        "label_source": data.label_source if labels else None,
        "mask_source": data.mask_source,
        **result,
        "baselines": {k: {x: y for x, y in v.items() if isinstance(y, float)} for k, v in others.items()},
        **(extra or {}),
    }
    if report.get("scoring_seconds"):
        report["frames_per_second"] = sum(map(len, scores.values())) / report["scoring_seconds"]
    write_json(out / "metrics.json", report)
    notes = notes_on(result, others) + (diagnosis.notes(result) if diagnosis else [])
    if labels:
        print_table(columns, data, protocol)
        print("\n".join([*notes, ""]))
    else:
        print(f"\n{data.no_labels()}")
    return Evaluation(method, data, protocol, scores, smoothed, labels, detections, columns, filtered, notes, report)


def frame_baselines(cache, videos: list, workers: int | None = None) -> dict:
    """Trivial scores for methods without boxes, on the frames that the method sees. -> {title: {video: float32 [T]}}

    Those of motion boxes need common/objects; a copy without that folder has the frame difference only.
    """
    baselines = optional_module("common.objects.baselines")
    if baselines is None:
        return {"frame difference": {v.name: frame_difference(cache.frames(v)) for v in videos}}
    return baselines.frame_baselines(cache, videos, workers)


def finish(
    out,
    result: Evaluation,
    *,
    script: str,
    checkpoint,
    options: ScoreOptions,
    skipped: dict,
    more: str = "",
    pictures=None,
    **drawing,
) -> None:
    """What follows a table: pictures, skipped videos, next commands. more: an extra one, ending in "; "; pictures,
    drawing: see common.report.write_results; a copy may leave it out."""
    report = optional_module("common.report")
    if report:
        report.write_results(out, result, pictures=pictures, top=options.top, overlay=options.overlay, **drawing)
        files = f"report.html, metrics.json, scores.npz, curves/ ({len(result.scores)} videos)"
        print(f"wrote {out}/{files}" + (", roc.png" if result.labels else ""))
    else:
        missing = "there is no common/report here, which would write a page, plots and overlays"
        print(f"wrote {out}/metrics.json, scores.npz; {missing}")
    report_skipped(skipped)
    look = f"look at {out}/report.html; " if report else ""
    command = f"python {script} --checkpoint {shlex.quote(Path(checkpoint).as_posix())}"
    overlay = f"{command} --overlay, with --dataset as here, writes videos with scores; "
    videos = overlay if report and pictures and not options.overlay else ""
    print(f"next: {look}{videos}{more}{command} --video FILE scores your own video")


def print_table(columns: dict, data: Dataset, protocol: Protocol) -> None:
    """Measures by methods, in percent; what the protocol left out or took is named above it."""
    print(
        f"\n{data.name}, protocol {protocol.name}: smoothing {protocol.smoothing} "
        + ("over all videos as one" if protocol.across else "inside each video")
        + (f", first {protocol.skip} frames of every video left out (baselines: none)" if protocol.skip else "")
        + (", every frame scored" if protocol.skip == 0 and protocol.multiple == 1 else "")
    )
    for liberty in protocol.liberties:
        print(f"  liberty taken: {liberty}")
    first = next(iter(columns.values()))
    print(
        f"labels: {data.label_source}; {first['frames']} frames of {first['videos']} videos, "
        f"{first['abnormal_frames']} abnormal; {first['one_class_videos']} videos of one class (macro AUC)"
    )
    width = max(22, *(len(k) + 2 for k in columns))
    print(" " * 24 + "".join(f"{k:>{width}}" for k in columns))
    for key, title in ROWS:
        cells = [v.get(key) for v in columns.values()]
        if any(c is not None for c in cells):
            print(f"{title:<24}" + "".join(f"{'–' if c is None else f'{100 * c:.2f}':>{width}}" for c in cells))
    print()


def notes_on(result: dict, others: dict) -> list[str]:
    """Sentences: where a result stands beside the baselines; measures that are not defined, and why."""
    trivial = {k: v for k, v in others.items() if k in BASELINES} or others
    out, best = [], max(((v.get("micro_auc", 0), k) for k, v in trivial.items()), default=None)
    if best and "micro_auc" in result:
        gap = 100 * (result["micro_auc"] - best[0])
        other = f"best trivial baseline ({best[1]})" if best[1] in BASELINES else best[1]
        out.append(f"micro AUC is {abs(gap):.2f} points {'above' if gap >= 0 else 'BELOW'} the {other}")
    if "rbdc" in result and result["videos_with_regions"] < result["videos"]:
        out.append(
            f"RBDC, TBDC and pixel-level AUC are of the {result['videos_with_regions']} of {result['videos']} videos "
            "that have masks or tracks"
        )
    if "undefined_localization" in result:
        out.append(f"RBDC, TBDC and pixel-level AUC: not defined here ({result['undefined_localization']})")
    out += [
        f"regions of video {name} are left out: {why}" for name, why in result.get("unreadable_regions", {}).items()
    ]
    return out + [f"{name}: not defined here ({why})" for name, why in result.get("undefined", {}).items()]
