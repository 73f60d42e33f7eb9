"""Cubes -> scores: blocks of the frame, checkpoints (ours and the authors'), normalised scores."""

import io
import pickle

import numpy as np
from tqdm import tqdm

from common import old_training as training
from common.batches import Batches
from common.io import UserError, first_line
from common.kept import Kept, seconds_of
from common.late import Late, torch
from common.video import Video

model = Late("spr_uvad.model")

SIZES = {"full": {}, "small": dict(features_root=8)}
BATCH = {"cuda": 1024, "cpu": 128}  # cubes at once: a CPU's cache holds their feature maps, 1024 are half as fast
NO_MODEL, NO_BOX = 20.0, -20.0  # score of a cube in a block without a model, of a frame without boxes (authors' code)


def fields(use_flow):
    return {"appearance": slice(None), **({"flow": slice(None)} if use_flow else {})}


def to_input(batch):
    """uint8 [N, F, C, S, S], float16 [N, F, 2, S, S] -> {"raw": [N, 3F, S, S] in [0, 1], "flow": [N, 2F, S, S] in pixels}."""
    frames = batch["appearance"]
    frames = frames.expand(-1, -1, 3, -1, -1) if frames.shape[2] == 1 else frames
    out = {"raw": (frames.flatten(1, 2).float() / 255).contiguous(memory_format=torch.channels_last)}
    if "flow" in batch:
        out["flow"] = batch["flow"].flatten(1, 2).float()
    return out


def blocks(boxes, sizes, grid):
    """Number (row * columns + column) of the block that each box's centre lies in. int64 [N].

    boxes: [n_i, 4] of every video; sizes: (height, width) of each; grid: (rows, columns).
    """
    out = [np.zeros(0, np.int64)]
    for box, (h, w) in zip(boxes, sizes):
        row = np.clip((box[:, 1] + box[:, 3]) / 2 * grid[0] // h, 0, grid[0] - 1)
        column = np.clip((box[:, 0] + box[:, 2]) / 2 * grid[1] // w, 0, grid[1] - 1)
        out.append((row * grid[1] + column).astype(np.int64))
    return np.concatenate(out)


def score(nets, data, rows, block, r, tick=lambda n: None):
    """Summed squared errors of the cubes `rows` of a Batches, whose blocks are `block` [n]. nets: {block number: LBR}.

    -> float32 [n, 2] (raw, flow), NaN where a block has no model. tick(n) after every n cubes.
    """
    out = np.full((len(rows), 2), np.nan, np.float32)
    for number, net in nets.items():
        places, done = np.flatnonzero(block == number), 0
        own = torch.full((len(places), 2), torch.nan, device=r.device)
        net.to(r.device, memory_format=torch.channels_last)
        for part, batch in data.iterate(rows[places], BATCH[r.device.type]):
            wanted = to_input(batch)
            with torch.inference_mode(), r.autocast():
                got = net.folded(wanted["raw"])
            for i, key in enumerate(got):
                own[done : done + len(part), i] = model.cube_errors(got[key], wanted[key])
            done += len(part)
            tick(len(part))
        out[places] = own.cpu().numpy()
    return out


def use_flow(nets):
    return any(n.use_flow for n in nets.values())


def shared_score(nets, records, rows, block, r, label):
    """score() of the cubes `rows` of many videos, of which torchrun's processes compute a part each."""
    share = r.contiguous_share(len(rows))
    mine, data = rows[share.start : share.stop], Batches(records, fields(use_flow(nets)), r.device)
    with tqdm(
        total=len(mine), desc=label, unit="cube", disable=not r.is_main, dynamic_ncols=True, mininterval=2
    ) as bar:
        return r.gather(score(nets, data, mine, block[share.start : share.stop], r, bar.update))


def kept_score(nets, grid, ready, videos, folder, r, among=None, shard=None):
    """score() of all cubes of `videos`, kept in `folder`. -> errors [N, 2], blocks [N], seconds; None where common.kept says so"""
    tag = [training.weights_hash(n) for _, n in sorted(nets.items())]
    kept = Kept(
        folder,
        {"weights": tag, "grid": list(grid), "cubes": ready.store.s.key(), "precision": r.precision},
        Video.fingerprint,
        __file__,
    )

    def own(v, tick):
        records, block = ready.store.records(v), blocks(ready.column([v], "box"), ready.sizes([v]), grid)
        data = Batches([records], fields(use_flow(nets)), r.device, once=True)
        return {"errors": score(nets, data, np.arange(len(records)), block, r, tick), "block": block}

    found = kept.make(
        videos, own, r, size=lambda v: ready.store.info(v)["cubes"], unit="cube", among=among, shard=shard
    )
    return found and (
        *(np.concatenate([found[v.key][k] for v in videos]) for k in ("errors", "block")),
        seconds_of(found),
    )


def statistics(errors, block, numbers):
    """{block: {"raw_mean", "raw_std", "flow_mean", "flow_std", "cubes"}} over the cubes that each model was trained on."""
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


def combine(errors, block, stats, w_raw, w_flow):
    """w_raw · z(raw) + w_flow · z(flow), z(raw) alone without motion; NO_MODEL in blocks without one. -> float32 [N]."""
    out = np.full(len(errors), NO_MODEL, np.float32)
    for number, s in stats.items():
        own = (block == number) & np.isfinite(errors[:, 0])
        z = (errors[own, 0] - s["raw_mean"]) / s["raw_std"]
        if "flow_mean" in s:
            z = w_raw * z + w_flow * (errors[own, 1] - s["flow_mean"]) / s["flow_std"]
        out[own] = z
    return out


# ------------------------------------------------------------------------------------------------------- checkpoints


def build(model_args):
    return model.LBR(**model_args)


def load_checkpoint(path):
    """-> ({(row, column): LBR}, state). Ours, or the authors' nested list [row][column][0] of state-dicts."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError):
        state = training.load_checkpoint(path, "spr_uvad")  # says what is wrong
    if isinstance(state, list):
        weights = {}
        for row, line in enumerate(state):
            for column, cell in enumerate(line if isinstance(line, list) else []):
                cell = cell[0] if isinstance(cell, list) and cell else cell
                if isinstance(cell, dict):
                    weights[row, column] = cell
        if not weights:
            raise UserError(f"checkpoint {path} holds no model: expected nested lists [row][column][0] of weights")
        state = {"grid": [len(state), max(len(line) for line in state)], "weights": weights, "model_args": None}
    else:
        state = training.load_checkpoint(path, "spr_uvad")
        if "model_state_dicts" not in state:
            raise UserError(f"checkpoint {path} is not one of LBR-SPR's: it has no model_state_dicts")
        columns = state["grid"][1]
        state["weights"] = {(int(k) // columns, int(k) % columns): w for k, w in state["model_state_dicts"].items()}
    nets = {}
    for place, w in state["weights"].items():
        w = {k.removeprefix("module."): v for k, v in w.items()}
        try:
            nets[place] = build(state.get("model_args") or infer_args(w))
            nets[place].load_state_dict(w)
        except (RuntimeError, TypeError, ValueError, KeyError) as e:
            raise UserError(f"checkpoint {path} does not fit the model: {first_line(e)}") from None
        if not all(torch.isfinite(p).all() for p in nets[place].parameters()):
            raise UserError(f"checkpoint {path} holds NaN or infinite weights")
        nets[place].eval()
    return nets, state


def infer_args(weights):
    """Sizes of a model whose file does not say them, read off its tensors."""
    root, channels = weights["raw_ae.0.conv.conv.0.weight"].shape[:2]
    return {
        "features_root": root,
        "num_frames": channels // 3,
        "use_flow": any(k.startswith("of_ae.") for k in weights),
    }


def numbered(nets, grid):
    """{(row, column): net} -> {block number: net}."""
    return {row * grid[1] + column: net for (row, column), net in nets.items()}


class OnlyArrays(pickle.Unpickler):
    """Reads pickled numpy arrays in lists and refuses whatever else a file would call."""

    ALLOWED = {
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")  # as files of numpy 1 say it
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return super().find_class(module, name)


def load_training_scores(path, grid):
    """The authors' `…_training_scores.npy` -> {block number: float64 [n]}: nested lists [row][column] of arrays.

    The file is an object array of numpy, or a torch file; arrays are read, nothing else is run.
    """
    try:
        with open(path, "rb") as f:
            head = f.read(6)
            f.seek(0)
            if head == b"\x93NUMPY":
                version = np.lib.format.read_magic(f)
                reader = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = reader(f)
                nested = OnlyArrays(f).load() if dtype.hasobject else np.frombuffer(f.read(), dtype).reshape(shape)
            else:
                rebuild = np._core.multiarray._reconstruct
                with torch.serialization.safe_globals([rebuild, np.ndarray, np.dtype, *np_dtypes()]):
                    nested = torch.load(io.BytesIO(f.read()), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"training scores {path} are missing") from None
    except Exception as e:  # damaged pickles raise many kinds
        raise UserError(
            f"training scores {path} cannot be read ({first_line(e)}): expected nested lists of arrays"
        ) from None
    out = {}
    try:
        for row in range(grid[0]):
            for column in range(grid[1]):
                cell = flat(nested[row][column])
                if len(cell):
                    out[row * grid[1] + column] = cell
    except (IndexError, TypeError, ValueError):
        raise UserError(f"training scores {path}: expected nested lists of {grid[0]}×{grid[1]} arrays") from None
    return out


def flat(nested):
    """All numbers of nested lists and arrays, float64 [n]."""
    if isinstance(nested, (list, tuple)) or (isinstance(nested, np.ndarray) and nested.dtype == object):
        parts = [flat(x) for x in nested]
        return np.concatenate(parts) if parts else np.zeros(0)
    return np.asarray(nested, np.float64).reshape(-1)


def np_dtypes():
    return [type(np.dtype(t)) for t in ("f4", "f8", "f2", "i8", "i4")]
