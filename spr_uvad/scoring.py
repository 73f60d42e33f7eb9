"""Cubes -> scores: blocks of the frame, checkpoints (ours and the authors'), normalised scores."""

import numpy as np
import torch

from common import training
from common.io import UserError
from common.objects.cube_dataset import CubeDataset
from spr_uvad import model

SCORES_VERSION = 1  # raise it when raw scores change: cached ones are then computed again
BATCH_SIZE = {"cuda": 1024, "cpu": 128}  # cubes; a CPU's cache holds the feature maps of 128, 1024 are half as fast
NO_MODEL, NO_BOX = 20.0, -20.0  # score of a cube in a block without a model, of a frame without boxes (authors' code)


def fields(use_flow: bool) -> dict:
    return {"appearance": slice(None), **({"flow": slice(None)} if use_flow else {})}


def to_input(batch: dict) -> dict:
    """uint8 [N, F, C, S, S], float16 [N, F, 2, S, S]

    -> {"raw": [N, 3F, S, S] in [0, 1], "flow": [N, 2F, S, S] in pixels}.
    """
    frames = batch["appearance"]
    frames = frames.expand(-1, -1, 3, -1, -1) if frames.shape[2] == 1 else frames
    out = {"raw": (frames.flatten(1, 2).float() / 255).contiguous(memory_format=torch.channels_last)}
    if "flow" in batch:
        out["flow"] = batch["flow"].flatten(1, 2).float()
    return out


def blocks(boxes: list, sizes: list, grid: tuple) -> np.ndarray:
    """Number (row * columns + column) of the block that each box's centre lies in. int64 [N].

    boxes: [n_i, 4] of every video; sizes: (height, width) of each; grid: (rows, columns).
    """
    out = [np.zeros(0, np.int64)]
    for box, (h, w) in zip(boxes, sizes):
        row = np.clip((box[:, 1] + box[:, 3]) / 2 * grid[0] // h, 0, grid[0] - 1)
        column = np.clip((box[:, 0] + box[:, 2]) / 2 * grid[1] // w, 0, grid[1] - 1)
        out.append((row * grid[1] + column).astype(np.int64))
    return np.concatenate(out)


@torch.inference_mode()
def score_batch(net: model.LBR, batch: dict, run) -> torch.Tensor:
    """A batch of a CubeDataset -> summed squared errors of its cubes, float32 [n, 2] (raw, flow), or [n, 1]."""
    target = to_input(batch)
    with run.autocast():
        out = net.folded(target["raw"])
    return torch.stack([model.cube_errors(out[key], target[key]) for key in out], dim=1)


def score_cubes(nets: dict, data: CubeDataset, block: np.ndarray, run, tick=None) -> np.ndarray:
    """Summed squared errors of all cubes of a dataset, whose blocks are `block` [n]. nets: {block number: LBR}.

    -> float32 [n, 2] (raw, flow), NaN where a block has no model. tick(n) is called after every n cubes.
    """
    errors = np.full((len(block), 2), np.nan, np.float32)
    for number, net in nets.items():
        rows, done = np.flatnonzero(block == number), 0
        part_errors = torch.full((len(rows), 2), torch.nan, device=run.device)
        net.to(run.device, memory_format=torch.channels_last)
        for part, batch in data.batches(rows, BATCH_SIZE[run.device.type]):
            values = score_batch(net, batch, run)
            part_errors[done : done + len(part), : values.shape[1]] = values
            done += len(part)
            if tick:
                tick(len(part))
        errors[rows] = part_errors.cpu().numpy()
    return errors


def uses_flow(nets: dict) -> bool:
    return any(net.use_flow for net in nets.values())


def score_video(nets: dict, grid: tuple, records: np.ndarray, size: tuple, run, tick=None) -> dict:
    """Records [n] of one video's cubes -> {"errors": float32 [n, 2] (raw, flow), "block": int64 [n]}.

    size: (height, width) of the video's frames; grid: (rows, columns) of blocks.
    """
    block = blocks([np.array(records["box"])], [size], grid)
    data = CubeDataset([records], fields(uses_flow(nets)), run, once=True)
    return {"errors": score_cubes(nets, data, block, run, tick), "block": block}


def statistics(errors: np.ndarray, block: np.ndarray, numbers) -> dict:
    """{block: {"raw_mean", "raw_std", "flow_mean", "flow_std", "cubes"}} over the cubes that each model was trained
    on."""
    out = {}
    for number in numbers:
        e = errors[block == number].astype(np.float64)
        mean, std = e.mean(0), e.std(0)
        keys = ("raw", "flow") if np.isfinite(e[:, 1]).all() else ("raw",)
        out[number] = {
            "cubes": len(e),
            **{f"{k}_mean": float(mean[i]) for i, k in enumerate(keys)},
            **{f"{k}_std": float(std[i]) if std[i] > 0 else 1.0 for i, k in enumerate(keys)},
        }
    return out


def combine(errors: np.ndarray, block: np.ndarray, stats: dict, w_raw: float, w_flow: float) -> np.ndarray:
    """w_raw · z(raw) + w_flow · z(flow), only z(raw) without motion; NO_MODEL in blocks without one.

    -> float32 [N].
    """
    out = np.full(len(errors), NO_MODEL, np.float32)
    for number, s in stats.items():
        rows = (block == number) & np.isfinite(errors[:, 0])
        z = (errors[rows, 0] - s["raw_mean"]) / s["raw_std"]
        if "flow_mean" in s:
            z = w_raw * z + w_flow * (errors[rows, 1] - s["flow_mean"]) / s["flow_std"]
        out[rows] = z
    return out


# ------------------------------------------------------------------------------------------------------- checkpoints


def build_model(model_args: dict) -> model.LBR:
    return model.LBR(**model_args)


def load_model(path) -> tuple[dict, dict]:
    """-> ({block number: LBR}, checkpoint dict with "grid" (rows, columns)). Raises UserError for any other file.

    Ours, or the authors' nested list [row][column][0] of state-dicts.
    """
    state = training.load_checkpoint(path, "spr_uvad", (dict, list))
    if isinstance(state, list):
        state = published_state(path, state)
    elif "model_state_dicts" not in state:
        raise UserError(f"checkpoint {path} is not one of LBR-SPR's: it has no model_state_dicts")
    nets = {}
    for number, weights in state["model_state_dicts"].items():
        weights = {k.removeprefix("module."): v for k, v in weights.items()}

        def make_net(weights=weights):
            return build_model(state.get("model_args") or infer_args(weights))

        nets[int(number)] = training.load_weights(make_net, weights, path).eval()
    return nets, state


def published_state(path, nested: list) -> dict:
    """The authors' file as one of ours."""
    columns = max((len(line) for line in nested if isinstance(line, list)), default=0)
    weights = {}
    for row, line in enumerate(nested):
        for column, cell in enumerate(line if isinstance(line, list) else []):
            cell = cell[0] if isinstance(cell, list) and cell else cell
            if isinstance(cell, dict):
                weights[str(row * columns + column)] = cell
    if not weights:
        raise UserError(f"checkpoint {path} holds no model: expected nested lists [row][column][0] of weights")
    return {"grid": [len(nested), columns], "model_state_dicts": weights}


def infer_args(weights: dict) -> dict:
    """Sizes of a model whose file does not say them, read off its tensors."""
    root, channels = weights["raw_ae.0.conv.conv.0.weight"].shape[:2]
    return {
        "features_root": root,
        "num_frames": channels // 3,
        "use_flow": any(k.startswith("of_ae.") for k in weights),
    }
