"""From cached frames to the network's input: neighbours, gradients and scaling happen on the device, in batches."""

import copy

import numpy as np
import torch

from common.loader import take_rows, tensors_ahead

INPUT_OFFSETS = (-3, 0, 3)  # frames around t that the network sees
SAMPLE_OFFSETS = (-3, -1, 0, 1, 3)  # and those that a training sample needs: its gradient is between -1 and 1
NOISE_ROWS = 256  # frames that share one mask are this far apart


class FrameDataset:
    """The frames of several videos of one size as one dataset; in device memory where they all fit.

    arrays: uint8 [T_i, H, W, C] memory maps (C = 1 grey or 3 BGR); offsets: the frames around t that a sample holds;
    once: every frame is read only once, so that none stays on the device.
    """

    def __init__(self, arrays: list, run, offsets: tuple = INPUT_OFFSETS, once: bool = False):
        self.arrays, self.run = arrays, run
        self.offsets = np.array(offsets)
        lengths = [len(a) for a in arrays]
        self.starts = np.cumsum([0, *lengths])
        self.number = np.concatenate([np.arange(n) for n in lengths])  # of each frame in its video
        self.last = np.repeat(np.array(lengths, np.int64) - 1, lengths)
        self.channels = max(a.shape[3] for a in arrays)
        self.size = arrays[0].shape[1:3]
        self.resident = None
        nbytes = len(self) * self.channels * self.size[0] * self.size[1]
        if run.device.type == "cuda" and not once and run.fits_device(nbytes):
            shape = (*self.size, self.channels)
            self.resident = run.keep_on_device((np.broadcast_to(a, (len(a), *shape)) for a in arrays), len(self))

    def __len__(self):
        return int(self.starts[-1])

    def with_offsets(self, offsets: tuple) -> "FrameDataset":
        """The same frames, in the same memory, as samples of other offsets."""
        other = copy.copy(self)
        other.offsets = np.array(offsets)
        return other

    def neighbours(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the frames at the offsets around each row; the row itself where the video has none. int64 [n,
        offsets]."""
        number = self.number[rows][:, None] + self.offsets
        inside = (number >= 0) & (number <= self.last[rows][:, None])
        return np.asarray(rows)[:, None] + np.where(inside, self.offsets, 0)

    def read(self, rows: np.ndarray):
        """-> the frames that the samples need, each once (None if they are on the device), and their places [n,
        offsets]; pinned."""
        rows = self.neighbours(rows)
        if self.resident is not None:
            return None, self.run.pin(rows)
        needed, places = np.unique(rows, return_inverse=True)
        frames = take_rows(self.arrays, self.starts, needed, (*self.size, self.channels), np.uint8)
        return self.run.pin(frames), self.run.pin(places.reshape(rows.shape))

    def to_device(self, arrays) -> torch.Tensor:
        """What read() returned -> uint8 [n, offsets, C, H, W]."""
        frames, places = arrays
        frames = self.resident if frames is None else frames.to(self.run.device, non_blocking=True)
        return frames[places.to(self.run.device, non_blocking=True)].permute(0, 1, 4, 2, 3)

    def batches(self, rows: np.ndarray, batch_size: int):
        """Yield (rows, samples) over `rows` in order; a thread reads the next batch."""
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        for part, samples, _ in tensors_ahead(self, parts, self.run):
            yield part, samples


def scale(x: torch.Tensor) -> torch.Tensor:
    """0..255 -> -1..1"""
    return x.to(torch.float32, copy=True).sub_(127.5).div_(127.5)  # in place: fresh memory costs more


def colours(x: torch.Tensor) -> torch.Tensor:
    """Grey repeated to three channels. [n, C, H, W] -> [n, 3, H, W]."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def network_input(seen: torch.Tensor) -> torch.Tensor:
    """Frames t-3, t, t+3, [n, 3, C, H, W] in 0..255 -> the network's input, float32 [n, 9, H, W] in [-1, 1]."""
    return scale(torch.cat([colours(seen[:, i]) for i in range(3)], dim=1))


def motion_gradient(frames: torch.Tensor) -> torch.Tensor:
    """|frame(t-1) - frame(t+1)| of samples at SAMPLE_OFFSETS, float32 [n, 3, H, W] in 0..255."""
    return colours(frames[:, 1].float().sub_(frames[:, 3]).abs_())


def network_target(frame: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Clean frame t [n, C, H, W] and anomaly map [n, 1, H, W], both in 0..255 -> float32 [n, 4, H, W] in [-1, 1]."""
    return torch.cat([scale(colours(frame)), scale(mask)], dim=1)


def noise_table(tokens: int, seed: int = 0, draw: int = 0) -> torch.Tensor:
    """Masking noise of evaluation, float32 [NOISE_ROWS, tokens] in [0, 1): frame number t takes row t % NOISE_ROWS.

    So a frame has the same mask in any batch, order or run. Draws come in pairs: at a mask ratio of a half the second
    one removes what the first one kept, so that every token is judged by its surroundings once.
    """
    if draw % 2:
        return 1 - noise_table(tokens, seed, draw - 1)
    generator = torch.Generator().manual_seed(seed * 1000 + draw)
    return torch.rand(NOISE_ROWS, tokens, generator=generator)
