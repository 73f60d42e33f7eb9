"""Clip features of videos in folders of .npy files, as they are published and as this toolkit writes them.

    data = find_features("ucfcrime", "data/UCF-Crime")     # or any folder with train/ and test/ of .npy files
    data.test[0].clips(range(4))                           # float [4, crops, width], read from the file
    data.labels(data.test[0])                              # uint8 [frames], or None

Layouts: one array of all clips with an index of videos (`concat_UCF.npy`, `Concat_test_10.npy` with `nalist.npy`), or
one .npy per video: [clips, width], [clips, crops, width], [crops, clips, width], or a file per crop (name__0.npy, …).
Labels (see labels.py): labels/<video>.npy, .npz, csv, temporal annotations, or `gt-*.npy` with a list of videos.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.io import UserError, load_array
from common.readers.dataset import normalized_name
from common.readers.video import natural
from frd_uvad.features.arrays import CROPS, check_not_transposed, crops_come_first, read_concatenated
from frd_uvad.features.data import PUBLISHED, FeatureData, FeatureVideo
from frd_uvad.features.labels import read_annotations, read_labels
from frd_uvad.features.names import name_in, names_of_files, original_name

OTHER = {"train": "test", "test": "train"}


def find_features(name: str, root, labels=None, order=None, segments: bool = False) -> FeatureData:
    """The features `name` under the folder `root`.

    labels: file or folder of frame labels, instead of those beside the features. order: file with the list of test
    videos in the order of a vector of labels. segments: see FeatureData.
    Raises UserError for features or labels that are missing, damaged, or can be understood in two ways.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--features {root} does not exist")
    refuse_other_datasets(root, name)
    train, test = read_classes(root, labels and Path(labels)) or (
        read_split(root, split) for split in ("train", "test")
    )
    if not train and not test:
        content = sorted(p.name for p in root.iterdir())
        layouts = "train*/ and test*/ with .npy files, or concat_*.npy and Concat_test_*.npy with nalist.npy"
        below = [p for p in sorted(root.iterdir()) if p.is_dir() and any(feature_folders(p, s, False) for s in OTHER)]
        advice = f"; try --features {below[0]}" if below else ""
        raise UserError(
            f"--features {root}: looked for {layouts}; found {', '.join(content[:12]) or 'nothing'}{advice}"
        )
    data = FeatureData(name, root, train, test, segments)
    if test:
        read_labels(data, labels and Path(labels), order)
    return data


def refuse_other_datasets(root: Path, name: str) -> None:
    """Raises UserError where a folder of features is named after another published dataset than `name`."""
    taken = [p for split in OTHER for p in feature_folders(root, split, verbose=False)]
    others = {key: names for key, names in PUBLISHED.items() if key not in (name, "features")}
    for p in taken if name in PUBLISHED and name != "features" else ():
        other = next((key for key, names in others.items() if normalized_name(p.name).startswith(names)), None)
        if other:
            way_out = f"with --dataset {name}: take it away, or name the folder of {name} with --features"
            raise UserError(f"--features {root} holds {p.name}, which is named after {other}, {way_out}")


def read_classes(root: Path, labels: Path | None) -> tuple[list, list] | None:
    """(train, test) of folders called after classes, as of UCF-Crime: what temporal annotations name is tested.

    None where folders are called after the splits, or are none of classes. Raises UserError without annotations.
    """
    folders = folders_of_arrays(root)
    splits = [p for p in folders if re.search("train|test", p.name, re.I)]
    files = [labels] if labels and labels.suffix == ".txt" else sorted(root.glob("*emporal*nnotation*.txt"))
    by_class = len(splits) < len(folders) and all(re.search("(?<!ab)normal", p.name, re.I) for p in splits)
    if not by_class or concatenated_arrays(root):
        return None
    if not files and splits:
        names = f"{splits[0].name} and {next(p.name for p in folders if p not in splits)}"
        way_out = "put the temporal annotations of the test videos beside them (or give them with --labels)"
        raise UserError(f"--features {root}: which videos of {names} are tested is not known: {way_out}")
    videos = read_files(folders, "train") if files else []
    names = {v.name for v in videos}
    tested = {name_in(entry, names) for file in files[:1] for entry in read_annotations(file)}
    if files and not tested & names:
        raise UserError(f"annotations {files[0]} name none of the videos under {root}, such as {min(names)}")
    train = [v for v in videos if v.name not in tested]
    return (train, [replace(v, split="test") for v in videos if v.name in tested]) if files else None


def read_split(root: Path, split: str) -> list[FeatureVideo]:
    """The videos of one split: in one array, or in folders of files."""
    concatenated = concatenated_arrays(root)
    arrays = {"train": [p for p in concatenated if "test" not in p.name.lower()]}
    arrays["test"] = [p for p in concatenated if "test" in p.name.lower()]
    if arrays[split]:
        return read_concatenated(arrays[split][0], next(iter(arrays[OTHER[split]]), None), split)
    other_folders = feature_folders(root, OTHER[split], verbose=False)
    return read_files(feature_folders(root, split), split, (root / "settings.json").exists(), other_folders)


def feature_folders(root: Path, split: str, verbose: bool = True) -> list[Path]:
    """The folders with a split's features. Of several kinds of features (RGB, Flow, …) only RGB is taken."""
    folders = folders_of_arrays(root)
    matching = [p for p in folders if re.search(split, p.name, re.I)]
    if split == "train" and not matching:  # XD-Violence: RGB/ beside RGBTest/
        matching = [p for p in folders if f"{p.name}test".lower() in [q.name.lower() for q in folders]]
    taken = [p for p in matching if re.search("rgb", p.name, re.I)] or matching
    if verbose and len(matching) > 1:
        others = ", ".join(p.name for p in matching if p not in taken)
        rest = f"; not read: {others}" if others else ""
        print(f"note: {split} features are those of {', '.join(p.name for p in taken)}{rest}", flush=True)
    return taken


def concatenated_arrays(root: Path) -> list[Path]:
    return [p for p in sorted(root.glob("*.npy")) if re.match("concat", p.name, re.I)]


def folders_of_arrays(root: Path) -> list[Path]:
    """The folders that hold .npy files, but for those of labels."""
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not re.search("mask|label", p.name, re.I)]
    return [p for p in folders if any(npy_files(p))]


def npy_files(folder: Path) -> Iterator[Path]:
    """The .npy files in a folder and below it, in any order; links are followed, each folder is read once."""
    seen = {str(p) for p in folder.resolve().parents}
    for place, below, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            below.clear()
            continue
        seen.add(os.path.realpath(place))
        yield from (Path(place, name) for name in names if name.lower().endswith(".npy"))


def load_features(folders) -> dict[Path, np.ndarray]:
    """{file: memory map} of all .npy files in and below these folders, in natural order. Raises UserError."""
    files = sorted((p for folder in folders for p in npy_files(folder)), key=lambda p: (natural(p), str(p)))
    return {p: load_array(p, "features", mmap=True) for p in files}


def read_files(folders, split: str, by_toolkit: bool = False, other_folders=()) -> list[FeatureVideo]:
    """Videos with one .npy each, or one per crop in the same folder.

    by_toolkit: the files were written by this toolkit, which keeps videos' names. other_folders: the other split's.
    """
    arrays = load_features(folders)
    for p, x in arrays.items():
        if x.ndim not in (2, 3) or 0 in x.shape:
            raise UserError(f"features {p}: expected [clips, crops, width] with at least one clip, got {x.shape}")
    groups, crops_first = [(p.stem, [p]) for p in arrays], False
    names = {p.stem: original_name(p.stem) for p in arrays}
    if not by_toolkit:
        groups = group_crops(arrays)
        names = names_of_files({stem for stem, _ in groups})
        crops_first = crops_come_first(arrays, lambda: load_features(other_folders))
    count = Counter(names[stem] for stem, _ in groups)
    videos = {}
    for stem, paths in groups:
        parts = [arrays[p] for p in paths]
        shapes = {x.shape for x in parts}
        if len(shapes) > 1:
            raise UserError(f"features {paths[0]} to {paths[-1]}: crops of one video differ in shape: {sorted(shapes)}")
        name = names[stem] if count[names[stem]] == 1 else stem  # only the endings tell these files apart
        if name in videos:
            both = f"features {videos[name].path} and {paths[0]} are both called {name}"
            raise UserError(f"{both}: keep one kind of features, or name the folder of one kind with --features")
        if parts[0].ndim == 3 and crops_first:
            parts = list(parts[0])  # a view per crop
        videos[name] = FeatureVideo(name, split, parts, path=paths[0])
    check_not_transposed(arrays)
    return list(videos.values())


def group_crops(arrays: dict[Path, np.ndarray]) -> list[tuple[str, list[Path]]]:
    """[(stem, files)] of each video: name__0.npy, name__1.npy, … where each is [clips, width] and none is missing."""
    crops = {}  # (folder, stem) -> {number: file}
    for p, x in arrays.items():
        crop = re.fullmatch(r"(.+)__(\d+)", p.stem)
        if crop and x.ndim == 2:
            crops.setdefault((p.parent, crop[1]), {})[int(crop[2])] = p
    for (folder, stem), files in crops.items():  # DeepMIL: the first crop has no number
        centre = folder / f"{stem}.npy"
        files |= {0: centre} if 0 not in files and len(files) + 1 in CROPS and centre in arrays else {}
    groups = [(stem, [f[i] for i in sorted(f)]) for (_, stem), f in crops.items() if max(f) < len(f)]
    joined = {p for _, files in groups for p in files}
    groups += [(p.stem, [p]) for p in arrays if p not in joined]
    order = {p: i for i, p in enumerate(arrays)}
    return sorted(groups, key=lambda group: order[group[1][0]])
