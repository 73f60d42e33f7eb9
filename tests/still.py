"""Run a script with batch norms and dropout at rest, so that its losses depend on its data alone: a process of torchrun sees its part
of a batch only, and normalises and drops by that.

    torchrun --nproc-per-node 2 tests/still.py sdmae/train.py --dataset demo …
"""
import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    rest = torch.nn.Module.train
    torch.nn.Module.train = lambda self, mode=True: rest(self, False)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
