"""Clip features of videos on disk, memory-mapped, and the frame labels that belong to them.

    data = find_features("ucfcrime", "data/UCF-Crime")     # or any folder with train/ and test/ of .npy files
    data.train, data.test                                  # lists of FeatureVideo
    video.clips(range(4))                                  # float [4, crops, width], read from the file
    data.labels(video)                                     # uint8 [frames], or None

Layouts: one array of all clips with an index of videos (`concat_UCF.npy`, `Concat_test_10.npy` with `nalist.npy` of first and
last clips), or one .npy per video ([clips, width], [clips, crops, width] or [crops, clips, width]; crops in files of their own,
name__0.npy, are put together). Labels: by the videos' names (labels/<video>.npy, an .npz, a csv, temporal annotations of UCF-Crime and
XD-Violence), or one vector of all test clips or frames (`gt-*.npy`) together with the list of videos by which it was made.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.dataset import Dataset, plain
from common.io import UserError, first_line, load_array, load_arrays, original_name, read_text, stamp
from common.labels import csv_ranges, frame_labels
from common.loader import copy_rows
from common.video import Video, natural

CLIP_FRAMES = 16  # frames of a clip
ALIASES = {
    "ucfcrime": ("ucfcrime", "ucf", "ucfcrimes"),
    "xdviolence": ("xdviolence", "xd"),
    "shanghaitech": ("shanghaitech", "shanghai", "sht"),
    "features": ("features",),
}
CROPS = {1, 5, 10}
LABEL_FORMS = (
    "*emporal*nnotation*.txt, annotations*.txt, labels/ with a .npy or .txt per video, *frame_mask*/, or gt*.npy with the list "
    "of test videos (*.list, --order)"
)


@dataclass
class FeatureVideo:
    """One video's clips, [clips, crops, width] in its files."""

    name: str
    split: str
    parts: list = field(repr=False)  # memory maps [clips, …], one per crop where crops are in files of their own
    first: int = 0
    last: int = -1  # first and last clip inside the parts
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
        return [[str(f.resolve()), *stamp(f.parent, [f.name])] for f in files] + [self.first, len(self), *self.shape]

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


def add_label_flags(group):
    group.add_argument(
        "--order",
        type=Path,
        default=None,
        help="list of the test videos, a name or path a line, in the order of the label "
        "vector gt*.npy (default: a *.list or *.txt beside the features that names exactly these videos)",
    )
    group.add_argument(
        "--segments",
        action="store_true",
        help="the features are equal parts of each video (32 as a rule), not clips of 16 "
        "frames: scores are stretched to the frames that its labels have",
    )


class FeatureData:
    """Training and test videos as clip features, with the labels of the test videos.

    segments: a video's rows are equal parts of it, however long it is, instead of clips of 16 frames.
    """

    def __init__(self, name, root, train, test, segments=False):
        self.name, self.root, self.train, self.test, self.segments = name, root, train, test, segments
        self.label_source = "none"
        self._labels = None  # video name -> uint8 [frames], or ranges [(first, last)]
        self.skipped = {}  # video: why it is not here
        self.settings = None  # how they were made, where they were made from videos
        self.wanted = train + test  # those that were to be here, in the order by which jobs of an array share them
        self.videos = {}  # (split, name): Video, where the features were made from videos
        self.dataset = None  # the Dataset of those videos
        global_batch = train + test
        if not global_batch:
            raise UserError(f"no features were found under {root}")
        shapes = {}
        for v in global_batch:
            shapes.setdefault(v.shape, v.name)
        if len(shapes) > 1:
            (a, x), (b, y) = list(shapes.items())[:2]
            raise UserError(
                f"features under {root} differ: {x} has {a[0]} crops of width {a[1]}, {y} has {b[0]} of {b[1]}; encode "
                "all of them alike"
            )
        self.crops, self.width = next(iter(shapes))

    @property
    def has_labels(self):
        return self._labels is not None

    def labels(self, video):
        """uint8 [frames], 1 = abnormal; None without labels. A video without annotation among annotated ones is an error."""
        if self._labels is None:
            return None
        clips, name = len(video) * CLIP_FRAMES, video.name
        if name not in self._labels:
            if "label_A" in name or name.startswith("Normal"):  # XD-Violence does not list its normal videos
                return np.zeros(clips, np.uint8)
            raise UserError(
                f"no annotation for the test video {name} in {self.label_source}: add it, or take its features away"
            )
        known = self._labels[name]
        if isinstance(known, np.ndarray):
            if not self.segments and abs(len(known) - clips) > CLIP_FRAMES:
                raise UserError(
                    f"labels of video {name} ({self.label_source}) are of {len(known)} frames, its {len(video)} clips of "
                    f"features of {clips}: one of them is of another version, or the features are segments (--segments)"
                )
            return known
        if self.segments:
            raise UserError(
                f"{self.label_source} annotates frames, and how many video {name} has is not known of its segments: with "
                "--segments labels must be one 0 or 1 per frame (labels/<video>.npy, or --labels FILE.npz)"
            )
        out = np.zeros(clips, np.uint8)
        for first, last in known:
            if first >= clips:
                raise UserError(
                    f"{self.label_source} marks frames {first} to {last} of video {name}, whose features end at frame {clips} "
                    f"({len(video)} clips of {CLIP_FRAMES}): they are of another version, or segments of a longer video (--segments)"
                )
            out[max(0, first) : last + 1] = 1
        return out

    def rows_of_frames(self, video, frames):
        """The clip or segment that each of so many frames of a video belongs to: int [frames]."""
        if self.segments:
            return np.arange(frames) * len(video) // frames
        return np.minimum(np.arange(frames) // CLIP_FRAMES, len(video) - 1)

    def frame_scores(self, video, scores):
        """A score per clip or segment [n] -> one per frame that the video's labels have, or that its clips make."""
        labels = self.labels(video) if video.split == "test" else None
        return scores[self.rows_of_frames(video, len(video) * CLIP_FRAMES if labels is None else len(labels))]

    def as_dataset(self):
        """The test videos as a Dataset, which is what evaluation asks for labels."""
        videos = [Video(v.name, v.path or self.root) for v in self.test]
        if self.dataset:
            data = replace(self.dataset, train=[], test=videos, _ranges={}, _arrays={}, _masks={}, _tracks={})
        else:
            data = Dataset(self.name, self.root, [], videos, self.label_source, label_forms=LABEL_FORMS)
        if self.has_labels:
            data._arrays = {v.name: (lambda v=v: self.labels(v)) for v in self.test}
        return data


def frames_of_clips(scores, frames):
    """One score per clip -> one per frame: repeated, cut or filled up with the last one. [clips] -> [frames]"""
    out = np.repeat(scores, CLIP_FRAMES)
    return np.pad(out, (0, max(0, frames - len(out))), mode="edge")[:frames]


def canonical_features(name):
    for key, names in ALIASES.items():
        if plain(name) in names:
            return key
    return None


def find_features(name, root, labels=None, order=None, segments=False):
    """FeatureData `name` under `root`.

    labels: a file or folder of labels to use instead of those found; order: a list file that says in which order a vector of labels goes
    through the test videos; segments: see FeatureData. Raises UserError for features or labels that cannot be told apart.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--features {root} does not exist")
    train, test = (split_of(root, split) for split in ("train", "test"))
    if not train and not test:
        found = sorted(p.name for p in root.iterdir())
        raise UserError(
            f"--features {root}: looked for train*/ and test*/ with .npy files, or concat_*.npy and Concat_test_*.npy "
            f"with nalist.npy; found {', '.join(found[:12]) or 'nothing'}"
        )
    data = FeatureData(name, root, train, test, segments)
    if test:
        read_labels(data, labels and Path(labels), order)
    return data


# ------------------------------------------------------------------------------------------------------------ features


def split_of(root, split):
    """Videos of one split: a concatenated array, or a folder of files."""
    arrays = {
        kind: [
            p
            for p in sorted(root.glob("*.npy"))
            if re.match(r"concat", p.name, re.I) and (re.search("test", p.name, re.I) is not None) == (kind == "test")
        ]
        for kind in ("train", "test")
    }
    if arrays[split]:
        other = arrays["train" if split == "test" else "test"]
        return concatenated(arrays[split][0], root, split, other[0] if other else None)
    beside = feature_folders(root, "train" if split == "test" else "test", say=False)
    return per_video(feature_folders(root, split), split, own=(root / "settings.json").exists(), beside=beside)


def feature_folders(root, split, say=True):
    """The folders of a split's features. Of several kinds of features (RGB, Flow, …) those of RGB are taken, and the others named."""
    folders = [
        p for p in sorted(root.iterdir()) if p.is_dir() and not re.search("mask|label", p.name, re.I) and npy_files(p)
    ]
    matching = [p for p in folders if re.search(split, p.name, re.I)]
    if split == "train" and not matching:  # XD-Violence: RGB/ beside RGBTest/
        matching = [p for p in folders if any(q.name.lower() == f"{p.name}test".lower() for q in folders)]
    taken = [p for p in matching if re.search("rgb", p.name, re.I)] or matching
    if say and len(matching) > 1:
        left = [p.name for p in matching if p not in taken]
        rest = f"; not read: {', '.join(left)}" if left else ""
        print(f"note: {split} features are those of {', '.join(p.name for p in taken)}{rest}", flush=True)
    return taken


def npy_files(folder):
    """The .npy files in a folder and below it; links are followed, each folder is read once."""
    found, waiting, seen = [], [folder], {folder.resolve(), *folder.resolve().parents}
    while waiting:
        for p in sorted(waiting.pop().iterdir()):
            if not p.is_dir():
                found += [p] if p.suffix == ".npy" else []
            elif p.resolve() not in seen:
                seen.add(p.resolve())
                waiting.append(p)
    return found


def index_of(array, path, root, split, other):
    """Rows [videos, 2] of the index file that belongs to a concatenated array, the one that ends where the array does; or None."""
    files, fits = [], []
    for file in sorted(root.glob("*nalist*.npy")):
        rows = load_array(file, "index of videos")
        two = rows.ndim == 2 and rows.shape[1] == 2 and rows.size and rows.dtype.kind in "iuf"
        if not two or (rows[:, 1] < rows[:, 0]).any() or rows.min() < 0:
            raise UserError(f"index {file}: expected [videos, 2] of the first and last clips of each video")
        files.append((file, int(rows.max())))
        if rows.max() in (len(array) - 1, len(array)):
            fits.append((file, rows.astype(np.int64)))
    if len(fits) > 1 or (fits and other is not None and fits[0][1].max() in (len(other) - 1, len(other))):
        named = [x for x in fits if re.search("train|test", x[0].name, re.I)]
        fits = [x for x in named if re.search(split, x[0].name, re.I)] if named else fits
        if len(fits) > 1 or not named:
            raise UserError(
                f"index {(fits or files)[0][0]} fits several arrays of features by its length: call it nalist_train.npy or "
                "nalist_test.npy"
            )
    if fits:
        return fits[0][1]
    others = [] if other is None else [len(other) - 1, len(other)]
    for file, end in files:
        if end not in others or re.search(split, file.name, re.I):
            raise UserError(
                f"index {file} ends at clip {end}, and {path.name} has {len(array)}: expected [videos, 2] of the first and "
                "last clips inside it"
            )
    return None


def concatenated(path, root, split, other_path):
    array, other = (p and load_array(p, "features", mmap=True) for p in (path, other_path))
    if array.ndim not in (2, 3):
        raise UserError(f"features {path}: expected [clips, crops, width], got an array of shape {array.shape}")
    rows = index_of(array, path, root, split, other)
    if rows is None:
        print(
            f"note: {path.name} has no index of videos beside it (nalist_{split}.npy with each video's first and last clip): all its "
            "clips are taken for one video, and windows may cross videos",
            flush=True,
        )
        return [FeatureVideo(path.stem, split, [array], path=path)]
    if (rows[1:, 0] == rows[:-1, 1]).all() and (len(rows) > 1 or rows.max() == len(array)):  # half-open ranges
        rows = np.stack([rows[:, 0], rows[:, 1] - 1], axis=1)
    if rows[0, 0] != 0 or rows[-1, 1] != len(array) - 1 or (rows[1:, 0] != rows[:-1, 1] + 1).any():
        raise UserError(
            f"the index of {path}: its videos do not follow one another without gaps or overlaps from clip 0 on"
        )
    return [FeatureVideo(f"{split}{i:04d}", split, [array], int(a), int(b), path) for i, (a, b) in enumerate(rows)]


def name_of_file(stem):
    """A video's name without what feature extractors add to it: Abuse028_x264_i3d__3 -> Abuse028_x264"""
    return re.sub(r"_(i3d|x3d|rgb|clip)$", "", re.sub(r"__\d+$", "", stem))


def names_of_files(stems):
    """{stem: name}. An ending (_i3d, …) is the extractor's where all files have it, and a part of the name where some have it."""
    cut = {stem: name_of_file(stem) for stem in stems}
    endings = {re.sub(r"__\d+$", "", stem)[len(name) :] for stem, name in cut.items()}
    return cut if len(endings) == 1 else {stem: re.sub(r"__\d+$", "", stem) for stem in stems}


def name_in(text, known):
    """Which of the names in `known` a path or name stands for, with or without folders, suffix, crop number and ending; or None."""
    stem = re.sub(r"\.(npy|mp4|avi|mkv)$", "", re.split(r"[/\\]", text)[-1])
    short = name_of_file(stem)
    spellings = [
        text,
        stem,
        re.sub(r"__\d+$", "", stem),
        short,
        re.sub(r"_\d$", "", short),
        re.sub(r"_\d$", "", stem),
        original_name(stem),
    ]
    return next((x for x in spellings if x in known), None)


def per_video(folders, split, own=False, beside=()):
    """Videos of one .npy each, or of one per crop (name__0.npy … name__9.npy, each [clips, width], in one folder). own: the files were
    written by this toolkit, under the names that the videos have."""
    files = sorted((p for folder in folders for p in npy_files(folder)), key=lambda p: (natural(p), str(p)))
    arrays = {p: load_array(p, "features", mmap=True) for p in files}
    for p, x in arrays.items():
        if x.ndim not in (2, 3) or 0 in x.shape:
            raise UserError(f"features {p}: expected [clips, crops, width] with at least one clip, got {x.shape}")
    groups = {} if own else crop_files(files, arrays)
    joined = {p for paths in groups.values() for p in paths}
    groups.update({(p.parent, p.stem): [p] for p in files if p not in joined})
    short = {} if own else names_of_files({stem for _, stem in groups})
    names = {key: short.get(key[1]) or original_name(key[1]) for key in groups}
    videos, swapped = {}, not own and crops_first([x for x in arrays.values() if x.ndim == 3], files, beside)
    for key, paths in sorted(groups.items(), key=lambda item: files.index(item[1][0])):
        name, parts = names[key], [arrays[p] for p in paths]
        if len({x.shape for x in parts}) > 1:
            raise UserError(
                f"features {paths[0]} and {paths[-1]} are crops of one video and differ in shape: {parts[0].shape}, "
                f"{parts[-1].shape}"
            )
        if sum(n == name for n in names.values()) > 1:
            name = key[1]  # only the endings tell these files apart
        if name in videos:
            raise UserError(
                f"features {videos[name].path} and {paths[0]} are both called {name}: keep one kind of features, or name the "
                "folder of one kind with --features"
            )
        if parts[0].ndim == 3 and swapped:
            parts = list(parts[0])  # one view per crop
        videos[name] = FeatureVideo(name, split, parts, path=paths[0])
    first, last = {x.shape[0] for x in arrays.values() if x.ndim == 2}, {x.shape[-1] for x in arrays.values()}
    if len(first) == 1 and (len(last) > 1 or (min(first) % 256 == 0 and min(last) % 8)):
        raise UserError(
            f"features {files[0]} {arrays[files[0]].shape} look like [width, clips]: transpose them to [clips, width]"
        )
    return list(videos.values())


def crop_files(files, arrays):
    """{(folder, name): its files name__0.npy … in order} where each is [clips, width] and no number is missing."""
    groups = {}
    for p in files:
        crop = re.fullmatch(r"(.+)__(\d+)", p.stem)
        if crop and arrays[p].ndim == 2:
            groups.setdefault((p.parent, crop[1]), {})[int(crop[2])] = p
    return {
        key: [paths[i] for i in range(len(paths))]
        for key, paths in groups.items()
        if set(paths) == set(range(len(paths)))
    }


def crops_first(arrays, files, beside):
    """Whether arrays are [crops, clips, width], not [clips, crops, width]: all videos have the same number of crops, and not of clips.
    Where these few do not tell, those of the other split do."""
    first, second = ({x.shape[axis] for x in arrays} for axis in (0, 1))
    if first != {1} and max(len(first), len(second)) == 1 and first | second <= CROPS - {1}:
        arrays = arrays + [load_array(p, "features", mmap=True) for folder in beside for p in npy_files(folder)]
        first, second = ({x.shape[axis] for x in arrays if x.ndim == 3} for axis in (0, 1))
    if len(first) != 1 or not first <= CROPS:
        return False
    if first != {1} and len(second) == 1 and second <= CROPS - {1}:
        raise UserError(
            f"features {files[0]}: which axis of {arrays[0].shape} are the crops cannot be told: keep crops in files of their "
            "own, name__0.npy … [clips, width]"
        )
    return not (len(second) == 1 and second <= CROPS)


# -------------------------------------------------------------------------------------------------------------- labels


def read_labels(data, path, order):
    """Fill a FeatureData's labels from `path`, or from what lies beside the features: labels by name go before a vector of all videos."""
    root = data.root
    if path:
        is_vector = path.suffix == ".npy"
        by_name, vectors = ([], [path]) if is_vector else ([path], [])
    else:
        by_name = [
            *sorted(root.glob("*emporal*nnotation*.txt")),
            *sorted(root.glob("annotations*.txt")),
            *(p for p in sorted(root.iterdir()) if p.is_dir() and (p.name == "labels" or "frame_mask" in p.name)),
        ]
        vectors = sorted(root.glob("gt*.npy"))
    if by_name:
        data._labels, data.label_source = labels_by_name(by_name[0], data), by_name[0].name
        for v in data.test:
            data.labels(v)  # what does not fit is refused before any work
    if not vectors:
        return
    try:
        cut, source = cut_vector(data, vectors[0], order)
    except UserError as e:
        if not by_name:
            raise
        print(f"note: labels are those of {data.label_source}; {vectors[0].name} is not compared ({e})", flush=True)
        return
    if not by_name:
        data._labels, data.label_source = cut, source
        return
    pairs = [(data.labels(v), cut[v.name]) for v in data.test]
    differ = sum(int((named[: len(other)] != other[: len(named)]).sum()) for named, other in pairs)
    print(f"note: labels are those of {data.label_source}; {source} differs in {differ} frames", flush=True)


def labels_by_name(source, data):
    """{video name: uint8 [frames], or ranges [(first, last)]} of a folder, an .npz, a csv, or temporal annotations."""
    names = {v.name for v in data.test}
    if source.is_dir():
        given = {f.stem: frame_labels(f) for f in sorted(source.iterdir()) if f.suffix in (".npy", ".txt")}
    elif source.suffix == ".npz":
        given = load_arrays(source, "label file")
    elif source.suffix == ".csv":
        return csv_ranges(source, names, lambda text: name_in(text, names) or text)
    else:
        given = annotations(source)
    out, unknown = {}, []
    for k, x in given.items():
        name = name_in(k, names)
        if name in out:
            raise UserError(
                f"labels {source} hold the video {name} twice, as {k} and under another spelling: leave one"
            )
        if name:
            out[name] = x if isinstance(x, list) else zeros_and_ones(x, f"labels of video {k} in {source}")
        else:
            unknown.append(k)
    if unknown:
        print(f"note: {source.name} annotates {len(unknown)} videos without features, such as {unknown[0]}", flush=True)
    if source.is_dir() and out and ("mask" in source.name.lower() or any(np.ndim(x) > 2 for x in given.values())):
        without = sorted(names - set(out))  # published sets of masks leave normal videos out
        if without:
            print(
                f"note: {source.name} has no mask of {len(without)} test videos, such as {without[0]}: they are taken for normal",
                flush=True,
            )
        out.update({name: [] for name in without})
    return out


def zeros_and_ones(x, what):
    """uint8 [frames] of a vector, or of pixel masks [frames, H, W]: 1 where any pixel is marked."""
    x = np.asarray(x)
    x = (x != 0).any((1, 2)) if x.ndim == 3 else x.reshape(-1)
    if not x.size or not np.isin(x, (0, 1)).all():
        raise UserError(f"{what} must be one 0 or 1 per frame")
    return x.astype(np.uint8)


def cut_vector(data, path, order):
    """Labels of all test clips or frames in a row, cut by an order that is known. -> {video name: uint8 [frames]}, their source"""
    if data.segments:
        raise UserError(
            f"labels {path} cannot be cut, as how many frames each video has is not known of its segments: with --segments "
            "give labels by name (labels/<video>.npy, or --labels FILE.npz)"
        )
    flat = zeros_and_ones(load_array(path, "frame labels"), f"labels {path}")
    videos, source = order_of(data, path, order)
    clips = sum(map(len, videos))
    if len(flat) == clips:
        flat = np.repeat(flat, CLIP_FRAMES)
    if len(flat) != clips * CLIP_FRAMES:
        raise UserError(
            f"labels {path}: {len(flat)} entries for {clips} test clips; expected one 0 or 1 per clip, or {CLIP_FRAMES} per clip"
        )
    parts = np.split(flat, np.cumsum([len(v) * CLIP_FRAMES for v in videos])[:-1])
    for v, part in zip(videos, parts):
        if part.any() and ("label_A" in v.name or v.name.startswith("Normal")):
            raise UserError(
                f"labels {path} in the order of {source} mark frames of {v.name}, which is normal by its name: they were made "
                "in another order; give its list with --order FILE"
            )
    return {v.name: part for v, part in zip(videos, parts)}, f"{path.name} in the order of {source}"


def order_of(data, path, order):
    """The test videos in the order of a vector of labels, and what says so."""
    if order is None and (len(data.test) == 1 or len({v.path for v in data.test}) == 1):
        return data.test, data.test[0].path.name
    by_name, orders = {v.name: v for v in data.test}, {}
    beside = [
        *sorted(data.root.glob("*.list")),
        *(p for p in sorted(data.root.glob("*.txt")) if "annotation" not in p.name.lower()),
    ]
    for file in [order] if order else beside:
        names = listed_names(file, by_name)
        if set(names) == set(by_name):
            orders.setdefault(tuple(names), Path(file).name)
        elif order:
            missing, other = (sorted(a - b) for a, b in ((set(by_name), set(names)), (set(names), set(by_name))))
            raise UserError(
                f"--order {order} is not the list of these test videos: {len(missing)} of them are missing there and "
                f"{len(other)} others are listed, such as {(missing + other)[0]}"
            )
    if len(orders) == 1:
        names, source = next(iter(orders.items()))
        return [by_name[n] for n in names], source
    found = (
        f"{' and '.join(orders.values())} differ: say which with --order FILE"
        if orders
        else (
            "put the list of test videos by which it was made beside it (*.list or *.txt, a name a line) or give it "
            "with --order FILE, or give "
            "labels by name (labels/<video>.npy, --labels FILE.npz, temporal annotations)"
        )
    )
    raise UserError(f"labels {path} go through all test videos in an order that is not known: {found}")


def listed_names(path, known):
    """The videos that a list names or gives paths of, each once (its crops stand below each other)."""
    out = {}
    for line in read_text(path, "list of videos").splitlines():
        line = line.strip()
        if not line:
            continue
        name = name_in(line, known) or name_in(line.split()[0], known)
        if name or not line.startswith("#"):  # else a comment
            out[name or line] = None
    return list(out)


def annotations(path):
    """UCF-Crime: `Abuse028_x264.mp4  Abuse  165  240  -1  -1`; XD-Violence: `name start end start end …`.

    Frames are inclusive; -1 stands for none. -> {video name without suffix: [(first, last)]}
    """
    out = {}
    try:
        lines = [line.split() for line in read_text(path, "annotations").splitlines() if line.strip()]
        for words in lines:
            numbers = [int(float(w)) for w in words[1:] if re.fullmatch(r"-?\d+(\.\d+)?", w)]
            pairs = [(a, b) for a, b in zip(numbers[::2], numbers[1::2]) if (a, b) != (-1, -1)]
            if len(numbers) % 2 or any(not 0 <= a <= b for a, b in pairs):
                raise UserError(
                    f"annotations {path}: {' '.join(words)}: expected pairs of the first and last abnormal frame, and -1 -1 "
                    "for none"
                )
            out.setdefault(re.sub(r"\.(mp4|avi|mkv)$", "", words[0], flags=re.I), []).extend(pairs)
    except (OverflowError, ValueError) as e:
        raise UserError(f"annotations {path} cannot be read ({first_line(e)})") from None
    return out
