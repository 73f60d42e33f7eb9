"""Clip features -> scores by the detector; its checkpoints, ours and the authors'."""

import numpy as np
import torch

from common import training
from common.io import UserError
from frd_uvad.features.data import FeatureVideo
from frd_uvad.svmae import data, detector

DETECTOR = "svmae-detector"  # of checkpoints that train.py writes
SCORES_VERSION = 2  # raise it when raw scores change: cached ones are then computed again


def build_model(model_args: dict) -> detector.Detector:
    return detector.Detector(**model_args)


def load_model(path, fusion=None, feature_group=None, aggregate_text=None) -> tuple[detector.Detector, dict]:
    """-> (Detector, checkpoint dict with its `model_args`). Ours, or the authors' bare state-dict.

    fusion, feature_group, aggregate_text: see Detector; for an authors' file, whose weights do not tell all of them.
    Raises UserError.
    """
    state = training.load_checkpoint(path, DETECTOR)
    is_ours = "model_state_dict" in state
    weights = state["model_state_dict"] if is_ours else state.get("model", state)
    if not isinstance(weights, dict):
        raise UserError(f"checkpoint {path} is not of this method: it holds no weights")
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    if "fc1.weight" not in weights or not any(k.startswith("Aggregate") for k in weights):
        raise UserError(f"checkpoint {path} is not of this method: it has no fc1.weight or no Aggregate")
    state = dict(state) if is_ours else {}

    def make_net():
        if not is_ours:
            state["model_args"] = infer_args(weights, fusion, feature_group, aggregate_text)
        return build_model(state["model_args"])

    return training.load_weights(make_net, weights, path), state


def infer_args(weights: dict, fusion=None, feature_group=None, aggregate_text=None) -> dict:
    """The detector's arguments from the weights of an authors' file, and from flags what weights do not tell."""

    def width(key, default):
        return weights[key].shape[1] if key in weights else default

    size = width("Aggregate.conv_4.0.weight", 1536)
    text = width("Aggregate_text.conv_4.0.weight", 768)
    has_fc0, has_add_up = "fc0.weight" in weights, "fc_vis.weight" in weights
    if feature_group is None:
        by_width = {text: "text", size: "vis"}.get(width("fc1.weight", 0), "both")  # of equal widths vis
        feature_group = "both" if has_fc0 or has_add_up else by_width
    if fusion is None and feature_group == "both" and has_fc0:
        raise UserError(
            "the authors' file is of the fusion add or product, which its weights do not tell: give --fusion add or "
            "--fusion product"
        )
    reduced = {"input_size": len(weights["components"])} if "components" in weights else {}
    return reduced | {
        "feature_size": size,
        "text_dim": text,
        "feature_group": feature_group,
        "fusion": "add_up" if has_add_up else fusion or "concat",
        "aggregate_text": aggregate_text is not False,
    }


@torch.inference_mode()
def score_batch(net: detector.Detector, visual: torch.Tensor, words: torch.Tensor | None, run) -> torch.Tensor:
    """Clips [n, crops, clips, C] of n videos on the device, and captions [n, crops, rows, D] or None -> scores float32
    [n, clips]."""
    with run.autocast():
        return net(visual, words)["scores"][..., 0].float()


def score_video(net: detector.Detector, video: FeatureVideo, text, run, tick=None) -> dict[str, np.ndarray]:
    """{"scores": float32 [clips]}, all clips in one pass, as the network looks along the video; then tick(clips).

    text: folder of caption embeddings, or None. Raises UserError.
    """
    visual = run.to_device(data.read_clips(video)).transpose(0, 1)[None]
    words = None
    if text:
        words = run.to_device(data.read_captions(text, video)).expand(1, visual.shape[1], -1, -1)
    scores = score_batch(net, visual, words, run)[0].cpu().numpy()
    if tick:
        tick(len(scores))
    return {"scores": scores}
