"""Score videos with a trained AED-MAE, or a camera as its frames arrive.

python sdmae/eval.py --dataset ped2 --checkpoint runs/sdmae/ped2/sdmae.pt --protocol official --overlay
python sdmae/eval.py --dataset avenue --checkpoint checkpoint-best.pth --student checkpoint-best-student.pth
python sdmae/eval.py --video my.mp4 --checkpoint runs/sdmae/folder/sdmae.pt      # a file, a folder of frames,
python sdmae/eval.py --video rtsp://camera/stream --checkpoint …                 # a camera's number or its address
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli, evaluation, score_cache, smoothing
from common.io import UserError, run_script
from common.readers.video import frames_and_clock
from sdmae import preprocess

# torch is imported inside functions: --help answers at once.

METHOD = "AED-MAE"


def add_eval_flags(parser, training=False):
    group = cli.add_score_flags(
        parser,
        "strict: smoothing fixed beforehand; official: the authors' filter and scaling",
        overlay="heat maps, boxes and the curve",
        training=training,
    )
    group.add_argument(
        "--norm", choices=["L1", "L2"], help="of the errors (default: L1 on ShanghaiTech and UBnormal, else L2)"
    )
    group.add_argument(
        "--parts",
        choices=["both", "reconstruction", "distillation"],
        help="errors that are summed (default: reconstruction on ShanghaiTech and UBnormal, else both)",
    )
    group.add_argument(
        "--student-on",
        choices=["all", "removed"],
        default="all",
        help="tokens that the student's error counts on: all, as published, or the removed ones, which it is trained "
        "on (default: %(default)s)",
    )
    group.add_argument(
        "--mask-draws",
        type=cli.positive_int,
        default=1,
        metavar="K",
        help="masks averaged over; with 2 (and --mask-ratio 0.5) every token is removed once, for twice the time "
        "(default: %(default)s)",
    )


def add_live_flags(parser):
    group = parser.add_argument_group("--video")
    group.add_argument(
        "--false-alarms-per-hour",
        type=cli.positive_float,
        default=1.0,
        metavar="N",
        help="events per hour that normal footage may cause; sets the threshold (default: %(default)s)",
    )
    group.add_argument(
        "--threshold", type=cli.positive_float, help="smoothed score from which an event begins, instead"
    )
    group.add_argument(
        "--window",
        type=cli.positive_float,
        default=0.5,
        help="past seconds that a score is averaged over (default: %(default)s)",
    )
    group.add_argument(
        "--fps",
        type=cli.positive_float,
        help="frames per second, instead of what the source says (default: the source's, else 25)",
    )
    group.add_argument(
        "--reconnect",
        type=cli.natural_float,
        default=2.0,
        metavar="SECONDS",
        help="wait between attempts to open a lost stream again (default: %(default)s)",
    )
    group.add_argument("--max-seconds", type=cli.positive_float, help="stop after this much footage (default: never)")


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    group = cli.add_checkpoint_flags(
        parser, "runs/sdmae/<dataset>/sdmae.pt", video=False, whose="our checkpoint, or the authors' teacher"
    )
    group.add_argument("--student", type=Path, help="the authors' second file, with the student")
    group.add_argument(
        "--video",
        help="a video file, a folder of frames, a camera's number or a stream's address, not the dataset's test set",
    )
    cli.add_shard_flag(group, scoring=True)
    group.add_argument("--batch-size", type=cli.positive_int, default=64, help="frames at once (default: %(default)s)")
    onnx = "write the scoring network as ONNX (float32, any batch), and stop"
    group.add_argument("--export", type=Path, metavar="FILE.onnx", help=onnx)
    group.add_argument(
        "--runtime",
        choices=["torch", "onnx"],
        default="torch",
        help="onnx: --video is scored with an exported file as --checkpoint, by onnxruntime (default: %(default)s)",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model, on a GPU with CUDA graphs")
    add_eval_flags(parser)
    add_live_flags(parser)
    return parser.parse_args(argv)


def make_protocol(options: cli.ScoreOptions, dataset: str, config, draws: int = 1) -> evaluation.Protocol:
    """config: scoring.ScoreConfig; draws: masks averaged over"""
    from sdmae import scoring

    if options.protocol == "strict":
        return evaluation.Protocol("strict", options.smoothing)
    of, published = ("ShanghaiTech", scoring.SHANGHAITECH) if config.minmax else ("Avenue", scoring.AVENUE)
    if dataset.removesuffix("-sd") == of.lower():
        liberties = ["the filter's parameters are the authors' for this dataset; how they were chosen is unknown"]
    else:
        liberties = [f"the filter is the authors' for {of}, not for {dataset}"]
    if config != published or draws > 1:
        errors = f"{' + '.join(config.parts)}, {config.norm}, student on {config.tokens} tokens, {draws} masks"
        liberties.append(f"the errors are not summed as published: {errors}")
    if config.minmax:
        liberties.append("scores of each video are scaled to [0, 1] by its own extremes, which needs the whole video")
    return evaluation.Protocol("official", config.filter, 0, liberties, minmax=config.minmax)


@dataclass
class Loaded:
    """A checkpoint ready to score."""

    net: object
    state: dict
    scorer: object  # scoring.Scorer
    size: tuple  # height, width of the network's input

    @property
    def config(self):
        return self.scorer.config

    def statistics(self, training_frames=None):
        """Of the checkpoint, if made with the same configuration and masks; else of the training frames. Where there
        are none, those of other masks must do: a mean over fewer masks has a longer tail.

        training_frames() -> preprocess.FrameVideos of the training videos. -> dict, None without any.
        """
        from sdmae import scoring
        from sdmae.data import FrameDataset

        config, saved = self.config, self.state.get("statistics")
        made_with = [config.norm, list(config.parts), config.tokens]
        if saved and [saved["norm"], saved["parts"], saved.get("tokens", "all")] != made_with:
            saved = None
        if training_frames is None or (saved and saved.get("draws", 1) == len(self.scorer.tables)):
            return saved
        try:
            dataset = training_frames()
        except UserError:
            return saved
        if not dataset.train:
            return saved
        run = self.scorer.run
        run.print("the checkpoint has no training statistics of these errors: scoring training frames")
        return scoring.statistics(self.scorer, FrameDataset(dataset.arrays(dataset.train), run))


def load(
    checkpoint,
    dataset: str,
    run,
    *,
    student=None,
    image_size=None,
    norm=None,
    parts=None,
    tokens="all",
    draws=1,
    compiled=False,
) -> Loaded:
    """dataset: whose published configuration counts if the checkpoint names none; image_size: for the authors'
    files."""
    from sdmae import scoring

    net, state = scoring.load_model(checkpoint, student, image_size)
    size = state["model_args"]["image_size"]
    if image_size and tuple(image_size) != tuple(size):
        raise UserError(f"--image-size, --patch: {checkpoint} is for frames of {size[0]}x{size[1]}; leave them out")
    config = scoring.score_config(state.get("identity", {}).get("dataset", dataset), norm, parts, tokens)
    is_untrained = state["phase"] == "teacher" if "phase" in state else student is None
    if is_untrained and parts is None and len(config.parts) > 1:
        reason = "has not begun to train its student" if "phase" in state else "comes without --student"
        run.print(f"note: {checkpoint} {reason}: scores are the teacher's errors alone")
        config.parts = ("reconstruction",)
    scorer = scoring.Scorer(net, config, run, draws=draws, compiled=compiled)
    return Loaded(net, state, scorer, tuple(state["model_args"]["image_size"]))


def evaluate(
    dataset,
    checkpoint,
    *,
    out,
    run,
    options,
    batch_size=64,
    shard=None,
    workers=None,
    loaded=None,
    training_frames=None,
    **scoring_options,
):
    """Score the test set, print and write the results. -> metrics on rank 0, else None.

    dataset: preprocess.FrameVideos; loaded: the checkpoint, loaded; else scoring_options: see load().
    """
    from common.training import run_info, weights_hash
    from sdmae import scoring

    loaded = loaded or load(checkpoint, dataset.data.name, run, **scoring_options)
    scorer, config = loaded.scorer, loaded.config
    if loaded.state.get("done") is False:
        run.print(f"note: the training of {checkpoint} has not finished ({loaded.state['epoch']} whole epochs)")
    arrays = score_cache.score_test_set(
        dataset,
        lambda video, tick: scoring.score_video(scorer, dataset.cache.frames(video), batch_size, tick),
        run,
        out=out,
        settings={
            "weights": weights_hash(loaded.net),
            "config": config.state_dict(),
            "draws": len(scorer.tables),
            "size": dataset.cache.size,
            "precision": run.precision,
            "version": scoring.SCORES_VERSION,
        },
        source=dataset.cache.source_of,
        size=dataset.frames,
        unit="frame",
        shard=shard,
        on_disk=["maps"],
    )
    stats = None if shard else loaded.statistics(training_frames)
    if not arrays:
        return None
    scores, maps = ({v.name: arrays[v.key][k] for v in dataset.test} for k in ("scores", "maps"))
    detections = threshold = None
    if stats:
        threshold = stats["token_quantiles"][str(scoring.QUANTILE)]
        detections = {}
        for v in dataset.test:
            source_size = dataset.cache.info(v)["source_size"]
            detections[v.name] = scoring.boxes_of_maps(maps[v.name]().astype(np.float32), threshold, source_size)
    out = Path(out) / options.protocol
    result = evaluation.evaluate(
        out,
        dataset.data,
        scores,
        method=METHOD,
        protocol=make_protocol(options, dataset.data.name, config, len(scorer.tables)),
        detections=detections,
        baselines=evaluation.frame_baselines(dataset.cache, dataset.test, workers),
        extra={
            **run_info(checkpoint, loaded.state, [loaded.net], score_cache.total_seconds(arrays), dataset.skipped, run),
            "rule": config.state_dict(),
            "mask_draws": len(scorer.tables),
            "size": list(loaded.size),
            "patch": loaded.net.patch_size,
            "token_threshold": threshold,
        },
    )
    evaluation.finish(
        out,
        result,
        script="sdmae/eval.py",
        checkpoint=checkpoint,
        options=options,
        skipped=dataset.skipped,
        more="--video takes cameras too, as their frames arrive; ",
        pictures=frames_and_clock,
        color_max=3 * threshold if threshold else None,
        maps=maps,
        map_range=map_range(maps, threshold),
    )
    return result.metrics


def map_range(maps, threshold):
    """What heat maps span: around the threshold of tokens, or without one the largest 99.9 % quantile of a video."""
    if not threshold:
        threshold = max(float(np.quantile(read().astype(np.float32), 0.999)) for read in maps.values())
    return threshold / 2, 2 * threshold


def load_exported(path) -> Loaded:
    """An exported network, with which only videos can be watched."""
    from sdmae.runtime import OnnxScorer

    scorer = OnnxScorer(path)
    return Loaded(None, scorer.state, scorer, scorer.size)


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    name = cli.dataset_name(args)
    checkpoint = args.checkpoint or Path("runs/sdmae") / name / "sdmae.pt"
    sizes = args.image_size or args.patch
    image_size = preprocess.input_size(name, args.image_size, args.patch)[0] if sizes else None

    def watch_video(loaded, training_frames=None):
        from sdmae.live import LiveOptions, watch

        out = args.out or Path(checkpoint).parent / "video"
        live = LiveOptions(**{k: getattr(args, k) for k in LiveOptions.__dataclass_fields__})
        watch(args.video, loaded, live, out=out, training_frames=training_frames, checkpoint=checkpoint)

    if args.runtime == "onnx":
        if args.video is None:
            raise UserError("--runtime onnx scores a --video; a dataset is scored by --runtime torch")
        return watch_video(load_exported(checkpoint))
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        loaded = load(
            checkpoint,
            name,
            run,
            student=args.student,
            image_size=image_size,
            norm=args.norm,
            parts=args.parts,
            tokens=args.student_on,
            draws=args.mask_draws,
            compiled=args.compile,
        )
        source = cli.DataSource.from_args(args)

        def training_frames():
            if args.video is not None or args.export is not None:
                cli.need_training_set(checkpoint, loaded.state, name)
            return preprocess.prepare(source, loaded.size, run, splits=("train",))

        if args.export is not None:
            from sdmae.export import export

            export(loaded.net, loaded.config, loaded.statistics(training_frames), args.export, draws=args.mask_draws)
            size = args.export.stat().st_size / 2**20
            print(f"wrote {args.export} ({size:.1f} MB); next: python sdmae/camera.py --video 0 --model {args.export}")
            return
        if args.video is not None:
            return watch_video(loaded, training_frames)
        dataset = preprocess.prepare(source, loaded.size, run, splits=("test",))
        evaluate(
            dataset,
            checkpoint,
            out=args.out or Path(checkpoint).parent,
            run=run,
            options=cli.ScoreOptions.from_args(args),
            batch_size=args.batch_size,
            shard=args.shard,
            workers=args.workers,
            loaded=loaded,
            training_frames=training_frames,
        )


if __name__ == "__main__":
    run_script(main)
