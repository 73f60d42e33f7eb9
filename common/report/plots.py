"""Pictures of results: score curves, ROC, and overlay videos."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from common.io import UserError, atomic_write, opencv_path, printable
from common.readers.container import Clock
from common.readers.pictures import as_channels, write_image

BLUE, GREY = "#1f5fa8", "#9aa5b1"
RED = "#d6453d"


def pyplot():
    """matplotlib.pyplot without a screen; imported for the first plot, as it would double the start of every script."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is no formula
    import matplotlib.pyplot

    return matplotlib.pyplot


def ranges(labels) -> list[tuple[int, int]]:
    """(first, end) of the runs of ones, end exclusive."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(labels) > 0, 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def save(figure, path) -> None:
    path = Path(path)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format=path.suffix[1:], dpi=110)
    pyplot().close(figure)


def _axes(width, height):
    figure, ax = pyplot().subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _score_axes(title, labels, frames):
    figure, ax = _axes(9, 2.8)
    ax.set(title=printable(title), xlabel="frame", ylabel="anomaly score", xlim=(0, max(1, frames - 1)))
    for i, (a, b) in enumerate(ranges(labels) if labels is not None else ()):
        ax.axvspan(a - 0.5, b - 0.5, color=RED, alpha=0.15, lw=0, label=None if i else "abnormal (ground truth)")
    return figure, ax


def curve(scores: np.ndarray, smoothed: np.ndarray, labels, title: str, path, threshold: float | None = None) -> None:
    """One video: raw and smoothed scores [T], shaded abnormal ranges (labels [T] or None), a line at `threshold`."""
    figure, ax = _score_axes(title, labels, len(scores))
    ax.plot(scores, color=GREY, lw=0.8, label="frame score")
    ax.plot(smoothed, color=BLUE, lw=1.8, label="smoothed")
    if threshold is not None:
        ax.axhline(threshold, color=RED, lw=1, ls="--", label="threshold")
    ax.legend(loc="upper left", fontsize=8, frameon=False, ncols=4)
    save(figure, path)


def curves(runs: dict[str, np.ndarray], labels: np.ndarray, title: str, path) -> None:
    """Several runs {title: [T]} over each other, each scaled to [0, 1] by its own extremes in this video."""
    figure, ax = _score_axes(title, labels, len(labels))
    for name, s in runs.items():
        span = np.ptp(s)
        ax.plot((s - s.min()) / span if span else s * 0, lw=1.4, label=printable(name))
    ax.legend(loc="upper left", fontsize=8, frameon=False)
    save(figure, path)


def lines(series: dict[str, tuple], title: str, path, **axes) -> None:
    """Several lines {label: (x, y)}, with points where there are few values. axes: for matplotlib's Axes.set."""
    figure, ax = _axes(6, 3)
    for label, (x, y) in series.items():
        ax.plot(x, y, marker="o" if len(x) < 50 else None, label=label)
    ax.set(title=title, **axes)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=4)
    save(figure, path)


def tsne(panels: dict[str, tuple], path, most: int = 1500) -> None:
    """Points in two dimensions (t-SNE), panels {title: (points [N, D], groups [N], kinds [N])} side by side.

    A colour per group; kind 0 is a dot, 1 a circle, 2 a cross. At most `most` points a panel.
    """
    from sklearn.manifold import TSNE

    size = (6 * len(panels), 5.4)
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, (points, groups, kinds)) in zip(axes[0], panels.items()):
        keep = np.sort(np.random.default_rng(0).permutation(len(points))[:most])
        points, groups = points[keep], groups[keep]
        kinds = kinds[keep]
        flat = TSNE(perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(points)
        colours = pyplot().get_cmap("tab10" if len(set(groups)) <= 10 else "tab20")
        for i, group in enumerate(sorted(set(groups))):
            for kind, marker, size, edge in ((0, ".", 14, None), (1, "o", 18, "white"), (2, "X", 46, "black")):
                xy = flat[(groups == group) & (kinds == kind)]
                style = dict(marker=marker, s=size, color=colours(i % colours.N), linewidths=0.5, edgecolors=edge)
                if len(xy):
                    ax.scatter(*xy.T, alpha=0.95 if kind else 0.5, label=None if kind else group, **style)
        ax.set(title=title, xticks=[], yticks=[])
    axes[0, 0].legend(fontsize=8, frameon=False)
    save(figure, path)


def scored_frames(runs: dict[str, dict], labels: dict[str, np.ndarray]) -> Iterator[tuple]:
    """Yield (title, labels [n], scores [n]) of runs {title: {video: [T]}} over all frames of all videos.

    Frames left out (NaN) are skipped, and runs whose frames are of one class.
    """
    y = np.concatenate([labels[k] for k in sorted(labels)])
    for title, scores in runs.items():
        s = np.concatenate([scores[k] for k in sorted(labels)])
        finite = np.isfinite(s)
        if len(np.unique(y[finite])) == 2:
            yield title, y[finite], s[finite]


def roc(runs: dict[str, dict], labels: dict[str, np.ndarray], path) -> None:
    """ROC of several runs, see scored_frames()."""
    from sklearn.metrics import auc, roc_curve

    figure, ax = _axes(5, 5)
    first = next(iter(runs), None)
    for title, y, s in scored_frames(runs, labels):
        fpr, tpr, _ = roc_curve(y, s)
        ax.plot(fpr, tpr, lw=2.2 if title == first else 1.2, label=f"{printable(title)}: {100 * auc(fpr, tpr):.1f}")
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":", label="chance: 50.0")
    ax.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC over all frames (AUC in %)")
    ax.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    ax.legend(loc="lower right", fontsize=8, frameon=False)
    save(figure, path)


def enlarged(image: np.ndarray, width: int) -> np.ndarray:
    """A small picture magnified by a whole factor, at least `width` wide."""
    factor = max(1, -(-width // image.shape[1]))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)


def write_text(image: np.ndarray, text: str, x: int, y: int, color: tuple = (255, 255, 255)) -> None:
    """Write ASCII into a picture (in place)."""
    text = text.encode("ascii", "replace").decode()
    cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, 1, cv2.LINE_AA)


def contact_sheet(path, tiles: list[tuple[np.ndarray, str]], columns: int = 3) -> None:
    """Pictures uint8 [h, w, 3] with captions under them, in rows; nothing is written without any."""
    if not tiles:
        return
    height, cells = max(image.shape[0] for image, _ in tiles), []
    for image, text in tiles:
        cell = np.pad(image, ((0, height - image.shape[0] + 34), (0, 8), (0, 0)), constant_values=255)
        write_text(cell, text, 4, height + 18, (30, 30, 30))
        cells.append(cell)
    columns = min(columns, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    write_image(path, np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]))


def heat(share: np.ndarray) -> np.ndarray:
    """0..1 [...] -> BGR float [..., 3] from green over yellow to red."""
    share = np.clip(share, 0, 1)
    return np.stack([np.full_like(share, 40), 200 * np.minimum(1, 2 - 2 * share), 230 * np.minimum(1, 2 * share)], -1)


def share_of(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Where values lie in a range (low, high): 0 at its low end, 1 at its high end."""
    low, high = value_range
    return (values - low) / max(1e-9, high - low)


def draw_box(image: np.ndarray, box: np.ndarray, scale: float, share: float, is_thick: bool) -> None:
    """Draw x1, y1, x2, y2, multiplied by `scale`, into a picture (in place), coloured by heat(share)."""
    x1, y1, x2, y2 = box
    color = tuple(int(c) for c in heat(np.float64(share)))
    corners = (int(x1 * scale), int(y1 * scale)), (int((x2 + 1) * scale), int((y2 + 1) * scale))
    cv2.rectangle(image, *corners, color, 3 if is_thick else 1, cv2.LINE_AA)


def blend_map(image: np.ndarray, values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Paint a coarse map of errors [rows, columns] over a BGR image: unseen at the range's low end, red at its high."""
    share = np.clip(share_of(np.asarray(values, np.float32), value_range), 0, 1)
    share = cv2.resize(share, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return (image + 0.6 * np.minimum(1, 3 * share)[..., None] * (heat(share) - image)).astype(np.uint8)


def score_range(smoothed: np.ndarray, color_max: float) -> tuple[float, float]:
    """(low, high) of the curve under one video's overlay: its scores, and at least up to where boxes are red."""
    return float(np.nanmin(smoothed, initial=0)), float(np.nanmax(smoothed, initial=color_max))


def overlay(
    frames: Iterable[np.ndarray],
    boxes: np.ndarray | None,
    smoothed: np.ndarray,
    labels: np.ndarray | None,
    path,
    clock: Clock,
    box_range: tuple[float, float],
    score_range: tuple[float, float],
    maps: np.ndarray | None = None,
    map_range: tuple[float, float] | None = None,
) -> None:
    """An mp4 with every box coloured by its score and the score curve running underneath.

    frames: uint8 [H, W, C] each, as many as `smoothed` has scores; boxes float [n, 6] frame, x1, y1, x2, y2, score, or
    None; box_range (low, high) maps scores to colours and is the same for all videos of a run, so that colours compare;
    score_range maps them to the curve's height. maps [T, rows, columns]: errors painted as heat over map_range. The mp4
    has an even rate; where the video's has not, the time of every frame stands beside its number. Raises UserError.
    """
    boxes = np.zeros((0, 6), np.float32) if boxes is None else boxes[np.lexsort((boxes[:, 5], boxes[:, 0]))]
    count, writer = len(smoothed), None
    starts = np.searchsorted(boxes[:, 0], np.arange(count + 1))
    with atomic_write(path) as tmp:
        for t, image in zip(range(count), frames):
            if writer is None:
                h, w = image.shape[:2]
                scale = max(1, int(np.ceil(480 / w)))
                width, height = w * scale // 2 * 2, h * scale // 2 * 2
                strip = max(60, height // 4) // 2 * 2
                background = _strip(smoothed, labels, width, strip, score_range)
                writer = open_mp4(tmp, path, clock.fps, (width, height + strip))
            image = cv2.resize(as_channels(image, 3), (width, height), interpolation=cv2.INTER_LINEAR)
            if maps is not None:
                image = blend_map(image, maps[t], map_range)
            for box in boxes[starts[t] : starts[t + 1]]:
                share = share_of(box[5], box_range)
                draw_box(image, box[1:5], scale, share, share >= 1)
            below = background.copy()
            x = int(t / max(1, count - 1) * (width - 1))
            cv2.line(below, (x, 0), (x, strip), (40, 40, 40), 1)
            below[:, x + 1 :] = below[:, x + 1 :] // 2 + 110  # the rest of the video stays pale
            if labels is not None and labels[t]:
                cv2.rectangle(image, (0, 0), (width - 1, height - 1), (61, 69, 214), 4)
            write_text(image, f"{t}" if clock.times is None else f"{t}  {clock.text(t, 2)} s", 6, 18)
            writer.write(np.vstack([image, below]))
        if writer is not None:
            writer.release()


def open_mp4(tmp, path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    """A writer of frames (width, height) `size` into the file `tmp`, which will be called `path`. Raises UserError."""
    writer = cv2.VideoWriter(opencv_path(tmp), cv2.VideoWriter_fourcc(*"mp4v"), max(0.01, round(fps or 25.0, 2)), size)
    if not writer.isOpened():  # nor does mpeg4 take a rate such as 66.6667, whose fraction needs more than 16 bits
        reason = "this OpenCV has no mp4 encoder, or the folder refuses it"
        raise UserError(f"the overlay video {path} cannot be written: {reason}")
    return writer


def _strip(smoothed, labels, width, height, score_range):
    """The curve under an overlay: uint8 [height, width, 3]."""
    image = np.full((height, width, 3), 250, np.uint8)
    x = np.arange(len(smoothed) + 1) / max(1, len(smoothed) - 1) * (width - 1)
    for a, b in ranges(labels) if labels is not None else ():
        image[:, int(x[a]) : int(x[b]) + 1] = (220, 222, 250)
    values = np.nan_to_num(np.asarray(smoothed, np.float64), nan=score_range[0])
    level = height - 4 - (height - 8) * np.clip(share_of(values, score_range), 0, 1)
    points = np.stack([x[:-1], level], 1).round().astype(np.int32)
    cv2.polylines(image, [points.reshape(-1, 1, 2)], False, (168, 95, 31), 2, cv2.LINE_AA)
    return image
