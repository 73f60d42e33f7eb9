"""Score videos with a trained LBR-SPR.

python spr_uvad/eval.py --dataset ped2 --checkpoint runs/spr_uvad/ped2/spr.pt --protocol official --overlay
python spr_uvad/eval.py --dataset ped2 --checkpoint authors_model_set.npy --training-scores raw_training_scores.npy
python spr_uvad/eval.py --video my.mp4 --checkpoint runs/spr_uvad/folder/spr.pt
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
from spr_uvad import preprocess

# torch is imported inside functions: --help answers at once.

METHOD = "LBR-SPR"
W_FLOW = 1.0  # weight of the flow error
COLOR_MAX_QUANTILE = 0.99  # of all boxes' scores, from which pictures paint them red


def add_eval_flags(parser, training=False):
    group = cli.add_score_flags(
        parser,
        "strict: smoothing inside each video; official: as the authors computed it, over all videos as one",
        "moving_average:10",
        training=training,
    )
    group.add_argument(
        "--w-raw", type=float, help="weight of the appearance error, with motion (default: 0.5, shanghaitech 0.1)"
    )
    group.add_argument("--w-flow", type=float, default=W_FLOW, help="weight of the motion error (default: %(default)s)")


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    group = cli.add_checkpoint_flags(
        parser, "runs/spr_uvad/<dataset>/spr.pt", whose="our checkpoint, or the authors' nested list of models"
    )
    cli.add_shard_flag(group, scoring=True)
    group.add_argument(
        "--training-scores",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="the authors' training-score files (raw, and flow for a model with motion); without them the cubes of "
        "--setting are scored for their statistics",
    )
    group.add_argument(
        "--setting",
        choices=["test", "merge"],
        default="test",
        help="cubes for the statistics of a checkpoint that has none (default: %(default)s)",
    )
    add_eval_flags(parser)
    return parser.parse_args(argv)


def make_protocol(options: cli.ScoreOptions) -> evaluation.Protocol:
    if options.protocol == "strict":
        return evaluation.Protocol("strict", options.smoothing)
    liberties = ["smoothing runs across the borders of videos"]
    return evaluation.Protocol("official", options.smoothing, 0, liberties, across=True)


def color_max(detections):
    """A quantile of the boxes' scores: training errors include the anomalies, a few of which stretch their
    deviation."""
    scores = np.concatenate([d[:, 5] for d in detections.values()])
    return max(1e-3, float(np.quantile(scores, COLOR_MAX_QUANTILE))) if len(scores) else 1.0


def raw_weight(dataset: str) -> float:
    """Weight of the appearance error (authors' code)."""
    return 0.1 if dataset.startswith("shanghaitech") else 0.5


def score_videos(dataset, videos, nets, grid, run, *, out, shard=None):
    """Cube errors and blocks of `videos`, cached in `out`. -> {video key: {"errors", "block"}} on rank 0, else None."""
    from common.training import weights_hash
    from spr_uvad import scoring

    settings = {
        "weights": [weights_hash(net) for _, net in sorted(nets.items())],
        "grid": list(grid),
        "cubes": dataset.store.s.key(),
        "precision": run.precision,
        "device": run.device.type,
        "version": scoring.SCORES_VERSION,
    }

    def score(video, tick):
        return scoring.score_video(nets, grid, dataset.store.array(video), dataset.sizes([video])[0], run, tick)

    cache = score_cache.ScoreCache(out, settings, dataset.cache.source_of)
    all_videos = dataset.data.test if shard else videos
    return cache.compute(videos, score, run, size=dataset.cubes, unit="cube", all_videos=all_videos, shard=shard)


def statistics_of_files(paths, grid, nets):
    """The authors' training scores -> {block number: means and deviations}."""
    from spr_uvad import authors, scoring

    with_motion = scoring.uses_flow(nets)
    if len(paths) != (2 if with_motion else 1):
        raise UserError(
            f"--training-scores: this model is {'with' if with_motion else 'without'} motion and needs "
            f"{'two files, raw and flow' if with_motion else 'one file, raw'}; {len(paths)} were given"
        )
    statistics = {k: {} for k in nets}
    for name, path in zip(("raw", "flow"), paths):
        training_scores = authors.load_training_scores(path, grid)
        for k in nets:
            if k not in training_scores:
                raise UserError(f"training scores {path} have none for block {k // grid[1]},{k % grid[1]}")
            scores = training_scores[k]
            statistics[k]["cubes"] = len(scores)
            statistics[k][f"{name}_mean"] = float(scores.mean())
            statistics[k][f"{name}_std"] = float(scores.std()) or 1.0
    return statistics


def block_statistics(checkpoint, nets, state, run, out, training_scores, training_set):
    """{block number: means and deviations}: of the checkpoint, of files, or of the cubes of training_set() (rank 0)."""
    from spr_uvad import scoring

    grid = tuple(state["grid"])
    if state.get("statistics"):
        return {int(k): v for k, v in state["statistics"].items()}
    if training_scores:
        return statistics_of_files(training_scores, grid, nets)
    dataset = training_set()
    setting = "merge" if dataset.train else "test"
    run.print(f"{checkpoint} has no training statistics: scoring the cubes of setting {setting}")
    videos = dataset.train + dataset.test
    arrays = score_videos(dataset, videos, nets, grid, run, out=out)
    if not arrays:
        return None
    errors, block = (np.concatenate([arrays[v.key][k] for v in videos]) for k in ("errors", "block"))
    return scoring.statistics(errors, block, [k for k in nets if (block == k).any()])


def frame_scores(dataset, videos, arrays, statistics, weights):
    """-> {video: frame scores}, {video: detections}"""
    from spr_uvad import scoring

    errors, block = (np.concatenate([arrays[v.key][k] for v in videos]) for k in ("errors", "block"))
    return pipeline.per_video(dataset, videos, scoring.combine(errors, block, statistics, *weights), scoring.NO_BOX)


def evaluate(
    dataset,
    checkpoint,
    *,
    out,
    run,
    options,
    w_raw=None,
    w_flow=W_FLOW,
    shard=None,
    training_scores=None,
    training_set=None,
    loaded=None,
):
    """Score the test set, print and write the results. -> metrics on rank 0, else None.

    dataset: pipeline.CubeVideos. For checkpoints without statistics: training_scores, the authors' files, or
    training_set() -> the CubeVideos whose cubes give them (default: `dataset`). loaded: what
    scoring.load_model(checkpoint) gave, if it was called before.
    """
    from common.training import run_info
    from spr_uvad import scoring

    score_cache.need_test_videos(dataset)
    nets, state = loaded or scoring.load_model(checkpoint)
    out = writable_folder(out)
    arrays = score_videos(dataset, dataset.test, nets, tuple(state["grid"]), run, out=out, shard=shard)
    if shard:
        return None
    statistics = block_statistics(checkpoint, nets, state, run, out, training_scores, training_set or (lambda: dataset))
    if not arrays:
        return None
    weights = raw_weight(dataset.data.name) if w_raw is None else w_raw, w_flow
    if state.get("done") is False:
        print(
            f"note: the training of {checkpoint} has not finished ({state['epoch']} epochs of block {state['block']})"
        )
    scores, detections = frame_scores(dataset, dataset.test, arrays, statistics, weights)
    with_motion = scoring.uses_flow(nets)
    out = out / options.protocol
    result = evaluation.evaluate(
        out,
        dataset.data,
        scores,
        method=METHOD,
        protocol=make_protocol(options),
        detections=detections,
        baselines=pipeline.baselines(dataset, dataset.test),
        extra={
            **run_info(checkpoint, state, nets.values(), score_cache.total_seconds(arrays), dataset.skipped, run),
            "weights": weights if with_motion else None,
            "statistics": statistics,
            "with_motion": with_motion,
            "epochs": state.get("epoch"),
            "foreground": vars(dataset.store.s),
        },
    )
    highest = color_max(detections)
    evaluation.finish(
        out,
        result,
        script="spr_uvad/eval.py",
        checkpoint=checkpoint,
        options=options,
        skipped=dataset.skipped,
        pictures=dataset.pictures,
        color_max=highest,
        curve_max=highest,
    )
    return result.metrics


def score_own_video(
    video,
    checkpoint,
    source,
    *,
    out,
    run,
    options,
    foreground,
    w_raw=None,
    w_flow=W_FLOW,
    training_scores=None,
    loaded=None,
):
    """scores.csv, ranking.csv, curve.png, overlay.mp4 and report.html of one video, in a folder of its name under
    `out`."""
    from spr_uvad import scoring

    own_video = optional_module("common.own_video", "--video", "score a dataset")
    nets, state = loaded or scoring.load_model(checkpoint)
    dataset = preprocess.prepare(source, run, video=video, foreground=foreground, trained=state.get("foreground"))
    out = writable_folder(out / safe_filename(video.name))
    statistics = block_statistics(checkpoint, nets, state, run, out, training_scores, lambda: dataset)
    arrays = score_videos(dataset, [video], nets, tuple(state["grid"]), run, out=out)
    if not arrays:
        return
    trained_on = state.get("identity", {}).get("dataset", "")
    weights = raw_weight(trained_on) if w_raw is None else w_raw, w_flow
    scores, detections = frame_scores(dataset, [video], arrays, statistics, weights)
    own_video.write(
        video.name,
        *dataset.pictures(video),
        scores[video.name],
        options.smoothing,
        METHOD,
        out,
        detections[video.name],
        color_max(detections),
        options.top,
    )
    report_skipped(dataset.skipped)


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    checkpoint = args.checkpoint or Path("runs/spr_uvad") / cli.dataset_name(args) / "spr.pt"
    from common.distributed import Run
    from spr_uvad import scoring

    with Run(args.device, args.precision) as run:
        loaded = scoring.load_model(checkpoint)  # a wrong file is refused before any work
        nets, state = loaded
        source, foreground = cli.DataSource.from_args(args), cli.given(args, pipeline.FLAGS)
        trained = state.get("foreground")
        if trained is None and scoring.uses_flow(nets):
            foreground.setdefault("flow", "dis")
        options = cli.ScoreOptions.from_args(args)
        how = dict(
            run=run,
            options=options,
            w_raw=args.w_raw,
            w_flow=args.w_flow,
            training_scores=args.training_scores,
            loaded=loaded,
        )
        if args.video:
            video, out = open_video(args.video), args.out or Path(checkpoint).parent / "video"
            score_own_video(video, checkpoint, source, out=out, foreground=foreground, **how)
            return
        dataset = preprocess.prepare(source, run, splits=("test",), foreground=foreground, trained=trained)

        def training_set():
            if args.setting == "test":
                return dataset
            return preprocess.prepare(source, run, foreground=foreground, trained=trained)

        out = args.out or Path(checkpoint).parent
        evaluate(dataset, checkpoint, out=out, shard=args.shard, training_set=training_set, **how)


if __name__ == "__main__":
    run_script(main)
