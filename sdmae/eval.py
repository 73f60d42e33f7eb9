"""Score videos with a trained AED-MAE, or a camera as its frames arrive.

python sdmae/eval.py --dataset ped2 --checkpoint runs/sdmae/ped2/sdmae.pt --protocol official --overlay
python sdmae/eval.py --dataset avenue --checkpoint checkpoint-best.pth --student checkpoint-best-student.pth
python sdmae/eval.py --video my.mp4 --checkpoint runs/sdmae/folder/sdmae.pt      # a file, a folder of frames,
python sdmae/eval.py --video rtsp://camera/stream --checkpoint …                 # a camera's number or its address
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import datasets, evaluation, smoothing
from common import old_training as training
from common.io import UserError, run, writable_folder
from common.kept import seconds_of
from common.pool import add_shard_flag, cores
from common.video import decoded
from sdmae import preprocess, scoring
from sdmae.frames import Frames


def add_eval_flags(parser):
    g = evaluation.add_score_flags(
        parser,
        "strict: smoothing fixed beforehand; official: the authors' filter and scaling",
        "median:17",
        "heat maps, boxes and the curve",
    )
    g.add_argument(
        "--norm",
        choices=["L1", "L2"],
        default=None,
        help="of the errors (default: the paper's; L1 on ShanghaiTech and UBnormal, else L2)",
    )
    g.add_argument(
        "--parts",
        choices=["both", "reconstruction", "distillation"],
        default=None,
        help="errors that are summed (default: the paper's; reconstruction on ShanghaiTech and UBnormal, else both)",
    )
    g.add_argument(
        "--student-on",
        choices=["all", "removed"],
        default="all",
        help="tokens that the student's error counts on: all, as "
        "published, or those that were removed, which alone it is trained on (default: %(default)s)",
    )
    g.add_argument(
        "--mask-draws",
        type=int,
        default=1,
        metavar="K",
        help="masks averaged over; with 2 every token is removed once, for twice the time (default: %(default)s)",
    )


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preprocess.add_data_flags(parser)
    training.add_flags(parser, out="the checkpoint's folder")
    g = evaluation.add_source_flags(
        parser, "runs/sdmae/<dataset>/sdmae.pt", video=None, whose="our checkpoint, or the authors' teacher"
    )
    g.add_argument("--student", type=Path, default=None, help="the authors' second file, with the student")
    g.add_argument(
        "--video",
        default=None,
        help="a video file, a folder of frames, a camera's number or a stream's address "
        "instead of the dataset's test set",
    )
    add_shard_flag(g, scoring=True)
    g.add_argument("--batch-size", type=int, default=None, help="frames scored at once (default: 64)")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    add_eval_flags(parser)
    from sdmae.live import add_live_flags

    add_live_flags(parser)
    return parser.parse_args(argv)


def protocol_of(args, dataset, rule):
    if args.protocol == "strict":
        return evaluation.Protocol("strict", args.smoothing)
    liberties = [
        "the filter's parameters are the authors' for Avenue and ShanghaiTech; how they were chosen is unknown"
    ]
    if dataset not in ("avenue", "shanghaitech"):
        other = "ShanghaiTech" if rule["minmax"] else "Avenue"
        liberties[0] = f"the authors' filter for {dataset} is not published: theirs for {other} is used"
    if rule["minmax"]:
        liberties.append("scores of each video are scaled to [0, 1] by its own extremes, which needs the whole video")
    return evaluation.Protocol("official", rule["filter"], 0, liberties, minmax=rule["minmax"])


class Scored:
    """A checkpoint with what it needs to score: network, rule, thresholds."""

    def __init__(self, args, dataset, r):
        size = None
        if args.image_size:  # for the authors' files, which do not say theirs
            size, _ = preprocess.input_of(args, dataset)
        self.net, self.state = scoring.load_model(args.checkpoint, args.student, size)
        self.size, self.patch = tuple(self.state["model_args"]["image_size"]), self.net.patch_size
        self.dataset = self.state.get("identity", {}).get("dataset", dataset)
        self.rule = scoring.rule_of(self.dataset, args.norm, args.parts, args.student_on)
        for key in ("mask_draws", "batch_size"):
            if getattr(args, key) is not None and getattr(args, key) < 1:
                raise UserError(f"--{key.replace('_', '-')} must be at least 1")
        self.batch_size = args.batch_size or 64
        self.scorer = scoring.Scorer(self.net, self.rule, r, draws=args.mask_draws, compiled=args.compile)

    def statistics(self, args, r):
        """Those of the checkpoint, if they were made with this rule; else of the dataset's training videos; None without any."""
        known = self.state.get("statistics")
        if known and [known["norm"], known["parts"], known.get("tokens", "all")] == [
            self.rule["norm"],
            list(self.rule["parts"]),
            self.rule["tokens"],
        ]:
            return known
        try:
            ready = preprocess.prepare(args, self.size, r, splits=("train",))
        except UserError:
            return None
        if not ready.train:
            return None
        r.print("the checkpoint has no training statistics of these errors: scoring training frames")
        return scoring.statistics(self.scorer, Frames(ready.arrays(ready.train), r.device))


def evaluate(args, ready, checkpoint, r):
    """Score the test set, print and write the results. -> metrics (rank 0)."""
    if not ready.test:
        raise UserError(f"{ready.data.name} has no test videos under {ready.data.root}; score single ones with --video")
    args.checkpoint = checkpoint
    args.student = getattr(args, "student", None)
    model = Scored(args, ready.data.name, r)
    folder = writable_folder(args.out or Path(checkpoint).parent)
    shard = getattr(args, "shard", None)
    found = scoring.kept_score(
        model.scorer, model.net, ready, ready.test, folder, model.batch_size, ready.data.test, shard
    )
    stats = None if shard else model.statistics(args, r)
    if not found:
        return None
    scores, maps = ({v.name: found[v.key][k] for v in ready.test} for k in ("scores", "maps"))
    protocol, rule = protocol_of(args, ready.data.name, model.rule), model.rule
    detections, threshold = None, None
    if stats:
        threshold = stats["token_quantiles"][str(scoring.QUANTILE)]
        detections = {
            v.name: scoring.boxes_of_maps(
                maps[v.name].astype(np.float32), threshold, ready.cache.info(v)["source_size"]
            )
            for v in ready.test
        }
    out = folder / args.protocol
    result = evaluation.evaluate(
        out,
        ready.data,
        scores,
        method="AED-MAE",
        protocol=protocol,
        detections=detections,
        baselines=evaluation.frame_baselines(ready.cache, ready.test, args.workers or cores()),
        extra={
            **training.about(checkpoint, model.state, [model.net], seconds_of(found), ready.skipped, r),
            "rule": {**rule, "parts": list(rule["parts"])},
            "mask_draws": args.mask_draws,
            "size": list(model.size),
            "patch": model.patch,
            "token_threshold": threshold,
        },
    )
    evaluation.show(
        out,
        result,
        pictures=decoded,
        red=3 * threshold if threshold else None,
        maps=maps,
        map_range=map_range_of(maps, threshold),
        top=args.top,
        overlay=args.overlay,
    )
    ready.report_skipped()
    evaluation.print_next_steps(
        "sdmae/eval.py",
        checkpoint,
        out,
        overlay=args.overlay,
        more="--video takes cameras too, as their frames arrive; ",
    )
    return result.metrics


def map_range_of(maps, threshold):
    """What heat maps span: around the threshold of tokens, or where there is none, their 99.9 % quantile."""
    threshold = threshold or float(
        np.quantile(np.concatenate([m.reshape(-1) for m in maps.values()]).astype(np.float32), 0.999)
    )
    return threshold / 2, 2 * threshold


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    r = training.Run.from_args(args)
    name = datasets.canonical(args.dataset)
    args.checkpoint = args.checkpoint or Path("runs/sdmae") / name / "sdmae.pt"
    if args.video is not None:
        from sdmae.live import watch

        watch(args, Scored(args, name, r), r)
        return
    model = Scored(args, name, r)  # a wrong file is refused before any work
    evaluate(args, preprocess.prepare(args, model.size, r, splits=("test",)), args.checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
