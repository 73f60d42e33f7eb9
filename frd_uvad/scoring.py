"""Clip features -> scores; checkpoints, ours and the authors'; auxiliary scorers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common import training
from common.io import UserError, load_arrays, short_hash
from frd_uvad import model

SCORES_VERSION = 2  # raise it when raw scores change: cached ones are then computed again


@torch.inference_mode()
def score_batch(net: torch.nn.Module, clips: torch.Tensor, run) -> dict[str, torch.Tensor]:
    """Clips [n, crops, width] on the device -> {"scores": float32 [n] by the scorer, "errors": float32 [n] of the
    reconstruction where the network has a reconstructor, "finite": bool [n], whether the clips' features are}."""
    x = clips.float().unsqueeze(2)
    with run.autocast():
        out = {"scores": net.scorer(x)[:, 0, 0].float()}
        if net.reconstructor is not None:
            out["errors"] = net.error(x)[:, 0].float()
    return {**out, "finite": torch.isfinite(x).flatten(1).all(1)}


def score_video(
    net: torch.nn.Module, video, run, batch_size: int = 1024, tick: Callable = lambda n: None
) -> dict[str, np.ndarray]:
    """-> {"scores": float32 [clips]} of a FeatureVideo by the scorer, and {"errors": reconstruction errors [clips]}
    where the network has a reconstructor. tick(n) is called after every n clips. Raises UserError for features that
    are not finite."""
    batches = []
    for i in range(0, len(video), batch_size):
        clips = run.to_device(video.clips(range(i, min(i + batch_size, len(video)))))
        batches.append(score_batch(net, clips, run))
        tick(len(clips))
    arrays = {k: torch.cat([batch[k] for batch in batches]).cpu().numpy() for k in batches[0]}
    if not arrays.pop("finite").all():
        raise UserError(
            f"features of video {video.name} ({video.path}) hold NaN or infinite numbers: encode it again, or take it "
            "away"
        )
    return arrays


def build_model(model_args: dict) -> torch.nn.Module:
    return model.FRD(**model_args)


def read_weights(path) -> tuple[dict, dict]:
    """-> (weights, the whole checkpoint where it is ours, else {}). Raises UserError where there are no weights."""
    state = training.load_checkpoint(path, "frd_uvad")
    weights = state.get("model_state_dict", state.get("model", state))
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"checkpoint {path} is not of this method: it holds no weights")
    return weights, state if "model_state_dict" in state else {}


def load_model(path, heads: int = 16) -> tuple[torch.nn.Module, dict]:
    """-> (FRD, checkpoint dict with model_args). Ours, or the authors' bare state-dict.

    A file for evaluation only holds the scorer's weights: its network has no reconstructor. Raises UserError.
    """
    weights, state = read_weights(path)
    if "scorer.fc1.weight" not in weights:
        raise UserError(f"checkpoint {path} is not of this method: it has no scorer.fc1.weight")
    blocks = {k.split(".")[2] for k in weights if k.startswith("decoder.decoder_blocks.")}
    parts = ("decoder.", "scorer.") if blocks else ("AE.", "scorer.")  # published files hold both reconstructors
    weights = {k: v for k, v in weights.items() if k.startswith(parts)}
    model_args = {}

    def make_net():
        feature_size = weights["scorer.fc1.weight"].shape[1]
        sizes = dict(feature_size=feature_size, num_blocks=len(blocks), heads=heads)
        model_args.update(state.get("model_args") or sizes)
        net = build_model(model_args)
        if all(k.startswith("scorer.") for k in weights):
            net.AE = None
        return net

    net = training.load_weights(make_net, weights, path)
    return net, {**state, "model_args": model_args}


@dataclass
class Auxiliary:
    """Scores that must agree with the reconstruction error: a network, or one number per clip."""

    source: str
    net: torch.nn.Module | None = None  # a scorer of frd_uvad.model
    labels: dict | None = None  # video name -> float32 [clips]

    def content(self) -> str:
        """A hash of its weights or numbers."""
        if self.net is not None:
            return training.weights_hash(self.net)
        return short_hash({name: x.tolist() for name, x in self.labels.items()})


def load_auxiliary(source: str) -> Auxiliary | None:
    """`none`, `c2fpl:FILE`, `frd:FILE` (scorers) or `labels:FILE.npz` (video name -> scores in 0..1 per clip).

    Raises UserError for anything else.
    """
    kind, _, path = source.partition(":")
    if source == "none":
        return None
    if kind not in ("c2fpl", "frd", "labels") or not path:
        raise UserError(f"--auxiliary {source} is not known; write none, c2fpl:FILE, frd:FILE or labels:FILE.npz")
    if kind == "labels":
        labels = load_arrays(path, "pseudo labels")
        for name, x in labels.items():
            if x.dtype.kind not in "biuf" or not np.isfinite(x).all():
                raise UserError(f"pseudo labels {path}: {name} must be finite numbers, one per clip")
        return Auxiliary(source, labels={name: np.asarray(x, np.float32).reshape(-1) for name, x in labels.items()})
    file_weights, _ = read_weights(path)
    for prefix in ("scorer_c2fpl.", "") if kind == "c2fpl" else ("scorer.", ""):
        weights = {k.removeprefix(prefix): v for k, v in file_weights.items() if k.startswith(prefix)}
        if "fc1.weight" in weights:
            break
    else:
        raise UserError(f"--auxiliary {source}: {path} holds no such scorer")
    net = (model.C2FPLScorer if kind == "c2fpl" else model.Scorer)(weights["fc1.weight"].shape[1])
    expected = net.state_dict()
    missing, _ = net.load_state_dict({k: v for k, v in weights.items() if k in expected}, strict=False)
    missing = [k for k in missing if not k.startswith("fc_att")]  # C2FPL's attention layers are not used
    if missing:
        raise UserError(f"--auxiliary {source}: {path} does not fit ({missing[0]} is missing)")
    return Auxiliary(source, net=net.eval().requires_grad_(False))
