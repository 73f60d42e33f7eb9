"""Clip features -> scores; checkpoints, ours and the authors'; auxiliary scorers."""

from dataclasses import dataclass

import numpy as np

from common import old_training as training
from common.io import UserError, first_line, load_arrays
from common.late import Late, torch

model = Late("frd_uvad.model")


@training.inference
def clip_scores(net, features):
    """Scores of single clips by the scorer alone. [N, crops, 1, C] or [N, crops, C] -> [N, 1]"""
    x = features if features.ndim == 4 else features.unsqueeze(2)
    return net.scorer(x)[..., 0]


# ------------------------------------------------------------------------------------------------------- checkpoints


def weights_of(path):
    state = training.load_checkpoint(path, "frd_uvad")
    weights = state.get("model_state_dict", state.get("model", state))
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"checkpoint {path} is not of this method: it holds no weights")
    return weights, state if "model_state_dict" in state else {}


def load_model(path, heads=16):
    """-> (FRD, state). Ours, or the authors' bare state-dict; one for evaluation alone holds the scorer's weights only."""
    weights, state = weights_of(path)
    if "scorer.fc1.weight" not in weights:
        raise UserError(f"checkpoint {path} is not of this method: it has no scorer.fc1.weight")
    blocks = {k.split(".")[2] for k in weights if k.startswith("decoder.decoder_blocks.")}
    own = {k: v for k, v in weights.items() if k.startswith(("decoder.", "scorer.") if blocks else ("AE.", "scorer."))}
    try:
        args = state.get("model_args") or dict(
            feature_size=weights["scorer.fc1.weight"].shape[1], num_blocks=len(blocks), heads=heads
        )
        net = model.FRD(**args)
        missing, unknown = net.load_state_dict(own, strict=False)
    except (RuntimeError, ValueError, TypeError, IndexError) as e:
        raise UserError(f"checkpoint {path} does not fit this model ({first_line(e)}…)") from None
    if not any(not k.startswith("scorer.") for k in own):  # for evaluation alone
        net.AE, missing = None, [k for k in missing if not k.startswith("AE.")]
    if missing or unknown:
        raise UserError(f"checkpoint {path} does not fit this model ({(missing + unknown)[0]})")
    return net, {**state, "model_args": args}


@dataclass
class Auxiliary:
    """Scores that must agree with the reconstruction error: a network, or one number per clip."""

    source: str
    net: object = None  # a scorer of frd_uvad.model
    labels: dict = None  # video name -> float32 [clips]


def load_auxiliary(spec):
    """`none`, `c2fpl:FILE`, `frd:FILE` (scorers) or `labels:FILE.npz` (video name -> scores in 0..1 per clip).

    -> Auxiliary, or None.
    """
    kind, _, path = spec.partition(":")
    if spec == "none":
        return None
    if kind not in ("c2fpl", "frd", "labels") or not path:
        raise UserError(f"--auxiliary {spec} is not known; write none, c2fpl:FILE, frd:FILE or labels:FILE.npz")
    if kind == "labels":
        arrays = load_arrays(path, "pseudo labels")
        for k, v in arrays.items():
            if v.dtype.kind not in "biuf" or not np.isfinite(v).all():
                raise UserError(f"pseudo labels {path}: {k} must be finite numbers, one per clip")
        return Auxiliary(spec, labels={k: np.asarray(v, np.float32).reshape(-1) for k, v in arrays.items()})
    weights, _ = weights_of(path)
    prefixes = ("scorer_c2fpl.", "") if kind == "c2fpl" else ("scorer.", "")
    own = next(
        (
            w
            for p in prefixes
            if (w := {k.removeprefix(p): v for k, v in weights.items() if k.startswith(p)}) and "fc1.weight" in w
        ),
        None,
    )
    if own is None:
        raise UserError(f"--auxiliary {spec}: {path} holds no such scorer")
    net = (model.C2FPLScorer if kind == "c2fpl" else model.Scorer)(own["fc1.weight"].shape[1])
    known = set(net.state_dict())
    # the attention layers of C2FPL are not used, so files without them are fine
    own = {k: v for k, v in own.items() if k in known}
    missing, _ = net.load_state_dict(own, strict=False)
    if any(not k.startswith("fc_att") for k in missing):
        raise UserError(f"--auxiliary {spec}: {path} does not fit ({missing[0]} is missing)")
    return Auxiliary(spec, net=net.eval().requires_grad_(False))
