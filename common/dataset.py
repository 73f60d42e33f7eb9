"""The record that every reader of a dataset gives, and what readers share."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.io import UserError, first_line, read_table, writable_folder


def plain(name):
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


@dataclass
class Dataset:
    name: str
    root: Path
    train: list
    test: list
    label_source: str = "none"  # what the frame labels were made from; printed beside every result
    mask_source: str = "none"
    _ranges: dict = field(default_factory=dict, repr=False)  # video name -> [(first, last)], 0-based inclusive
    _arrays: dict = field(default_factory=dict, repr=False)  # video name -> function returning uint8 [T]
    _masks: dict = field(default_factory=dict, repr=False)  # video name -> function returning bool [T, H, W]
    _tracks: dict = field(default_factory=dict, repr=False)  # video name -> file, or function returning float32 [n, 6]
    abnormal_train: list = field(default_factory=list)  # UBnormal: labelled abnormal videos for training
    cut_ranges: bool = False  # UBnormal: its tracks may end after the video
    skipped: dict = field(default_factory=dict)  # video key -> why it cannot be used
    label_forms: str = ""  # where labels were looked for, and in which forms
    not_understood: str = ""  # what lies there and was not
    _other_labels: tuple = ()  # a second source: its name, {video name: function(frames) -> uint8 [frames]}

    def cache_folder(self, cache):
        """Its folder under --cache; two copies of a dataset never mix."""
        place = hashlib.sha256(os.fsencode(Path(self.root).resolve())).hexdigest()[:6]
        return writable_folder(Path(cache) / f"{self.name}-{place}")

    @property
    def has_labels(self):
        return bool(self._ranges or self._arrays)

    def labels(self, video, frames):
        """uint8 [frames], 1 = abnormal; None where this dataset has no labels at all.

        Raises UserError where the video has none among labelled ones, or of another length than the video.
        """
        if not self.has_labels:
            return None
        key = video.name
        if key in self._ranges:
            out = np.zeros(frames, np.uint8)
            for first, last in self._ranges[key]:
                if self.cut_ranges:
                    last = min(last, frames - 1)
                if not 0 <= first <= last < frames:
                    raise UserError(
                        f"labels of video {key} ({self.label_source}) mark frames {first + 1}..{last + 1}, "
                        f"but the video has {frames} frames: labels or frames are of another version"
                    )
                out[first : last + 1] = 1
            return out
        if key not in self._arrays:
            raise UserError(
                f"no labels for video {key} in {self.label_source}; add them, or take the video out of the test folder"
            )
        out = np.asarray(self._arrays[key]()).reshape(-1)
        if len(out) != frames:
            raise UserError(
                f"labels of video {key} ({self.label_source}) have {len(out)} entries, but the video has "
                f"{frames} frames: labels or frames are of another version"
            )
        if not np.isin(out, (0, 1)).all():
            raise UserError(f"labels of video {key} ({self.label_source}) must be 0 or 1 per frame")
        return out.astype(np.uint8)

    def no_labels(self):
        """One sentence about where labels were looked for."""
        looked = f"; looked for {self.label_forms}" if self.label_forms else ""
        strange = f"; {self.not_understood}" if self.not_understood else ""
        return f"{self.name} has no labels under {self.root}: no metrics{looked}{strange}"

    def disagreement(self, labels):
        """How far a second source of labels differs from {video name: uint8 [frames]}, in a sentence; None where it does not."""
        if not self._other_labels:
            return None
        other, read = self._other_labels
        differ, unread = {}, []
        for name in sorted(set(labels) & set(read)):
            try:
                y = read[name](len(labels[name]))
            except UserError as e:
                unread.append(str(e))
                continue
            n = min(len(y), len(labels[name]))
            differ[name] = int((y[:n] != labels[name][:n]).sum()) + abs(len(y) - len(labels[name]))
        videos = sum(n > 0 for n in differ.values())
        said = []
        if videos:
            said.append(
                f"{other} differs from {self.label_source}, which counts, in {sum(differ.values())} frames of {videos} videos"
            )
        if unread:
            said.append(f"{other} could not be compared with {self.label_source} in {len(unread)} videos: {unread[0]}")
        return "; ".join(said) or None

    def events(self):
        """[(video, kind, first frame, end)] of events.csv, where the dataset has one (the demo does); end exclusive."""
        path = Path(self.root) / "events.csv"
        if not path.is_file():
            return []
        try:
            (_, names), *rows = read_table(path, "events")
            rows = [dict(zip(names, row)) for _, row in rows]
            return [(r["video"], r["event"], int(r["start"]), int(r["end"])) for r in rows]
        except (KeyError, ValueError) as e:
            raise UserError(f"{path}: expected columns video, event, start, end ({first_line(e)})") from None

    @property
    def has_masks(self):
        return bool(self._masks)

    def masks(self, video):
        """bool [T, H, W] of abnormal pixels, or None."""
        read = self._masks.get(video.name)
        return None if read is None else read()

    def tracks(self, video):
        """float32 [n, 6]: track id, frame (0-based), x1, y1, x2, y2 in inclusive pixels; None where there are none."""
        path = self._tracks.get(video.name)
        if path is None or callable(path):
            return path and path()
        try:
            found = np.array([row for _, row in read_table(path, "tracks")], np.float32).reshape(-1, 6)
        except ValueError as e:
            raise UserError(f"tracks {path}: expected lines id,frame,x1,y1,x2,y2 ({first_line(e)})") from None
        if not np.isfinite(found).all():
            raise UserError(f"tracks {path} hold NaN or infinite numbers")
        return found


class UsableVideos:
    """The videos of a dataset that could be read, and why others could not. failed: {video key: why}."""

    def __init__(self, data, videos, failed):
        """videos: those that were wanted, or what is left of them."""
        self.data, self.skipped = data, {**data.skipped, **failed}
        usable = [v for v in videos if v.key not in self.skipped]
        if self.skipped and not usable:
            raise UserError(
                f"none of the {len(self.skipped)} videos of {data.name} could be used; the first: "
                f"{next(iter(self.skipped.values()))}"
            )
        self.train = [v for v in usable if v.split == "train"]
        self.test = [v for v in usable if v.split == "test"]

    def report_skipped(self):
        report_skipped(self.skipped)


def report_skipped(skipped):
    """Name at the end what was left out. skipped: {video: why}."""
    if skipped:
        print(f"skipped {len(skipped)} videos:")
        for name, why in skipped.items():
            print(f"  {name}: {why}")


def search(root, pattern, depth=3):
    """Files or folders below `root` whose lower-case name matches; at most `depth` levels, each folder once, links followed."""
    level, hits, seen = [root], [], {root.resolve(), *root.resolve().parents}
    for _ in range(depth):
        following = []
        for p in level:
            for x in sorted(p.iterdir()):
                if re.fullmatch(pattern, x.name.lower()):
                    hits.append(x)
                elif (
                    x.is_dir()
                    and not re.fullmatch(r"\d+|\d\d_\d+|t(rain|est)\d+", x.name.lower())
                    and x.resolve() not in seen
                ):
                    seen.add(x.resolve())
                    following.append(x)
        level = following
    return hits
