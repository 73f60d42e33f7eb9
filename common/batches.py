"""Batches of cube records: rows gathered from memory maps, or from device memory where they all fit."""

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common.io import UserError
from common.late import torch


def copy_rows(array, rows, out, places, field=None, part=slice(None)):
    """out[places] = array[rows], or array[field][rows][:, part].

    Rows of a memory map are read from its file: mapped pages would count as this process's memory, up to the whole file.
    """
    start = 0
    if field is not None:
        sub, start = array.dtype.fields[field]
        start += part.indices(sub.shape[0])[0] * (sub.itemsize // sub.shape[0])
    whole = array.flags.c_contiguous and (
        field is not None or array.shape[1:] == out.shape[1:]
    )  # rows lie one after another
    if not isinstance(array.base, mmap.mmap) or not hasattr(os, "preadv") or not whole:
        out[places] = array[rows] if field is None else array[field][rows][:, part]
        return
    file = os.open(array.filename, os.O_RDONLY)
    try:
        for place, row in zip(places.tolist(), rows.tolist()):
            if os.preadv(file, [out[place]], array.offset + row * array.strides[0] + start) != out[place].nbytes:
                raise UserError(
                    f"{array.filename} is shorter than its header says: delete it, and run the same command again"
                )
    finally:
        os.close(file)


def take_rows(arrays, starts, rows, shape, dtype, field=None, part=slice(None)):
    """Rows int [n] of arrays laid end to end, array i from starts[i] on -> [n, *shape]; see copy_rows."""
    out, rows = np.empty((len(rows), *shape), dtype), np.asarray(rows)
    which = np.searchsorted(starts, rows, side="right") - 1
    for i in np.unique(which):
        places = np.flatnonzero(which == i)
        copy_rows(arrays[i], rows[places] - starts[i], out, places, field, part)
    return out


def read_ahead(parts, get):
    """Yield (part, get(part), seconds waited for it); the next one is read in a thread while one is used."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(get, parts[0]) if parts else None
        for i, part in enumerate(parts):
            before = time.perf_counter()
            batch = ahead.result()
            waited = time.perf_counter() - before
            if i + 1 < len(parts):
                ahead = pool.submit(get, parts[i + 1])
            yield part, batch, waited


def own_part(n, rank, world):
    """A process's part of a batch of n rows: a slice; all of them where there are fewer rows than processes."""
    return slice(rank, None, world) if n >= world else slice(None)


def parts_of(order, size, start=0, rank=0, world=1):
    """Batches of `size` rows, from number `start` on, as far as they are this process's."""
    parts = [order[i : i + size] for i in range(start * size, len(order), size)]
    return [p[own_part(len(p), rank, world)] for p in parts]


class Batches:
    """Fields of many record files as one indexable set.

    records: list of structured arrays [n_i] (memory maps); fields: {name: slice over the field's first axis}.
    get(rows) -> {name: tensor [len(rows), …]} on `device`, in the stored type (uint8, float16): converting, scaling and
    expanding channels happen there. `waited` sums the seconds that the consumer of iterate() waited for data. once: the rows are used
    once, so that device memory is no place for all of them.
    """

    def __init__(self, records, fields, device="cpu", once=False):
        self.records = [r for r in records if len(r)]
        self.fields = fields
        self.device = torch.device(device)
        self.starts = np.cumsum([0] + [len(r) for r in self.records])
        self.waited = 0.0
        self.resident = None
        if self.device.type == "cuda" and not once:
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.bytes() < 0.5 * free:
                self.resident = {
                    k: torch.cat(
                        [torch.from_numpy(np.ascontiguousarray(r[k][:, s])).to(self.device) for r in self.records]
                    )
                    for k, s in fields.items()
                }

    def __len__(self):
        return int(self.starts[-1])

    def bytes(self):
        if not self.records:
            return 0
        r = self.records[0]
        return len(self) * sum(r[k][:1, s].nbytes for k, s in self.fields.items())

    def rows(self, rows):
        """{name: array [len(rows), …]} copied from the memory maps; rows int [n]."""
        first = {k: self.records[0][k][:1, s] for k, s in self.fields.items()}
        return {
            k: take_rows(self.records, self.starts, rows, first[k].shape[1:], first[k].dtype, k, s)
            for k, s in self.fields.items()
        }

    def get(self, rows):
        if self.resident is not None:
            index = torch.as_tensor(np.asarray(rows), device=self.device)
            return {k: v[index] for k, v in self.resident.items()}
        tensors = {k: torch.from_numpy(a) for k, a in self.rows(rows).items()}
        if self.device.type == "cuda":
            return {k: t.pin_memory().to(self.device, non_blocking=True) for k, t in tensors.items()}
        return tensors

    def iterate(self, order, batch_size, start=0):
        """Yield (rows, batch) over `order`, from batch number `start`; the next batch is read while one is used."""
        parts = [order[i : i + batch_size] for i in range(start * batch_size, len(order), batch_size)]
        if self.resident is not None:
            for rows in parts:
                yield rows, self.get(rows)
            return
        for rows, batch, waited in read_ahead(parts, self.get):
            self.waited += waited
            yield rows, batch
