"""What every training shares: checkpoint, exact resume, progress, log.

The loop itself stands in each method's train.py.
"""

import hashlib
import json
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.io import UserError, atomic_write, first_line, resource

CHECK_EVERY = 20  # steps between two checks of the loss; each check waits for the device
SAVE_SECONDS = 60  # an epoch's end writes a checkpoint if the last one is older


class EpochMeter:
    """Progress bar, mean losses, finite check, timed checkpoints and the log line of a training.

    for epoch in range(meter.epoch, epochs):
        for batch, weight in meter.batches(loader, epoch):
            ...
            meter.update(losses, weight)
        meter.end_epoch(loader)

    stage: names the run in log.jsonl; save(): writes a checkpoint with state_dict() in it; unit: what is counted per
    second; log_steps: for trainings that count steps (DrawLoader), steps per "epoch"; their log holds the
    number of steps under "epoch". `epoch`, `step`, `seconds` and `sums` say where an interrupted run continues.
    """

    def __init__(
        self, run, stage, epochs, *, log, save, unit="sample", save_minutes=5.0, print_epochs=True, log_steps=None
    ):
        self.run, self.stage = run, stage
        self.epochs, self.log = epochs, log
        self.save = save
        self.unit, self.save_minutes = unit, save_minutes
        self.print_epochs, self.log_steps = print_epochs, log_steps
        self.epoch, self.step = 0, 0
        self.seconds, self.sums = 0.0, {}
        self.steps = 0  # of the present epoch
        self.lr = None
        self.bar = None
        self.saved = time.perf_counter()

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.sums = state["seconds"], state["sums"]

    def position(self, step: int) -> str:
        """Step number `step` of the present epoch, in words."""
        if self.log_steps:
            return f"step {self.epoch * self.log_steps + step}"
        return f"epoch {self.epoch + 1}, step {step}"

    @property
    def progress(self) -> float:
        """The part of the present epoch that is done, 0..1."""
        return self.step / self.steps

    def batches(self, loader, epoch: int):
        """Yield (batch, weight): this rank's part, and the weight of its mean loss, see Run.batch_slice()."""
        self.steps, self.first_step = loader.steps(epoch), self.step
        if self.bar is None:
            steps = [loader.steps(e) for e in range(self.epochs)]
            self.bar = tqdm(
                total=sum(steps),
                initial=sum(steps[:epoch]) + self.step,
                desc=self.stage,
                unit="step",
                disable=not self.run.is_main,
                dynamic_ncols=True,
                mininterval=1 if sys.stderr.isatty() else 30,
            )
        self.began, before = time.perf_counter(), self.seconds
        loader.waited = 0.0
        torch.backends.cudnn.benchmark = True  # batches have one size; it is no gain where sizes change
        for batch in loader.batches(epoch, self.step):
            yield batch, self.run.batch_slice(len(batch))[1]
            self.step += 1
            self.bar.update()
            now = time.perf_counter()
            self.seconds = before + now - self.began
            due = now - self.saved > 60 * self.save_minutes and self.step < self.steps
            if due or self.step % CHECK_EVERY == 0 or self.step == self.steps:
                self.check_finite()  # a checkpoint never holds weights from after a NaN
            if due:
                self.save()
                self.saved = time.perf_counter()

    def set_lr(self, optimizer, lr: float) -> None:
        """lr times the `scale` of each parameter group, where it has one; logged."""
        self.lr = lr
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)

    def update(self, losses: dict, weight: float = 1.0) -> None:
        """Add the losses of a step; they stay on the device. "total", or the first one, is shown by the bar."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach() * weight

    def check_finite(self) -> None:
        name = "total" if "total" in self.sums else next(iter(self.sums))
        mean = float(self.sums[name]) / self.step
        if not np.isfinite(mean):
            raise UserError(
                f"the loss became {mean} in {self.stage}, {self.position(self.step)}: lower --lr, or try "
                "--precision fp32; the last checkpoint before it is kept"
            )
        if self.bar:
            epoch = {} if self.log_steps else {"epoch": f"{self.epoch + 1}/{self.epochs}"}
            self.bar.set_postfix({name: f"{mean:.4g}", **epoch})

    def end_epoch(self, loader, **extra: float) -> None:
        """Means over the ranks, and `extra` -> log.jsonl and one printed line; a checkpoint, if the last is old."""
        torch.backends.cudnn.benchmark = False
        ranks = self.run.all_gather_object({k: float(v) / self.steps for k, v in self.sums.items()})
        means = {k: sum(x[k] for x in ranks) / len(ranks) for k in ranks[0]}
        duration, steps = time.perf_counter() - self.began, self.steps - self.first_step
        samples = min(steps * loader.batch_size, loader.samples)
        number = self.epoch * self.log_steps + self.steps if self.log_steps else self.epoch + 1
        if self.run.is_main:  # before the checkpoint: a run that is killed between them writes the line again
            line = {"stage": self.stage, "epoch": number, **means, **extra}
            if self.lr is not None:
                line["lr"] = self.lr
            line["seconds"] = self.seconds
            line[f"{self.unit}s_per_second"] = samples / duration
            line["waited_share"] = loader.waited / duration
            self.log.write(**line)
            if self.print_epochs:
                values = {k: v for k, v in {**means, **extra}.items() if isinstance(v, float)}
                self.bar.write(
                    f"{self.stage} epoch {number}/{self.epochs}: "
                    + ", ".join(f"{k} {v:.5g}" for k, v in values.items())
                )
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = {}
        if time.perf_counter() - self.saved > min(SAVE_SECONDS, 60 * self.save_minutes) or self.epoch == self.epochs:
            self.save()
            self.saved = time.perf_counter()
        if self.epoch == self.epochs:
            self.bar.close()


class Log:
    """One JSON line per epoch, appended and flushed."""

    def __init__(self, path):
        self.path = Path(path)

    def write(self, **values) -> None:
        with open(self.path, "a") as file:
            file.write(
                json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}) + "\n"
            )

    def drop_after(self, stage: str, epoch: int) -> None:
        """Remove the lines of `stage` past `epoch`: the run continues from a checkpoint written before them."""
        if not self.path.exists():
            return
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.strip().endswith("}")]
        lines = [x for x in lines if not (x.get("stage") == stage and x.get("epoch", 0) > epoch)]
        with atomic_write(self.path) as tmp:
            tmp.write_text("".join(json.dumps(x) + "\n" for x in lines))


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_training(path, method: str, meter: EpochMeter, net, optimizer, **rest) -> None:
    """Write the checkpoint of a training, on rank 0. rest: done, model_args, plan, identity and a method's own."""
    if not meter.run.is_main:
        return
    rng = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    state = {"method": method, **rest, **meter.state_dict(), "model_state_dict": net.state_dict()}
    save_checkpoint(path, {**state, "optimizer": optimizer.state_dict(), "rng": rng})


def previous_run(path, method: str, identity: dict, resumed: bool = True) -> dict | None:
    """The checkpoint of an interrupted or finished run that this one continues; None for a new run.

    identity: {setting: value} that must be the same in both; resumed: False for --no-resume. Raises UserError for other
    settings, and for files whose training cannot be continued.
    """
    if not resumed or not Path(path).exists():
        return None
    state = load_checkpoint(path, method)
    if not {"epoch", "step", "sums", "seconds", "optimizer", "model_state_dict", "rng"} <= state.keys():
        raise UserError(
            f"{path} was written by an older version, whose training cannot be continued: choose another --out, or "
            "start again with --no-resume (eval.py --checkpoint still reads it)"
        )
    check_identity(path, state.get("identity"), identity)
    return state


def resume(state: dict | None, path, meter: EpochMeter, net, optimizer) -> None:
    """Continue where previous_run() stopped, or begin (state None); lines of the log from after it are removed."""
    if state:
        net.load_state_dict(state["model_state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        meter.load_state_dict(state)
        torch.set_rng_state(state["rng"]["torch"])
        if "cuda" in state["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng"]["cuda"])
    if meter.run.is_main:
        meter.log.drop_after(meter.stage, meter.epoch * (meter.log_steps or 1))
    if meter.epoch >= meter.epochs:
        meter.run.print(f"{meter.stage}: all steps were done before ({path})")
    elif meter.epoch or meter.step:
        meter.run.print(f"{meter.stage}: going on at {meter.position(meter.step + 1)}")


def save_checkpoint(path, state: dict) -> None:
    """state: tensors, numbers, strings, lists and dicts only, so that weights_only loading accepts it."""
    with atomic_write(path) as tmp:
        torch.save(state, tmp)


def load_checkpoint(path, method: str | None = None, kinds: tuple = (dict,)) -> dict:
    """A checkpoint as a dict, or of another type among `kinds`, on the CPU.

    Refuses files that would run code and checkpoints of another method (UserError).
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} is missing") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {path} holds objects that would run code on loading, or is damaged: refused; only tensors, "
            "numbers, strings, lists and dicts are read"
        ) from None
    except Exception as e:  # torch raises many kinds
        raise UserError(f"checkpoint {path} cannot be read ({first_line(e)}); is it a PyTorch file, whole?") from None
    if not isinstance(state, kinds):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, expected a dict of weights")
    if method and isinstance(state, dict) and "method" in state and state["method"] != method:
        raise UserError(f"checkpoint {path} belongs to the method {state['method']}, this script is {method}")
    return state


def load_weights(make_net, weights: dict, path) -> torch.nn.Module:
    """make_net() -> a network that the file's weights must fit exactly, all of them finite; else UserError."""
    try:
        net = make_net()
        net.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:
        lines = [line.strip() for line in str(e).splitlines()] or [type(e).__name__]
        raise UserError(f"checkpoint {path} does not fit the model: {' '.join(lines[:3])}") from None
    if not all(torch.isfinite(p).all() for p in net.parameters()):
        raise UserError(f"checkpoint {path} holds NaN or infinite weights")
    return net


def check_identity(path, saved: dict | None, now: dict) -> None:
    """Raises UserError where settings {name: value} `saved` in a checkpoint differ from those of this call."""
    for key, value in now.items():
        if (saved or {}).get(key) != value:
            raise UserError(
                f"{path} was trained with {key} = {(saved or {}).get(key)}, now it is {value}: choose another --out, "
                "or start again with --no-resume"
            )


def weights_hash(net: torch.nn.Module) -> str:
    """Names a network by its weights."""
    digest = hashlib.sha256()
    for name, x in sorted(net.state_dict().items()):
        digest.update(name.encode() + x.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MiB."""
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 2**20


def run_info(checkpoint, state: dict, nets, seconds: float, skipped: dict, run) -> dict:
    """What metrics.json says of every run: its checkpoint, and what it cost.

    seconds: from prepared input (cached frames, cubes or features) to raw scores on one process, summed over videos.
    """
    identity = state.get("identity", {})
    return {
        "checkpoint": str(checkpoint),
        "seed": identity.get("seed"),
        "plan": state.get("plan"),
        "training_seconds": state.get("seconds"),
        "scoring_seconds": seconds,
        "parameters": sum(p.numel() for n in nets for p in n.parameters()),
        "device": str(run.device),
        "precision": run.precision,
        "processes": run.world_size,
        "skipped_videos": skipped,
        "peak_memory_mib": round(peak_memory()),
    }
