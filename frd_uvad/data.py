"""The training set, windows of consecutive clips, and the latent anomaly bank."""

import numpy as np
import torch

from common.io import UserError


class Windows:
    """Windows of `length` consecutive clips of one video, each named by its first clip among all videos' clips.

    A window that reaches past its video's end repeats the last clip. Features lie on the device where they fit, else
    they are read from the memory maps. Raises UserError for features that are not finite.
    """

    def __init__(self, videos, length: int, run):
        self.videos, self.length = videos, length
        self.run = run
        counts = np.array([len(v) for v in videos])
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.last = np.repeat(self.starts[1:] - 1, counts)
        self.features = None  # float [clips, crops, width] on the device
        crops, width = videos[0].shape
        size = len(self) * crops * width * videos[0].parts[0].itemsize
        if run.fits_device(size, cpu_limit=2**30):
            self.features = run.keep_on_device((v.clips(np.arange(len(v))) for v in videos), len(self))
            for i in range(0, len(self), 4096):  # in parts: a check needs memory of its own
                part = self.features[i : i + 4096]
                self.check(part, np.arange(i, i + len(part)))

    def __len__(self):
        return int(self.starts[-1])

    def clips(self, first: np.ndarray) -> np.ndarray:
        """Windows int [n] -> their clips, int [n, length]."""
        return np.minimum(np.asarray(first)[:, None] + np.arange(self.length), self.last[first][:, None])

    def locate(self, clip: int) -> tuple[int, int]:
        """-> number of the video, and of the clip in it"""
        video = int(np.searchsorted(self.starts, clip, side="right")) - 1
        return video, int(clip - self.starts[video])

    def read_clips(self, clips):
        """Clips int [n], ascending, from the files -> [n, crops, width]."""
        which = np.searchsorted(self.starts, clips, side="right") - 1
        return np.concatenate([self.videos[v].clips(clips[which == v] - self.starts[v]) for v in np.unique(which)])

    def check(self, features, clips):
        bad = ~torch.isfinite(features).flatten(1).all(1)
        if bad.any():
            video, clip = self.locate(int(clips[int(bad.nonzero()[0])]))
            raise UserError(
                f"features of video {self.videos[video].name} ({self.videos[video].path}) hold NaN or infinite numbers "
                f"in clip {clip}: encode it again, or take it away"
            )

    def read(self, first: np.ndarray) -> torch.Tensor:
        """Windows int [n] -> their features [n, length, crops, width], or their clips where features lie on the
        device."""
        clips = self.clips(first)
        if self.features is not None:
            return self.run.pin(clips)
        needed, places = np.unique(clips, return_inverse=True)
        features = self.read_clips(needed)
        self.check(torch.from_numpy(features), needed)
        return self.run.pin(features[places.reshape(clips.shape)])

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """-> float32 [n, crops, length, width]"""
        x = x.to(self.run.device, non_blocking=True)
        return (x if self.features is None else self.features[x]).transpose(1, 2).float()

    def get(self, first: np.ndarray) -> torch.Tensor:
        return self.to_device(self.read(first))


class AnomalyBank:
    """The latent anomaly bank: at most `size` windows that look abnormal, [n, crops, T, width] on the device, or
    None; and `first`, the clips that they begin with.

    What a step chooses joins before the next one. It is copied to the host while a GPU computes gradients.
    """

    def __init__(self, size: int):
        self.size, self.windows = size, None
        self.first = np.zeros(0, np.int64)
        self.chosen = None  # what has not joined yet

    def __len__(self):
        return len(self.first)

    def choose(self, joins: torch.Tensor, batch, windows: Windows) -> None:
        """Windows of a Batch are to join: bool [n] on the device."""
        self.chosen = windows.run.copy_to_host(joins), batch.rows, batch.rng, windows

    def update(self) -> None:
        """Let join what was chosen."""
        if self.chosen is None:
            return
        joins, rows, rng, windows = self.chosen
        self.chosen = None
        first = rows[joins()]
        if len(first):
            self.add(windows.get(first), first, rng)

    def add(self, windows, first, rng):
        """windows [n, crops, T, width], first int [n]. Above the size a random subset stays."""
        joined, first = [*(() if self.windows is None else self.windows), *windows], np.concatenate([self.first, first])
        keep = np.arange(len(joined))
        if len(joined) > self.size:
            keep = np.sort(rng.permutation(len(joined))[: self.size])
        if len(keep):
            self.windows, self.first = torch.stack([joined[i] for i in keep]), first[keep]

    def state_dict(self) -> dict:
        self.update()
        return {"bank": self.windows, "bank_first": self.first.tolist()}

    def load_state_dict(self, state: dict, device) -> None:
        self.windows = None if state["bank"] is None else state["bank"].to(device)
        self.first = np.array(state["bank_first"], np.int64)
