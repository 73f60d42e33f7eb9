"""The normality advantage: mean loss of normal and of abnormal cubes over the epochs (section 3.1). Labels serve only
this plot.

python spr_uvad/advantage.py runs/with runs/without --out advantage.png
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.io import UserError, optional_module, run_script


def cube_labels(dataset, videos, share=0.2):
    """int8 [N]: 1 for cubes with at least `share` of their box abnormal by the pixel masks; without masks the
    frame's label."""
    out = []
    for v in videos:
        frame, box = (dataset.column([v], k)[0] for k in ("frame", "box"))
        label = np.zeros(len(frame), np.int8)
        if v.split == "test":
            try:
                masks = dataset.data.masks(v)
            except UserError:  # which the evaluation names
                masks = None
            if masks is None or len(masks) != dataset.frames(v):
                label = dataset.data.labels(v, dataset.frames(v))[frame].astype(np.int8)
            else:
                whole = np.ceil(box).astype(int)
                for i, (t, (x1, y1, x2, y2)) in enumerate(zip(frame, whole)):
                    part = masks[t][max(0, y1) : y2 + 1, max(0, x1) : x2 + 1]
                    label[i] = part.size > 0 and part.mean() >= share
        out.append(label)
    return np.concatenate(out) if out else np.zeros(0, np.int8)


def means(losses, labels):
    """{"normal_loss", "abnormal_loss"}: means of the two kinds of cubes, None where there is no such cube."""
    return {
        f"{name}_loss": float(losses[labels == k].mean()) if (labels == k).any() else None
        for k, name in ((0, "normal"), (1, "abnormal"))
    }


def read(path):
    """Epoch means over all blocks (equal weights) of a run's log.jsonl: {epoch: (normal, abnormal)}."""
    try:
        lines = [json.loads(x) for x in Path(path).read_text().splitlines() if x.strip()]
    except (OSError, ValueError) as e:
        raise UserError(f"log {path} cannot be read ({e})") from None
    losses_of_epoch = {}
    for x in lines:
        if x.get("normal_loss") is not None and x.get("abnormal_loss") is not None:
            losses_of_epoch.setdefault(x["epoch"], []).append((x["normal_loss"], x["abnormal_loss"]))
    return {k: tuple(np.mean(v, 0)) for k, v in sorted(losses_of_epoch.items())}


def plot(logs, path):
    """logs {title: log.jsonl} -> PNG: the losses above, their ratio below; nothing where there is no common/report."""
    report = optional_module("common.report")
    curves = {title: read(log) for title, log in logs.items()}
    curves = {k: v for k, v in curves.items() if v}
    if not curves or report is None:
        return
    plots = report.plots
    figure, (above, below) = plots.pyplot().subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for i, (title, points) in enumerate(curves.items()):
        epochs, style = list(points), ("-", "--", ":", "-.")[i % 4]
        normal, abnormal = np.array(list(points.values())).T
        above.plot(epochs, normal, style, color=plots.BLUE, label=f"normal, {title}")
        above.plot(epochs, abnormal, style, color=plots.RED, label=f"abnormal, {title}")
        below.plot(epochs, abnormal / normal, style, color="black", label=title)
    above.set(yscale="log", ylabel="mean squared error of cubes", title="Normality advantage")
    below.set(xlabel="epoch", ylabel="abnormal / normal")
    for ax in (above, below):
        ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    plots.save(figure, path)
    print(f"wrote {path}")


def main(argv=None):
    parser = cli.make_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs on a labelled dataset")
    parser.add_argument("--out", type=Path, default=Path("normality_advantage.png"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    names = [folder.name for folder in args.runs]
    logs = {(str(f) if names.count(f.name) > 1 else f.name): f / "log.jsonl" for f in args.runs}
    if not any(read(x) for x in logs.values()):
        raise UserError(
            "these runs have no losses of normal and abnormal cubes in their log.jsonl: their dataset had no labels"
        )
    plot(logs, args.out)


if __name__ == "__main__":
    run_script(main)
