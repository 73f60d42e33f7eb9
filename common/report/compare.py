"""Compare finished runs on one dataset, with confidence intervals over videos; or put them together.

python common/report/compare.py runs/a/strict runs/b/strict --dataset ped2 --out compared
python common/report/compare.py runs/*/strict --dataset ped2 --fuse --fuse-weights 1,2
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from common import evaluation, io, metrics, smoothing
from common.io import UserError, atomic_write, read_json, run_script, safe_filename, writable_folder, writing_table
from common.readers import datasets
from common.report import plots

COLUMNS = dict(micro_auc="micro AUC", macro_auc="macro AUC", ap="AP", eer="EER", rbdc="RBDC", tbdc="TBDC")
COSTS = [
    ("frames_per_second", "frames/s, scoring", "{:.0f}", 1),
    ("parameters", "parameters, M", "{:.1f}", 1e6),
    ("training_seconds", "training, min", "{:.1f}", 60),
]


def load_scores(path) -> dict[str, np.ndarray]:
    """{video: float [T]} of a scores.npz. Raises UserError."""
    scores = io.load_arrays(path, "scores")
    wrong = [k for k, s in scores.items() if s.ndim != 1 or s.dtype.kind not in "fiu" or not np.isfinite(s).all()]
    if wrong or not scores:
        raise UserError(f"scores {path}: expected a finite number per frame of every video, not so of {wrong or 'any'}")
    return scores


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="folders with a scores.npz (and metrics.json), or scores.npz files")
    add("--dataset", required=True)
    add("--data-root", type=Path, default=Path("data"), help="(default: %(default)s)")
    labels = "an .npz of video name -> 0/1 per frame, a csv of video,start,end, or a folder of one .npy or .txt, or of "
    add("--labels", type=Path, help=f"frame labels to use instead of the dataset's own: {labels}pixel masks, per video")
    add("--smoothing", default="median:17", help="the same for all runs (default: %(default)s)")
    add("--resamples", type=int, default=1000, help="bootstrap resamples of the videos; 0: none (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--fuse", action="store_true", help="also average the runs' z-scores, with weights that no label has tuned")
    add("--fuse-weights", metavar="A,B,…", help="weights of the runs in the order given (default: the same for all)")
    add("--out", type=Path, help="folder for comparison.csv, .md and .tex, roc.png and curves")
    return parser.parse_args(argv)


def bootstrap(columns: dict[str, dict], labels: dict[str, np.ndarray], resamples: int, seed: int) -> dict:
    """Micro AUC of every run on the same resamples of videos: {run: float64 [resamples]}, NaN where one class is drawn.

    columns {run: {video: [T]}}; labels {video: 0/1 [T]}.
    """
    names, rng = sorted(labels), np.random.default_rng(seed)
    out = {title: np.empty(resamples) for title in columns}
    for i in tqdm(range(resamples), desc="bootstrap", unit="resample", dynamic_ncols=True, mininterval=2, leave=False):
        drawn = [names[k] for k in rng.integers(0, len(names), len(names))]
        y = np.concatenate([labels[k] for k in drawn])
        for title, scores in columns.items():
            s = np.concatenate([scores[k] for k in drawn])
            out[title][i] = metrics.auc(y, s) if y.min() < y.max() else np.nan
    return out


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % percentile interval of the finite values, None without any."""
    values = values[np.isfinite(values)]
    return tuple(np.percentile(values, (2.5, 97.5))) if len(values) else None


def fuse(columns: dict[str, dict], weights: list[float]) -> dict[str, np.ndarray]:
    """Weighted mean of the runs' scores, each as deviations from its mean over all frames. -> {video: [T]}"""
    total = {}
    for scores, weight in zip(columns.values(), weights):
        everything = np.concatenate(list(scores.values()))
        for k, s in scores.items():
            total[k] = total.get(k, 0.0) + weight * (s - everything.mean()) / (everything.std() or 1.0)
    return {k: v / sum(weights) for k, v in total.items()}


def weights_of(text: str | None, count: int) -> list[float]:
    """Numbers of --fuse-weights. Raises UserError."""
    try:
        weights = [1.0] * count if text is None else [float(x) for x in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or min(weights) < 0 or not sum(weights):
        raise UserError(f"--fuse-weights {text}: expected {count} numbers of at least 0, one for each run")
    return weights


def titles_of(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart. Raises UserError."""
    for n in range(1, 12):
        names = ["/".join(f.resolve().parts[-n:]) for f in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"one of {', '.join(map(str, folders))} is named twice: give every run once")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    data = datasets.find(args.dataset, args.data_root, args.labels)
    protocol, apply = evaluation.Protocol("strict", args.smoothing), smoothing.parse(args.smoothing)
    folders = [p.parent if p.suffix == ".npz" else p for p in args.runs]
    runs, reports = {}, {}
    for title, folder, path in zip(titles_of(folders), folders, args.runs):
        runs[title] = load_scores(path if path.suffix == ".npz" else path / "scores.npz")
        report = folder / "metrics.json"
        reports[title] = read_json(report, "the run's measures") if report.exists() else {}
    labels = evaluation.labels_of(next(iter(runs.values())), data)
    if not labels:
        raise UserError(f"{data.name} has no labels under {data.root}: nothing to compare by; give --labels FILE.npz")
    measured, smoothed = {}, {}
    for title, scores in runs.items():
        if set(scores) != set(labels):
            common = f"{len(set(scores) & set(labels))} in common"
            raise UserError(f"the runs scored different videos ({common}): compare runs of the same test set")
        evaluation.labels_of(scores, data)
        smoothed[title] = {k: apply(s) for k, s in scores.items()}
        regions = {k: reports[title][k] for k in ("rbdc", "tbdc") if k in reports[title]}
        measured[title] = {**evaluation.measure(scores, labels, protocol)[0], **regions}
    if args.fuse:
        smoothed["fused"] = fuse(smoothed, weights_of(args.fuse_weights, len(runs)))
        measured["fused"], _ = evaluation.measure(smoothed["fused"], labels, evaluation.Protocol("strict", "none"))
        reports["fused"] = {}
    evaluation.print_table(measured, data, protocol)
    print_costs(reports)
    if args.resamples:
        resampled = bootstrap(smoothed, labels, args.resamples, args.seed)
        for title, values in resampled.items():
            measured[title]["interval"] = interval(values)
        print_intervals(measured, resampled)
    if args.out:
        out = writable_folder(args.out)
        write_tables(out, measured, reports)
        plots.roc(smoothed, labels, out / "roc.png")
        for name in labels:
            path = out / "curves" / f"{safe_filename(name)}.png"
            plots.curves({t: s[name] for t, s in smoothed.items()}, labels[name], f"{data.name} · {name}", path)
        print(f"wrote {out}/comparison.csv, .md, .tex, roc.png and curves/")


def cost(report: dict, key: str, form: str, unit: float) -> str:
    return "" if report.get(key) is None else form.format(report[key] / unit)


def print_costs(reports: dict[str, dict]) -> None:
    """What the runs cost, a line per measure that any of them names."""
    width = max(22, *(len(k) + 2 for k in reports))
    for key, name, form, unit in COSTS:
        cells = [cost(r, key, form, unit) for r in reports.values()]
        if any(cells):
            print(f"{name:<24}" + "".join(f"{c or '–':>{width}}" for c in cells))
    print()


def print_intervals(measured: dict[str, dict], resampled: dict[str, np.ndarray]) -> None:
    print("micro AUC with 95 % intervals over videos (bootstrap):")
    width = max(map(len, measured))
    for title, m in measured.items():
        text = "not defined" if m["interval"] is None else "{:.2f} .. {:.2f}".format(*(100 * x for x in m["interval"]))
        print(f"  {title:<{width}}  {100 * m.get('micro_auc', np.nan):6.2f}  ({text})")
    for a, b in itertools.combinations(resampled, 2):
        span = interval(resampled[a] - resampled[b])
        if span:
            verdict = "within noise" if span[0] <= 0 <= span[1] else f"{a if span[0] > 0 else b} is better"
            print(f"  {a} − {b}: {100 * span[0]:+.2f} .. {100 * span[1]:+.2f} points: {verdict}")
    print()


def cells_of(title: str, m: dict, report: dict) -> dict[str, str]:
    """{column: text} of one run, in percent."""
    out = {"run": title, "method": report.get("method", ""), "protocol of the run": report.get("protocol", "")}
    out |= {name: f"{100 * m[key]:.2f}" if m.get(key) is not None else "" for key, name in COLUMNS.items()}
    out["95 % interval"] = "{:.2f}–{:.2f}".format(*(100 * x for x in m["interval"])) if m.get("interval") else ""
    return out | {name: cost(report, key, form, unit) for key, name, form, unit in COSTS}


def write_tables(out: Path, measured: dict[str, dict], reports: dict[str, dict]) -> None:
    """Write comparison.csv, .md and .tex; columns without any number are left out."""
    cells = [cells_of(title, m, reports[title]) for title, m in measured.items()]
    columns = [c for c in cells[0] if any(r[c] for r in cells)]
    rows = [[r[c] for c in columns] for r in cells]
    with writing_table(out / "comparison.csv") as table:
        table.writerows([columns, *rows])
    md = [columns, ["---"] * len(columns), *([x.replace("|", "\\|") for x in row] for row in rows)]
    special = str.maketrans({c: "\\" + c for c in "&%$#_{}"})
    head, *body = (" & ".join(x.translate(special) for x in row) + r" \\" for row in (columns, *rows))
    begin, end = r"\begin{tabular}{l" + "r" * (len(columns) - 1) + "}", r"\end{tabular}"
    tex = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end]
    for name, lines in (("comparison.md", ["| " + " | ".join(row) + " |" for row in md]), ("comparison.tex", tex)):
        with atomic_write(out / name) as tmp:
            tmp.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    run_script(main)
