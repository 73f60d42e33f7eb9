"""Pictures of results: score curves, ROC, and overlay videos."""

from pathlib import Path

import cv2
import numpy as np

from common.io import UserError, atomic_write, opencv_path, printable
from common.pictures import as_channels, write_image

BLUE, GREY, RED = "#1f5fa8", "#9aa5b1", "#d6453d"


def pyplot():
    """matplotlib.pyplot without a screen; imported when something is drawn, as it would double the start of every script."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is no formula
    import matplotlib.pyplot

    return matplotlib.pyplot


def ranges(labels):
    """[(first, end)] of the runs of ones, end exclusive."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(labels) > 0, 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def save(figure, path):
    path = Path(path)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format=path.suffix[1:], dpi=110)
    pyplot().close(figure)


def _axes(title, labels, frames, figsize=(9, 2.8)):
    figure, ax = pyplot().subplots(figsize=figsize, layout="constrained")
    for i, (a, b) in enumerate(ranges(labels) if labels is not None else ()):
        ax.axvspan(a - 0.5, b - 0.5, color=RED, alpha=0.15, lw=0, label=None if i else "abnormal (ground truth)")
    ax.set(title=printable(title), xlabel="frame", ylabel="anomaly score", xlim=(0, max(1, frames - 1)))
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def curve(scores, smoothed, labels, title, path, threshold=None):
    """One video: raw and smoothed scores [T], shaded abnormal ranges, a line at `threshold`."""
    figure, ax = _axes(title, labels, len(scores))
    ax.plot(scores, color=GREY, lw=0.8, label="frame score")
    ax.plot(smoothed, color=BLUE, lw=1.8, label="smoothed")
    if threshold is not None:
        ax.axhline(threshold, color=RED, lw=1, ls="--", label="threshold")
    ax.legend(loc="upper left", fontsize=8, frameon=False, ncols=4)
    save(figure, path)


def curves(runs, labels, title, path):
    """Several runs over each other, each scaled to [0, 1] by its own extremes in this video."""
    figure, ax = _axes(title, labels, len(labels))
    for name, s in runs.items():
        span = np.ptp(s)
        ax.plot((s - s.min()) / span if span else s * 0, lw=1.4, label=printable(name))
    ax.legend(loc="upper left", fontsize=8, frameon=False)
    save(figure, path)


def lines(series, title, path, **axes):
    """Several lines {label: (x, y)} with a point at each of their values."""
    figure, ax = pyplot().subplots(figsize=(6, 3), layout="constrained")
    for label, (x, y) in series.items():
        ax.plot(x, y, marker="o", label=label)
    ax.set(title=title, **axes)
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def tsne(panels, path, most=1500):
    """Points in two dimensions (t-SNE), panels {title: (points [N, D], groups [N], kinds [N])} side by side.

    A colour per group; kind 0 is a dot, 1 a circle, 2 a cross. At most `most` points a panel.
    """
    from sklearn.manifold import TSNE

    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(6 * len(panels), 5.4), layout="constrained", squeeze=False
    )
    for ax, (title, (points, groups, kinds)) in zip(axes[0], panels.items()):
        keep = np.sort(np.random.default_rng(0).permutation(len(points))[:most])
        points, groups, kinds = points[keep], groups[keep], kinds[keep]
        flat = TSNE(perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(points)
        colours = pyplot().get_cmap("tab10" if len(set(groups)) <= 10 else "tab20")
        for i, group in enumerate(sorted(set(groups))):
            for kind, mark, size, edge in ((0, ".", 14, None), (1, "o", 18, "white"), (2, "X", 46, "black")):
                own = (groups == group) & (kinds == kind)
                if own.any():
                    ax.scatter(
                        *flat[own].T,
                        marker=mark,
                        s=size,
                        color=colours(i % colours.N),
                        linewidths=0.5,
                        edgecolors=edge,
                        alpha=0.95 if kind else 0.5,
                        label=None if kind else group,
                    )
        ax.set(title=title, xticks=[], yticks=[])
    axes[0, 0].legend(fontsize=8, frameon=False)
    save(figure, path)


def roc(runs, labels, path):
    """ROC over all frames of several runs {title: {video: [T]}}; frames left out (NaN) are skipped."""
    from sklearn.metrics import auc, roc_curve

    figure, ax = pyplot().subplots(figsize=(5, 5), layout="constrained")
    names = sorted(labels)
    y = np.concatenate([labels[k] for k in names])
    for i, (title, s) in enumerate(runs.items()):
        s = np.concatenate([s[k] for k in names])
        ok = np.isfinite(s)
        if len(np.unique(y[ok])) < 2:
            continue
        fpr, tpr, _ = roc_curve(y[ok], s[ok])
        ax.plot(fpr, tpr, lw=2.2 if i == 0 else 1.2, label=f"{printable(title)}: {100 * auc(fpr, tpr):.1f}")
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":")
    ax.set(
        xlabel="false positive rate",
        ylabel="true positive rate",
        xlim=(0, 1),
        ylim=(0, 1.005),
        aspect="equal",
        title="ROC over all frames (AUC in %)",
    )
    ax.legend(loc="lower right", fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def enlarged(image, width):
    """A small picture in whole pixels of itself, at least `width` wide."""
    factor = max(1, -(-width // image.shape[1]))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)


def contact_sheet(path, tiles, columns=3):
    """Pictures with captions under them, [(uint8 [h, w, 3], text)], in rows; nothing is written without any."""
    if not tiles:
        return
    height, done = max(image.shape[0] for image, _ in tiles), []
    for image, text in tiles:
        image = np.pad(image, ((0, height - image.shape[0] + 34), (0, 8), (0, 0)), constant_values=255)
        cv2.putText(
            image,
            text.encode("ascii", "replace").decode(),
            (4, height + 18),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.5,
            (30, 30, 30),
            1,
            cv2.LINE_AA,
        )
        done.append(image)
    columns = min(columns, len(done))
    done += [np.full_like(done[0], 255)] * (-len(done) % columns)
    write_image(path, np.vstack([np.hstack(done[i : i + columns]) for i in range(0, len(done), columns)]))


def heat(share):
    """0..1 -> BGR from green over yellow to red."""
    share = float(np.clip(share, 0, 1))
    return (40, int(200 * min(1, 2 - 2 * share)), int(230 * min(1, 2 * share)))


def blend_map(image, values, value_range):
    """A coarse map of errors [rows, columns] painted over a BGR image: unseen at the range's low end, red at its high end."""
    low, high = value_range
    share = np.clip((np.asarray(values, np.float32) - low) / max(1e-9, high - low), 0, 1)
    share = cv2.resize(share, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None]
    colour = np.concatenate(
        [np.full_like(share, 40), 200 * np.minimum(1, 2 - 2 * share), 230 * np.minimum(1, 2 * share)], axis=2
    )
    return (image + 0.6 * np.minimum(1, 3 * share) * (colour - image)).astype(np.uint8)


def score_range(smoothed, red):
    """What the curve under one video's overlay spans: its own scores, and at least what colours boxes from green to red."""
    return float(np.nanmin(smoothed, initial=0)), float(np.nanmax(smoothed, initial=red))


def overlay(frames, boxes, smoothed, labels, path, clock, box_range, score_range, maps=None, map_range=None):
    """An mp4 with every box coloured by its score and the score curve running underneath.

    frames: uint8 [H, W, C] each, as many as `smoothed` has scores; boxes float [n, 6] frame, x1, y1, x2, y2, score, or None; box_range
    (low, high) maps scores to colours and is the same for all videos of a run, so that colours compare; score_range maps them to
    the curve's height. maps [T, rows, columns]: errors painted as heat, map_range (low, high) alike. The mp4 runs at an even rate;
    where the video's Clock `clock` does not, the time of every frame is written beside its number.
    """
    boxes = np.zeros((0, 6), np.float32) if boxes is None else boxes
    t, order = len(smoothed), boxes[np.argsort(boxes[:, 0], kind="stable")]
    edges = np.searchsorted(order[:, 0], np.arange(t + 1))
    writer = None
    with atomic_write(path) as tmp:
        for i, image in zip(range(t), frames):
            if writer is None:
                h, w = image.shape[:2]
                scale = max(1, int(np.ceil(480 / w)))
                width, height = w * scale // 2 * 2, h * scale // 2 * 2
                strip = max(60, height // 4) // 2 * 2
                background = _strip(smoothed, labels, width, strip, score_range)
                writer = open_mp4(tmp, path, clock.fps, (width, height + strip))
            image = cv2.resize(as_channels(image, 3), (width, height), interpolation=cv2.INTER_LINEAR)
            if maps is not None:
                image = blend_map(image, maps[i], map_range)
            part = order[edges[i] : edges[i + 1]]
            for _, x1, y1, x2, y2, s in part[np.argsort(part[:, 5])]:
                share = (s - box_range[0]) / max(1e-9, box_range[1] - box_range[0])
                a, b = (int(x1 * scale), int(y1 * scale)), (int((x2 + 1) * scale), int((y2 + 1) * scale))
                cv2.rectangle(image, a, b, heat(share), 3 if share >= 1 else 1, cv2.LINE_AA)
            below = background.copy()
            x = int(i / max(1, t - 1) * (width - 1))
            cv2.line(below, (x, 0), (x, strip), (40, 40, 40), 1)
            below[:, x + 1 :] = below[:, x + 1 :] // 2 + 110  # what is still to come stays pale
            if labels is not None and labels[i]:
                cv2.rectangle(image, (0, 0), (width - 1, height - 1), (61, 69, 214), 4)
            said = f"{i}" if clock.times is None else f"{i}  {clock.text(i, 2)} s"
            cv2.putText(image, said, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
            writer.write(np.vstack([image, below]))
        if writer is not None:
            writer.release()


def open_mp4(tmp, path, fps, size):
    """A writer of frames (width, height) `size` into the file `tmp`, which will be called `path`."""
    writer = cv2.VideoWriter(opencv_path(tmp), cv2.VideoWriter_fourcc(*"mp4v"), fps or 25.0, size)
    if not writer.isOpened():
        raise UserError(
            f"the overlay video {path} cannot be written: this OpenCV has no mp4 encoder, or the folder refuses it"
        )
    return writer


def _strip(smoothed, labels, width, height, score_range):
    image = np.full((height, width, 3), 250, np.uint8)
    t = len(smoothed)
    place = lambda i: i / max(1, t - 1) * (width - 1)
    span = max(1e-9, score_range[1] - score_range[0])
    level = lambda s: height - 4 - (height - 8) * np.clip((s - score_range[0]) / span, 0, 1)
    for a, b in ranges(labels) if labels is not None else ():
        image[:, int(place(a)) : int(place(b)) + 1] = (220, 222, 250)
    values = np.nan_to_num(np.asarray(smoothed, np.float64), nan=score_range[0])
    points = np.stack([place(np.arange(t)), level(values)], 1).round().astype(np.int32)
    cv2.polylines(image, [points.reshape(-1, 1, 2)], False, (168, 95, 31), 2, cv2.LINE_AA)
    return image
