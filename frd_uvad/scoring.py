"""Clip features -> scores; checkpoints, ours and the authors'; auxiliary scorers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common import training
from common.io import UserError, load_arrays
from frd_uvad import model

SCORES_VERSION = 1  # raise it when raw scores change: cached ones are then computed again


@torch.inference_mode()
def score_video(
    net: torch.nn.Module, video, run, batch_size: int = 1024, tick: Callable = lambda n: None
) -> dict[str, np.ndarray]:
    """-> {"scores": float32 [clips]} of a FeatureVideo by the scorer, and {"errors": reconstruction errors [clips]}
    where the network has a reconstructor. tick(n) is called after every n clips. Raises UserError for features that
    are not finite."""
    scores, errors = [], []
    for i in range(0, len(video), batch_size):
        x = torch.from_numpy(video.clips(range(i, min(i + batch_size, len(video))))).to(run.device).float().unsqueeze(2)
        if not torch.isfinite(x).all():
            raise UserError(
                f"features of video {video.name} ({video.path}) hold NaN or infinite numbers: encode it again, or take "
                "it away"
            )
        with run.autocast():
            scores.append(net.score(x)[:, 0, 0].float().cpu().numpy())
            if net.reconstructor is not None:
                errors.append(net.error(x)[:, 0].float().cpu().numpy())
        tick(len(x))
    return {"scores": np.concatenate(scores), **({"errors": np.concatenate(errors)} if errors else {})}


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
    weights = {k: v for k, v in weights.items() if k.startswith((*parts, "standardizer."))}
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
    net: torch.nn.Module | None = None  # a scorer of frd_uvad.model, after its standardizer if it has one
    width: int = 0  # of the features that it scores
    labels: dict | None = None  # video name -> float32 [clips]


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
    width, scale = net.fc1.in_features, {k: file_weights.get(f"standardizer.{k}") for k in ("mean", "std")}
    if kind == "frd" and scale["mean"] is not None:
        standardizer = model.Standardizer(width)
        standardizer.load_state_dict(scale)
        net = torch.nn.Sequential(standardizer, net)
    return Auxiliary(source, net.eval().requires_grad_(False), width)
