"""The record of videos as clip features: memory-mapped clips, and the frame labels that belong to them."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from common.io import UserError, stamp
from common.loader import copy_rows
from common.readers.dataset import Dataset, normalized_name
from common.readers.video import Video

CLIP_FRAMES = 16  # frames of a clip
LABEL_FORMS = (
    "*emporal*nnotation*.txt, annotations*.txt, labels/ with a .npy or .txt per video, *frame_mask*/, or gt*.npy with "
    "the list of test videos (*.list, --order)"
)
LABELS_OF_SEGMENTS = (  # what is wrong with labels that are not per frame
    "do not say how many frames a video has: with --segments labels must be one 0 or 1 per frame "
    "(labels/<video>.npy, or --labels FILE.npz)"
)
PUBLISHED = {
    "ucfcrime": ("ucfcrime", "ucf", "ucfcrimes"),
    "xdviolence": ("xdviolence", "xd"),
    "shanghaitech": ("shanghaitech", "shanghai", "sht"),
    "features": ("features",),
}


def canonical_features(name: str) -> str | None:
    """The name of a dataset that is published as features, from any spelling; None for other datasets."""
    return next((key for key, names in PUBLISHED.items() if normalized_name(name) in names), None)


@dataclass
class FeatureVideo:
    """The features of one video, read from its files clip by clip."""

    name: str
    split: str
    parts: list[np.ndarray] = field(repr=False)  # one [clips, crops, width], or a [clips, width] per crop
    first: int = 0  # its first and last clip inside the parts; -1: up to their end
    last: int = -1
    path: Path | None = None

    def __len__(self):
        return (self.last if self.last >= 0 else len(self.parts[0]) - 1) - self.first + 1

    @property
    def shape(self) -> tuple[int, int]:
        """(crops, width)"""
        part = self.parts[0]
        return (len(self.parts) if part.ndim == 2 else part.shape[1]), part.shape[-1]

    @property
    def key(self) -> str:
        return f"{self.split}/{self.name}"

    def fingerprint(self) -> list:
        """Changes when its files do: their places, sizes, times, and which clips of them it has."""
        files = [Path(p.filename) for p in self.parts if getattr(p, "filename", None)]
        return [[str(f.resolve()), *stamp(f.parent, [f.name])] for f in files] + [self.first, len(self), *self.shape]

    def clips(self, numbers) -> np.ndarray:
        """The clips of these numbers, int [n], copied from the files: [n, crops, width]."""
        rows = self.first + np.asarray(numbers)
        out = np.empty((len(rows), *self.shape), self.parts[0].dtype)
        targets = [out] if self.parts[0].ndim == 3 else out.swapaxes(0, 1)
        for part, target in zip(self.parts, targets):
            copy_rows(part, rows, target, np.arange(len(rows)))
        return out


@dataclass
class FeatureData:
    """Training and test videos as clip features, with the frame labels of the test videos.

    Raises UserError where there are no videos, or where they differ in crops or width.
    """

    name: str
    root: Path
    train: list[FeatureVideo]
    test: list[FeatureVideo]
    segments: bool = False  # rows are equal parts of a video of any length, instead of clips of 16 frames
    label_source: str = "none"
    annotations: dict | None = None  # video name -> uint8 [frames], or ranges [(first, last)]
    settings: dict | None = None  # encoder settings, or None for external features
    skipped: dict = field(default_factory=dict)  # video key -> why it has no features
    dataset: Dataset | None = None  # that the features were made from
    videos: dict = field(default_factory=dict)  # (split, name) -> Video that the features were made from
    all_videos: list | None = None  # all requested videos, in shard order; default: train + test

    def __post_init__(self):
        videos = self.train + self.test
        self.all_videos = videos if self.all_videos is None else self.all_videos
        if not videos:
            raise UserError(f"no features were found under {self.root}")
        self.crops, self.width = videos[0].shape
        for v in videos:
            if v.shape != videos[0].shape:
                shapes = [f"{x.name} has {x.shape[0]} crops of width {x.shape[1]}" for x in (videos[0], v)]
                raise UserError(f"features under {self.root} differ: {', '.join(shapes)}; encode all in the same way")

    @property
    def has_labels(self) -> bool:
        return self.annotations is not None

    def labels(self, video: FeatureVideo) -> np.ndarray | None:
        """uint8 [frames], 1 = abnormal; None where no video has labels.

        Raises UserError where only this video has none, or where they do not fit the number of its clips.
        """
        if self.annotations is None:
            return None
        clips, frames = len(video), len(video) * CLIP_FRAMES
        name, source = video.name, self.label_source
        if name not in self.annotations:
            if is_normal_by_name(name):
                return np.zeros(frames, np.uint8)
            raise UserError(f"no annotation for the test video {name} in {source}: add it, or take its features away")
        labels = self.annotations[name]
        other = "one of them is another version, or the features are segments (--segments)"
        if isinstance(labels, np.ndarray):
            if not self.segments and abs(len(labels) - frames) > CLIP_FRAMES:
                lengths = f"have {len(labels)} frames, its {clips} clips of features have {frames}"
                raise UserError(f"labels of video {name} ({source}) {lengths}: {other}")
            return labels
        if self.segments:
            raise UserError(f"{source} annotates frames, and segments of {name} {LABELS_OF_SEGMENTS}")
        out = np.zeros(frames, np.uint8)
        for first, last in labels:
            if first >= frames:
                marked = f"marks frames {first} to {last} of video {name}"
                end = f"whose features end at frame {frames} ({clips} clips)"
                raise UserError(f"{source} {marked}, {end}: {other}")
            out[max(0, first) : last + 1] = 1
        return out

    def rows_of_frames(self, video: FeatureVideo, frames: int) -> np.ndarray:
        """The clip or segment to which each frame of a video belongs: int [frames]."""
        if self.segments:
            return np.arange(frames) * len(video) // frames
        return frames_of_clips(np.arange(len(video)), frames)

    def frame_scores(self, video: FeatureVideo, scores: np.ndarray) -> np.ndarray:
        """A score per clip or segment [n] -> a score per frame: as many as the video has labels, else 16 per row."""
        labels = self.labels(video) if video.split == "test" else None
        return scores[self.rows_of_frames(video, len(video) * CLIP_FRAMES if labels is None else len(labels))]

    def as_dataset(self) -> Dataset:
        """The test videos as a Dataset, from which the evaluation takes labels."""
        videos = [Video(v.name, v.path or self.root) for v in self.test]
        data = Dataset(self.name, self.root, [], videos, self.label_source, label_forms=LABEL_FORMS)
        if self.dataset:
            data = replace(self.dataset, train=[], test=videos, _labels={}, _masks={}, _tracks={})
        if self.has_labels:
            data._labels = {v.name: partial(self.labels, v) for v in self.test}
        return data


def clips_of_frames(frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (clip uint8 [CLIP_FRAMES, H, W, C], number of its frames): a shorter last clip repeats its last frame."""
    frames = iter(frames)
    while clip := list(itertools.islice(frames, CLIP_FRAMES)):
        yield np.stack(clip + [clip[-1]] * (CLIP_FRAMES - len(clip))), len(clip)


def is_normal_by_name(name: str) -> bool:
    """For UCF-Crime and XD-Violence, whose annotations leave normal videos out."""
    return "label_A" in name or name.startswith("Normal")


def frames_of_clips(scores: np.ndarray, frames: int) -> np.ndarray:
    """A score per clip [clips] -> a score per frame [frames]: repeated, cut, or continued with the last one."""
    return scores[np.minimum(np.arange(frames) // CLIP_FRAMES, len(scores) - 1)]
