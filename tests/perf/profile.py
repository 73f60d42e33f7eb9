"""Where the time of a step of training or scoring goes, by PyTorch's profiler, beside the floor that the machine sets.

    python tests/perf/profile.py hf2vad/train.py --dataset demo            # any script with a network, and its flags
    python tests/perf/profile.py --steps 50 sdmae/eval.py --dataset ped2 --checkpoint sdmae.pt

The script stops after so many steps. Nothing in it knows of this: hooks of PyTorch tell when a network, a backward pass
or an optimizer begins and ends. A step of training lasts until the network is used again after the optimizer, a step of
scoring (or encoding) until torch.inference_mode() ends.
"""

import argparse
import importlib
import os
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.pop(0)  # this folder, in which this file would stand for Python's own profile.py
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own remarks, such as that there is no GPU

import torch
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common.distributed import Run
from common.io import UserError, run_script
from tests.perf.rates import bandwidth, matrix_rate, where

WARM = 3  # steps before, of which the last one is counted: its FLOPs and bytes
PARTS = {
    "outside": "waiting for data, Python",
    "tensors": "tensors outside the network",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
}


class Traffic(TorchDispatchMode):
    """Bytes that every operation reads and writes, summed."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
            self.total += sum(x.numel() * x.element_size() for x in tensors.values())
        return out


class StepProfiler:
    """Watches `steps` steps after a few that do not count, prints the table, and ends the script."""

    def __init__(self, run, steps, training):
        self.run, self.steps = run, steps
        self.training = training
        self.done, self.depth = 0, 0
        self.regions, self.ended = [], False
        self.asleep = False
        self.work = {k: [0, 0] for k in PARTS}  # FLOPs and bytes of one step
        self.counters, self.profiler = None, None
        modules.register_module_forward_pre_hook(lambda *_: self.enter())
        modules.register_module_forward_hook(lambda *_: self.leave(), always_call=True)
        optimizers.register_optimizer_step_pre_hook(lambda *_: self.begin("optimizer"))
        optimizers.register_optimizer_step_post_hook(lambda *_: self.optimized())
        self.wrap(torch.Tensor, "backward", before=lambda: self.begin("backward"), after=self.end)
        if not training:
            self.inside = 0
            self.wrap(torch.inference_mode, "__enter__", before=lambda: setattr(self, "inside", self.inside + 1))
            self.wrap(torch.inference_mode, "__exit__", after=self.scored)

    @property
    def left(self):
        return WARM + self.steps - self.done

    @staticmethod
    def wrap(owner, name, before=lambda: None, after=lambda: None):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before()
            out = original(*args, **kwargs)
            after()
            return out

        setattr(owner, name, wrapped)

    # ------------------------------------------------------------------------------------------------ parts of a step

    def count(self, part):
        """What was computed since the last call belongs to `part`."""
        if self.counters:
            flops, traffic = self.counters[0].get_total_flops(), self.counters[1].total
            self.work[part][0] += flops - self.seen[0]
            self.work[part][1] += traffic - self.seen[1]
            self.seen = flops, traffic

    def begin(self, part):
        if self.asleep:
            return
        self.count("tensors")
        region = record_function(f"vad::{part}")
        region.__enter__()
        self.regions.append((part, region))

    def end(self):
        if self.asleep:
            return
        part, region = self.regions.pop()
        region.__exit__(None, None, None)
        self.count(part)

    def enter(self):
        """Of modules the outermost alone is the network; those that run inside a backward pass belong to that."""
        if self.asleep:
            return
        if self.ended:  # not in the optimizer's hook, which PyTorch's own mark of its step encloses
            self.ended = False
            self.step()
        self.depth += 1
        if self.depth == 1 and not self.regions:
            self.begin("forward")

    def leave(self):
        if self.asleep:
            return
        self.depth -= 1
        if self.depth == 0 and self.regions and self.regions[-1][0] == "forward":
            self.end()

    def optimized(self):
        self.end()
        self.ended = self.training and not self.asleep

    def scored(self):
        self.inside -= 1
        if self.inside == 0 and not self.asleep:
            self.step()

    # ----------------------------------------------------------------------------------------------------------- steps

    def step(self):
        """A step has ended."""
        self.done += 1
        if self.done == WARM - 1:
            self.counters, self.seen = (FlopCounterMode(display=False), Traffic()), (0, 0)
            torch.backends.mha.set_fastpath_enabled(False)  # one operation that the modes cannot look into
            for mode in self.counters:
                mode.__enter__()
        elif self.done == WARM:
            self.count("tensors")
            for mode in reversed(self.counters):
                mode.__exit__(None, None, None)
            self.counters = None
            torch.backends.mha.set_fastpath_enabled(True)
            cuda = [ProfilerActivity.CUDA] if self.run.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self.profiler.__enter__()
            self.mark()
        elif self.done > WARM:
            if self.run.device.type == "cuda":
                torch.cuda.synchronize()
            self.marker.__exit__(None, None, None)
            if self.left:
                return self.mark()
            self.profiler.__exit__(None, None, None)
            if self.run.is_main:
                print(self.table(), flush=True)
            sys.exit(0)

    def mark(self):
        self.marker = record_function("vad::step")
        self.marker.__enter__()

    def table(self):
        events = self.profiler.events()
        steps = [e for e in events if e.name == "vad::step" and e.cpu_children is not None]
        cuda = self.run.device.type == "cuda"
        time = dict.fromkeys(PARTS, 0.0)  # ms a step
        device = dict.fromkeys(PARTS, 0.0)
        for step in steps:
            time["outside"] += step.cpu_time_total
            for e in step.cpu_children:
                part = (
                    "optimizer"
                    if e.name.startswith("Optimizer.")
                    else e.name.removeprefix("vad::")
                    if e.name.startswith("vad::")
                    else "tensors"
                )
                time[part] += e.cpu_time_total
                time["outside"] -= e.cpu_time_total
                device[part] += e.device_time_total
        time, device = ({k: v / 1000 / len(steps) for k, v in x.items()} for x in (time, device))
        rate, speed = matrix_rate(self.run.device, bf16=self.run.precision == "bf16"), bandwidth(self.run.device)
        # networks are bound by arithmetic at best, everything else by memory
        floor = {
            k: 1000 * (self.work[k][0] / rate if k in ("forward", "backward") else self.work[k][1] / speed)
            for k in PARTS
        }
        what = {
            k: (f"{self.work[k][0] / 1e9:.1f} GFLOP; " if k in ("forward", "backward") else "")
            + f"{self.work[k][1] / 2**20:.1f} MiB moved"
            for k in PARTS
        }
        whole = sum(time.values())
        lines = [
            f"one step of {'training' if self.training else 'scoring'}, mean of {len(steps)}, on {where(self.run)}; "
            f"floor: FLOPs at {rate / 1e9:.0f} GFLOP/s (a matrix product), bytes at {speed / 1e9:.1f} GB/s (a copy)",
            "",
            f"| part | ms | share |{' ms on the GPU |' if cuda else ''} floor, ms | |",
            f"|---|---|---|{'---|' if cuda else ''}---|---|",
        ]
        for k, name in PARTS.items():
            if k in ("backward", "optimizer") and not self.training:
                continue
            known = k != "outside"
            lines.append(
                f"| {name} | {time[k]:.1f} | {100 * time[k] / whole:.1f} % |{f' {device[k]:.1f} |' if cuda else ''} "
                f"{f'{floor[k]:.1f}' if known else '0'} | {what[k] if known else ''} |"
            )
        lines.append(
            f"| **whole step** | {whole:.1f} | |{f' {sum(device.values()):.1f} |' if cuda else ''} "
            f"{sum(floor.values()):.1f} | {100 * sum(floor.values()) / whole:.0f} % of the time |"
        )
        own = {}
        for e in events:
            if not e.name.startswith(("vad::", "Profiler", "Optimizer.")):
                own[e.name] = own.get(e.name, 0.0) + (e.self_device_time_total if cuda else e.self_cpu_time_total)
        most = sorted(own.items(), key=lambda x: -x[1])[:6]
        total = sum(own.values()) or 1.0
        lines += [
            "",
            "operators by their own time: "
            + ", ".join(f"{k.removeprefix('aten::')} {100 * v / total:.0f} %" for k, v in most),
        ]
        return "\n".join(["", *lines])

    @contextmanager
    def sleeping(self):
        """What is done in here does not count."""
        self.asleep = True
        try:
            yield
        finally:
            self.asleep = False


def watched(steps, training):
    """Make the Run of every script a profiled one."""
    start, end = Run.__init__, Run.__exit__

    def init(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.profiler = StepProfiler(self, steps, training)

    def leave(self, *details):
        profiler = getattr(self, "profiler", None)
        if profiler and profiler.left and not any(details):
            self.print(f"the run ended {profiler.left} steps too early for a table; give fewer --steps, or more to do")
        end(self, *details)

    Run.__init__, Run.__exit__ = init, leave


def without_stand_in():
    """Leave out the training of scene_aware_ae's stand-in encoder."""
    stand_in = importlib.import_module("scene_aware_ae.stand_in")
    plain = stand_in.StandIn.train

    def train(self, *args, **kwargs):
        with self.run.profiler.sleeping():
            return plain(self, *args, **kwargs)

    stand_in.StandIn.train = train


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="how many are measured (default: %(default)s)")
    parser.add_argument("script", type=Path)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="those of the script")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be at least 1")
    if not args.script.is_file():
        raise UserError(f"{args.script} does not exist: name a script such as hf2vad/train.py")
    watched(args.steps, training=args.script.stem in ("train", "pretrain"))
    if args.script.resolve().parent.name == "scene_aware_ae":
        without_stand_in()
    sys.argv = [str(args.script), *args.flags]
    runpy.run_path(str(args.script), run_name="__main__")


if __name__ == "__main__":
    run_script(main)
