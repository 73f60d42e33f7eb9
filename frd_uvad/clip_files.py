"""Clip features of videos in files, encoded by this toolkit: for frd_uvad and for svmae's detector."""

from pathlib import Path

import numpy as np

from common.cache import VideoFiles
from common.features.prefetch import encode_videos
from common.io import UserError


class ClipFiles(VideoFiles):
    """Features of clips of 16 frames, float16 [clips, crops, width].

    info(video): {"source", "clips", "crops", "width", "frames", "warnings"}.
    """

    what = "clip features"

    def __init__(self, folder, action: str = "encoding"):
        super().__init__(Path(folder))
        self.action = action

    def make(self, videos, workers, show, *, encoder, clips_at_once=None):
        """encoder: encoders.ClipEncoder; clips_at_once: how many it encodes at once, by default its own number."""

        def encode(video, frames, tick):
            lengths = []

            def count(n):
                lengths.append(n)
                tick(n)

            def describe(shape):
                sizes = dict(zip(("clips", "crops", "width"), shape))
                return {**sizes, "frames": sum(lengths), "warnings": frames.decoder.warnings}

            self.write(video, encoder.encode_video(video, frames, self.folder, clips_at_once, count), describe)

        return encode_videos(videos, encoder.preprocess_frame, encode, workers, show)


def features_of_video(files: ClipFiles, video, encoder, workers: int) -> tuple[np.ndarray, int]:
    """Features of your own video [clips, crops, width], written into `files`, and its number of frames. Raises
    UserError."""
    _, failed = files.build([video], workers, encoder=encoder)
    if failed:
        raise UserError(failed[video.key])
    return np.array(files.array(video)), files.info(video)["frames"]
