"""What the training of FRD-UVAD reads: windows of consecutive clips, and the bank of those that look abnormal."""

import numpy as np

from common.io import UserError
from common.late import torch
from common.loader import prefetch


class Windows:
    """Windows of consecutive clips, all of one video: get(starts) -> float32 [n, crops, T, width] on the device.

    A window that reaches past its video's end repeats the last clip. Features lie on the device where they fit; else they are
    read from the memory maps with the next batch in flight.
    """

    def __init__(self, videos, length, r):
        self.videos, self.length, self.device = videos, length, r.device
        counts = np.array([len(v) for v in videos])
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.last = np.repeat(self.starts[1:] - 1, counts)
        self.waited, self.whole = 0.0, None
        crops, width = videos[0].shape
        limit = 0.5 * torch.cuda.mem_get_info(r.device)[0] if r.device.type == "cuda" else 2**30
        if len(self) * crops * width * videos[0].parts[0].itemsize < limit:
            self.whole = torch.from_numpy(self.read(np.arange(len(self)))).to(r.device)
            self.check(self.whole, np.arange(len(self)))

    def __len__(self):
        return int(self.starts[-1])

    def rows(self, first):
        return np.minimum(np.asarray(first)[:, None] + np.arange(self.length), self.last[first][:, None])

    def read(self, rows):
        """Clips from the files: rows int [n], ascending -> [n, crops, width]."""
        which = np.searchsorted(self.starts, rows, side="right") - 1
        return np.concatenate([self.videos[v].clips(rows[which == v] - self.starts[v]) for v in np.unique(which)])

    def check(self, features, rows):
        bad = ~torch.isfinite(features).flatten(1).all(1)
        if bad.any():
            row = int(np.asarray(rows).reshape(-1)[int(bad.nonzero()[0])])
            v = int(np.searchsorted(self.starts, row, side="right")) - 1
            raise UserError(
                f"features of video {self.videos[v].name} ({self.videos[v].path}) hold NaN or infinite numbers in clip "
                f"{row - self.starts[v]}: encode it again, or take it away"
            )

    def get(self, first):
        rows = self.rows(first)
        if self.whole is not None:
            x = self.whole[torch.from_numpy(rows).to(self.device)]
        else:
            needed, places = np.unique(rows, return_inverse=True)
            flat = torch.from_numpy(self.read(needed))
            self.check(flat, needed)
            x = flat[torch.from_numpy(places.reshape(rows.shape))].to(self.device, non_blocking=True)
        return x.transpose(1, 2).float()

    def iterate(self, parts):
        for first, batch, waited in prefetch(parts, self.get):
            self.waited += waited
            yield first, batch


class Bank:
    """The latent anomaly bank: windows that look abnormal, at most `size` of them, on the device; and the clips they begin with."""

    def __init__(self, size):
        self.size, self.windows, self.first = size, None, np.zeros(0, np.int64)

    def add(self, windows, first, rng):
        """windows [n, crops, T, width], first int [n]. Above the size a random subset stays."""
        if not len(windows):
            return
        joined = windows if self.windows is None else torch.cat([self.windows, windows])
        first = np.concatenate([self.first, first])
        if len(joined) > self.size:
            keep = np.sort(rng.permutation(len(joined))[: self.size])
            joined, first = joined[torch.from_numpy(keep).to(joined.device)], first[keep]
        self.windows, self.first = joined, first
