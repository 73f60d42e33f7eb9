"""Seed, device, precision, torchrun, checkpoints, resume and log: the part of a training loop that is no method's own."""

import argparse
import functools
import hashlib
import json
import pickle
import random
import resource
import sys
import zipfile
from pathlib import Path

import numpy as np

from common.io import UserError, atomic_write, first_line
from common.late import torch


def add_flags(parser, *, out, epochs=None, batch_size=None, lr=None, number=None):
    """The flags that mean the same in every script. `number` reads numbers of stages: one or several. -> the group "run" """
    g = run = parser.add_argument_group("run")
    g.add_argument("--out", "--model_save_path", type=Path, default=None, help=f"folder of this run (default: {out})")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bf16 autocast on a GPU that has it, fp32 elsewhere (CPUs with AMX gain from bf16 too)",
    )
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--workers", type=int, default=None, help="processes that read and crop (default: one per core)")
    if lr:
        g = parser.add_argument_group("optimisation")
        g.add_argument("--epochs", "--max_epoch", type=number or int, default=None, help=f"(default: {epochs})")
        g.add_argument(
            "--batch-size",
            "--batchsize",
            "--max_seqlen",
            type=number or int,
            default=None,
            help=f"(default: {batch_size})",
        )
        g.add_argument("--lr", type=number or float, default=None, help=f"(default: {lr})")
        g.add_argument(
            "--resume",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="go on where an interrupted run of the same settings stopped",
        )
        g.add_argument(
            "--save-minutes",
            type=float,
            default=5,
            help="minutes between checkpoints inside an epoch (one is always written at its end)",
        )
        g.add_argument("--compile", action="store_true", help="torch.compile the model")
    return run


def inference(function):
    """torch.inference_mode() around a function; unlike that decorator it does not load torch where the function is defined."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.inference_mode():
            return function(*args, **kwargs)

    return wrapped


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def __getattr__(name):
    """Run as the methods that have not moved yet use it; torch is loaded with it."""
    if name != "Run":
        raise AttributeError(name)
    from common import distributed

    class Run(distributed.Run):
        @classmethod
        def from_args(cls, args):
            return cls(args.device, args.precision)

        gather = distributed.Run.all_gather_array

        def average_gradients(self, parameters):
            parameters = parameters.parameters() if hasattr(parameters, "parameters") else parameters
            grads = [p.grad for p in parameters if p.grad is not None]
            if self.world_size > 1:
                flat = torch.cat([g.reshape(-1) for g in grads])
                torch.distributed.all_reduce(flat)
                flat /= self.world_size
                for grad, mean in zip(grads, flat.split([g.numel() for g in grads])):
                    grad.copy_(mean.view_as(grad))

        def close(self):
            self.__exit__()

    globals()["Run"] = Run
    return Run


def epoch_order(n, seed, epoch):
    """The permutation of n samples for one epoch, the same however often the run was interrupted. int64 [n]."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def get_rng():
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng(state):
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(path, state):
    """Tensors, numbers, strings, lists and dicts only, so that weights_only loading accepts it; written, then renamed."""
    with atomic_write(path) as tmp:
        torch.save(state, tmp)


def load_checkpoint(path, method=None):
    """A checkpoint as a dict, on the CPU. Refuses files that would run code and checkpoints of another method."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} is missing") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {path} holds objects that would run code on loading, or is damaged: refused; "
            "only tensors, numbers, strings, lists and dicts are read"
        ) from None
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
        zipfile.BadZipFile,
    ) as e:
        raise UserError(f"checkpoint {path} cannot be read ({first_line(e)}); is it a PyTorch file, whole?") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, expected a dict of weights")
    if method and "method" in state and state["method"] != method:
        raise UserError(f"checkpoint {path} belongs to the method {state['method']}, this script is {method}")
    return state


def check_identity(path, known, now):
    """A run goes on only with the settings it began with. known, now: {setting: value} of the checkpoint and of this call."""
    for key, value in now.items():
        if (known or {}).get(key) != value:
            raise UserError(
                f"{path} was trained with {key} = {(known or {}).get(key)}, now it is {value}: choose another --out, or "
                "start again with --no-resume"
            )


class Log:
    """One JSON line per epoch, appended and flushed."""

    def __init__(self, path):
        self.path = Path(path)

    def write(self, **values):
        with open(self.path, "a") as f:
            f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}) + "\n")

    def drop_after(self, stage, epoch):
        """Forget lines of `stage` past `epoch`: the run goes back to a checkpoint made before them."""
        if not self.path.exists():
            return
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.strip().endswith("}")]
        kept = [x for x in lines if not (x.get("stage") == stage and x.get("epoch", 0) > epoch)]
        with atomic_write(self.path) as tmp:
            tmp.write_text("".join(json.dumps(x) + "\n" for x in kept))


def weights_hash(module):
    """Names a network by its weights."""
    h = hashlib.sha256()
    for k, v in sorted(module.state_dict().items()):
        h.update(k.encode() + v.cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def check_finite(value, where):
    """Stop with a way out on a NaN or infinite loss."""
    if not np.isfinite(value):
        raise UserError(
            f"the loss became {value} {where}: lower --lr, or try --precision fp32; "
            "the last checkpoint before it is kept"
        )


def peak_memory():
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 2**20


def about(checkpoint, state, nets, seconds, skipped, r):
    """What metrics.json says of every run: where it comes from, and what it cost.

    state: the checkpoint's; seconds: that scoring took one process from prepared input (frames or cubes in the cache, features) to
    raw scores, summed over the videos.
    """
    identity = state.get("identity", {})
    return {
        "checkpoint": str(checkpoint),
        "seed": identity.get("seed"),
        "plan": state.get("plan"),
        "training_seconds": state.get("seconds"),
        "scoring_seconds": seconds,
        "parameters": sum(p.numel() for n in nets for p in n.parameters()),
        "device": str(r.device),
        "precision": r.precision,
        "processes": r.world_size,
        "skipped_videos": skipped,
        "peak_memory_mib": round(peak_memory()),
    }
