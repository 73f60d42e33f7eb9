"""The stand-in for an encoder of clips: statistics of motion and appearance, without a network or torch."""

import cv2
import numpy as np

GRID = 16  # cells along a side


def small_grey(frame: np.ndarray, grid: int = GRID) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [4 · grid, 4 · grid, 1]; a frame that is so already is unchanged."""
    grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) if frame.shape[2] == 3 else frame[:, :, 0]
    return cv2.resize(grey, (4 * grid, 4 * grid), interpolation=cv2.INTER_AREA)[:, :, None]


def handcrafted_features(clip: np.ndarray, grid: int = GRID) -> np.ndarray:
    """On a grid, mean and deviation of grey levels, mean and largest difference of consecutive frames.

    uint8 [T, H, W, C] -> float32 [1, 4 · grid²]
    """
    grey = np.stack([small_grey(f, grid)[:, :, 0] for f in clip]).astype(np.float32) / 255
    change = np.abs(np.diff(grey, axis=0))

    def cells(x):
        return x.reshape(grid, 4, grid, 4)

    parts = [
        cells(grey.mean(0)).mean((1, 3)),
        4 * cells(grey.std(0)).mean((1, 3)),
        10 * cells(change.mean(0)).mean((1, 3)),
        4 * cells(change.max(0)).max((1, 3)),
    ]
    return np.concatenate([p.reshape(-1) for p in parts])[None]


class Statistics:
    """handcrafted_features() with the interface of encoders.ImageClips; every crop has those of the whole frame."""

    clips_at_once = 8
    width = 4 * GRID**2

    def __init__(self, crops: int = 1):
        self.crops = crops

    def preprocess_frame(self, frame: np.ndarray) -> np.ndarray:
        return small_grey(frame)

    def encode(self, clips, *_) -> np.ndarray:
        """Clips uint8 [T, H, W, C] -> float32 [n, crops, width]."""
        return np.stack([np.repeat(handcrafted_features(clip), self.crops, axis=0) for clip in clips])

    def describe(self) -> dict:
        return {"encoder": "stand-in:statistics", "weights": "none", "width": self.width, "crops": self.crops}
