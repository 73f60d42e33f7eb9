"""Records of space-time cubes -> tensors: the dataset that common.loader.Loader and scoring read."""

from collections.abc import Iterator

import numpy as np
import torch

from common.loader import take_rows, tensors_ahead


class CubeDataset:
    """Fields of the record files of many videos as one dataset; in device memory where it fits.

    records: structured arrays [n_i] (memory maps); fields: {name: slice over the field's first axis}; once: rows are
    used once, so they do not stay in device memory. Tensors keep the stored type (uint8, float16): converting, scaling
    and expanding channels happen on the device.
    """

    def __init__(self, records: list[np.ndarray], fields: dict[str, slice], run, *, once: bool = False):
        self.records = [r for r in records if len(r)]
        self.fields, self.run = fields, run
        self.starts = np.cumsum([0] + [len(r) for r in self.records])
        is_resident = run.device.type == "cuda" and not once and run.fits_device(self.nbytes())
        self.resident = self.load_all() if is_resident else None

    def __len__(self):
        return int(self.starts[-1])

    def nbytes(self) -> int:
        return sum(r[k][:, part].nbytes for r in self.records for k, part in self.fields.items())

    def load_all(self) -> dict[str, torch.Tensor]:
        return {
            k: self.run.keep_on_device((r[k][:, part] for r in self.records), len(self))
            for k, part in self.fields.items()
        }

    def read(self, rows: np.ndarray) -> dict | torch.Tensor:
        """{name: pinned tensor [len(rows), …]} from the files; the rows where the fields are in device memory."""
        if self.resident is not None:
            return self.run.pin(np.ascontiguousarray(rows))
        arrays = {}
        for k, part in self.fields.items():
            first = self.records[0][k][:1, part]
            arrays[k] = self.run.pin(take_rows(self.records, self.starts, rows, first.shape[1:], first.dtype, k, part))
        return arrays

    def to_device(self, arrays) -> dict[str, torch.Tensor]:
        """What read() returned -> {name: tensor [n, …]}."""
        if self.resident is not None:
            index = arrays.to(self.run.device, non_blocking=True)
            return {k: x[index] for k, x in self.resident.items()}
        return {k: x.to(self.run.device, non_blocking=True) for k, x in arrays.items()}

    def batches(self, rows: np.ndarray, batch_size: int) -> Iterator[tuple]:
        """Yield (rows, {name: tensor}) over `rows` in order; a thread reads the next batch."""
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        for part, batch, _ in tensors_ahead(self, parts, self.run):
            yield part, batch
