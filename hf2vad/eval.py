"""Score test videos, or one's own, with a trained HF2-VAD.

python hf2vad/eval.py --dataset ped2 --checkpoint runs/hf2vad/ped2/cvae.pt --protocol official --overlay
python hf2vad/eval.py --video my.mp4 --checkpoint runs/hf2vad/ped2/cvae.pt
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import evaluation, smoothing
from common import old_training as training
from common.dataset import Dataset
from common.io import UserError, run, safe_filename, writable_folder
from common.kept import Kept, seconds_of
from common.objects import pipeline
from common.pool import add_shard_flag
from common.video import Video, open_video
from hf2vad import preprocess, scoring

SKIPPED = 4  # frames without full history, which the authors leave out
# w_r (flow) and w_p (frame). How the published values were found is unknown, so strict weighs both errors alike.
STRICT_WEIGHTS = (1.0, 1.0)
OFFICIAL_WEIGHTS = {"ped2": (1.0, 0.1)}


def add_eval_flags(parser):
    g = evaluation.add_score_flags(
        parser, "strict: every frame, nothing chosen on test labels; official: as the authors computed it", "median:17"
    )
    g.add_argument("--w-flow", type=float, default=None, help="weight of the flow error w_r (default: 1)")
    g.add_argument(
        "--w-frame", type=float, default=None, help="weight of the frame error w_p (default: 1; official on ped2: 0.1)"
    )


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preprocess.add_data_flags(parser)
    training.add_flags(parser, out="the checkpoint's folder")
    g = evaluation.add_source_flags(parser, "the newest of runs/hf2vad/<dataset>")
    add_shard_flag(g, scoring=True)
    g.add_argument(
        "--batch-size",
        type=int,
        default=None,
        help="cubes at once; scores do not depend on it "
        "(default: 256 on GPUs; on CPUs 64, which stay in the processor's cache)",
    )
    add_eval_flags(parser)
    return parser.parse_args(argv)


def weights_of(args, dataset):
    default = OFFICIAL_WEIGHTS.get(dataset, STRICT_WEIGHTS) if args.protocol == "official" else STRICT_WEIGHTS
    return (default[0] if args.w_flow is None else args.w_flow, default[1] if args.w_frame is None else args.w_frame)


def protocol_of(args, dataset):
    if args.protocol == "strict":
        return evaluation.Protocol("strict", args.smoothing)
    liberties = [f"the first {SKIPPED} frames of every video are left out"]
    if dataset in OFFICIAL_WEIGHTS:
        liberties.append(
            "the weights of the two errors are the authors' for this dataset; how they were chosen is unknown"
        )
    return evaluation.Protocol("official", args.smoothing, SKIPPED, liberties)


def cube_errors(scorer, net, ready, videos, folder, r, batch_size, among=None, shard=None):
    """[N, 2] flow and frame errors of all cubes of `videos`, and the seconds that scoring took; None where common.kept says so."""
    kept = Kept(
        folder,
        {"weights": training.weights_hash(net), "cubes": ready.store.s.key(), "precision": r.precision},
        Video.fingerprint,
        __file__,
    )
    found = kept.make(
        videos,
        lambda v, tick: {"errors": scorer.errors_of(ready.store.records(v), batch_size, tick)},
        r,
        size=lambda v: ready.store.info(v)["cubes"],
        unit="cube",
        among=among,
        shard=shard,
    )
    return found and (np.concatenate([found[v.key]["errors"] for v in videos]), seconds_of(found))


def per_video(ready, errors, stats, weights):
    """-> {video: frame scores}, {video: detections} of the test videos; a frame without cubes scores as one without error."""
    return pipeline.per_video(
        ready, ready.test, scoring.combine(errors, stats, *weights), scoring.empty_score(stats, *weights)
    )


def red(weights):
    """The score that overlays paint red: three deviations of the training cubes above their mean."""
    return 3 * float(np.hypot(*weights)) or 1.0


def training_statistics(state, net, scorer, args, r, checkpoint, batch_size):
    """The checkpoint's own statistics, or those of the dataset's training cubes where it has none (on the first process)."""
    if state.get("statistics"):
        return state["statistics"]
    r.print(f"{checkpoint} has no training statistics: scoring the training cubes of {args.dataset}")
    ready = preprocess.prepare(args, r, splits=("train",), trained=state.get("foreground"))
    if not ready.train:
        raise UserError(
            f"{checkpoint} has no training statistics and {args.dataset} no training videos: the scores cannot "
            "be normalised"
        )
    found = cube_errors(scorer, net, ready, ready.train, ready.store.folder, r, batch_size)
    return found and scoring.statistics(found[0])


def evaluate(args, ready, checkpoint, r, batch_size=None):
    """Score the test set, print and write the results. -> metrics (rank 0)."""
    if not ready.test:
        raise UserError(f"{ready.data.name} has no test videos under {ready.data.root}; score single ones with --video")
    net, state = scoring.load_model(checkpoint)
    scorer = scoring.Scorer(net, r)
    folder, shard = writable_folder(args.out or Path(checkpoint).parent), getattr(args, "shard", None)
    found = cube_errors(scorer, net, ready, ready.test, folder, r, batch_size, ready.data.test, shard)
    stats = None if shard else training_statistics(state, net, scorer, args, r, checkpoint, batch_size)
    if not found:
        return None
    errors, seconds = found
    weights = weights_of(args, ready.data.name)
    if state.get("done") is False:
        print(
            f"note: the training of {checkpoint} has not finished (stage {state['stage']}, {state['epoch']} whole epochs)"
        )
    if not scorer.whole:
        print("this checkpoint is stage one alone: scores are flow errors")
    scores, detections = per_video(ready, errors, stats, weights)
    out = folder / args.protocol
    result = evaluation.evaluate(
        out,
        ready.data,
        scores,
        method="HF2-VAD",
        protocol=protocol_of(args, ready.data.name),
        detections=detections,
        baselines=pipeline.baselines(ready, ready.test),
        extra={
            **training.about(checkpoint, state, [net], seconds, ready.skipped, r),
            "weights": weights,
            "statistics": stats,
            "stage": state.get("stage"),
            "epochs": state.get("epoch"),
            "foreground": vars(ready.store.s),
        },
    )
    evaluation.show(
        out,
        result,
        pictures=ready.pictures,
        red=red(weights),
        curve_top=red(weights),
        top=args.top,
        overlay=args.overlay,
    )
    ready.report_skipped()
    evaluation.print_next_steps("hf2vad/eval.py", checkpoint, out, args)
    return result.metrics


def score_video(args, r):
    """One's own footage: scores.csv, curve.png, overlay.mp4."""
    video = open_video(args.video)
    net, state = scoring.load_model(args.checkpoint)
    scorer = scoring.Scorer(net, r)
    stats = training_statistics(state, net, scorer, args, r, args.checkpoint, args.batch_size)
    ready = preprocess.prepare(
        args,
        r,
        data=Dataset("video", video.path.resolve().parent, [], [video]),
        trained=pipeline.for_own_video(state.get("foreground"), args.boxes),
    )
    out = writable_folder((args.out or Path(args.checkpoint).parent / "video") / safe_filename(video.name))
    if r.is_main:
        errors = scorer.errors_of(ready.store.records(video), args.batch_size)
        weights = weights_of(args, state.get("identity", {}).get("dataset"))
        scores, detections = per_video(ready, errors, stats, weights)
        evaluation.write_own_video(
            video.name,
            *ready.pictures(video),
            scores[video.name],
            args.smoothing,
            "HF2-VAD",
            out,
            detections[video.name],
            red(weights),
            args.top,
        )
        ready.report_skipped()


def newest_checkpoint(folder):
    for stage in ("finetune", "cvae", "memae"):
        path = Path(folder) / f"{stage}.pt"
        if path.exists():
            return path
    raise UserError(f"no checkpoint in {folder}: name one with --checkpoint, or train first with hf2vad/train.py")


def main(argv=None):
    args = parse(argv)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    smoothing.parse(args.smoothing)
    r = training.Run.from_args(args)
    from common.datasets import canonical

    args.checkpoint = args.checkpoint or newest_checkpoint(args.out or Path("runs/hf2vad") / canonical(args.dataset))
    if args.video:
        return score_video(args, r)
    trained = scoring.load_model(args.checkpoint)[1].get("foreground")  # a wrong file is refused before any work
    ready = preprocess.prepare(args, r, splits=("test",), trained=trained)
    evaluate(args, ready, args.checkpoint, r, args.batch_size)
    r.close()


if __name__ == "__main__":
    run(main)
