"""Frame labels of clip features: by names of videos, or a vector of all test videos in the order of a list."""

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from common.io import UserError, load_array, load_arrays, read_text, reading
from common.readers.labels import csv_ranges, frame_labels
from frd_uvad.features.data import CLIP_FRAMES, LABELS_OF_SEGMENTS, FeatureData, FeatureVideo, is_normal_by_name
from frd_uvad.features.names import name_in


def read_labels(data: FeatureData, path: Path | None, order: Path | None) -> None:
    """Fill in the labels of `data` from `path`, else from the files beside the features.

    Labels by name are preferred to a vector, which is then compared with them. Raises UserError where they do not fit.
    """
    files = [path] if path else sorted(data.root.glob("*emporal*nnotation*.txt"))
    if not path:
        files += sorted(data.root.glob("annotations*.txt"))
        folders = [p for p in sorted(data.root.iterdir()) if p.is_dir()]
        files += [p for p in folders if p.name == "labels" or "frame_mask" in p.name]
        files += sorted(data.root.glob("gt*.npy"))
    vectors = [p for p in files if p.suffix == ".npy" and not p.is_dir()]
    by_name = [p for p in files if p not in vectors]
    if not by_name:
        if vectors:
            data.annotations, data.label_source = cut_vector(data, vectors[0], order)
        return
    data.annotations, data.label_source = read_labels_by_name(by_name[0], data), by_name[0].name
    labels = {v.name: data.labels(v) for v in data.test}  # labels that do not fit are refused before any work
    if vectors:
        try:
            other, source = cut_vector(data, vectors[0], order)
            differ = sum(int((y[: len(other[name])] != other[name][: len(y)]).sum()) for name, y in labels.items())
            comparison = f"{source} differs in {differ} frames"
        except UserError as e:
            comparison = f"{vectors[0].name} is not compared ({e})"
        print(f"note: labels are those of {data.label_source}; {comparison}", flush=True)


def read_labels_by_name(source: Path, data: FeatureData) -> dict:
    """{video name: uint8 [frames], or ranges [(first, last)]} of a folder, .npz, csv, or temporal annotations."""
    names = {v.name for v in data.test}
    if source.is_dir():
        entries = {f.stem: frame_labels(f) for f in sorted(source.iterdir()) if f.suffix in (".npy", ".txt")}
    elif source.suffix == ".npz":
        entries = load_arrays(source, "label file")
    elif source.suffix == ".csv":
        return csv_ranges(source, names, lambda text: name_in(text, names) or text)
    else:
        entries = read_annotations(source)
    out, unknown = {}, []
    for entry, labels in entries.items():
        name = name_in(entry, names)
        if name in out:
            raise UserError(f"labels {source} hold video {name} twice, as {entry} and in another spelling: remove one")
        if name is None:
            unknown.append(entry)
        else:
            is_ranges = isinstance(labels, list)
            out[name] = labels if is_ranges else zeros_and_ones(labels, f"labels of video {entry} in {source}")
    if unknown:
        print(f"note: {source.name} annotates {len(unknown)} videos without features, such as {unknown[0]}", flush=True)
    normal = sorted(names - set(out))  # published sets of masks leave normal videos out
    has_masks = "mask" in source.name.lower() or any(np.ndim(x) > 2 for x in entries.values())
    if source.is_dir() and out and normal and has_masks:
        example = f"such as {normal[0]}: they are taken for normal"
        print(f"note: {source.name} has no mask of {len(normal)} test videos, {example}", flush=True)
        out.update({name: [] for name in normal})
    return out


def zeros_and_ones(x, what: str) -> np.ndarray:
    """uint8 [frames] from a vector, or from pixel masks [frames, H, W]: 1 if any pixel is marked. Raises UserError."""
    x = np.asarray(x)
    x = (x != 0).any((1, 2)) if x.ndim == 3 else x.reshape(-1)
    if not x.size or not np.isin(x, (0, 1)).all():
        raise UserError(f"{what} must be one 0 or 1 per frame")
    return x.astype(np.uint8)


def cut_vector(data: FeatureData, path: Path, order: Path | None) -> tuple[dict[str, np.ndarray], str]:
    """The labels of all test clips or frames, cut by video. -> ({video name: uint8 [frames]}, their source)"""
    if data.segments:
        raise UserError(f"labels {path} cannot be cut by video: segments {LABELS_OF_SEGMENTS}")
    flat = zeros_and_ones(load_array(path, "frame labels"), f"labels {path}")
    videos, source = videos_in_order(data, path, order)
    ends = np.cumsum([len(v) for v in videos])
    if len(flat) == ends[-1]:
        flat = np.repeat(flat, CLIP_FRAMES)
    if len(flat) != ends[-1] * CLIP_FRAMES:
        expected = f"expected one 0 or 1 per clip, or {CLIP_FRAMES} per clip"
        raise UserError(f"labels {path}: {len(flat)} entries for {ends[-1]} test clips; {expected}")
    out = {v.name: part for v, part in zip(videos, np.split(flat, ends[:-1] * CLIP_FRAMES))}
    for name, part in out.items():
        if part.any() and is_normal_by_name(name):
            normal = f"mark frames of {name}, which is normal by its name"
            advice = "they were made in another order; give its list with --order FILE"
            raise UserError(f"labels {path} in the order of {source} {normal}: {advice}")
    return out, f"{path.name} in the order of {source}"


def videos_in_order(data: FeatureData, path: Path, order: Path | None) -> tuple[list[FeatureVideo], str]:
    """The test videos in the order of the label vector `path`, and the name of the file that gives this order."""
    if order is None and len({v.path for v in data.test}) == 1:  # one video, or one array
        return data.test, data.test[0].path.name
    by_name, orders = {v.name: v for v in data.test}, {}
    texts = [p for p in sorted(data.root.glob("*.txt")) if "annotation" not in p.name.lower()]
    for file in [Path(order)] if order else [*sorted(data.root.glob("*.list")), *texts]:
        names = listed_names(file, by_name)
        missing, others = sorted(set(by_name) - set(names)), sorted(set(names) - set(by_name))
        if not missing and not others:
            orders.setdefault(tuple(names), file.name)
        elif order:
            counts = f"{len(missing)} of them are missing there and {len(others)} others are listed, such as"
            raise UserError(f"--order {order} is not the list of these test videos: {counts} {(missing + others)[0]}")
    if len(orders) == 1:
        names, source = orders.popitem()
        return [by_name[n] for n in names], source
    unknown = f"labels {path} go through all test videos in an order that is not known"
    if orders:
        raise UserError(f"{unknown}: {' and '.join(orders.values())} differ: choose one with --order FILE")
    by_list = "put the list of test videos beside it (*.list or *.txt, a name a line) or give it with --order FILE"
    by_name = "labels/<video>.npy, --labels FILE.npz, temporal annotations"
    raise UserError(f"{unknown}: {by_list}, or give labels by name ({by_name})")


def listed_names(path, names: Collection[str]) -> list[str]:
    """The videos, of `names` or others, whose names or paths a list has, each once. Raises UserError."""
    out = {}
    for line in filter(None, map(str.strip, read_text(path, "list of videos").splitlines())):
        name = name_in(line, names) or name_in(line.split()[0], names)
        if name or not line.startswith("#"):  # a name may begin with #, else it is a comment
            out[name or line] = None
    return list(out)


def read_annotations(path) -> dict[str, list[tuple[int, int]]]:
    """UCF-Crime: `Abuse028_x264.mp4  Abuse  165  240  -1  -1`; XD-Violence: `name start end start end …`.

    Frames are inclusive; -1 -1 is no event. -> {video name without suffix: [(first, last)]}. Raises UserError.
    """
    out = {}
    for words in filter(None, map(str.split, read_text(path, "annotations").splitlines())):
        with reading("annotations", path, "cannot be read", OverflowError):
            numbers = [int(float(w)) for w in words[1:] if re.fullmatch(r"-?\d+(\.\d+)?", w)]
        pairs = [(a, b) for a, b in zip(numbers[::2], numbers[1::2]) if (a, b) != (-1, -1)]
        if len(numbers) % 2 or any(not 0 <= a <= b for a, b in pairs):
            expected = "expected pairs of the first and last abnormal frame, and -1 -1 for none"
            raise UserError(f"annotations {path}: {' '.join(words)}: {expected}")
        out.setdefault(re.sub(r"\.(mp4|avi|mkv)$", "", words[0], flags=re.I), []).extend(pairs)
    return out
