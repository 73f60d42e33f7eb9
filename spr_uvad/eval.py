"""Score videos with a trained LBR-SPR.

python spr_uvad/eval.py --dataset ped2 --checkpoint runs/spr_uvad/ped2/spr.pt --protocol official --overlay
python spr_uvad/eval.py --dataset ped2 --checkpoint authors_model_set.npy --training-scores raw_training_scores.npy
python spr_uvad/eval.py --video my.mp4 --checkpoint runs/spr_uvad/folder/spr.pt
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import datasets, evaluation, smoothing
from common import old_training as training
from common.io import UserError, run, safe_filename, writable_folder
from common.objects import pipeline
from common.pool import add_shard_flag
from common.video import open_video
from spr_uvad import preprocess, scoring

W_RAW, W_FLOW = {"shanghaitech": 0.1}, 1.0  # weights of the two errors (authors' code); w_raw is 0.5 elsewhere
RED = 0.99  # quantile of all boxes' scores from which pictures paint them red


def add_eval_flags(parser):
    g = evaluation.add_score_flags(
        parser,
        "strict: smoothing inside each video; official: as the authors computed it, over all videos as one",
        "moving_average:10",
    )
    g.add_argument(
        "--w-raw",
        type=float,
        default=None,
        help="weight of the appearance error, with motion (default: 0.5, shanghaitech 0.1)",
    )
    g.add_argument("--w-flow", type=float, default=W_FLOW, help="weight of the motion error (default: %(default)s)")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preprocess.add_data_flags(parser)
    training.add_flags(parser, out="the checkpoint's folder")
    g = evaluation.add_source_flags(
        parser, "runs/spr_uvad/<dataset>/spr.pt", whose="our checkpoint, or the authors' nested list of models"
    )
    add_shard_flag(g, scoring=True)
    g.add_argument(
        "--training-scores",
        type=Path,
        nargs="+",
        default=None,
        metavar="FILE",
        help="the authors' training-score files (raw, and flow for a model with motion); without them the cubes of "
        "--setting are scored for their statistics",
    )
    g.add_argument(
        "--setting",
        choices=["test", "merge"],
        default=None,
        help="cubes for the statistics of a checkpoint that has none (default: test)",
    )
    add_eval_flags(parser)
    return parser.parse_args(argv)


def weights_of(args, dataset):
    return W_RAW.get(dataset, 0.5) if args.w_raw is None else args.w_raw, args.w_flow


def protocol_of(args):
    if args.protocol == "strict":
        return evaluation.Protocol("strict", args.smoothing)
    return evaluation.Protocol(
        "official", args.smoothing, 0, ["smoothing runs across the borders of videos"], across=True
    )


def red_of(detections):
    """Few large errors stretch the deviation of training scores, which include the anomalies: colours go by rank instead."""
    scores = np.concatenate([d[:, 5] for d in detections.values()])
    return max(1e-3, float(np.quantile(scores, RED))) if len(scores) else 1.0


class Scored:
    """A checkpoint with what it needs to score: models per block, settings of the cubes, statistics."""

    def __init__(self, path):
        self.path, (nets, self.state) = path, scoring.load_checkpoint(path)
        self.grid = tuple(self.state["grid"])
        self.nets = scoring.numbered(nets, self.grid)
        self.use_flow = scoring.use_flow(self.nets)
        self.foreground = self.state.get("foreground")

    def statistics(self, args, ready, folder, r):
        """{block number: means and deviations}, of the checkpoint, of files, or of cubes (on the first process)."""
        if self.state.get("statistics"):
            return {int(k): v for k, v in self.state["statistics"].items()}
        if args.training_scores:
            return statistics_of_files(args.training_scores, self.grid, self.use_flow, self.nets)
        merge = args.setting == "merge"
        r.print(f"{self.path} has no training statistics: scoring the cubes of setting {args.setting or 'test'}")
        everything = preprocess.prepare(args, r, splits=("train", "test"), trained=self.foreground) if merge else ready
        found = scoring.kept_score(
            self.nets, self.grid, everything, everything.train + everything.test if merge else ready.test, folder, r
        )
        if not found:
            return None
        errors, block, _ = found
        numbers = [k for k in self.nets if (block == k).any()]
        return scoring.statistics(errors, block, numbers)


def statistics_of_files(paths, grid, use_flow, nets):
    if len(paths) != (2 if use_flow else 1):
        raise UserError(
            f"--training-scores: this model is {'with' if use_flow else 'without'} motion and needs "
            f"{'two files, raw and flow' if use_flow else 'one file, raw'}; {len(paths)} were given"
        )
    out = {k: {} for k in nets}
    for name, path in zip(("raw", "flow"), paths):
        known = scoring.load_training_scores(path, grid)
        for k in nets:
            if k not in known:
                raise UserError(f"training scores {path} have none for block {k // grid[1]},{k % grid[1]}")
            out[k].update(
                {
                    "cubes": len(known[k]),
                    f"{name}_mean": float(known[k].mean()),
                    f"{name}_std": float(known[k].std()) or 1.0,
                }
            )
    return out


def evaluate(args, ready, checkpoint, r):
    """Score the test set, print and write the results. -> metrics (rank 0)."""
    if not ready.test:
        raise UserError(f"{ready.data.name} has no test videos under {ready.data.root}; score single ones with --video")
    model = Scored(checkpoint)
    folder = writable_folder(args.out or Path(checkpoint).parent)
    shard = getattr(args, "shard", None)
    found = scoring.kept_score(model.nets, model.grid, ready, ready.test, folder, r, ready.data.test, shard)
    stats = None if shard else model.statistics(args, ready, folder, r)
    if not found:
        return None
    errors, block, seconds = found
    weights = weights_of(args, ready.data.name)
    scores, detections = pipeline.per_video(
        ready, ready.test, scoring.combine(errors, block, stats, *weights), scoring.NO_BOX
    )
    out = folder / args.protocol
    red = red_of(detections)
    result = evaluation.evaluate(
        out,
        ready.data,
        scores,
        method="LBR-SPR",
        protocol=protocol_of(args),
        detections=detections,
        baselines=pipeline.baselines(ready, ready.test),
        extra={
            **training.about(checkpoint, model.state, model.nets.values(), seconds, ready.skipped, r),
            "weights": weights if model.use_flow else None,
            "statistics": stats,
            "with_motion": model.use_flow,
            "epochs": model.state.get("at", {}).get("epoch"),
            "foreground": vars(ready.store.s),
        },
    )
    evaluation.show(out, result, pictures=ready.pictures, red=red, curve_top=red, top=args.top, overlay=args.overlay)
    ready.report_skipped()
    evaluation.print_next_steps("spr_uvad/eval.py", checkpoint, out, overlay=args.overlay)
    return result.metrics


def score_video(args, r):
    """One's own footage: scores.csv, curve.png, overlay.mp4, ranking.csv."""
    video, model = open_video(args.video), Scored(args.checkpoint)
    ready = preprocess.prepare(args, r, video=video, trained=model.foreground)
    out = writable_folder((args.out or Path(args.checkpoint).parent / "video") / safe_filename(video.name))
    stats = model.statistics(args, ready, out, r)
    found = scoring.kept_score(model.nets, model.grid, ready, ready.test, out, r)
    if found:
        errors, block, _ = found
        values = scoring.combine(
            errors, block, stats, *weights_of(args, model.state.get("identity", {}).get("dataset"))
        )
        scores, detections = pipeline.per_video(ready, ready.test, values, scoring.NO_BOX)
        s, d = scores[video.name], detections[video.name]
        red = red_of(detections)
        evaluation.write_own_video(
            video.name, *ready.pictures(video), s, args.smoothing, "LBR-SPR", out, d, red, args.top
        )
        ready.report_skipped()


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    r = training.Run.from_args(args)
    args.checkpoint = args.checkpoint or Path("runs/spr_uvad") / datasets.canonical(args.dataset) / "spr.pt"
    if args.video:
        return score_video(args, r)
    model = Scored(args.checkpoint)  # a wrong file is refused before any work
    if args.flow is None and model.use_flow and model.foreground is None:
        args.flow = "dis"
    ready = preprocess.prepare(args, r, splits=("test",), trained=model.foreground)
    evaluate(args, ready, args.checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
