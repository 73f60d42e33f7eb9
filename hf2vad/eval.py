"""Score test videos, or your own video, with a trained HF2-VAD.

python hf2vad/eval.py --dataset ped2 --checkpoint runs/hf2vad/ped2/cvae.pt --protocol official --overlay
python hf2vad/eval.py --video my.mp4 --checkpoint runs/hf2vad/ped2/cvae.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli, evaluation, score_cache, smoothing
from common.io import UserError, optional_module, run_script, safe_filename, writable_folder
from common.objects import pipeline
from common.readers.dataset import report_skipped
from common.readers.video import open_video
from hf2vad import preprocess

# torch is imported inside functions: --help answers at once.

METHOD = "HF2-VAD"
SKIPPED = 4  # frames without full history, which the authors leave out
# w_r (flow) and w_p (frame). How the published values were found is unknown, so strict weighs both errors equally.
STRICT_WEIGHTS = (1.0, 1.0)
OFFICIAL_WEIGHTS = {"ped2": (1.0, 0.1)}


def add_eval_flags(parser, training=False):
    group = cli.add_score_flags(
        parser,
        "strict: every frame, nothing chosen on test labels; official: as the authors computed it",
        training=training,
    )
    group.add_argument("--w-flow", type=float, help="weight of the flow error w_r (default: 1)")
    group.add_argument(
        "--w-frame", type=float, help="weight of the frame error w_p (default: 1; official on ped2: 0.1)"
    )


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    group = cli.add_checkpoint_flags(parser, "that of the last stage in runs/hf2vad/<dataset>")
    cli.add_shard_flag(group, scoring=True)
    group.add_argument(
        "--batch-size",
        type=cli.positive_int,
        help="cubes at once; scores do not depend on it (default: 256 on GPUs; on CPUs 64, which fit the cache)",
    )
    add_eval_flags(parser)
    return parser.parse_args(
        cli.with_synonyms(argv, {"--ckpt_path": "--checkpoint", "--model_save_path": "--checkpoint"})
    )


def make_protocol(options: cli.ScoreOptions, dataset: str, weights: tuple) -> evaluation.Protocol:
    """weights: see error_weights()"""
    if options.protocol == "strict":
        return evaluation.Protocol("strict", options.smoothing)
    liberties = [f"the first {SKIPPED} frames of every video are left out"]
    if weights == OFFICIAL_WEIGHTS.get(dataset):
        whose = "are the authors' for this dataset; how they were chosen is unknown"
    else:
        whose = "are not known to be the authors' for this dataset"
    liberties.append(f"the weights of the two errors, {weights[0]:g} (flow) and {weights[1]:g} (frame), {whose}")
    return evaluation.Protocol("official", options.smoothing, SKIPPED, liberties)


def error_weights(options, dataset, w_flow, w_frame):
    """-> (w_r, w_p)"""
    official = options.protocol == "official"
    default = OFFICIAL_WEIGHTS.get(dataset, STRICT_WEIGHTS) if official else STRICT_WEIGHTS
    return default[0] if w_flow is None else w_flow, default[1] if w_frame is None else w_frame


def color_max(weights):
    """The score that overlays paint red: three deviations of the training cubes above their mean."""
    return 3 * float(np.hypot(*weights)) or 1.0


def cached_scoring(dataset, scorer, net, run, batch_size=None):
    """-> score(video, tick) and the settings that scores depend on, as score_cache.ScoreCache takes them."""
    from common.training import weights_hash
    from hf2vad import scoring

    settings = {
        "weights": weights_hash(net),
        "cubes": dataset.store.s.key(),
        "precision": run.precision,
        "device": run.device.type,
        "version": scoring.SCORES_VERSION,
    }

    def score(video, tick):
        return scoring.score_video(scorer, dataset.store.array(video), batch_size, tick)

    return score, settings


def training_statistics(train_set, checkpoint, scorer, net, run, out, batch_size=None):
    """Statistics for a checkpoint that has none, from the training cubes of the dataset (rank 0; None on the
    others)."""
    from hf2vad import scoring

    run.print(f"{checkpoint} has no training statistics: scoring the training cubes of {train_set.data.name}")
    if not train_set.train:
        raise UserError(
            f"{checkpoint} has no training statistics and {train_set.data.name} no training videos: the scores cannot "
            "be normalised"
        )
    score, settings = cached_scoring(train_set, scorer, net, run, batch_size)
    cache = score_cache.ScoreCache(out, settings, train_set.cache.source_of)
    arrays = cache.compute(train_set.train, score, run, size=train_set.cubes, unit="cube")
    return arrays and scoring.statistics(np.concatenate([arrays[v.key]["errors"] for v in train_set.train]))


def evaluate(
    dataset,
    checkpoint,
    *,
    out,
    run,
    options,
    w_flow=None,
    w_frame=None,
    batch_size=None,
    shard=None,
    train_set=None,
    loaded=None,
):
    """Score the test set, print and write the results. -> metrics on rank 0, else None.

    dataset: pipeline.CubeVideos; train_set() -> the same of the training videos, for checkpoints without statistics;
    loaded: what scoring.load_model(checkpoint) gave, if it was called before.
    """
    from common.training import run_info
    from hf2vad import scoring

    net, state = loaded or scoring.load_model(checkpoint)
    scorer = scoring.Scorer(net, run)
    score, settings = cached_scoring(dataset, scorer, net, run, batch_size)
    arrays = score_cache.score_test_set(
        dataset,
        score,
        run,
        out=out,
        settings=settings,
        source=dataset.cache.source_of,
        size=dataset.cubes,
        unit="cube",
        shard=shard,
    )
    stats = state.get("statistics")
    if not stats and not shard:
        stats = training_statistics(train_set(), checkpoint, scorer, net, run, out, batch_size)
    if not arrays:
        return None
    weights = error_weights(options, dataset.data.name, w_flow, w_frame)
    if state.get("done") is False:
        epochs = f"stage {state['stage']}, {state['epoch']} whole epochs"
        print(f"note: the training of {checkpoint} has not finished ({epochs})")
    if not scorer.predicts_frames:
        print("this checkpoint is of stage memae: scores are flow errors")
    errors = np.concatenate([arrays[v.key]["errors"] for v in dataset.test])
    scores, detections = frame_scores(dataset, errors, stats, weights)
    out = Path(out) / options.protocol
    result = evaluation.evaluate(
        out,
        dataset.data,
        scores,
        method=METHOD,
        protocol=make_protocol(options, dataset.data.name, weights),
        detections=detections,
        baselines=pipeline.baselines(dataset, dataset.test),
        extra={
            **run_info(checkpoint, state, [net], score_cache.total_seconds(arrays), dataset.skipped, run),
            "weights": weights,
            "statistics": stats,
            "stage": state.get("stage"),
            "epochs": state.get("epoch"),
            "foreground": vars(dataset.store.s),
        },
    )
    highest = color_max(weights)
    evaluation.finish(
        out,
        result,
        script="hf2vad/eval.py",
        checkpoint=checkpoint,
        options=options,
        skipped=dataset.skipped,
        pictures=dataset.pictures,
        color_max=highest,
        curve_max=highest,
    )
    return result.metrics


def frame_scores(dataset, errors, stats, weights):
    """-> {video: frame scores}, {video: detections} of the test videos; a frame without cubes scores as one without
    error."""
    from hf2vad import scoring

    cube_scores, empty = scoring.combine(errors, stats, *weights), scoring.empty_score(stats, *weights)
    return pipeline.per_video(dataset, dataset.test, cube_scores, empty)


def score_own_video(
    video,
    checkpoint,
    source,
    *,
    out,
    run,
    options,
    foreground,
    w_flow=None,
    w_frame=None,
    batch_size=None,
    train_set=None,
    loaded=None,
):
    """scores.csv, curve.png, overlay.mp4 and report.html of one video. video: readers.video.Video; out: folder for
    it."""
    from hf2vad import scoring

    own_video = optional_module("common.own_video", "--video", "score a dataset")
    net, state = loaded or scoring.load_model(checkpoint)
    scorer = scoring.Scorer(net, run)
    stats = state.get("statistics") or training_statistics(train_set(), checkpoint, scorer, net, run, out, batch_size)
    dataset = preprocess.prepare(source, run, video=video, foreground=foreground, trained=state.get("foreground"))
    out = writable_folder(out / safe_filename(video.name))
    if not run.is_main:
        return
    errors = scoring.score_video(scorer, dataset.store.array(video), batch_size)["errors"]
    weights = error_weights(options, state.get("identity", {}).get("dataset"), w_flow, w_frame)
    scores, detections = frame_scores(dataset, errors, stats, weights)
    own_video.write(
        video.name,
        *dataset.pictures(video),
        scores[video.name],
        options.smoothing,
        METHOD,
        out,
        detections[video.name],
        color_max(weights),
        options.top,
    )
    report_skipped(dataset.skipped)


def last_checkpoint(folder):
    """Of the last stage that was trained. Raises UserError without any."""
    for stage in ("finetune", "cvae", "memae"):
        path = Path(folder) / f"{stage}.pt"
        if path.exists():
            return path
    raise UserError(f"no checkpoint in {folder}: name one with --checkpoint, or train first with hf2vad/train.py")


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    checkpoint = args.checkpoint or last_checkpoint(args.out or Path("runs/hf2vad") / cli.dataset_name(args))
    from common.distributed import Run
    from hf2vad import scoring

    with Run(args.device, args.precision) as run:
        loaded = scoring.load_model(checkpoint)  # a wrong file is refused before any work
        trained = loaded[1].get("foreground")
        source, foreground = cli.DataSource.from_args(args), cli.given(args, pipeline.FLAGS)

        def train_set():
            if args.video:
                cli.need_training_set(checkpoint, loaded[1], source.dataset)
            return preprocess.prepare(source, run, splits=("train",), foreground=foreground, trained=trained)

        how = dict(
            run=run,
            options=cli.ScoreOptions.from_args(args),
            w_flow=args.w_flow,
            w_frame=args.w_frame,
            batch_size=args.batch_size,
            train_set=train_set,
            loaded=loaded,
        )
        if args.video:
            video, out = open_video(args.video), args.out or checkpoint.parent / "video"
            score_own_video(video, checkpoint, source, out=out, foreground=foreground, **how)
        else:
            dataset = preprocess.prepare(source, run, splits=("test",), foreground=foreground, trained=trained)
            evaluate(dataset, checkpoint, out=args.out or checkpoint.parent, shard=args.shard, **how)


if __name__ == "__main__":
    run_script(main)
