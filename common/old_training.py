"""common.training and common.distributed as the methods use them that have not moved there yet; goes with the last of them.

torch is loaded when something of theirs is first used, so that --help answers at once.
"""

import functools
import importlib

import numpy as np

from common.io import UserError
from common.late import torch

MODULES = ("common.training", "common.distributed", "common.loader")


def inference(function):
    """torch.inference_mode() around a function, without loading torch where the function is defined."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.inference_mode():
            return function(*args, **kwargs)

    return wrapped


def check_finite(value, where):
    """Stop with a way out on a NaN or infinite loss."""
    if not np.isfinite(value):
        raise UserError(
            f"the loss became {value} {where}: lower --lr, or try --precision fp32; the last checkpoint before it is kept"
        )


def make_run_class():
    from common import distributed

    class Run(distributed.Run):
        @classmethod
        def from_args(cls, args):
            return cls(args.device, args.precision)

        def close(self):
            self.__exit__()

    return Run


def __getattr__(name):
    if name == "Run":
        value = make_run_class()
    else:
        value = next((getattr(m, name) for m in map(importlib.import_module, MODULES) if hasattr(m, name)), None)
    if value is None:
        raise AttributeError(name)
    globals()[name] = value
    return value
