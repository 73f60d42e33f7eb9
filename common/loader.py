"""Rows of memory maps -> batches on the device: seeded order, one batch read ahead, this rank's part of each."""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from common.io import UserError


def copy_rows(array: np.ndarray, rows, out: np.ndarray, places, field: str | None = None, part=slice(None)) -> None:
    """out[places] = array[rows], or array[field][rows][:, part].

    Rows of a memory map are read from its file: mapped pages would count as memory of this process.
    """
    start = 0
    if field is not None:
        sub, start = array.dtype.fields[field]
        start += part.indices(sub.shape[0])[0] * (sub.itemsize // sub.shape[0])
    # rows lie one after another
    contiguous = array.flags.c_contiguous and (field is not None or array.shape[1:] == out.shape[1:])
    if not isinstance(array.base, mmap.mmap) or not hasattr(os, "preadv") or not contiguous:
        out[places] = array[rows] if field is None else array[field][rows][:, part]
        return
    file = os.open(array.filename, os.O_RDONLY)
    try:
        for place, row in zip(places.tolist(), rows.tolist()):
            if os.preadv(file, [out[place]], array.offset + row * array.strides[0] + start) != out[place].nbytes:
                raise UserError(
                    f"{array.filename} is shorter than its header says: delete it and run the command again"
                )
    finally:
        os.close(file)


def take_rows(
    arrays: list, starts, rows, shape: tuple, dtype, field: str | None = None, part=slice(None)
) -> np.ndarray:
    """Rows int [n] of arrays laid end to end, array i starting at row starts[i] -> [n, *shape]; see copy_rows."""
    out, rows = np.empty((len(rows), *shape), dtype), np.asarray(rows)
    which = np.searchsorted(starts, rows, side="right") - 1
    for i in np.unique(which):
        places = np.flatnonzero(which == i)
        copy_rows(arrays[i], rows[places] - starts[i], out, places, field, part)
    return out


def prefetch(items: list, read: Callable, start: Callable | None = None) -> Iterator[tuple]:
    """Yield (item, read(item), seconds waited for it); a thread, which calls start() first, reads the next one."""
    with ThreadPoolExecutor(1, initializer=start) as pool:
        ahead = pool.submit(read, items[0]) if items else None
        for i, item in enumerate(items):
            before = time.perf_counter()
            result = ahead.result()
            waited = time.perf_counter() - before
            if i + 1 < len(items):
                ahead = pool.submit(read, items[i + 1])
            yield item, result, waited


def tensors_ahead(dataset, parts: list, run) -> Iterator[tuple]:
    """Yield (rows int [n], the dataset's tensors of them on the device or None, seconds waited) for every part.

    On a GPU the reading thread also copies the next batch, on a stream of its own, while this one is computed. On a CPU
    the main thread puts tensors together: torch's thread pools would compete.
    """
    if run.device.type != "cuda":
        for rows, arrays, waited in prefetch(parts, dataset.read):
            yield rows, dataset.to_device(arrays), waited
        return
    import torch

    copies, current = run.copy_stream, torch.cuda.current_stream(run.device)
    copies.wait_stream(current)  # data that stay on the device were written there

    def load(rows):
        with torch.cuda.stream(copies):
            data = dataset.to_device(dataset.read(rows))
            return data, copies.record_event()

    for rows, (data, copied), waited in prefetch(parts, load, lambda: torch.cuda.set_device(run.device)):
        current.wait_event(copied)
        tensors = data.values() if isinstance(data, dict) else data if isinstance(data, tuple) else (data,)
        for x in tensors:
            if x is not None:
                x.record_stream(current)  # keeps its memory until this stream has read it
        yield rows, data, waited


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n samples for one epoch, the same however often the run was interrupted. int64 [n]."""
    return np.random.default_rng([seed, epoch]).permutation(n)


@dataclass
class Batch:
    """What one step trains on. rows and rng are the same on every rank, so that random draws do not depend on ranks."""

    rows: np.ndarray  # int [n]: samples of the whole batch
    part: slice  # those of this rank
    data: object  # their tensors, on the device
    rng: np.random.Generator  # seeded by epoch and step

    def __len__(self):
        return len(self.rows)


class Loader:
    """Batches of one epoch after another.

    dataset: read(rows) -> arrays, called in a thread one batch ahead; to_device(arrays) -> a tensor, or a tuple or dict
    of them; see tensors_ahead(). order(epoch) -> int [samples]: the samples of an epoch in their order, by default a
    permutation of all.
    `waited` sums the seconds that training waited for data.
    """

    def __init__(self, dataset, batch_size, seed, run, order=None):
        self.dataset, self.batch_size = dataset, batch_size
        self.seed, self.run = seed, run
        self.order = order or (lambda epoch: epoch_order(len(dataset), seed, epoch))
        self.samples = len(self.order(0))
        self.waited = 0.0

    def steps(self, epoch: int) -> int:
        return -(-self.samples // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield a Batch for every step of an epoch from number `start` on; a thread reads the next one."""
        order, size = self.order(epoch), self.batch_size
        batches = [order[i : i + size] for i in range(start * size, len(order), size)]
        rngs = [np.random.default_rng([self.seed, epoch, start + i, 0]) for i in range(len(batches))]
        parts = [self.run.batch_slice(len(rows))[0] for rows in batches]
        rank_rows = [rows[part] for rows, part in zip(batches, parts)]
        for i, (_, data, waited) in enumerate(tensors_ahead(self.dataset, rank_rows, self.run)):
            self.waited += waited
            yield Batch(batches[i], parts[i], data, rngs[i])
