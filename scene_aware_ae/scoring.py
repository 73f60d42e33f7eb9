"""Features -> segments -> scores; checkpoints, ours and the authors'."""

import numpy as np

from common import old_training as training
from common.io import UserError, first_line
from common.late import Late, torch

model = Late("scene_aware_ae.model")

LENGTH = 16  # frames of a segment


def segments(frames, length=LENGTH):
    """[(first, end, first frame that takes the score)] of a video's segments, without overlap.

    The last segment slides back to end with the video, and scores what was left over. A video shorter than a segment is one short
    segment.
    """
    if frames < length:
        return [(0, frames, 0)] if frames else []
    out = [(t, t + length, t) for t in range(0, frames - length + 1, length)]
    if frames % length:
        out.append((frames - length, frames, frames // length * length))
    return out


@training.inference
def score_features(net, features, r, batch_size=512, tick=lambda n: None):
    """Features [T, D] of one video -> frame scores float32 [T], scene features [segments, D]. tick(n) after every n frames."""
    parts = segments(len(features))
    scores, scenes = np.zeros(len(features), np.float32), []
    x = torch.from_numpy(np.asarray(features, np.float32)).to(r.device)
    for i in range(0, len(parts), batch_size):
        batch = torch.stack([x[a:b] for a, b, _ in parts[i : i + batch_size]])
        with r.autocast():
            out = net(batch)
        values = model.segment_scores(out["recon"], batch).cpu().numpy()
        for (_, end, first), s in zip(parts[i : i + batch_size], values):
            scores[first:end] = s
            tick(end - first)
        scenes.append(out["scene_feature"].float().cpu().numpy())
    return scores, np.concatenate(scenes) if scenes else np.zeros((0, x.shape[1] if x.ndim == 2 else 0), np.float32)


# ------------------------------------------------------------------------------------------------------- checkpoints


def args_of_weights(weights, num_heads):
    """The model's arguments from its weights; the number of heads is not among them."""
    depth = len({k.split(".")[2] for k in weights if k.startswith("encoder.layers.")})
    return dict(
        input_dim=weights["output_proj.weight"].shape[0],
        latent_dim=weights["proj_to_latent.weight"].shape[0],
        hidden_dim=weights["encoder.layers.0.linear1.weight"].shape[0],
        num_scenes=weights["classifier.3.weight"].shape[0],
        num_layers=depth,
        num_heads=num_heads,
        max_length=weights["pos_embedding"].shape[1],
        variational="proj_to_log_variance.weight" in weights,
    )


def load_model(path, num_heads=4):
    """-> (SceneAwareAE, state). Ours, or the authors' {"model", "optim", "iter"}."""
    state = training.load_checkpoint(path, "scene_aware_ae")
    ours = "model_state_dict" in state
    weights = state["model_state_dict"] if ours else state.get("model", state)
    if not isinstance(weights, dict) or "proj_to_latent.weight" not in weights:
        raise UserError(f"checkpoint {path} is not of this method: it has no proj_to_latent.weight")
    try:
        args = state["model_args"] if ours else args_of_weights(weights, num_heads)
        net = model.SceneAwareAE(**args)
        net.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, IndexError) as e:
        raise UserError(f"checkpoint {path} does not fit this model ({first_line(e)}…)") from None
    return net, {**(state if ours else {}), "model_args": args}
