"""Run a script with something of it held still, so that a test compares what it means to compare.

    python tests/tools/still.py --gradients FILE hf2vad/train.py …
        batch norms and dropout at rest, weights never changed: every step begins at the same weights. A line per step:
        norms of the parameters' gradients
    python tests/tools/still.py --kill-after "*/cvae.pt:2" hf2vad/train.py …
        killed by the system as soon as such a file is written twice

A process of torchrun sees its part of a batch only, and would normalise and drop by that.
"""

import os
import runpy
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path


def hold_still(path):
    import torch

    to_mode = torch.nn.Module.train
    torch.nn.Module.train = lambda self, mode=True: to_mode(self, False)
    first = int(os.environ.get("RANK", 0)) == 0

    def step(optimizer, *_, **__):
        norms = [
            0.0 if p.grad is None else float(p.grad.norm()) for group in optimizer.param_groups for p in group["params"]
        ]
        if first:
            with open(path, "a") as file:
                file.write(" ".join(f"{x:.8g}" for x in norms) + "\n")

    for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        optimizer.step = step


def kill_after(what):
    """what: `pattern:N`. Files are written beside their place and renamed, so the N-th renaming is the N-th time
    that one is whole."""
    pattern, _, count = what.rpartition(":")
    replace, left = os.replace, [int(count)]

    def replace_and_die(source, path):
        replace(source, path)
        left[0] -= fnmatch(str(path), pattern)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die


if __name__ == "__main__":
    actions = {"--gradients": hold_still, "--kill-after": kill_after}
    if len(sys.argv) < 4 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    what, value, *sys.argv = sys.argv[1:]
    actions[what](value)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
