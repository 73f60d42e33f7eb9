"""Features -> segments -> scores; checkpoints, ours and the authors'."""

from collections.abc import Callable

import numpy as np
import torch

from common import training
from common.io import UserError
from scene_aware_ae import model

LENGTH = 16  # frames of a segment
SCORES_VERSION = 1  # raise it when raw scores change: cached ones are then computed again


def segments(frames: int, length: int = LENGTH) -> list[tuple[int, int, int]]:
    """[(first, end, first frame that takes the score)] of a video's segments, without overlap.

    The last segment slides back to end with the video, and scores what was left over. A video shorter than a segment is
    one short segment.
    """
    if frames < length:
        return [(0, frames, 0)] if frames else []
    out = [(t, t + length, t) for t in range(0, frames - length + 1, length)]
    if frames % length:
        out.append((frames - length, frames, frames // length * length))
    return out


@torch.inference_mode()
def score_batch(net: torch.nn.Module, segments: torch.Tensor, run) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of segments [n, T, D] on the device -> their scores [n] and scene features [n, D], float32.

    A segment's score is the largest reconstruction error of its frames.
    """
    with run.autocast():
        out = net(segments)
    return model.segment_scores(out["recon"], segments), out["scene_feature"].float()


def score_video(
    net: torch.nn.Module, features: np.ndarray, run, batch_size: int = 512, tick: Callable = lambda n: None
) -> dict[str, np.ndarray]:
    """Features [T, D] of one video -> {"scores": float32 [T], "scene_features": float32 [segments, D]}.

    batch_size: segments at once; tick(n) is called after every n frames.
    """
    parts, x = segments(len(features)), run.to_device(np.asarray(features, np.float32))
    batches = [(x.new_zeros(0), x.new_zeros(0, x.shape[1]))]
    for i in range(0, len(parts), batch_size):
        batch = parts[i : i + batch_size]
        batches.append(score_batch(net, torch.stack([x[first:end] for first, end, _ in batch]), run))
        tick(sum(end - first for _, end, first in batch))
    values, scene_features = (torch.cat(tensors).cpu().numpy() for tensors in zip(*batches))
    scores = np.zeros(len(features), np.float32)
    for (_, end, first), value in zip(parts, values):
        scores[first:end] = value
    return {"scores": scores, "scene_features": scene_features}


def build_model(model_args: dict) -> torch.nn.Module:
    return model.SceneAwareAE(**model_args)


def load_model(path, num_heads: int = 4) -> tuple[torch.nn.Module, dict]:
    """-> (network, checkpoint dict with model_args). Ours, or the authors' {"model", "optim", "iter"}.

    num_heads: of an authors' file, whose weights do not tell it. Raises UserError for any other file.
    """
    state = training.load_checkpoint(path, "scene_aware_ae")
    ours = "model_state_dict" in state
    weights = state["model_state_dict"] if ours else state.get("model", state)
    if not isinstance(weights, dict) or "proj_to_latent.weight" not in weights:
        raise UserError(f"checkpoint {path} is not of this method: it has no proj_to_latent.weight")
    model_args = {}

    def make_net():
        model_args.update(state["model_args"] if ours else infer_args(weights, num_heads))
        return build_model(model_args)

    net = training.load_weights(make_net, weights, path)
    return net, {**(state if ours else {}), "model_args": model_args}


def infer_args(weights: dict, num_heads: int) -> dict:
    """The sizes of a model, read off its tensors; the number of heads does not show in them."""
    return dict(
        input_dim=weights["output_proj.weight"].shape[0],
        latent_dim=weights["proj_to_latent.weight"].shape[0],
        hidden_dim=weights["encoder.layers.0.linear1.weight"].shape[0],
        num_scenes=weights["classifier.3.weight"].shape[0],
        num_layers=len({k.split(".")[2] for k in weights if k.startswith("encoder.layers.")}),
        num_heads=num_heads,
        max_length=weights["pos_embedding"].shape[1],
        variational="proj_to_log_variance.weight" in weights,
    )
