"""Compare finished runs on one dataset, with confidence intervals over videos; or put them together.

python common/report/compare.py runs/a/strict runs/b/strict --dataset ped2 --out compared
python common/report/compare.py runs/*/strict --dataset ped2 --fuse --fuse-weights 1,2
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from common import datasets, evaluation, metrics, smoothing
from common.io import UserError, atomic_write, read_json, run, safe_filename, writable_folder, writing_table
from common.report import plots

COLUMNS = [
    ("micro_auc", "micro AUC"),
    ("macro_auc", "macro AUC"),
    ("ap", "AP"),
    ("eer", "EER"),
    ("rbdc", "RBDC"),
    ("tbdc", "TBDC"),
]
COSTS = [
    ("frames_per_second", "frames/s, scoring", "{:.0f}", 1),
    ("parameters", "parameters, M", "{:.1f}", 1e6),
    ("training_seconds", "training, min", "{:.1f}", 60),
]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders with a scores.npz (and metrics.json), or scores.npz files"
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--labels", type=Path, default=None, help=".npz of video name -> 0/1 per frame")
    parser.add_argument("--smoothing", default="median:17", help="the same for all runs (default: %(default)s)")
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        help="bootstrap resamples of the videos; 0: no intervals (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fuse",
        action="store_true",
        help="also average the runs' z-scores; the weights are given, never tuned on labels",
    )
    parser.add_argument(
        "--fuse-weights", default=None, metavar="A,B,…", help="weights of the runs in the order given (default: alike)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for comparison.csv, .md and .tex, roc.png and curves"
    )
    return parser.parse_args(argv)


def auc(labels, scores):
    """metrics.auc, NaN where a class is missing."""
    try:
        return metrics.auc(labels, scores)
    except ValueError:
        return np.nan


def bootstrap(columns, labels, resamples, seed):
    """Micro AUC of every run on the same resamples of videos: {run: float64 [resamples]}, NaN where a resample has one class."""
    names, rng = sorted(labels), np.random.default_rng(seed)
    out = {title: np.empty(resamples) for title in columns}
    for i in tqdm(range(resamples), desc="bootstrap", unit="resample", dynamic_ncols=True, mininterval=2, leave=False):
        drawn = [names[k] for k in rng.integers(0, len(names), len(names))]
        y = np.concatenate([labels[k] for k in drawn])
        for title, scores in columns.items():
            out[title][i] = auc(y, np.concatenate([scores[k] for k in drawn]))
    return out


def interval(values):
    """95 % percentile interval, or None without values."""
    values = values[np.isfinite(values)]
    return tuple(np.percentile(values, (2.5, 97.5))) if len(values) else None


def fuse(columns, weights):
    """Weighted mean of the runs' scores, each in deviations from its mean over all frames."""
    total = {}
    for scores, weight in zip(columns.values(), weights):
        everything = np.concatenate(list(scores.values()))
        for k, s in scores.items():
            total[k] = total.get(k, 0.0) + weight * (s - everything.mean()) / (everything.std() or 1.0)
    return {k: v / sum(weights) for k, v in total.items()}


def weights_of(text, count):
    if text is None:
        return [1.0] * count
    try:
        weights = [float(x) for x in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or min(weights, default=-1) < 0 or not sum(weights):
        raise UserError(f"--fuse-weights {text}: expected {count} numbers of at least 0, one for each run")
    return weights


def titles_of(paths):
    """The shortest ends of the paths that tell the runs apart."""
    folders = [(p.parent if p.suffix == ".npz" else p).resolve() for p in paths]
    for n in range(1, 12):
        names = ["/".join(f.parts[-n:]) for f in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{paths[0]} is named twice: give every run once")


def read(path):
    """-> scores {video: [T]}, metrics.json's content or {}."""
    folder = path.parent if path.suffix == ".npz" else path
    scores = evaluation.load_scores(path if path.suffix == ".npz" else path / "scores.npz")
    report = folder / "metrics.json"
    return scores, read_json(report, "the run's measures") if report.exists() else {}


def main(argv=None):
    args = parse(argv)
    data = datasets.find(args.dataset, args.data_root, args.labels)
    protocol, apply = evaluation.Protocol("strict", args.smoothing), smoothing.parse(args.smoothing)
    runs, reports = {}, {}
    for title, path in zip(titles_of(args.runs), args.runs):
        runs[title], reports[title] = read(path)
    labels = evaluation.labels_of(next(iter(runs.values())), data)
    if not labels:
        raise UserError(f"{data.name} has no labels under {data.root}: nothing to compare by; give --labels FILE.npz")
    for scores in runs.values():
        if set(scores) != set(labels):
            raise UserError(
                f"the runs scored different videos ({len(set(scores) & set(labels))} in common): compare runs of the same "
                "test set"
            )
        evaluation.labels_of(scores, data)
    smoothed = {title: {k: apply(s) for k, s in scores.items()} for title, scores in runs.items()}
    measured = {
        title: {
            **evaluation.measure(runs[title], labels, protocol)[0],
            **{k: reports[title][k] for k in ("rbdc", "tbdc") if k in reports[title]},
        }
        for title in runs
    }
    if args.fuse:
        weights = weights_of(args.fuse_weights, len(runs))
        smoothed["fused"] = fuse(smoothed, weights)
        measured["fused"], _ = evaluation.measure(smoothed["fused"], labels, evaluation.Protocol("strict", "none"))
        reports["fused"] = {}
    evaluation.print_table(measured, data, protocol)
    print_costs(reports)
    found = bootstrap(smoothed, labels, args.resamples, args.seed) if args.resamples else {}
    for title, values in found.items():
        measured[title]["interval"] = interval(values)
    if found:
        print_intervals(measured, found)
    if args.out:
        out = writable_folder(args.out)
        write_tables(out, measured, reports)
        plots.roc(smoothed, labels, out / "roc.png")
        for name in labels:
            plots.curves(
                {t: s[name] for t, s in smoothed.items()},
                labels[name],
                f"{data.name} · {name}",
                out / "curves" / f"{safe_filename(name)}.png",
            )
        print(f"wrote {out}/comparison.csv, .md, .tex, roc.png and curves/")


def cost(report, key, form, unit):
    return "" if report.get(key) is None else form.format(report[key] / unit)


def print_costs(reports):
    """What the runs say they cost, a line per measure; nothing where none says anything."""
    width = max(22, *(len(k) + 2 for k in reports))
    for key, name, form, unit in COSTS:
        if any(r.get(key) is not None for r in reports.values()):
            cells = [cost(r, key, form, unit) or "–" for r in reports.values()]
            print(f"{name:<24}" + "".join(f"{c:>{width}}" for c in cells))
    print()


def print_intervals(measured, found):
    print("micro AUC with 95 % intervals over videos (bootstrap):")
    width = max(map(len, measured))
    for title, m in measured.items():
        text = "not defined" if m["interval"] is None else "{:.2f} .. {:.2f}".format(*(100 * x for x in m["interval"]))
        print(f"  {title:<{width}}  {100 * m.get('micro_auc', np.nan):6.2f}  ({text})")
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            span = interval(found[a] - found[b])
            if span:
                noise = "within noise" if span[0] <= 0 <= span[1] else f"{a if span[0] > 0 else b} is better"
                print(f"  {a} − {b}: {100 * span[0]:+.2f} .. {100 * span[1]:+.2f} points: {noise}")
    print()


def cells_of(title, m, report):
    """{column: text} of one run, in percent."""
    out = {"run": title, "method": report.get("method", ""), "protocol of the run": report.get("protocol", "")}
    for key, name in COLUMNS:
        out[name] = f"{100 * m[key]:.2f}" if m.get(key) is not None else ""
    out["95 % interval"] = "{:.2f}–{:.2f}".format(*(100 * x for x in m["interval"])) if m.get("interval") else ""
    for key, name, form, unit in COSTS:
        out[name] = cost(report, key, form, unit)
    return out


def write_tables(out, measured, reports):
    """comparison.csv, comparison.md and comparison.tex; columns without any number are left out."""
    rows = [cells_of(t, m, reports.get(t, {})) for t, m in measured.items()]
    columns = [c for c in rows[0] if any(r[c] for r in rows)]
    with writing_table(out / "comparison.csv") as table:
        table.writerows([columns, *([r[c] for c in columns] for r in rows)])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(r[c].replace("|", "\\|") for c in columns) + " |" for r in rows]
    with atomic_write(out / "comparison.md") as tmp:
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    special = str.maketrans({c: "\\" + c for c in "&%$#_{}"})
    body = [
        " & ".join(x.translate(special) for x in line) + r" \\"
        for line in (columns, *([r[c] for c in columns] for r in rows))
    ]
    with atomic_write(out / "comparison.tex") as tmp:
        tmp.write_text(
            "\n".join(
                [
                    r"\begin{tabular}{l" + "r" * (len(columns) - 1) + "}",
                    r"\toprule",
                    body[0],
                    r"\midrule",
                    *body[1:],
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
            + "\n",
            encoding="utf-8",
            errors="backslashreplace",
        )


if __name__ == "__main__":
    run(main)
