"""Where a script runs: device, precision, and its rank among torchrun's processes."""

import os
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from common.io import UserError, first_line, lock_dir, writable_folder

PIECE = 2**26  # bytes copied to a device at a time


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _Losses(torch.nn.Module):
    """losses(net, …) as one module: DistributedDataParallel sees all of it, whatever parts of the network it calls."""

    def __init__(self, losses: Callable, net: torch.nn.Module):
        super().__init__()
        self.losses, self.net = losses, net

    def forward(self, *args):
        return self.losses(self.net, *args)


class Run:
    """Device, precision and rank of this process. device: auto, cpu, cuda or cuda:N; precision: auto, fp32 or bf16.

    Raises UserError where the device cannot be used.
    """

    def __init__(self, device: str = "auto", precision: str = "auto"):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            if self.device.type == "cuda" and self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if self.device.type not in ("cpu", "cuda"):
                raise RuntimeError("only cpu and cuda are supported")
            torch.ones(1, device=self.device)  # runs a kernel, which torch may not have for an old GPU
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {device} cannot be used here ({first_line(e)}); try --device cpu") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = ("bf16" if bf16 else "fp32") if precision == "auto" else precision
        if self.world_size > 1 and not torch.distributed.is_initialized():
            # one rank may prepare for hours while the others wait; torchrun itself notices a rank that died
            gpu = self.device if self.device.type == "cuda" else None
            torch.distributed.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=7), device_id=gpu)
        self._parallel = None  # the last (network and trained parameters, module) of data_parallel()

    def __enter__(self):
        # Adam's moments of units without gradients decay to denormal numbers, which slow a CPU down many times
        torch.set_flush_denormal(True)
        return self

    def __exit__(self, error, *_):
        torch.set_flush_denormal(False)
        # after an error the other ranks may wait in a collective, and would never come to this
        if error is None and self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def pin(self, array: np.ndarray) -> torch.Tensor:
        """In pinned memory where the device is a GPU, so that it copies while it computes; slow, for a reading
        thread."""
        x = torch.from_numpy(array)
        return x.pin_memory() if self.device.type == "cuda" else x

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return self.pin(array).to(self.device, non_blocking=True)

    def copy_to_host(self, x: torch.Tensor) -> Callable[[], np.ndarray]:
        """Begin to copy a tensor of the device. -> function that waits for the copy, and returns it."""
        if self.device.type != "cuda":
            return x.numpy
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        copied = torch.cuda.current_stream(self.device).record_event()
        return lambda: (copied.synchronize(), copy.numpy())[1]

    def fits_device(self, size: int, cpu_limit: int = 0) -> bool:
        """Whether `size` bytes may stay on the device: a third of a GPU's free memory, `cpu_limit` bytes on a CPU."""
        if self.device.type != "cuda":
            return size < cpu_limit
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return 3 * size < (torch.cuda.mem_get_info(self.device)[0] + unused)

    def keep_on_device(self, parts: Iterable[np.ndarray], count: int) -> torch.Tensor:
        """Arrays [n_i, …] of `count` rows in all, one after another as one tensor on the device. They are copied in
        pieces, as pinned memory would be rounded up to a power of two and kept."""
        out, done = None, 0
        for x in parts:
            rows = max(1, PIECE // max(1, x[:1].nbytes))
            for i in range(0, len(x), rows):
                piece = torch.from_numpy(np.array(x[i : i + rows]))
                if out is None:
                    out = torch.empty((count, *piece.shape[1:]), dtype=piece.dtype, device=self.device)
                out[done : done + len(piece)] = piece
                done += len(piece)
        return out

    @cached_property
    def copy_stream(self) -> torch.cuda.Stream:
        """The stream on which batches are copied to a GPU; torch keeps freed memory for each stream."""
        return torch.cuda.Stream(self.device)

    def print(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def open_output_dir(self, folder) -> Path:
        """Create the folder of this run; no other run may write into it meanwhile."""
        folder = writable_folder(folder)
        return lock_dir(folder) if self.is_main else folder

    @contextmanager
    def main_first(self):
        """Run the block on rank 0 first, then on the other ranks."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    # ---- training: every rank computes the loss of its part of each batch

    def batch_slice(self, n: int) -> tuple[slice, float]:
        """-> (slice of a batch of n for this rank, weight).

        Averaging weight · (mean loss of the slice) over the ranks gives the mean over the batch. A batch with fewer
        rows than ranks is computed whole by every rank.
        """
        if n < self.world_size:
            return slice(None), 1.0
        part = slice(self.rank, None, self.world_size)
        return part, len(range(n)[part]) * self.world_size / n

    def all_gather_batch(self, x: torch.Tensor, n: int, dim: int = 0) -> torch.Tensor:
        """All-gather a batch of n rows from all ranks, in the batch's order. x [n_i, …], or with the batch at `dim`.

        For losses that need the whole batch. Only this rank's rows carry a gradient; it is multiplied by world_size
        because data_parallel() takes the mean over the ranks.
        """
        if self.world_size == 1 or n < self.world_size:
            return x
        x = x.movedim(dim, 0)
        part = self.batch_slice(n)[0]
        batch = torch.zeros(n, *x.shape[1:], dtype=x.dtype, device=x.device)
        batch[part] = x.detach()
        torch.distributed.all_reduce(batch)
        if x.requires_grad:
            batch[part] = x + (self.world_size - 1) * (x - x.detach())
        return batch.movedim(0, dim)

    def data_parallel(self, losses: Callable, net: torch.nn.Module) -> Callable:
        """losses(net, …) as a function of its other arguments. The backward pass of what it returns leaves in every
        rank the mean of all ranks' gradients, which are sent while it still runs. Parameters that the losses do not
        need must not require a gradient."""
        if self.world_size == 1:
            return partial(losses, net)
        trained = [id(p) for p in net.parameters() if p.requires_grad]
        if self._parallel is None or self._parallel[0] != (id(net), trained):
            self._parallel = None  # its gradient hooks go first
            module = torch.nn.parallel.DistributedDataParallel(
                _Losses(losses, net), broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self._parallel = (id(net), trained), module
        return self._parallel[1]

    def sync(self, *tensors: torch.Tensor) -> None:
        """Rank 0's values of these tensors, in place, on every rank."""
        if self.world_size > 1:
            for x in tensors:
                torch.distributed.broadcast(x, 0)

    # ---- collectives of plain values

    def all_gather_object(self, value) -> list:
        """Every rank's value, in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def all_gather_array(self, array: np.ndarray) -> np.ndarray:
        """Concatenate every rank's array [n_i, …] in rank order, on every rank."""
        return array if self.world_size == 1 else np.concatenate(self.all_gather_object(array))

    def contiguous_share(self, n: int) -> range:
        """This rank's contiguous part of range(n)."""
        return range(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)
