"""scores.csv of your own video, --video. Optional: a copy without this file scores datasets only."""

import numpy as np

from common import smoothing
from common.io import optional_module, writing_table


def write(
    name: str,
    frames,
    clock,
    scores: np.ndarray,
    filter_: str,
    method: str,
    out,
    boxes: np.ndarray | None = None,
    color_max: float = 0.0,
    top: int = 20,
) -> None:
    """scores.csv of your video, and what common.report makes of it: a page, a plot, an overlay.

    frames: uint8 [H, W, C] each, read three times: an array or a Decoder, no generator; shown at the times of `clock`
    (readers.container.Clock). scores: float [T]; boxes [n, 6]: frame, x1, y1, x2, y2, score, coloured from green at 0
    to red at `color_max`; or None. top: peaks in ranking.csv.
    """
    smoothed = smoothing.parse(filter_)(scores)
    counts = None if boxes is None else np.bincount(boxes[:, 0].astype(int), minlength=len(scores))
    with writing_table(out / "scores.csv") as table:
        table.writerow(["frame", "seconds", "score", "smoothed", *([] if counts is None else ["boxes"])])
        for t in range(len(scores)):
            row = [t, clock.text(t, 3), f"{scores[t]:.6g}", f"{smoothed[t]:.6g}"]
            table.writerow(row if counts is None else [*row, counts[t]])
    print(f"{name}: {len(scores)} frames" + ("" if boxes is None else f", {len(boxes)} objects"))
    report = optional_module("common.report")
    if report:
        report.write_own_video(name, frames, clock, scores, smoothed, filter_, method, out, boxes, color_max, top)
        print(f"wrote {out}/report.html, scores.csv, curve.png, overlay.mp4")
    else:
        print(
            f"wrote {out}/scores.csv; there is no common/report here, which would write a page, a plot and an overlay"
        )
