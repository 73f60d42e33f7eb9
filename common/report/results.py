"""The pictures of a finished evaluation, and of your video."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.evaluation import ROWS, Evaluation
from common.io import safe_filename
from common.readers.container import Clock
from common.report import page, plots, ranking


def write_results(
    out: Path,
    evaluation: Evaluation,
    *,
    pictures: Callable | None = None,
    color_max: float | None = None,
    top: int = 20,
    overlay: bool = False,
    curve_max: float | None = None,
    maps: dict | None = None,
    map_range: tuple[float, float] | None = None,
) -> None:
    """Write report.html, ranking.csv, contact_sheet.png, curves/*.png, roc.png and overlay/*.mp4.

    pictures(Video) -> (frames, Clock) for key frames, thumbnails and overlays. Boxes go from green at 0 to red at
    `color_max`, the curve under an overlay up to at least `curve_max` (default: the run's highest score); maps {video:
    function -> [T, rows, columns]}: heat over map_range.
    """
    e, color_range = evaluation, (0.0, color_max or 1.0)
    videos = {v.name: v for v in e.data.test}
    files = {name: safe_filename(name) for name in sorted(e.scores)}
    pictures_of = pictures and (lambda name: pictures(videos[name]))
    if e.labels:
        plots.roc({e.method: e.smoothed, "raw": e.scores, **e.baselines}, e.labels, out / "roc.png")
    shared = dict(pictures=pictures_of, detections=e.detections, color_range=color_range)
    ranking.write_ranking(e.smoothed, out, top=top, **shared)
    for name, file in files.items():
        title, path = f"{e.method} · {e.data.name} · {name}", out / "curves" / f"{file}.png"
        plots.curve(e.scores[name], e.smoothed[name], e.labels.get(name), title, path)
    notes = [f"liberty taken: {x}" for x in e.protocol.liberties] + e.notes
    page.write(
        out / "report.html",
        f"{e.method} on {e.data.name}, {e.protocol.name}",
        e.scores,
        e.smoothed,
        facts=summary_lines(e.metrics),
        notes=[("warn" if "BELOW" in x or "WARNING" in x else "soft", x) for x in notes],
        labels=e.labels,
        columns=e.columns,
        rows=ROWS,
        curves={e.method: e.smoothed, **e.baselines},
        auc_per_video=e.metrics.get("auc_per_video"),
        overlays={k: f"overlay/{file}.mp4" for k, file in files.items()} if overlay and pictures else None,
        **shared,
    )
    if overlay and not pictures:
        print("note: --overlay needs the videos, and there are features only")
    elif overlay:
        if curve_max is None:
            curve_max = max(float(np.nanmax(s, initial=0)) for s in e.smoothed.values())
        for name in tqdm(files, desc="overlay", unit="video", dynamic_ncols=True, mininterval=2):
            frames, clock = pictures_of(name)
            boxes, score = (e.detections or {}).get(name), e.smoothed[name]
            path = out / "overlay" / f"{files[name]}.mp4"
            ranges = dict(box_range=color_range, score_range=plots.score_range(score, curve_max), map_range=map_range)
            plots.overlay(frames, boxes, score, e.labels.get(name), path, clock, maps=maps and maps[name](), **ranges)
        print(f"wrote {len(files)} videos into {out}/overlay")


def summary_lines(metrics: dict) -> list[str]:
    """The words under the page's title. metrics: the content of metrics.json."""
    lines, speed = [], metrics.get("frames_per_second")
    if "frames" in metrics:
        lines = [f"{metrics['frames']} frames of {metrics['videos']} videos, {metrics['abnormal_frames']} abnormal"]
    lines += [f"labels: {metrics['label_source'] or 'none'}", f"smoothing: {metrics['smoothing']}"]
    lines += [f"{k}: {metrics[k]}" for k in ("seed", "checkpoint") if metrics.get(k) is not None]
    if speed:
        machine = f"{metrics.get('device')}, {metrics.get('precision')}"
        lines.append(f"scored at: {speed:.0f} frames/s ({machine}), preparation not counted")
    return lines


def write_own_video(
    name: str, frames, clock: Clock, scores, smoothed, filter_, method, out: Path, boxes, color_max, top
) -> None:
    """Write curve.png, overlay.mp4, ranking.csv, contact_sheet.png and report.html: see common.evaluation."""
    score_range = plots.score_range(smoothed, color_max)
    plots.curve(scores, smoothed, None, f"{method} · {name}", out / "curve.png")
    plots.overlay(frames, boxes, smoothed, None, out / "overlay.mp4", clock, (0.0, color_max), score_range)
    shared = dict(pictures=lambda _: (frames, clock), detections={name: boxes}, color_range=(0.0, color_max or 1.0))
    ranking.write_ranking({name: smoothed}, out, top=top, **shared)
    title, facts = f"{method} on {name}", [f"smoothing: {filter_}", "no labels"]
    overlays = {name: "overlay.mp4"}
    page.write(out / "report.html", title, {name: scores}, {name: smoothed}, facts=facts, overlays=overlays, **shared)
