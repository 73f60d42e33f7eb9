"""Where videos and labels are: one small reader per dataset, all returning the same record.

data = find("ped2", "data")          # any layout in circulation, found under data/
data.train, data.test                # lists of common.readers.video.Video
data.labels(video, frames)           # uint8 [T], 1 = abnormal, or None where the dataset has none
data.masks(video)                    # bool [T, H, W] or None
data.tracks(video)                   # float32 [n, 6]: id, frame, x1, y1, x2, y2 (inclusive pixels) or None
"""

import importlib
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import ModuleType

from common.io import UserError, load_array, load_arrays
from common.readers.dataset import Dataset, normalized_name, search
from common.readers.labels import (
    csv_ranges,
    frame_labels,
    mat_ranges,
    matlab_ranges,
    packed_masks,
    read_masks,
    read_tracks,
)
from common.readers.video import Video, list_videos, natural

ALIASES = {
    "ped1": ("ped1", "ucsdped1"),
    "ped2": ("ped2", "ucsdped2"),
    "avenue": ("avenue", "avenuedataset", "cuhkavenue", "avenuecuhk"),
    "shanghaitech": ("shanghaitech", "shanghai", "sht", "shanghaitechcampus"),
    "shanghaitech-sd": ("shanghaitechsd", "shanghaisd", "shtsd", "shanghaitechscenedependent"),
    "ubnormal": ("ubnormal", "ubn"),
    "folder": ("folder",),
    "demo": ("demo",),
}
FOLDER = "folder"  # beside suffixes: a folder of images
WRAPPERS = ("ucsdanomalydatasetv1p2", "ucsdanomalydataset")  # folders that hold a dataset's folder
TRAIN = ("training/frames", "training/videos", "training_videos", "train/frames", "train/videos", "training", "train")
TEST = ("testing/frames", "testing/videos", "testing_videos", "test/frames", "test/videos", "testing", "test")
SPLITS = {"train": TRAIN, "test": TEST}


def canonical(name: str) -> str:
    """The dataset's one name for any of the spellings in circulation. Raises UserError."""
    for key, names in ALIASES.items():
        if normalized_name(name) in names:
            return key
    raise UserError(f"--dataset {name} is not known; choose one of {', '.join(ALIASES)}")


def canonical_video_name(dataset: str, video: str) -> str:
    """A video's one name in every copy of a dataset: Test001 -> 01 (ped), 1 -> 01 (avenue); others unchanged."""
    digits = re.findall(r"\d+", video)
    if dataset in ("ped1", "ped2", "avenue") and digits:
        return f"{int(digits[-1]):02d}"
    return video


def find(name: str, data_root="data", labels=None) -> Dataset:
    """The Dataset `name` under `data_root`, whatever its layout.

    labels: frame labels to take instead of its own, see use_labels(). Raises UserError where videos or labels are
    missing, damaged, or do not fit.
    """
    name, root = canonical(name), Path(data_root)
    if name != "demo" and not root.is_dir():
        content = "train/ and test/ with videos or folders of frames" if name == "folder" else name
        raise UserError(f"--data-root {root} does not exist; it should hold {content}")
    if name == "demo":
        data = folder(optional_module("demo").ensure_demo(root / "demo"), "demo")
    elif name == "ubnormal":
        data = optional_module("ubnormal").ubnormal(root)
    elif name == "folder":
        data = folder(root)
    else:
        root, folders = locate(name, root)
        data = Dataset(name, root, videos(name, folders, "train"), videos(name, folders, "test"))
        {"ped1": ucsd, "ped2": ucsd, "avenue": avenue}.get(name, shanghaitech)(data)
    if labels:
        use_labels(data, Path(labels))
    return data


def optional_module(name: str) -> ModuleType:
    """common/readers/demo.py or ubnormal.py, which a copy of a method may leave out. Raises UserError."""
    try:
        return importlib.import_module(f"common.readers.{name}")
    except ModuleNotFoundError as e:
        if e.name != f"common.readers.{name}":
            raise
        advice = "copy that file too, or choose another --dataset"
        raise UserError(f"the {name} dataset needs common/readers/{name}.py, which is not here: {advice}") from None


def use_labels(data: Dataset, path: Path) -> None:
    """Take frame labels of a Dataset from `path` instead, each by its video's name.

    path: an .npz of 0/1 per frame, a csv with lines video,start,end, or a folder with one file of labels or masks, or
    one folder of masks, per video. Raises UserError.
    """
    names = {v.name for v in data.test}
    canonical_name = partial(canonical_video_name, data.name)
    data._labels, data.label_source = {}, str(path)
    data._other_labels = None
    if path.suffix.lower() == ".csv":
        data._labels = csv_ranges(path, names, canonical_name)
        return
    if not path.is_dir():
        arrays = load_arrays(path, "label file")
        keys = named_once(path, [(canonical_name(k), k) for k in arrays])
        data._labels = {name: partial(arrays.get, k) for name, k in keys.items()}
        return
    entries = sorted(path.iterdir())
    mask_folders = [p for p in entries if p.is_dir() and p.name.lower().endswith("_gt")]
    if mask_folders:  # UCSD: folders of frames lie beside those of masks
        entries = [p for p in entries if p in mask_folders or not p.is_dir()]
    pairs, others = entries_of_videos(entries, (".npy", ".npz", ".txt", ".mat", FOLDER), names, canonical_name)
    files = named_once(path, pairs)
    if not files:
        example, content = min(names, default="(there is none)"), ", ".join(others[:5]) or "nothing"
        missing = "no .npy, .npz, .txt, .mat or folder that is called like a test video"
        raise UserError(f"--labels {path} holds {missing} such as {example}; it holds {content}")
    if others:
        print(f"note: --labels {path}: {len(others)} entries belong to no test video, such as {others[0]}", flush=True)
    masks = {name for name, file in files.items() if holds_masks(path / file)}
    for name, file in files.items():
        data._labels[name] = partial(read_masks if name in masks else frame_labels, path / file)
    normal = sorted(names - set(files)) if masks else []  # sets of masks leave normal videos out
    data._labels.update({name: [] for name in normal})
    if normal:
        count = f"{len(normal)} test videos have no mask in {path} and count as normal"
        print(f"note: {count}, such as {normal[0]}", flush=True)


def named_once(path: Path, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """{video: entry} of the pairs that `path` holds. Raises UserError where a video has two entries."""
    out = {}
    for name, entry in pairs:
        if name in out:
            both = f"{out[name]} and {entry} are both labels of video {name}"
            raise UserError(f"--labels {path}: {both}; keep one of them")
        out[name] = entry
    return out


def holds_masks(path: Path) -> bool:
    if path.is_dir() or path.suffix in (".mat", ".npz"):
        return True
    return path.suffix == ".npy" and load_array(path, "labels", mmap=True).ndim == 3


def entries_of_videos(entries, kinds, names: Collection[str], canonical_name=str) -> tuple[list, list[str]]:
    """-> ([(video of `names`, entry called like it)], other entries), names of the paths `entries`.

    kinds: suffixes of files, and FOLDER.
    """
    pairs, others = [], []
    for p in entries:
        is_folder = p.is_dir()
        video = canonical_name(p.name if is_folder else p.stem)
        if video in names and (FOLDER if is_folder else p.suffix) in kinds:
            pairs.append((video, p.name))
        else:
            others.append(p.name)
    return pairs, others


# ------------------------------------------------------------------------------------------------- finding folders


def child_folders(root: Path, names: Collection[str]) -> list[Path]:
    """The folders of these names, in lower case, in `root`, whatever their case; a/b descends."""
    out = []
    for name in names:
        folders = [root]
        for part in name.split("/"):
            folders = [p for f in folders[:1] for p in sorted(f.iterdir()) if p.name.lower() == part and p.is_dir()]
        out += folders[:1]
    return out


def split_folders(root: Path, split: str) -> list[Path]:
    """Folders of a split that hold videos: frames/ and videos/ may both be filled, else training/ counts."""
    filled = [p for p in child_folders(root, SPLITS[split]) if listed_videos(p)]
    specific = [p for p in filled if p.parent != root or "_" in p.name]
    return specific or filled[:1]


def listed_videos(folder: Path, split: str = "test", left_out: list | None = None) -> list[Video]:
    videos_and_masks = list_videos(folder, split, walk=True, left_out=left_out)
    return [v for v in videos_and_masks if not v.name.lower().endswith("_gt")]


def locate(name: str, data_root: Path) -> tuple[Path, dict[str, list[Path]]]:
    """-> (root of the dataset, {split: its folders}), at data_root or two folders below. Raises UserError."""

    def called(folder, names=(*ALIASES[name], *WRAPPERS)):
        return sorted(p for p in folder.iterdir() if p.is_dir() and normalized_name(p.name) in names)

    roots = [data_root]
    for p in called(data_root):
        roots += [p, *called(p)]
    for root in roots:
        # the data root may hold several datasets: it counts if it has both splits, or is called like the dataset
        folders = {split: split_folders(root, split) for split in SPLITS}
        names = {normalized_name(root.name), normalized_name(root.resolve().name)}
        if folders["test"] and (folders["train"] or root != data_root or names & set(ALIASES[name])):
            return root, folders
    content = sorted(p.name + ("/" if p.is_dir() else "") for p in data_root.iterdir())
    train, test = (", ".join([*names[:3], names[-1]]) for names in (TRAIN, TEST))
    looked = f"a training folder ({train}, …) and a testing folder ({test}, …)"
    raise UserError(
        f"{name} was not found under --data-root {data_root}: looked in {', '.join(map(str, roots))} for {looked} with "
        f"videos or folders of frames; found {shortened(content)}"
    )


def shortened(names: list[str]) -> str:
    return (", ".join(names[:12]) or "nothing") + (" …" if len(names) > 12 else "")


def videos(name: str, folders: dict[str, list[Path]], split: str) -> list[Video]:
    """The videos of all folders of a split; one that is in two of them is taken from the first. Raises UserError."""
    by_name, repeated = {}, []
    for folder in folders[split]:
        left_out, in_folder = [], set()
        for v in listed_videos(folder, split, left_out):
            v.name = canonical_video_name(name, v.name)
            if v.name in in_folder:
                raise UserError(f"{folder}: several videos are called {v.name}; keep one of each")
            in_folder.add(v.name)
            if by_name.setdefault(v.name, v) is not v:
                repeated.append(v)
        if left_out:
            files = f"{len(left_out)} files in {folder} are no part of a video, or of an unknown kind"
            print(f"note: {files}, such as {left_out[0]}", flush=True)
    if repeated:
        example, first = repeated[0].path, folders[split][0]
        count = f"{len(repeated)} videos, such as {example}"
        print(f"note: {count}, stand in {first} too and are taken from there", flush=True)
    return sorted(by_name.values(), key=lambda v: natural(v.name))


# --------------------------------------------------------------------------------------------------------- readers


def ucsd(data: Dataset) -> None:
    """UCSD Ped1 and Ped2 (Mahadevan et al. 2010): read masks and labels."""
    name = data.name
    data.label_forms = f"{name}.mat, UCSD{name}.m, or a folder Test*_gt of masks for every test video"
    folders = {canonical_video_name(name, p.name[:-3]): p for p in search(data.root, r"test\d+_gt") if p.is_dir()}
    packed = search(data.root, r"pixel_masks_packed\.npz")
    if folders:
        data.mask_source = "Test*_gt images"
        data._masks = {k: partial(read_masks, p) for k, p in folders.items()}
    elif packed:
        data.mask_source = packed[0].name
        data._masks = packed_masks(packed[0])
    readers = {rf"{name}\.mat": mat_ranges, rf"ucsd{name}\.m": matlab_ranges}
    files = [(p, read) for pattern, read in readers.items() for p in search(data.root, pattern)]
    choose_labels(data, [(p.name, read(p)) for p, read in files[:1]])


def avenue(data: Dataset) -> None:
    """CUHK Avenue (Lu et al. 2013). Its two label sets differ in 441 frames: the masks win where both exist."""
    data.label_forms = "testing_label_mask/1_label.mat … (in it, or in ground_truth_demo/ beside it), or avenue.mat"
    above = [p for root in (data.root.resolve(), data.root.absolute()) for p in (root.parent.parent, root.parent)]
    beside = [p / name for p in above for name in ("ground_truth_demo", "testing_label_mask")]
    places = [*(p for p in beside if p.is_dir()), data.root]  # the last and nearest counts
    files = [p for place in places for p in search(place, r"\d+_label\.mat", depth=4)]
    data._masks = {canonical_video_name("avenue", p.name.split("_")[0]): partial(read_masks, p) for p in files}
    data.mask_source = "testing_label_mask (volLabel)" if files else "none"
    ranges = [(p.name, mat_ranges(p)) for p in search(data.root, r"avenue\.mat")[:1]]
    choose_labels(data, [(f"masks: {data.mask_source}", data._masks), *ranges])


def shanghaitech(data: Dataset) -> None:
    """ShanghaiTech Campus (Luo et al. 2017)."""
    data.label_forms = "test_frame_mask/ (or frame_masks/) with one .npy per test video"
    for v in data.train + data.test:
        v.scene = v.name.split("_")[0]
    for p in search(data.root, r"(test_?)?frame_?masks?"):
        data._labels = {f.stem: partial(frame_labels, f) for f in sorted(p.glob("*.npy"))}
        data.label_source = p.name
    for p in search(data.root, r"(test_?)?pixel_?masks?"):
        data._masks = {f.stem: partial(read_masks, f) for f in sorted(p.glob("*.npy"))}
        data.mask_source = p.name


def folder(root: Path, name: str = "folder") -> Dataset:
    """Your videos: train/ and test/ (or only videos: then all are test), with labels if there are any.

    Labels: labels/<video>.npy or .txt (0/1 per frame), or labels.csv with lines video,start,end (0-based frames, end
    exclusive; a video without a line is normal). Masks: masks/<video>.npy, .npz (array `masks`) or a folder of images.
    Tracks: tracks/<video>.csv. A scene is what stands before the first underscore of a name, if all have one.
    Raises UserError.
    """
    folders = {split: split_folders(root, split) for split in SPLITS}
    for split in SPLITS:
        empty = next((p for p in child_folders(root, SPLITS[split]) if any(p.iterdir())), None)
        if empty and not folders[split]:
            entries = sorted(empty.iterdir())
            raise UserError(
                f"{empty} holds no video: {len(entries)} entries, such as {entries[0].name}, are of no kind that is "
                "read; convert videos with ffmpeg -i IN OUT.mp4"
            )
    if any(folders.values()):
        data = Dataset(name, root, videos(name, folders, "train"), videos(name, folders, "test"))
    else:
        data = Dataset(name, root, [], list_videos(root, "test"))
    all_videos, names = data.train + data.test, {v.name for v in data.test}
    if not all_videos:
        content = shortened(sorted(p.name for p in root.iterdir()))
        looked = "looked for train/ and test/ with videos or folders of frames"
        raise UserError(f"--data-root {root} holds no videos: {looked}; found {content}")
    if all("_" in v.name for v in all_videos):
        for v in all_videos:
            v.scene = v.name.split("_")[0]
    data.label_forms = "labels/<video>.npy or .txt, labels.csv (video,start,end), or masks/ of every test video"
    places, kinds = ("labels", "test_labels", "test_frame_mask"), (".npy", ".txt")
    labels, source, others = files_of_videos(root, places, kinds, names, frame_labels)
    if others:
        data.not_understood = f"{others}: not called like a test video such as {min(names, default='')}.npy"
    places, kinds = ("masks", "test_pixel_mask"), (".npy", ".npz", FOLDER)
    data._masks, data.mask_source, _ = files_of_videos(root, places, kinds, names, read_masks)
    data._tracks, _, _ = files_of_videos(root, ("tracks",), (".csv", ".txt"), names, read_tracks)
    sources = [(source, labels)]
    for table in search(root, r"labels\.csv", depth=1)[:1]:
        try:
            sources.append((table.name, csv_ranges(table, names)))
        except UserError as e:
            if not labels:
                raise
            print(f"note: labels are those of {source}; {table.name} is not compared ({e})", flush=True)
    choose_labels(data, sources)
    return data


def files_of_videos(root, places, kinds, names: Collection[str], read: Callable) -> tuple[dict, str, str]:
    """Files of folders `places` that are called like a video of `names`; the last place counts.

    kinds: suffixes, and FOLDER; read(path) -> array. -> ({video: function that reads its file}, "place/" or "none",
    "place/ holds …" other files, or "")
    """
    readers, source = {}, "none"
    sentence = ""
    for place in child_folders(root, places):
        pairs, others = entries_of_videos(sorted(place.iterdir()), kinds, names)
        readers.update({video: partial(read, place / file) for video, file in pairs})
        source = f"{place.name}/" if pairs else source
        if others:
            sentence = f"{place.name}/ holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''}"
    return readers, source, sentence


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
        data._other_labels = sources[1]
