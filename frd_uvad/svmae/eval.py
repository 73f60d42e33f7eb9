"""Score clip features with SVMAE's weakly supervised detector.

python frd_uvad/svmae/eval.py --features features/svmae/folder --checkpoint runs/svmae/features-detector/detector.pt
python frd_uvad/svmae/eval.py --video my.mp4 --checkpoint runs/svmae/features-detector/detector.pt
python frd_uvad/svmae/eval.py --features data/UCF-Crime --dataset ucfcrime --ckpt_path authors.pkl --protocol official
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common import cli, evaluation, smoothing
from common import old_training as training
from common.dataset import report_skipped
from common.features.data import FeatureVideo, frames_of_clips
from common.features.folders import find_features
from common.features.labels import add_label_flags
from common.io import UserError, first_line, load_array, run, safe_filename, writable_folder
from common.late import Late, torch
from common.video import decoded, open_video
from frd_uvad.svmae.preprocess import features_of_video

detector = Late("frd_uvad.svmae.detector")

METHOD = "svmae-detector"
FUSIONS, GROUPS = ("concat", "add", "product", "add_up"), ("both", "vis", "text")

SCORES_VERSION = 1  # raise it when raw scores change: cached ones are then computed again


def add_data_flags(parser, required=True):
    g = parser.add_argument_group("data")
    g.add_argument(
        "--features",
        type=Path,
        required=required,
        help="folder of clip features: train/ and test/ with .npy files, or UCF-Crime's and XD-Violence's",
    )
    g.add_argument("--dataset", default="features", help="name in results (default: %(default)s)")
    g.add_argument(
        "--labels",
        type=Path,
        default=None,
        help="frame labels instead of those found beside the features: an .npz or a folder "
        "of 0/1 per frame by video name, a csv of video,start,end, or temporal annotations",
    )
    add_label_flags(g)
    g.add_argument(
        "--text",
        type=Path,
        default=None,
        help="folder of caption embeddings, <video>.npy [clips, width], one row per clip",
    )


def add_eval_flags(parser):
    cli.add_score_flags(parser, "here they differ in name alone: nothing is smoothed or left out", "none", "the curve")


def authors_flags(args):
    """fusion, feature group and whether text is aggregated, where eval.py was told."""
    return [getattr(args, k) for k in ("fusion", "feature_group", "aggregate_text")]


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser, required=False)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    g = cli.add_checkpoint_flags(
        parser, "runs/svmae/<dataset>-detector/detector.pt", "a video file or a folder of frames instead of --features"
    )
    cli.add_shard_flag(g, scoring=True)
    g.add_argument(
        "--encoder",
        type=Path,
        default=None,
        help="with --video: the file that preprocess.py had as --checkpoint (default: where it was then)",
    )
    g.add_argument(
        "--fusion",
        choices=FUSIONS,
        default=None,
        help="of an authors' file, where its weights do not tell (add or product)",
    )
    g.add_argument(
        "--feature-group", choices=GROUPS, default=None, help="of an authors' file (default: what its weights tell)"
    )
    g.add_argument(
        "--aggregate-text",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of an authors' file: whether text passes the multi-scale temporal network (default: if the file has one)",
    )
    add_eval_flags(parser)
    return parser.parse_args(cli.with_synonyms(argv, {"--ckpt_path": "--checkpoint"}))


def detector_args(weights, fusion=None, feature_group=None, aggregate_text=None):
    """The detector's arguments from the weights of an authors' file, and from flags what weights do not tell."""

    def width(key, otherwise):
        return weights[key].shape[1] if key in weights else otherwise

    size, text, fused = (
        width("Aggregate.conv_4.0.weight", 1536),
        width("Aggregate_text.conv_4.0.weight", 768),
        width("fc1.weight", 0),
    )
    if feature_group is None:
        feature_group = (
            "both"
            if "fc0.weight" in weights or "fc_vis.weight" in weights
            else {size: "vis", text: "text"}.get(fused, "both")
        )
    if fusion is None and feature_group == "both" and "fc0.weight" in weights:
        raise UserError(
            "the authors' file is of the fusion add or product, which its weights do not tell: give --fusion add or --fusion "
            "product"
        )
    if aggregate_text is None:
        aggregate_text = "Aggregate_text.conv_4.0.weight" in weights
    fusion = "add_up" if "fc_vis.weight" in weights else fusion or "concat"
    return dict(
        feature_size=size, text_dim=text, feature_group=feature_group, fusion=fusion, aggregate_text=aggregate_text
    )


def load_detector(path, fusion=None, feature_group=None, aggregate_text=None):
    """-> (Detector, state). Ours, or the authors' bare state-dict, for which the arguments say what weights do not tell."""
    state = training.load_checkpoint(path, METHOD)
    ours = "model_state_dict" in state
    weights = (
        state["model_state_dict"]
        if ours
        else {k.removeprefix("module."): v for k, v in state.get("model", state).items()}
    )
    if "fc1.weight" not in weights or not any(k.startswith("Aggregate") for k in weights):
        raise UserError(f"checkpoint {path} is not of this method: it has no fc1.weight or no Aggregate")
    try:
        args = state["model_args"] if ours else detector_args(weights, fusion, feature_group, aggregate_text)
        net = detector.Detector(**args)
        net.load_weights(weights)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as e:
        raise UserError(f"checkpoint {path} does not fit this model ({first_line(e)}…)") from None
    return net, {**(state if ours else {}), "model_args": args}


def text_path(folder, video):
    """Where a video's caption embeddings are: by split where a training and a test video may have one name."""
    path = folder / video.split / f"{video.name}.npy"
    return path if path.exists() else folder / f"{video.name}.npy"


def text_of(folder, video):
    """Caption embeddings of a video: float32 [rows, width], a row per clip; published files have one more or less."""
    path = text_path(folder, video)
    x = load_array(path, "caption embeddings")
    if x.ndim != 2 or not x.size or x.dtype.kind not in "iuf" or not np.isfinite(x).all():
        raise UserError(f"caption embeddings {path}: expected finite numbers [clips, width], got shape {x.shape}")
    if abs(len(x) - len(video)) > 1:
        raise UserError(
            f"caption embeddings {path}: {len(x)} rows for video {video.name} of {len(video)} clips: expected one per clip"
        )
    return np.asarray(x, np.float32)


@training.inference
def score(net, video, text, r, tick=lambda n: None):
    """Scores of a video's clips, float32 [clips]: all of them in one pass, as the network looks along the video; then tick(clips)."""
    x = torch.from_numpy(video.clips(range(len(video))).astype(np.float32)).transpose(0, 1)[None].to(r.device)
    words = torch.from_numpy(text_of(text, video)).to(r.device).expand(1, x.shape[1], -1, -1) if text else None
    if not torch.isfinite(x).all():
        raise UserError(
            f"features of video {video.name} ({video.path}) hold NaN or infinite numbers: encode it again, or take it away"
        )
    with r.autocast():
        out = net(x, words)["scores"][0, :, 0].float().cpu().numpy()
    tick(len(out))
    return out


def source(video, text):
    """What changes when a video's features or caption embeddings do."""
    path = text and text_path(text, video)
    return [*video.fingerprint(), str(path), path.stat().st_mtime_ns if path and path.exists() else 0]


def evaluate(args, data, checkpoint, r):
    """Score the test videos, print and write the results. -> metrics (rank 0)."""
    if not data.test:
        raise UserError(f"{data.root} has no test videos to score")
    net, state = load_detector(checkpoint, *authors_flags(args))
    if state["model_args"]["feature_group"] != "text" and state["model_args"]["feature_size"] != data.width:
        raise UserError(
            f"checkpoint {checkpoint} is for features of width {state['model_args']['feature_size']}, these have {data.width}"
        )
    if state["model_args"]["feature_group"] != "vis" and not args.text:
        raise UserError(f"checkpoint {checkpoint} needs caption embeddings: give --text DIR")
    net.eval().to(r.device)
    folder = writable_folder(args.out or Path(checkpoint).parent)
    cache = evaluation.ScoreCache(
        folder,
        {
            "weights": training.weights_hash(net),
            "model": state["model_args"],
            "precision": r.precision,
            "version": SCORES_VERSION,
        },
        lambda v: source(v, args.text),
    )
    found = cache.compute(
        data.test,
        lambda v, tick: {"scores": score(net, v, args.text, r, tick)},
        r,
        size=len,
        unit="clip",
        shard=getattr(args, "shard", None),
    )
    if not found:
        return None
    dataset, scores = data.as_dataset(), {}
    for v in data.test:
        scores[v.name] = data.frame_scores(v, found[v.key]["scores"])
    out = folder / args.protocol
    protocol = evaluation.Protocol(args.protocol, args.smoothing, probabilities=True)
    result = evaluation.evaluate(
        out,
        dataset,
        scores,
        method="SVMAE",
        protocol=protocol,
        extra=training.run_info(checkpoint, state, [net], evaluation.total_seconds(found), data.skipped, r),
    )
    evaluation.show(out, result, top=args.top, overlay=args.overlay)
    report_skipped(data.skipped)
    evaluation.print_next_steps("frd_uvad/svmae/eval.py", checkpoint, out, overlay=args.overlay, pictures=False)
    return result.metrics


def score_video(args, r):
    """One's own footage: scores.csv, curve.png, overlay.mp4."""
    video, (net, state) = open_video(args.video), load_detector(args.checkpoint, *authors_flags(args))
    made, wanted = state.get("features"), state["model_args"]
    if not made:
        raise UserError(
            f"{args.checkpoint} was trained on features made elsewhere: make those of {args.video} alike, and score them with "
            "--features"
        )
    if wanted["feature_group"] != "vis" and not args.text:
        raise UserError(f"checkpoint {args.checkpoint} needs caption embeddings: give --text DIR with {video.name}.npy")
    features, frames = features_of_video(video, made, args, r)
    out = writable_folder((args.out or Path(args.checkpoint).parent / "video") / safe_filename(video.name))
    scores = score(net.eval().to(r.device), FeatureVideo(video.name, "test", [features], path=video.path), args.text, r)
    evaluation.write_own_video(
        video.name,
        *decoded(video),
        frames_of_clips(scores, frames),
        args.smoothing,
        "SVMAE",
        out,
        red=1.0,
        top=args.top,
    )


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    if not args.video and not args.features:
        raise UserError("nothing to score: give --features DIR, or --video FILE")
    r = training.Run.from_args(args)
    args.checkpoint = args.checkpoint or Path("runs/svmae") / f"{args.dataset}-detector" / "detector.pt"
    load_detector(args.checkpoint, *authors_flags(args))  # a wrong file is refused before any work
    if args.video:
        return score_video(args, r)
    evaluate(
        args, find_features(args.dataset, args.features, args.labels, args.order, args.segments), args.checkpoint, r
    )
    r.close()


if __name__ == "__main__":
    run(main)
