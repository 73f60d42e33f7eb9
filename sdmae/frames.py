"""From cached frames to the network's input: neighbours, gradients and scaling happen on the device, in batches."""

import numpy as np

from common.batches import read_ahead, take_rows
from common.late import torch

SEEN = (-3, 0, 3)  # frames around t that the network sees
STEPS = (-3, -1, 0, 1, 3)  # and those that a training sample needs: its gradient is that of -1 and 1
NOISE_ROWS = 256  # frames that share one mask are this far apart


class Frames:
    """The frames of several videos of one size as one indexable set; in device memory where they all fit.

    arrays: uint8 [T_i, H, W, C] memory maps (C = 1 grey or 3 BGR); steps: the frames around t that a sample holds. `waited` sums
    the seconds that iterate()'s consumer waited.
    """

    def __init__(self, arrays, device="cpu", steps=SEEN):
        self.arrays, self.device, self.waited, self.resident = arrays, torch.device(device), 0.0, None
        self.steps = np.array(steps)
        lengths = [len(a) for a in arrays]
        self.starts = np.cumsum([0, *lengths])
        self.number = np.concatenate([np.arange(n) for n in lengths])  # of each frame in its video
        self.last = np.repeat(np.array(lengths, np.int64) - 1, lengths)
        self.channels = max(a.shape[3] for a in arrays)
        self.size = arrays[0].shape[1:3]
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if len(self) * self.channels * self.size[0] * self.size[1] < 0.5 * free:
                self.resident = torch.cat([self._colours(self._tensor(np.ascontiguousarray(a))) for a in arrays])

    def __len__(self):
        return int(self.starts[-1])

    def _tensor(self, array):
        x = torch.from_numpy(array)
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    def _colours(self, x):
        """[n, H, W, C] with grey repeated where other videos have colours."""
        return x.expand(*x.shape[:3], self.channels)

    def around(self, rows):
        """Rows of the frames at the steps around each row, itself where the video has none. int64 [n, steps]."""
        number = self.number[rows][:, None] + self.steps
        there = (number >= 0) & (number <= self.last[rows][:, None])
        return np.asarray(rows)[:, None] + np.where(there, self.steps, 0)

    def get(self, rows):
        """The frames of samples: uint8 [n, steps, C, H, W] on the device."""
        return self._samples(self._read(rows))

    def _read(self, rows):
        """-> the frames that the samples need, each once, and the places [n, steps] where they go; from disk, unless they are resident."""
        rows = self.around(rows)
        if self.resident is not None:
            return self.resident, rows
        needed, places = np.unique(rows, return_inverse=True)
        return take_rows(self.arrays, self.starts, needed, (*self.size, self.channels), np.uint8), places.reshape(
            rows.shape
        )

    def _samples(self, read):
        frames, places = read
        frames = frames if self.resident is not None else self._tensor(frames)
        return frames[torch.as_tensor(places, device=self.device)].permute(0, 1, 4, 2, 3)

    def iterate(self, parts):
        """Yield (rows, frames [n, steps, C, H, W]) for each of `parts`, arrays of rows.

        The next part is read meanwhile; put together it is here, as a second thread of torch's would stand in the way of the first.
        """
        for rows, read, waited in read_ahead(parts, self._read):
            self.waited += waited
            yield rows, self._samples(read)


def scale(x):
    """0..255 -> -1..1"""
    return (
        x.to(torch.float32, copy=True).sub_(127.5).div_(127.5)
    )  # in place: fresh memory costs more than the arithmetic


def colours(x):
    """Grey repeated to three channels. [n, C, H, W] -> [n, 3, H, W]."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def image_of(seen):
    """Frames t-3, t, t+3, [n, 3, C, H, W] in 0..255 -> the network's input, float32 [n, 9, H, W] in [-1, 1]."""
    return scale(torch.cat([colours(seen[:, i]) for i in range(3)], dim=1))


def gradient_of(five):
    """|frame(t-1) - frame(t+1)|, float32 [n, 3, H, W] in 0..255."""
    return colours(five[:, 1].float().sub_(five[:, 3]).abs_())


def target_of(frame, mask):
    """Clean frame t [n, C, H, W] and anomaly map [n, 1, H, W], both in 0..255 -> float32 [n, 4, H, W] in [-1, 1]."""
    return torch.cat([scale(colours(frame)), scale(mask)], dim=1)


def noise_table(tokens, seed=0, draw=0):
    """Masking noise of evaluation, float32 [NOISE_ROWS, tokens] in [0, 1): frame number t takes row t % NOISE_ROWS.

    So a frame is masked alike in any batch, order or run. Draws come in pairs: at a mask ratio of a half the second one removes what the
    first one kept, so that every token is judged by its surroundings once.
    """
    if draw % 2:
        return 1 - noise_table(tokens, seed, draw - 1)
    generator = torch.Generator().manual_seed(seed * 1000 + draw)
    return torch.rand(NOISE_ROWS, tokens, generator=generator)
