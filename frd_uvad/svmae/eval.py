"""Score clip features with SVMAE's weakly supervised detector.

    python frd_uvad/svmae/eval.py --features features/svmae/folder --checkpoint runs/svmae/features-detector/detector.pt
    python frd_uvad/svmae/eval.py --features data/UCF-Crime --dataset ucfcrime --ckpt_path authors.pkl --protocol official
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from common import evaluation, smoothing, training  # noqa: E402
from common.datasets import report_skipped  # noqa: E402
from common.features import CLIP, find_features, frames_of_clips  # noqa: E402
from common.files import UserError, first_line, load_array, run, writable_folder  # noqa: E402
from frd_uvad.svmae.detector import Detector  # noqa: E402

METHOD = "svmae-detector"


def add_data_flags(parser):
    g = parser.add_argument_group("data")
    g.add_argument("--features", type=Path, required=True, help="folder of clip features: train/ and test/ with .npy files, or UCF-Crime's "
                   "and XD-Violence's")
    g.add_argument("--dataset", default="features", help="name in results (default: %(default)s)")
    g.add_argument("--labels", type=Path, default=None, help="frame labels instead of those found beside the features")
    g.add_argument("--text", type=Path, default=None, help="folder of caption embeddings, <video>.npy [clips, width], one row per clip")


def add_eval_flags(parser):
    evaluation.add_score_flags(parser, "here they differ in name alone: nothing is smoothed or left out", "none", "the curve")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    training.add_flags(parser, out="the checkpoint's folder")
    g = evaluation.add_source_flags(parser, "runs/svmae/<dataset>-detector/detector.pt", video=None)
    g.add_argument("--fusion", default="concat", help="of the authors' file, whose weights do not say it (default: %(default)s)")
    add_eval_flags(parser)
    return parser.parse_args(argv)


def args_of_weights(weights, fusion):
    """The detector's arguments from the weights of an authors' file."""
    text = weights["Aggregate_text.conv_4.0.weight"].shape[1] if "Aggregate_text.conv_4.0.weight" in weights else 768
    if "Aggregate.conv_4.0.weight" not in weights:
        return dict(feature_size=1536, text_dim=text, feature_group="text", fusion=fusion)
    size, width = weights["Aggregate.conv_4.0.weight"].shape[1], weights["fc1.weight"].shape[1]
    group = "vis" if width == size and "fc0.weight" not in weights else "both"
    if "fc_vis.weight" in weights:
        fusion = "add_up"
    return dict(feature_size=size, text_dim=text, feature_group=group, fusion=fusion,
                aggregate_text="Aggregate_text.conv_4.0.weight" in weights)


def load_detector(path, fusion="concat"):
    """-> (Detector, state). Ours, or the authors' bare state-dict."""
    state = training.load_checkpoint(path, METHOD)
    ours = "model_state_dict" in state
    weights = state["model_state_dict"] if ours else {k.removeprefix("module."): v for k, v in state.get("model", state).items()}
    if "fc1.weight" not in weights or not any(k.startswith("Aggregate") for k in weights):
        raise UserError(f"checkpoint {path} is not of this method: it has no fc1.weight or no Aggregate")
    try:
        args = state["model_args"] if ours else args_of_weights(weights, fusion)
        net = Detector(**args)
        net.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as e:
        raise UserError(f"checkpoint {path} does not fit this model ({first_line(e)}…)") from None
    return net, {**(state if ours else {}), "model_args": args}


def text_of(folder, video):
    """Caption embeddings of a video: float32 [clips, width]."""
    x = load_array(folder / f"{video.name}.npy", "caption embeddings")
    if x.ndim != 2 or not x.size or x.dtype.kind not in "iuf" or not np.isfinite(x).all():
        raise UserError(f"caption embeddings {folder / (video.name + '.npy')}: expected finite numbers [clips, width], got shape {x.shape}")
    return np.asarray(x, np.float32)


@torch.inference_mode()
def score(net, video, text, r):
    """Scores of a video's clips, float32 [clips]: all of them in one pass, as the network looks along the video."""
    x = torch.from_numpy(video.clips(range(len(video))).astype(np.float32)).transpose(0, 1)[None].to(r.device)
    words = torch.from_numpy(text_of(text, video)).to(r.device).expand(1, x.shape[1], -1, -1) if text else None
    if not torch.isfinite(x).all():
        raise UserError(f"features of video {video.name} ({video.path}) hold NaN or infinite numbers: encode it again, or take it away")
    with r.autocast():
        return net(x, words)["scores"][0, :, 0].float().cpu().numpy()


def evaluate(args, data, checkpoint, r):
    """Score the test videos, print and write the results. -> metrics (rank 0)."""
    if not r.main:
        return None
    if not data.test:
        raise UserError(f"{data.root} has no test videos to score")
    net, state = load_detector(checkpoint, args.fusion)
    if state["model_args"]["feature_group"] != "text" and state["model_args"]["feature_size"] != data.width:
        raise UserError(f"checkpoint {checkpoint} is for features of width {state['model_args']['feature_size']}, these have {data.width}")
    if state["model_args"]["feature_group"] != "vis" and not args.text:
        raise UserError(f"checkpoint {checkpoint} needs caption embeddings: give --text DIR")
    net.eval().to(r.device)
    dataset, scores = data.as_dataset(), {}
    for v in tqdm(data.test, desc="score", unit="video", dynamic_ncols=True, mininterval=2):
        labels = data.labels(v) if data.has_labels else None
        scores[v.name] = frames_of_clips(score(net, v, args.text, r), len(v) * CLIP if labels is None else len(labels))
    folder = writable_folder(args.out or Path(checkpoint).parent)
    protocol = evaluation.Protocol(args.protocol, args.smoothing, probabilities=True)
    report = evaluation.evaluate(
        folder / args.protocol, dataset, scores, method="SVMAE", protocol=protocol, args=args,
        extra={"checkpoint": str(checkpoint), "plan": state.get("plan"), "training_seconds": state.get("seconds"),
               "skipped_videos": data.skipped, "peak_memory_mib": round(training.peak_memory())})
    report_skipped(data.skipped)
    print(f"next: look at {folder / args.protocol}/curves")
    return report


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    r = training.Run(args.device, args.precision)
    args.checkpoint = args.checkpoint or Path("runs/svmae") / f"{args.dataset}-detector" / "detector.pt"
    load_detector(args.checkpoint, args.fusion)   # a wrong file is refused before any work
    evaluate(args, find_features(args.dataset, args.features, args.labels), args.checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
