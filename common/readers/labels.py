"""Files of frame labels, pixel masks and tracks, in the formats that datasets come with. All raise UserError."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from common.io import UserError, load_array, load_arrays, read_table, read_text, reading
from common.readers.pictures import read_grey
from common.readers.video import Video, frame_files, list_frames

FOLDER = "folder"  # beside suffixes: a folder of images
Ranges = dict[str, list[tuple[int, int]]]  # video name -> [(first, last)] abnormal frames, from 0, inclusive


def read_mat(path: Path, key: str) -> np.ndarray:
    """One variable of a MATLAB file."""
    from scipy import io

    with reading("labels", path, "are not a readable MATLAB file", Exception):  # scipy raises many kinds
        content = io.loadmat(path)
    if key not in content:
        raise UserError(f"{path} has no variable {key!r}; it holds {', '.join(k for k in content if k[0] != '_')}")
    return content[key]


def csv_ranges(path: Path, names: Collection[str], canonical_name: Callable[[str], str] = str) -> Ranges:
    """Lines video,start,end of a csv; a video of `names` without a line is normal."""
    out = {n: [] for n in names}
    for i, row in read_table(path, "frame labels", names):
        if [x.lower() for x in row] == ["video", "start", "end"]:
            continue
        try:
            name, start = canonical_name(row[0]), int(row[1])
            end = int(row[2])
        except (IndexError, ValueError):
            raise UserError(f"{path} line {i}: expected video,start,end, got {','.join(row)!r}") from None
        if name not in out:
            raise UserError(f"{path} line {i}: there is no test video {name}")
        if not 0 <= start < end:
            raise UserError(
                f"{path} line {i}: the range {start}..{end} is empty (start is the first abnormal "
                "frame, counted from 0; end is the one after the last)"
            )
        out[name].append((start, end - 1))
    return out


def frame_labels(path: Path) -> np.ndarray:
    """The array of an .npy, or the numbers of a text, float64 [frames]; whether they are 0 or 1 is not asked here."""
    if path.suffix == ".npy":
        return load_array(path, "frame labels")
    problem = "must be zeros and ones separated by spaces or lines"
    with reading("frame labels", path, problem, (ValueError, OverflowError)):
        return np.array(read_text(path, "frame labels").replace(",", " ").split(), np.float64)


def read_masks(path: Path) -> np.ndarray:
    """bool [T, H, W] of a folder of images, Avenue's .mat (volLabel), an .npy, or the array `masks` of an .npz.

    Nonzero is abnormal; of images, what is brighter than 127, or than 0 where all are of 0 and 1.
    """
    if path.is_dir():
        files, _ = frame_files(Video(path.name, path, files=list_frames(path)))
        if None in files:  # the pictures after it would stand at other frames
            missing, before = files.count(None), files[files.index(None) - 1]
            raise UserError(f"pixel masks {path}: {missing} pictures are missing, the first after {before}")
        pictures = stacked([read_grey(path / f, "pixel mask") for f in files], path)
        masks = pictures > (0 if pictures.max(initial=0) == 1 else 127)
    elif path.suffix == ".mat":
        masks = stacked([np.asarray(m) for m in read_mat(path, "volLabel").reshape(-1)], path)
    elif path.suffix == ".npy":
        masks = load_array(path, "pixel masks")
    else:
        arrays = load_arrays(path, "pixel masks")
        if "masks" not in arrays:
            raise UserError(f"pixel masks {path} has no array called masks; it holds {', '.join(arrays) or 'nothing'}")
        masks = arrays["masks"]
    if masks.ndim != 3 or masks.dtype.kind not in "biuf":
        array = f"shape {masks.shape} of type {masks.dtype}"
        raise UserError(f"pixel masks {path}: expected numbers [T, H, W], got {array}")
    return masks != 0


def stacked(masks: list[np.ndarray], path: Path) -> np.ndarray:
    shapes = sorted({m.shape for m in masks})
    if len(shapes) != 1:
        sizes = ", ".join(map(str, shapes)) or "none"
        raise UserError(f"pixel masks {path}: expected pictures of one size, got {sizes}")
    return np.stack(masks)


def read_tracks(path: Path) -> np.ndarray:
    """float32 [n, 6] of lines id,frame,x1,y1,x2,y2: frames from 0, inclusive pixels."""
    with reading("tracks", path, "are not lines id,frame,x1,y1,x2,y2", ValueError):
        tracks = np.array([row for _, row in read_table(path, "tracks")], np.float32).reshape(-1, 6)
    if not np.isfinite(tracks).all():
        raise UserError(f"tracks {path} hold NaN or infinite numbers")
    return tracks


def entries_of_videos(entries, kinds, names: Collection[str], canonical_name=str) -> tuple[list, list[str]]:
    """-> ([(video of `names`, entry named after it)], other entries), names of the paths `entries`.

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
