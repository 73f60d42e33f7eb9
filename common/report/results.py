"""The pictures of a finished evaluation, and of one's own footage."""

import numpy as np
from tqdm import tqdm

from common.evaluation import ROWS
from common.io import safe_filename
from common.report import page, plots, ranking


def write_results(
    out, evaluation, *, pictures=None, red=None, top=20, overlay=False, curve_top=None, maps=None, map_range=None
):
    """report.html, ranking.csv, contact_sheet.png, curves/*.png, roc.png and overlay/*.mp4 of a common.evaluation.Evaluation.

    pictures(Video) -> (frames, Clock) for key frames, thumbnails and overlays. Boxes go from green at 0 to red at `red`, the curve under
    an overlay up to at least `curve_top` (default: the run's highest score); maps {video: [T, rows, columns]}: heat over map_range.
    """
    e, span = evaluation, (0.0, red or 1.0)
    by_name = {v.name: v for v in e.data.test}
    shown = pictures and (lambda name: pictures(by_name[name]))
    if e.labels:
        plots.roc({e.method: e.smoothed, "raw": e.scores, **e.baselines}, e.labels, out / "roc.png")
    ranking.write_ranking(e.smoothed, out, pictures=shown, detections=e.detections, span=span, top=top)
    for name in sorted(e.scores):
        plots.curve(
            e.scores[name],
            e.smoothed[name],
            e.labels.get(name),
            f"{e.method} · {e.data.name} · {name}",
            out / "curves" / f"{safe_filename(name)}.png",
        )
    notes = [f"liberty taken: {x}" for x in e.protocol.liberties] + e.remarks
    page.write(
        out / "report.html",
        f"{e.method} on {e.data.name}, {e.protocol.name}",
        e.scores,
        e.smoothed,
        facts=facts_of(e.metrics),
        notes=[("warn" if "BELOW" in x or "WARNING" in x else "soft", x) for x in notes],
        labels=e.labels,
        columns=e.columns,
        rows=ROWS,
        curves={e.method: e.smoothed, **e.baselines},
        auc_per_video=e.metrics.get("auc_per_video"),
        detections=e.detections,
        span=span,
        pictures=shown,
        overlays={k: f"overlay/{safe_filename(k)}.mp4" for k in e.scores} if overlay and shown else None,
    )
    if overlay:
        write_overlays(out, e, shown, span, curve_top, maps, map_range)


def write_overlays(out, evaluation, pictures, span, curve_top, maps, map_range):
    """One mp4 per video; colours and the curve's height are the same in all of them."""
    if not pictures:
        return print("note: --overlay needs the videos, and there are features alone")
    e = evaluation
    if curve_top is None:
        curve_top = max(float(np.nanmax(s, initial=0)) for s in e.smoothed.values())
    for name in tqdm(sorted(e.smoothed), desc="overlay", unit="video", dynamic_ncols=True, mininterval=2):
        frames, clock = pictures(name)
        plots.overlay(
            frames,
            (e.detections or {}).get(name),
            e.smoothed[name],
            e.labels.get(name),
            out / "overlay" / f"{safe_filename(name)}.mp4",
            clock,
            span,
            plots.score_range(e.smoothed[name], curve_top),
            maps=(maps or {}).get(name),
            map_range=map_range,
        )
    print(f"wrote {len(e.smoothed)} videos into {out}/overlay")


def facts_of(metrics):
    """What stands under the page's title."""
    counts = []
    if "frames" in metrics:
        counts = [f"{metrics['frames']} frames of {metrics['videos']} videos, {metrics['abnormal_frames']} abnormal"]
    said = [
        ("labels", metrics["label_source"] or "none"),
        ("smoothing", metrics["smoothing"]),
        ("seed", metrics.get("seed")),
        ("checkpoint", metrics.get("checkpoint")),
        ("scored at", speed_of(metrics)),
    ]
    return counts + [f"{k}: {v}" for k, v in said if v is not None]


def speed_of(metrics):
    """How fast the prepared input was scored, in words; None where it is not known."""
    if not metrics.get("frames_per_second"):
        return None
    return f"{metrics['frames_per_second']:.0f} frames/s ({metrics.get('device')}, {metrics.get('precision')}), preparation not counted"


def write_own_video(name, frames, clock, scores, smoothed, filter_, method, out, boxes, red, top):
    """curve.png, overlay.mp4, ranking.csv, contact_sheet.png and report.html of one's own footage, see common.evaluation."""
    plots.curve(scores, smoothed, None, f"{method} · {name}", out / "curve.png")
    plots.overlay(
        frames, boxes, smoothed, None, out / "overlay.mp4", clock, (0.0, red), plots.score_range(smoothed, red)
    )
    shown = lambda _: (frames, clock)
    found = None if boxes is None else {name: boxes}
    span = (0.0, red or 1.0)
    ranking.write_ranking({name: smoothed}, out, pictures=shown, detections=found, span=span, top=top)
    page.write(
        out / "report.html",
        f"{method} on {name}",
        {name: scores},
        {name: smoothed},
        facts=[f"smoothing: {filter_}", "no labels"],
        detections=found,
        span=span,
        pictures=shown,
        overlays={name: "overlay.mp4"},
    )
