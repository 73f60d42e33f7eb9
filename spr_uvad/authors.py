"""The authors' pickled training scores, read without running anything that a file asks for."""

import io
import pickle

import numpy as np
import torch

from common.io import UserError, first_line


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
                rebuild = np.zeros(0).__reduce__()[0]  # what pickles of arrays call
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
