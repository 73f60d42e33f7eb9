"""Clip features of videos on disk, memory-mapped, and the frame labels that belong to them.

    data = find_features("ucfcrime", "data/UCF-Crime")     # or any folder with train/ and test/ of .npy files
    data.train, data.test                                  # lists of FeatureVideo
    video.clips(range(4))                                  # float [4, crops, width], read from the file
    data.labels(video)                                     # uint8 [frames], or None

Layouts: one array of all clips with an index of videos (`concat_UCF.npy`, `Concat_test_10.npy` with `nalist.npy` of first and
last clips), or one .npy per video ([clips, width] or [clips, crops, width]; crops in files of their own, name__0.npy, are put
together). Labels: one vector of all test clips or frames (`gt-*.npy`), or temporal annotations by name (UCF-Crime, XD-Violence).
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.batches import copy_rows
from common.datasets import Dataset, plain
from common.files import UserError, first_line, load_array, read_text
from common.labels import frame_labels
from common.video import Video, natural

CLIP = 16                      # frames of a clip
ALIASES = {"ucfcrime": ("ucfcrime", "ucf", "ucfcrimes"), "xdviolence": ("xdviolence", "xd"),
           "shanghaitech": ("shanghaitech", "shanghai", "sht"), "features": ("features",)}


@dataclass
class FeatureVideo:
    """One video's clips, [clips, crops, width] in its files."""
    name: str
    split: str
    parts: list = field(repr=False)         # memory maps [clips, …], one per crop where crops are in files of their own
    first: int = 0
    last: int = -1                          # first and last clip inside the parts
    path: Path = None

    def __len__(self):
        return (self.last if self.last >= 0 else len(self.parts[0]) - 1) - self.first + 1

    @property
    def shape(self):
        """(crops, width)"""
        part = self.parts[0]
        return (len(self.parts) if len(self.parts) > 1 or part.ndim == 2 else part.shape[1]), part.shape[-1]

    @property
    def key(self):
        return f"{self.split}/{self.name}"

    def fingerprint(self):
        """Changes when its files do: which, how new, and what part of them."""
        files = [Path(p.filename) for p in self.parts if getattr(p, "filename", None)]
        return [[str(f.resolve()), f.stat().st_mtime_ns] for f in files] + [self.first, len(self), *self.shape]

    def clips(self, rows):
        """Those clips, copied from the files: [n, crops, width]."""
        rows, places = self.first + np.asarray(rows), np.arange(len(rows))
        out = np.empty((len(rows), *self.shape), self.parts[0].dtype)
        if self.parts[0].ndim == 3:
            copy_rows(self.parts[0], rows, out, places)
        else:
            for i, part in enumerate(self.parts):
                copy_rows(part, rows, out[:, i], places)
        return out


class FeatureData:
    """Training and test videos as clip features, with the labels of the test videos."""

    def __init__(self, name, root, train, test):
        self.name, self.root, self.train, self.test = name, root, train, test
        self.label_source, self._labels, self._flat = "none", {}, None
        self.skipped = {}                       # video: why it is not here
        self.settings = None                    # how they were made, where they were made from videos
        self.wanted = train + test              # those that were to be here, in the order by which jobs of an array share them
        self.videos = {}                        # (split, name): Video, where the features were made from videos
        self._start = dict(zip((v.name for v in test), np.cumsum([0, *map(len, test)]).tolist()))   # its first clip among all of them
        everyone = train + test
        if not everyone:
            raise UserError(f"no features were found under {root}")
        shapes = {}
        for v in everyone:
            shapes.setdefault(v.shape, v.name)
        if len(shapes) > 1:
            (a, x), (b, y) = list(shapes.items())[:2]
            raise UserError(f"features under {root} differ: {x} has {a[0]} crops of width {a[1]}, {y} has {b[0]} of {b[1]}; encode "
                            "all of them alike")
        self.crops, self.width = next(iter(shapes))

    @property
    def has_labels(self):
        return bool(self._labels) or self._flat is not None

    def labels(self, video):
        """uint8 [frames], 1 = abnormal; None without labels. A video without annotation among annotated ones is an error."""
        if self._flat is not None:
            start = self._start[video.name] * CLIP
            return self._flat[start:start + len(video) * CLIP]
        if not self._labels:
            return None
        if video.name not in self._labels:
            if "label_A" in video.name or video.name.startswith("Normal"):   # XD-Violence does not list its normal videos
                return np.zeros(len(video) * CLIP, np.uint8)
            raise UserError(f"no annotation for the test video {video.name} in {self.label_source}: add it, or take its features "
                            "away")
        ranges = self._labels[video.name]
        if isinstance(ranges, np.ndarray):
            return ranges
        out = np.zeros(len(video) * CLIP, np.uint8)
        for a, b in ranges:
            out[max(0, a):b + 1] = 1
        return out

    def as_dataset(self):
        """The test videos as a Dataset, which is what evaluation asks for labels."""
        data = Dataset(self.name, self.root, [], [Video(v.name, v.path or self.root) for v in self.test], self.label_source)
        if self.has_labels:
            data._arrays = {v.name: (lambda v=v: self.labels(v)) for v in self.test}
        return data


def frames_of_clips(scores, frames):
    """One score per clip -> one per frame: repeated, cut or filled up with the last one. [clips] -> [frames]"""
    out = np.repeat(scores, CLIP)
    return np.pad(out, (0, max(0, frames - len(out))), mode="edge")[:frames]


def canonical_features(name):
    for key, names in ALIASES.items():
        if plain(name) in names:
            return key
    return None


def find_features(name, root, labels=None):
    """FeatureData `name` under `root`. labels: a file of labels to use instead of the one found."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--features {root} does not exist")
    train = split_of(root, "train")
    test = split_of(root, "test")
    if not train and not test:
        found = sorted(p.name for p in root.iterdir())
        raise UserError(f"--features {root}: looked for train*/ and test*/ with .npy files, or concat_*.npy and Concat_test_*.npy "
                        f"with nalist.npy; found {', '.join(found[:12]) or 'nothing'}")
    data = FeatureData(name, root, train, test)
    if test:
        read_labels(data, Path(labels) if labels else None)
    return data


def split_of(root, split):
    """Videos of one split: a concatenated array, or a folder of files."""
    arrays = [p for p in sorted(root.glob("*.npy")) if re.match(r"concat", p.name, re.I)
              and (re.search("test", p.name, re.I) is not None) == (split == "test")]
    if arrays:
        return concatenated(arrays[0], root, split)
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and re.search(split, p.name, re.I)]
    return [v for p in folders[:1] for v in per_video(p, split)]


def concatenated(path, root, split):
    array = load_array(path, "features", mmap=True)
    if array.ndim not in (2, 3):
        raise UserError(f"features {path}: expected [clips, crops, width], got an array of shape {array.shape}")
    index = [p for p in sorted(root.glob("*nalist*.npy")) if (re.search("train", p.name, re.I) is not None) == (split == "train")]
    if not index:
        wanted = "nalist_train" if split == "train" else "nalist"
        print(f"note: {path.name} has no index of videos beside it ({wanted}.npy with each video's first and last clip): all its "
              "clips are taken for one video, and windows may cross videos", flush=True)
        return [FeatureVideo(path.stem, split, [array], path=path)]
    rows = load_array(index[0], "index of videos").astype(np.int64)
    if rows.ndim != 2 or rows.shape[1] != 2 or (rows[:, 1] < rows[:, 0]).any() or rows.min() < 0 or rows.max() > len(array):
        raise UserError(f"index {index[0]}: expected [videos, 2] of first and last clips inside {path.name} ({len(array)} clips)")
    if (rows[1:, 0] == rows[:-1, 1]).all() and len(rows) > 1:    # half-open ranges
        rows = np.stack([rows[:, 0], rows[:, 1] - 1], axis=1)
    return [FeatureVideo(f"{split}{i:04d}", split, [array], int(a), int(min(b, len(array) - 1)), path)
            for i, (a, b) in enumerate(rows)]


def per_video(folder, split):
    """One video per .npy below `folder`; name__0.npy … name__4.npy are crops of one video."""
    files = sorted(folder.rglob("*.npy"), key=lambda p: (natural(p), str(p)))
    groups = {}
    for p in files:
        name = re.sub(r"__\d+$", "", p.stem)
        groups.setdefault(re.sub(r"_(i3d|x3d|rgb|clip)$", "", name), []).append(p)
    out = []
    for name, paths in groups.items():
        parts = [load_array(p, "features", mmap=True) for p in paths]
        if (parts[0].ndim not in (2, 3) or 0 in parts[0].shape or len({p.shape for p in parts}) > 1
                or (len(parts) > 1 and parts[0].ndim != 2)):
            raise UserError(f"features {paths[0]}: expected [clips, crops, width] with at least one clip, got {parts[0].shape}")
        out.append(FeatureVideo(name, split, parts, path=paths[0]))
    return out


def read_labels(data, path):
    """Fill a FeatureData's labels from `path`, or from what lies beside the features."""
    root = data.root
    found = [path] if path else [*sorted(root.glob("gt*.npy")), *sorted(root.glob("*emporal*nnotation*.txt")),
                                 *sorted(root.glob("annotations*.txt")), *sorted(p for p in [root / "labels"] if p.is_dir())]
    if not found:
        return
    source = found[0]
    data.label_source = source.name
    if source.is_dir():
        data._labels = {f.stem: frame_labels(f).astype(np.uint8) for f in sorted(source.iterdir()) if f.suffix in (".npy", ".txt")}
    elif source.suffix == ".npy":
        flat = load_array(source, "frame labels").reshape(-1)
        clips = sum(map(len, data.test))
        if len(flat) == clips:
            flat = np.repeat(flat, CLIP)
        if len(flat) != clips * CLIP or not np.isin(flat, (0, 1)).all():
            raise UserError(f"labels {source}: {len(flat)} entries for {clips} test clips; expected one 0 or 1 per clip, or {CLIP} "
                            "per clip")
        data._flat = flat.astype(np.uint8)
    else:
        data._labels = annotations(source)
        unknown = sorted(set(data._labels) - {v.name for v in data.test})
        if unknown:
            print(f"note: {source.name} annotates {len(unknown)} videos without features, such as {unknown[0]}", flush=True)


def annotations(path):
    """UCF-Crime: `Abuse028_x264.mp4  Abuse  165  240  -1  -1`; XD-Violence: `name start end start end …`.

    Frames are inclusive; -1 stands for none. -> {video name without suffix: [(first, last)]}
    """
    out = {}
    try:
        lines = [line.split() for line in read_text(path, "annotations").splitlines() if line.strip()]
        for words in lines:
            numbers = [int(float(w)) for w in words[1:] if re.fullmatch(r"-?\d+(\.\d+)?", w)]
            pairs = [(a, b) for a, b in zip(numbers[::2], numbers[1::2]) if a >= 0 and b >= a]
            out[Path(words[0]).stem if Path(words[0]).suffix.lower() in (".mp4", ".avi", ".mkv") else words[0]] = pairs
    except (OverflowError, ValueError) as e:
        raise UserError(f"annotations {path} cannot be read ({first_line(e)})") from None
    return out
