"""Where videos and labels are: one small reader per dataset, all returning the same record.

data = find("ped2", "data")          # any layout in circulation, found under data/
data.train, data.test                # lists of common.video.Video
data.labels(video, frames)           # uint8 [T], 1 = abnormal, or None where the dataset has none
data.masks(video)                    # bool [T, H, W] or None
data.tracks(video)                   # float32 [n, 6]: id, frame, x1, y1, x2, y2 (inclusive pixels) or None
"""

import re
from pathlib import Path

import numpy as np

from common.dataset import Dataset, plain, search
from common.io import UserError, load_array, load_arrays
from common.labels import (
    any_masks,
    csv_ranges,
    frame_labels,
    mask_images,
    mat_ranges,
    matlab_ranges,
    npz_names,
    packed_masks,
    volume_masks,
)
from common.ubnormal import ubnormal
from common.video import list_videos, natural

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
WRAPPERS = ("ucsdanomalydatasetv1p2", "ucsdanomalydataset")  # folders that hold a dataset's folder
TRAIN = ("training/frames", "training/videos", "training_videos", "train/frames", "train/videos", "training", "train")
TEST = ("testing/frames", "testing/videos", "testing_videos", "test/frames", "test/videos", "testing", "test")


def canonical(name):
    """The dataset's one name for any of the spellings in circulation."""
    for key, names in ALIASES.items():
        if plain(name) in names:
            return key
    raise UserError(f"--dataset {name} is not known; choose one of {', '.join(ALIASES)}")


# ------------------------------------------------------------------------------------------------- finding folders


def find(name, data_root="data", labels=None):
    """The Dataset `name` under `data_root`, whatever its layout. `labels`: an .npz of video name -> 0/1 per frame."""
    name, data_root = canonical(name), Path(data_root)
    if name == "demo":
        from common.demo import ensure_demo

        root = ensure_demo(data_root / "demo")
        data = folder(root, name="demo")
    elif name == "folder":
        data = folder(data_root)
    elif name == "ubnormal":
        data = ubnormal(data_root)
    else:
        data = {
            "ped1": ucsd,
            "ped2": ucsd,
            "avenue": avenue,
            "shanghaitech": shanghaitech,
            "shanghaitech-sd": shanghaitech,
        }[name](name, *locate(name, data_root))
    if labels:
        use_labels(data, Path(labels))
    return data


def use_labels(data, path):
    """Take frame labels of a Dataset from an .npz, a csv or a folder instead, each by its video's name."""
    names = {v.name for v in data.test}
    data._ranges, data._arrays, data._other_labels, data.label_source = {}, {}, (), str(path)
    if path.suffix.lower() == ".csv":
        data._ranges = csv_ranges(path, names, lambda video: canonical_video_name(data.name, video))
        return
    if not path.is_dir():
        arrays = load_arrays(path, "label file")
        entries = named_once(path, [(canonical_video_name(data.name, k), k) for k in arrays])
        data._arrays = {name: (lambda k=k: arrays[k]) for name, k in entries.items()}
        return
    entries, masks = sorted(path.iterdir()), {}
    if any(
        p.is_dir() and p.name.lower().endswith("_gt") for p in entries
    ):  # UCSD: folders of frames lie beside those of masks
        entries = [p for p in entries if not p.is_dir() or p.name.lower().endswith("_gt")]
    named = [
        (canonical_video_name(data.name, p.name if p.is_dir() else p.stem), p.name)
        for p in entries
        if p.is_dir() or p.suffix in (".npy", ".txt", ".mat", ".npz")
    ]
    per_frame = {k: path / x for k, x in named_once(path, [(k, x) for k, x in named if k in names]).items()}
    for name, p in list(per_frame.items()):
        if (
            p.is_dir()
            or p.suffix in (".mat", ".npz")
            or (p.suffix == ".npy" and load_array(p, "labels", mmap=True).ndim == 3)
        ):
            masks[name] = per_frame.pop(name)
    taken = {p.name for p in (*per_frame.values(), *masks.values())}
    other = [p.name for p in entries if p.name not in taken]
    if not per_frame and not masks:
        raise UserError(
            f"--labels {path} holds no .npy, .txt, .mat or folder that is called like a test video such as "
            f"{min(names, default='(there is none)')}" + (f"; it holds {', '.join(other[:5])}" if other else "")
        )
    if other:
        print(f"note: --labels {path}: {len(other)} entries belong to no test video, such as {other[0]}", flush=True)
    data._arrays = {k: (lambda p=p: frame_labels(p)) for k, p in per_frame.items()}
    data._arrays.update({k: (lambda p=p: any_masks(p).any((1, 2)).astype(np.uint8)) for k, p in masks.items()})
    without = sorted(names - set(data._arrays))
    if masks and without:  # sets of masks leave normal videos out
        data._ranges = {k: [] for k in without}
        print(
            f"note: {len(without)} test videos have no mask in {path} and count as normal, such as {without[0]}",
            flush=True,
        )


def named_once(path, pairs):
    """{video: entry} of the pairs that `path` holds; a video with two entries is refused."""
    out = {}
    for name, entry in pairs:
        if name in out:
            raise UserError(
                f"--labels {path}: {out[name]} and {entry} are both labels of video {name}; keep one of them"
            )
        out[name] = entry
    return out


def child(folder_, name):
    """The entry `name` of a folder, whatever its case; a/b descends; None where it is missing."""
    for part in name.split("/"):
        hits = sorted(p for p in folder_.iterdir() if p.name.lower() == part) if folder_.is_dir() else []
        if not hits:
            return None
        folder_ = hits[0]
    return folder_


def split_folders(root, names):
    """Folders of a split that hold videos: frames/ and videos/ (or training_videos/) may both be filled, else training/ counts."""
    places = [(name, child(root, name)) for name in names]
    filled = [
        (name, p)
        for name, p in places
        if p is not None
        and p.is_dir()
        and any(v for v in list_videos(p, walk=True) if not v.name.lower().endswith("_gt"))
    ]
    return [p for name, p in filled if "/" in name or "_" in name] or [p for _, p in filled[:1]]


def candidates(name, data_root):
    """data_root itself, then its children and grandchildren that are called like the dataset."""
    yield data_root
    for p in sorted(x for x in data_root.iterdir() if x.is_dir()):
        if plain(p.name) in ALIASES[name]:
            yield p
            yield from sorted(x for x in p.iterdir() if x.is_dir() and plain(x.name) in ALIASES[name] + WRAPPERS)
        elif plain(p.name) in WRAPPERS:
            yield from sorted(x for x in p.iterdir() if x.is_dir() and plain(x.name) in ALIASES[name])


def locate(name, data_root):
    """-> (root, training folders, testing folders)."""
    if not data_root.is_dir():
        raise UserError(
            f"--data-root {data_root} does not exist; {name} is looked for there and in {data_root}/{ALIASES[name][0]}"
        )
    looked = []
    for root in candidates(name, data_root):
        # the data root itself may hold several datasets: only a folder with both splits, or called like the dataset, counts as one
        train, test = split_folders(root, TRAIN), split_folders(root, TEST)
        if test and (train or root != data_root or {plain(root.name), plain(root.resolve().name)} & set(ALIASES[name])):
            return root, train, test
        looked.append(root)
    found = sorted(p.name + ("/" if p.is_dir() else "") for p in data_root.iterdir())
    raise UserError(
        f"{name} was not found under --data-root {data_root}: looked in {', '.join(map(str, looked))} for a training "
        f"folder ({', '.join(TRAIN[:3])}, train, …) and a testing folder ({', '.join(TEST[:3])}, test, …) with videos "
        f"or folders of frames; found {', '.join(found[:12]) or 'nothing'}{' …' if len(found) > 12 else ''}"
    )


def canonical_video_name(name, video):
    """A video's one name in every copy of a dataset: Test001 -> 01 (ped), 1 -> 01 (avenue); others unchanged."""
    digits = re.findall(r"\d+", video)
    if name in ("ped1", "ped2", "avenue") and digits:
        return f"{int(digits[-1]):02d}"
    return video


def videos(name, folders, split):
    """The videos of a split, of all its folders; one that stands in two of them is taken from the first."""
    by_name, doubled = {}, []
    for folder_ in folders:
        left_out = []
        found = [
            v for v in list_videos(folder_, split, walk=True, left_out=left_out) if not v.name.lower().endswith("_gt")
        ]
        if left_out:
            print(
                f"note: {len(left_out)} files in {folder_} are no part of a video, or of an unknown kind, such as {left_out[0]}",
                flush=True,
            )
        here = {}
        for v in found:
            v.name = canonical_video_name(name, v.name)
            if v.name in here:
                raise UserError(f"{folder_}: several videos are called {v.name}; keep one of each")
            here[v.name] = v
        doubled += [v for k, v in here.items() if k in by_name]
        by_name = {**here, **by_name}
    if doubled:
        print(
            f"note: {len(doubled)} videos, such as {doubled[0].path}, stand in {folders[0]} too and are taken from there",
            flush=True,
        )
    return sorted(by_name.values(), key=lambda v: natural(v.name))


# --------------------------------------------------------------------------------------------------------- readers


def ucsd(name, root, train, test):
    """UCSD Ped1 and Ped2 (Mahadevan et al. 2010)."""
    data = Dataset(
        name,
        root,
        videos(name, train, "train"),
        videos(name, test, "test"),
        label_forms=f"{name}.mat, UCSD{name}.m, or a folder Test*_gt of masks for every test video",
    )
    mask_folders = {canonical_video_name(name, p.name[:-3]): p for p in search(root, r"test\d+_gt") if p.is_dir()}
    data._masks = {k: (lambda p=p: mask_images(p)) for k, p in mask_folders.items()}
    if mask_folders:
        data.mask_source = "Test*_gt images"
    packed = search(root, r"pixel_masks_packed\.npz")
    if packed and not data._masks:
        data._masks = {
            k: (lambda k=k: packed_masks(packed[0], k)) for k in npz_names(packed[0]) if k not in ("height", "width")
        }
        data.mask_source = packed[0].name
    mat, script = search(root, rf"{name}\.mat"), search(root, rf"ucsd{name}\.m")
    if mat:
        data._ranges, data.label_source = mat_ranges(mat[0]), mat[0].name
    elif script:
        data._ranges, data.label_source = matlab_ranges(script[0]), script[0].name
    elif set(mask_folders) >= {v.name for v in data.test}:
        labels_from_masks(data)
    compare_masks(data)
    return data


def avenue(name, root, train, test):
    """CUHK Avenue (Lu et al. 2013). Its two label sets differ in 441 frames: the masks win where both are there."""
    data = Dataset(
        name,
        root,
        videos(name, train, "train"),
        videos(name, test, "test"),
        label_forms="testing_label_mask/1_label.mat … (in it, or in ground_truth_demo/ beside it), or avenue.mat",
    )
    around = [
        place for p in (root.resolve(), root.absolute()) for place in (p.parent.parent, p.parent)
    ]  # the nearest counts
    beside = [p for place in around for p in (place / "ground_truth_demo", place / "testing_label_mask") if p.is_dir()]
    files = {
        canonical_video_name(name, p.name.split("_")[0]): p
        for place in (*beside, root)
        for p in search(place, r"\d+_label\.mat", depth=4)
    }
    data._masks = {k: (lambda p=p: volume_masks(p)) for k, p in files.items()}
    mat = search(root, r"avenue\.mat")
    if files:
        data.mask_source = "testing_label_mask (volLabel)"
        labels_from_masks(data)
        if mat:
            compare_ranges(data, mat[0].name, mat_ranges(mat[0]))
    elif mat:
        data._ranges, data.label_source = mat_ranges(mat[0]), mat[0].name
    return data


def shanghaitech(name, root, train, test):
    """ShanghaiTech Campus (Luo et al. 2017)."""
    data = Dataset(
        name,
        root,
        videos(name, train, "train"),
        videos(name, test, "test"),
        label_forms="test_frame_mask/ (or frame_masks/) with one .npy per test video",
    )
    for v in data.train + data.test:
        v.scene = v.name.split("_")[0]
    for p in search(root, r"(test_?)?frame_?masks?"):
        data._arrays = {f.stem: (lambda f=f: load_array(f, "frame labels")) for f in sorted(p.glob("*.npy"))}
        data.label_source = p.name
    for p in search(root, r"(test_?)?pixel_?masks?"):
        data._masks = {f.stem: (lambda f=f: any_masks(f)) for f in sorted(p.glob("*.npy"))}
        data.mask_source = p.name
    return data


def folder(root, name="folder"):
    """Anyone's videos: train/ and test/ (or videos alone: then all are test), with labels where there are some.

    Labels: labels/<video>.npy or .txt (0/1 per frame), or labels.csv with lines video,start,end (0-based frames, end
    exclusive; a video without a line is normal). Masks: masks/<video>.npy, .npz (array `masks`) or a folder of images.
    Tracks: tracks/<video>.csv. A scene is what stands before the first underscore of a name, if all have one.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"--data-root {root} does not exist; it should hold train/ and test/ with videos or folders of frames"
        )
    train, test = split_folders(root, TRAIN), split_folders(root, TEST)
    for names, filled in ((TRAIN, train), (TEST, test)):
        empty = next(
            (
                p
                for p in (child(root, x) for x in names)
                if not filled and p is not None and p.is_dir() and any(p.iterdir())
            ),
            None,
        )
        if empty is not None:
            left = [p.name for p in sorted(empty.iterdir())]
            raise UserError(
                f"{empty} holds no video: {len(left)} entries, such as {left[0]}, are of no kind that is read; convert "
                "videos with ffmpeg -i IN OUT.mp4"
            )
    if train or test:
        data = Dataset(name, root, videos(name, train, "train"), videos(name, test, "test"))
    else:
        data = Dataset(name, root, [], list_videos(root, "test"))
    data.label_forms = "labels/<video>.npy or .txt, labels.csv (video,start,end), or masks/ of every test video"
    if not data.train and not data.test:
        found = sorted(p.name for p in root.iterdir())
        raise UserError(
            f"--data-root {root} holds no videos: looked for train/ and test/ with videos or folders of "
            f"frames; found {', '.join(found[:12]) or 'nothing'}"
        )
    global_batch = data.train + data.test
    if all("_" in v.name for v in global_batch):
        for v in global_batch:
            v.scene = v.name.split("_")[0]
    names = {v.name for v in data.test}
    places = [
        p
        for p in (child(root, "labels"), child(root, "test_labels"), child(root, "test_frame_mask"))
        if p is not None and p.is_dir()
    ]
    for place in places:
        strange = []
        for f in sorted(place.iterdir()):
            if f.suffix in (".npy", ".txt") and f.stem in names:
                data._arrays[f.stem] = lambda f=f: frame_labels(f)
                data.label_source = f"{place.name}/"
            else:
                strange.append(f.name)
        if strange:
            more = " …" if len(strange) > 3 else ""
            data.not_understood = (
                f"{place.name}/ holds {', '.join(strange[:3])}{more}: not called like a test video such as "
                f"{min(names, default='')}.npy"
            )
    table = child(root, "labels.csv")
    if table is not None and not data._arrays:
        data._ranges, data.label_source = csv_ranges(table, names), table.name
    elif table is not None:
        try:
            compare_ranges(data, table.name, csv_ranges(table, names))
        except UserError as e:
            print(f"note: labels are those of {data.label_source}; {table.name} is not compared ({e})", flush=True)
    for place in (child(root, "masks"), child(root, "test_pixel_mask")):
        for f in sorted(place.iterdir()) if place is not None and place.is_dir() else ():
            video = f.name if f.is_dir() else f.stem
            if video in names and (f.suffix in (".npy", ".npz") or f.is_dir()):
                data._masks[video] = lambda f=f: any_masks(f)
                data.mask_source = f"{place.name}/"
    if data._masks and not data.has_labels and names <= set(data._masks):
        labels_from_masks(data)
    elif not data._other_labels:
        compare_masks(data)
    place = child(root, "tracks")
    for f in sorted(place.iterdir()) if place is not None and place.is_dir() else ():
        if f.stem in names and f.suffix in (".csv", ".txt"):
            data._tracks[f.stem] = f
    return data


def compare_ranges(data, source, ranges):
    """Ranges {video name: [(first, last)]} are a second source of labels."""
    other = Dataset(data.name, data.root, [], [], source, _ranges=ranges)
    data._other_labels = (source, {v.name: (lambda n, v=v: other.labels(v, n)) for v in data.test if v.name in ranges})


def compare_masks(data):
    """Masks are a second source of labels, where they are not the first."""
    if data._ranges or (data._arrays and not data.label_source.startswith("masks")):
        data._other_labels = (
            data.mask_source,
            {k: (lambda n, read=read: read().any(axis=(1, 2))) for k, read in data._masks.items()},
        )


def labels_from_masks(data):
    data._arrays = {k: (lambda read=read: read().any(axis=(1, 2)).astype(np.uint8)) for k, read in data._masks.items()}
    data.label_source = f"masks: {data.mask_source}"
