"""The record that every reader of a dataset gives, and what readers share."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.io import UserError, writable_folder
from common.readers.video import Video

# [(first, last)] frames, inclusive; or a function that returns 0 or 1 per frame, or pixel masks [T, H, W]
Labels = list[tuple[int, int]] | Callable[[], np.ndarray]
OTHER_VERSION = "labels or frames are of another version"


def normalized_name(name: str) -> str:
    """Letters and digits of a dataset's name: UCSD Ped_2 -> ucsdped2."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def canonical_video_name(dataset: str, video: str) -> str:
    """A video's one name in every copy of a dataset: Test001 -> 01 (ped), 1 -> 01 (avenue); others unchanged."""
    digits = re.findall(r"\d+", video)
    if dataset in ("ped1", "ped2", "avenue") and digits:
        return f"{int(digits[-1]):02d}"
    return video


@dataclass
class Dataset:
    name: str
    root: Path
    train: list[Video]
    test: list[Video]
    label_source: str = "none"  # what the frame labels were made from; printed beside every result
    mask_source: str = "none"
    _labels: dict[str, Labels] = field(default_factory=dict, repr=False)  # by names of videos, as all that follow
    _masks: dict[str, Callable] = field(default_factory=dict, repr=False)  # functions -> bool [T, H, W]
    _tracks: dict[str, Callable] = field(default_factory=dict, repr=False)  # functions -> float32 [n, 6]
    abnormal_train: list[Video] = field(default_factory=list)  # UBnormal: labelled abnormal videos for training
    cut_ranges: bool = False  # UBnormal: its tracks may end after the video
    skipped: dict[str, str] = field(default_factory=dict)  # video key -> why it cannot be used
    label_forms: str = ""  # the forms of labels that were looked for
    not_understood: str = ""  # a sentence about files that are no labels, though they lie where labels do
    other_labels: tuple[str, dict[str, Labels]] | None = None  # name and labels of a second source, to compare with

    def cache_folder(self, cache) -> Path:
        """Its folder under --cache; two copies of a dataset never mix. Raises UserError if it cannot be written."""
        digest = hashlib.sha256(os.fsencode(Path(self.root).resolve())).hexdigest()[:6]
        return writable_folder(Path(cache) / f"{self.name}-{digest}")

    @property
    def has_labels(self) -> bool:
        return bool(self._labels)

    def labels(self, video: Video, frames: int) -> np.ndarray | None:
        """uint8 [frames], 1 = abnormal; None if no video has labels.

        Raises UserError if only this video has none, or if they do not fit its number of frames.
        """
        if not self._labels:
            return None
        name, source = video.name, self.label_source
        if name not in self._labels:
            raise UserError(f"no labels for video {name} in {source}; add them, or take the video out of its folder")
        out = self.labels_per_frame(name, self._labels[name], source, frames)
        if len(out) != frames:
            lengths = f"have {len(out)} entries, but the video has {frames} frames"
            raise UserError(f"labels of video {name} ({source}) {lengths}: {OTHER_VERSION}")
        if not np.isin(out, (0, 1)).all():
            raise UserError(f"labels of video {name} ({source}) must be 0 or 1 per frame")
        return out.astype(np.uint8)

    def labels_per_frame(self, name: str, labels: Labels, source: str, frames: int) -> np.ndarray:
        """Labels of video `name` as numbers [frames], however its `source` holds them. Raises UserError."""
        if callable(labels):
            y = np.asarray(labels())
            return y.any((1, 2)) if y.ndim == 3 else y.reshape(-1)
        out = np.zeros(frames, np.uint8)
        for first, last in labels:
            last = min(last, frames - 1) if self.cut_ranges else last
            if not 0 <= first <= last < frames:
                marked = f"mark frames {first + 1}..{last + 1}, but the video has {frames} frames"
                raise UserError(f"labels of video {name} ({source}) {marked}: {OTHER_VERSION}")
            out[first : last + 1] = 1
        return out

    def no_labels(self) -> str:
        """One sentence about where labels were looked for."""
        looked_for = self.label_forms and f"looked for {self.label_forms}"
        sentences = [f"{self.name} has no labels under {self.root}: no metrics", looked_for, self.not_understood]
        return "; ".join(filter(None, sentences))

    def masks(self, video: Video) -> np.ndarray | None:
        """bool [T, H, W] of abnormal pixels, or None. Raises UserError."""
        read = self._masks.get(video.name)
        return read and read()

    def tracks(self, video: Video) -> np.ndarray | None:
        """float32 [n, 6]: track id, frame (0-based), x1, y1, x2, y2 in inclusive pixels; or None. Raises UserError."""
        read = self._tracks.get(video.name)
        return read and read()


class UsableVideos:
    """The videos of a dataset that could be read: train, test; skipped: {video key: why it could not}.

    videos: those that are needed, or fewer. failed: {video key: why}. Raises UserError if none is left.
    """

    def __init__(self, data: Dataset, videos: list[Video], failed: dict[str, str]):
        self.data, self.skipped = data, {**data.skipped, **failed}
        usable = [v for v in videos if v.key not in self.skipped]
        if self.skipped and not usable:
            count, first = len(self.skipped), next(iter(self.skipped.values()))
            raise UserError(f"none of the {count} videos of {data.name} could be used; the first: {first}")
        self.train = [v for v in usable if v.split == "train"]
        self.test = [v for v in usable if v.split == "test"]


def report_skipped(skipped: dict[str, str]) -> None:
    """Print which videos were left out, and why."""
    if skipped:
        print(f"skipped {len(skipped)} videos:")
        for name, why in skipped.items():
            print(f"  {name}: {why}")


FRAME_FOLDERS = r"\d+|\d\d_\d+|t(rain|est)\d+"  # lower-case names of videos in the published datasets


def search(root: Path, pattern: str, depth: int = 3) -> list[Path]:
    """Files and folders below `root` whose lower-case name matches; at most `depth` levels, each folder once.

    Links are followed; folders that may not be read, and those of frames, are passed over. Raises OSError where `root`
    may not be read.
    """
    level, hits = [root], []
    seen = {root.resolve(), *root.resolve().parents}
    for _ in range(depth):
        entries = [x for p in level for x in sorted(p.iterdir())]
        level = []
        for x in entries:
            if re.fullmatch(pattern, x.name.lower()):
                hits.append(x)
            elif re.fullmatch(FRAME_FOLDERS, x.name.lower()) or not os.access(x, os.R_OK | os.X_OK):
                continue
            elif x.is_dir() and x.resolve() not in seen:
                seen.add(x.resolve())
                level.append(x)
    return hits


def choose_labels(data: Dataset, sources: list[tuple[str, dict]]) -> None:
    """The first of the sources (name, labels) that has any counts, the next one is compared with it.

    Masks are the last source; they count where there is no other, and every test video has some.
    """
    sources = [(name, labels) for name, labels in sources if labels]
    if not sources and data._masks and {v.name for v in data.test} <= set(data._masks):
        sources = [(f"masks: {data.mask_source}", data._masks)]
    elif sources and sources[0][1] is not data._masks:
        sources.append((data.mask_source, data._masks))
    if sources:
        data.label_source, data._labels = sources[0]
    if len(sources) > 1:
        data.other_labels = sources[1]
