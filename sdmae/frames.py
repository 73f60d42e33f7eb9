"""From cached frames to the network's input: neighbours, gradients and scaling happen on the device, in batches."""
import numpy as np
import torch

from common.batches import copy_rows, read_ahead

STEPS = (-3, -1, 0, 1, 3)      # frames around t that one sample needs: the image shows -3, 0, 3, its gradient -1, 1
NOISE_ROWS = 256               # frames that share one mask are this far apart


class Frames:
    """The frames of several videos of one size as one indexable set; in device memory where they all fit.

    arrays: uint8 [T_i, H, W, C] memory maps (C = 1 grey or 3 BGR). `waited` sums the seconds that iterate()'s consumer waited.
    """

    def __init__(self, arrays, device="cpu"):
        self.arrays, self.device, self.waited, self.resident = arrays, torch.device(device), 0.0, None
        lengths = [len(a) for a in arrays]
        self.starts = np.cumsum([0, *lengths])
        self.number = np.concatenate([np.arange(n) for n in lengths])              # of each frame in its video
        self.last = np.repeat(np.array(lengths, np.int64) - 1, lengths)
        self.channels = max(a.shape[3] for a in arrays)
        self.size = arrays[0].shape[1:3]
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if len(self) * self.channels * self.size[0] * self.size[1] < 0.5 * free:
                self.resident = torch.cat([self._tensor(np.ascontiguousarray(a)) for a in arrays])

    def __len__(self):
        return int(self.starts[-1])

    def _tensor(self, array):
        """[n, H, W, C] -> [n, C, H, W] on the device, grey repeated where other videos have colours."""
        x = torch.from_numpy(array)
        if self.device.type == "cuda":
            x = x.pin_memory().to(self.device, non_blocking=True)
        return x.permute(0, 3, 1, 2).expand(-1, self.channels, -1, -1)

    def rows_of(self, videos):
        """Rows of the frames of the videos with these numbers. int64 [n]."""
        return np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in videos])

    def around(self, rows):
        """Rows of the frames at STEPS around each row, itself where the video has none. int64 [n, 5]."""
        steps = np.array(STEPS)
        number = self.number[rows][:, None] + steps
        there = (number >= 0) & (number <= self.last[rows][:, None])
        return np.asarray(rows)[:, None] + np.where(there, steps, 0)

    def get(self, rows):
        """Five frames per row: uint8 [n, 5, C, H, W] on the device. A frame that several rows need is read once."""
        rows = self.around(rows)
        if self.resident is not None:
            return self.resident[torch.as_tensor(rows, device=self.device)]
        needed, places = np.unique(rows, return_inverse=True)
        out = np.empty((len(needed), *self.size, self.channels), np.uint8)
        which = np.searchsorted(self.starts, needed, side="right") - 1
        for v in np.unique(which):
            at, a = np.flatnonzero(which == v), self.arrays[v]
            if a.shape[3] == self.channels:
                copy_rows(a, needed[at] - self.starts[v], out, at)
            else:
                out[at] = a[needed[at] - self.starts[v]]
        return self._tensor(out)[torch.as_tensor(places.reshape(rows.shape), device=self.device)]

    def iterate(self, order, batch_size, start=0):
        """Yield (rows, frames [n, 5, C, H, W]) over `order` from batch number `start`; the next batch is read ahead."""
        parts = [order[i:i + batch_size] for i in range(start * batch_size, len(order), batch_size)]
        for rows, batch, waited in read_ahead(parts, self.get):
            self.waited += waited
            yield rows, batch


def scale(x):
    """0..255 -> -1..1"""
    return (x.float() - 127.5) / 127.5


def colours(x):
    """Grey repeated to three channels. [n, C, H, W] -> [n, 3, H, W]."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def image_of(five):
    """Frames at STEPS, [n, 5, C, H, W] in 0..255 -> the network's input, float32 [n, 9, H, W] in [-1, 1]."""
    return scale(torch.cat([colours(five[:, i]) for i in (0, 2, 4)], dim=1))


def gradient_of(five):
    """|frame(t-1) - frame(t+1)|, float32 [n, 3, H, W] in 0..255."""
    return colours((five[:, 1].float() - five[:, 3].float()).abs())


def target_of(five, mask=None):
    """Clean frame t and anomaly map (0 or 255, none without a mask) -> float32 [n, 4, H, W] in [-1, 1]."""
    frame = scale(colours(five[:, 2]))
    anomaly = torch.full_like(frame[:, :1], -1.0) if mask is None else scale(mask)
    return torch.cat([frame, anomaly], dim=1)


def noise_table(tokens, seed=0, draw=0):
    """Masking noise of evaluation, float32 [NOISE_ROWS, tokens] in [0, 1): frame number t takes row t % NOISE_ROWS.

    So a frame is masked alike in any batch, order or run.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + draw)
    return torch.rand(NOISE_ROWS, tokens, generator=generator)
