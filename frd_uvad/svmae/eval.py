"""Score clip features with SVMAE's weakly supervised detector.

python frd_uvad/svmae/eval.py --features features/svmae/folder --checkpoint runs/svmae/features-detector/detector.pt
python frd_uvad/svmae/eval.py --video my.mp4 --checkpoint runs/svmae/features-detector/detector.pt
python frd_uvad/svmae/eval.py --features data/UCF-Crime --dataset ucfcrime --ckpt_path authors.pkl --protocol official
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli, evaluation, score_cache, smoothing
from common.io import UserError, optional_module, run_script, safe_filename, writable_folder
from common.readers.dataset import UsableVideos
from common.readers.video import frames_and_clock, open_video
from frd_uvad.eval import trivial_baselines
from frd_uvad.features.data import FeatureVideo, frames_of_clips
from frd_uvad.features.folders import find_features
from frd_uvad.preprocess import add_label_flags
from frd_uvad.svmae import preprocess
from frd_uvad.svmae.data import fingerprint

# torch is imported inside functions: --help answers at once.

METHOD = "SVMAE"
FUSIONS, GROUPS = ("concat", "add", "product", "add_up"), ("both", "vis", "text")  # of detector.py


def add_data_flags(parser):
    """-> the argument group"""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--features",
        type=Path,
        help="folder of clip features: train/ and test/ with .npy files, or UCF-Crime's and XD-Violence's",
    )
    group.add_argument("--dataset", default="features", help="name in results (default: %(default)s)")
    group.add_argument(
        "--labels",
        type=Path,
        help="frame labels instead of those found beside the features: an .npz or a folder of 0/1 per frame by video "
        "name, a csv of video,start,end, or temporal annotations",
    )
    add_label_flags(group)
    group.add_argument(
        "--text", type=Path, help="folder of caption embeddings, <video>.npy [clips, width], one row per clip"
    )
    return group


def add_eval_flags(parser, training=False):
    protocol = "here they differ only by name: nothing is smoothed or left out"
    cli.add_score_flags(parser, protocol, "none", "the curve", training=training)


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    group = cli.add_checkpoint_flags(parser, "runs/svmae/<dataset>-detector/detector.pt")
    cli.add_shard_flag(group, scoring=True)
    group.add_argument(
        "--encoder",
        help="with --video: what made the features, as train.py's --encoder (default: the files where they were then)",
    )
    group.add_argument(
        "--fusion", choices=FUSIONS, help="of an authors' file whose weights do not tell it (add or product)"
    )
    group.add_argument("--feature-group", choices=GROUPS, help="of an authors' file (default: what its weights tell)")
    group.add_argument(
        "--aggregate-text",
        action=argparse.BooleanOptionalAction,
        help="of an authors' file, which does not tell it: whether text passes a multi-scale temporal network "
        "(default: yes)",
    )
    add_eval_flags(parser)
    return parser.parse_args(cli.with_synonyms(argv, {"--ckpt_path": "--checkpoint"}))


def make_protocol(options: cli.ScoreOptions) -> evaluation.Protocol:
    return evaluation.Protocol(options.protocol, options.smoothing, probabilities=True)


def check_inputs(checkpoint, model_args, text, width=None, advice=""):
    """Raises UserError where a detector needs features of another width, or captions that were not given."""
    size = model_args.get("input_size") or model_args["feature_size"]
    if width and model_args["feature_group"] != "text" and size != width:
        raise UserError(f"checkpoint {checkpoint} is for features of width {size}, these have {width}")
    if model_args["feature_group"] != "vis" and not text:
        raise UserError(f"checkpoint {checkpoint} needs caption embeddings: give --text DIR{advice}")


def evaluate(data, checkpoint, *, out, run, options, text=None, shard=None, loaded=None, source=None):
    """Score the test videos, print and write the results. -> metrics on rank 0, else None.

    data: frd_uvad.features.data.FeatureData; text: folder of caption embeddings; loaded: what
    scoring.load_model(checkpoint) gave, if it was called before; source: cli.DataSource of the videos, if there are
    any: then trivial baselines and pictures belong to the results.
    """
    from common.training import run_info, weights_hash
    from frd_uvad.svmae import scoring

    net, state = loaded or scoring.load_model(checkpoint)
    check_inputs(checkpoint, state["model_args"], text, data.width)
    preprocess.check_same_encoder(state.get("features"), data.root)
    net.eval().to(run.device)
    settings = {
        "weights": weights_hash(net),
        "model": state["model_args"],
        "precision": run.precision,
        "version": scoring.SCORES_VERSION,
    }

    def score(video, tick):
        return scoring.score_video(net, video, text, run, tick)

    arrays = score_cache.score_test_set(
        UsableVideos(data, data.test, {}),  # features have what it asks of a dataset: name, root, test, skipped
        score,
        run,
        out=out,
        settings=settings,
        source=lambda video: fingerprint(video, text),
        size=len,
        unit="clip",
        shard=shard,
    )
    if not arrays:
        return None
    out = Path(out) / options.protocol
    result = evaluation.evaluate(
        out,
        data.as_dataset(),
        {v.name: data.frame_scores(v, arrays[v.key]["scores"]) for v in data.test},
        method=METHOD,
        protocol=make_protocol(options),
        baselines=trivial_baselines(data, source) if source else None,
        extra=run_info(checkpoint, state, [net], score_cache.total_seconds(arrays), data.skipped, run),
    )
    evaluation.finish(
        out,
        result,
        script="frd_uvad/svmae/eval.py",
        checkpoint=checkpoint,
        options=options,
        skipped=data.skipped,
        pictures=(lambda v: frames_and_clock(data.videos["test", v.name])) if data.videos else None,
    )
    return result.metrics


def score_own_video(video, checkpoint, *, out, run, options, text=None, encoder=None, workers=None, loaded=None):
    """scores.csv, curve.png, overlay.mp4 and report.html of one video, in a folder of its name under `out`.

    encoder: what --encoder says of what made the detector's features, if files have moved since.
    """
    from frd_uvad.svmae import scoring

    own_video = optional_module("common.own_video", "--video", "score a dataset")
    net, state = loaded or scoring.load_model(checkpoint)
    settings = state.get("features")
    if not settings:
        raise UserError(
            f"{checkpoint} was trained on features made elsewhere: make those of {video.path} in the same way, and "
            "score them with --features"
        )
    check_inputs(checkpoint, state["model_args"], text, advice=f" with {video.name}.npy")
    if not run.is_main:
        return
    features, frames = preprocess.encode_own_video(video, settings, checkpoint, run, encoder=encoder, workers=workers)
    out = writable_folder(out / safe_filename(video.name))
    clips = FeatureVideo(video.name, "test", [features], path=video.path)
    scores = scoring.score_video(net.eval().to(run.device), clips, text, run)["scores"]
    own_video.write(
        video.name,
        *frames_and_clock(video),
        frames_of_clips(scores, frames),
        options.smoothing,
        METHOD,
        out,
        color_max=1.0,
        top=options.top,
    )


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    if not args.video and not args.features:
        raise UserError("nothing to score: give --features DIR, or --video FILE")
    checkpoint = args.checkpoint or Path("runs/svmae") / f"{args.dataset}-detector" / "detector.pt"
    from common.distributed import Run
    from frd_uvad.svmae import scoring

    with Run(args.device, args.precision) as run:
        # a wrong file is refused before any work
        loaded = scoring.load_model(checkpoint, args.fusion, args.feature_group, args.aggregate_text)
        is_authors, uses_text = "plan" not in loaded[1], loaded[1]["model_args"]["feature_group"] != "vis"
        if is_authors and uses_text and args.aggregate_text is None:
            run.print(
                f"note: {checkpoint} does not tell whether text passes a multi-scale temporal network; it does here, "
                "give --no-aggregate-text if it was trained otherwise"
            )
        how = dict(run=run, options=cli.ScoreOptions.from_args(args), text=args.text, loaded=loaded)
        if args.video:
            video, out = open_video(args.video), args.out or checkpoint.parent / "video"
            score_own_video(video, checkpoint, out=out, encoder=args.encoder, workers=args.workers, **how)
        else:
            data = find_features(args.dataset, args.features, args.labels, args.order, args.segments)
            evaluate(data, checkpoint, out=args.out or checkpoint.parent, shard=args.shard, **how)


if __name__ == "__main__":
    run_script(main)
