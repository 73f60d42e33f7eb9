"""The training set: segments of consecutive frame features, the same number of every scene in each step."""

import numpy as np
import torch

from common.io import UserError
from common.loader import take_rows
from scene_aware_ae.scoring import LENGTH


class Segments:
    """Segments of LENGTH frames, each named by its first frame among the features of all videos laid end to end.

    scenes: names; frames: number of all frames. Features lie on the device where they fit, else they are read from
    disk. Raises UserError for a scene without a video of LENGTH frames.
    """

    def __init__(self, dataset, run):
        self.run, self.arrays = run, dataset.arrays(dataset.train)
        self.scenes = sorted({v.scene for v in dataset.train})
        self.offsets = np.cumsum([0, *map(len, self.arrays)])
        self.frames = int(self.offsets[-1])
        starts = {scene: [] for scene in self.scenes}
        for video, array, offset in zip(dataset.train, self.arrays, self.offsets):
            if len(array) >= LENGTH:
                starts[video.scene].append(np.arange(offset, offset + len(array) - LENGTH + 1))
        for scene, parts in starts.items():
            if not parts:
                raise UserError(f"scene {scene or '(unnamed)'} has no training video of at least {LENGTH} frames")
        self.starts = [np.concatenate(starts[scene]) for scene in self.scenes]
        self.features = None
        if run.fits_device(sum(a.nbytes for a in self.arrays), cpu_limit=2**30):
            self.features = run.keep_on_device(self.arrays, self.frames)

    def draw(self, rng: np.random.Generator, per_scene: int) -> np.ndarray:
        """First frames of `per_scene` random segments of every scene, scene after scene: int64 [scenes · per_scene]."""
        return np.concatenate([s[rng.integers(0, len(s), per_scene)] for s in self.starts])

    def scene_labels(self, per_scene: int) -> torch.Tensor:
        """The scene's number of each segment of draw(): int64 [scenes · per_scene] on the device."""
        return torch.arange(len(self.scenes), device=self.run.device).repeat_interleave(per_scene)

    def read(self, first: np.ndarray):
        """First frames int [n] -> features [n, LENGTH, D], or their frames' numbers where features lie on the
        device."""
        rows = first[:, None] + np.arange(LENGTH)
        if self.features is not None:
            return self.run.pin(rows)
        x = take_rows(self.arrays, self.offsets, rows.reshape(-1), self.arrays[0].shape[1:], self.arrays[0].dtype)
        return self.run.pin(x.reshape(*rows.shape, -1))

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """-> float32 [n, LENGTH, D]"""
        x = x.to(self.run.device, non_blocking=True)
        return (x if self.features is None else self.features[x]).float()
