"""Files of frame labels, pixel masks and tracks, in the formats that datasets come with. All raise UserError."""

import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np

from common.io import UserError, load_array, load_arrays, read_table, read_text, reading
from common.readers.pictures import read_grey
from common.readers.video import Video, frame_files, list_frames

Ranges = dict[str, list[tuple[int, int]]]  # video name -> [(first, last)] abnormal frames, from 0, inclusive


def read_mat(path: Path, key: str) -> np.ndarray:
    """One variable of a MATLAB file."""
    from scipy import io

    with reading("labels", path, "are not a readable MATLAB file", Exception):  # scipy raises many kinds
        content = io.loadmat(path)
    if key not in content:
        raise UserError(f"{path} has no variable {key!r}; it holds {', '.join(k for k in content if k[0] != '_')}")
    return content[key]


def mat_ranges(path: Path) -> Ranges:
    """`gt` of ped2.mat and avenue.mat: per video 2×k, 1-based inclusive."""
    out = {}
    for i, cell in enumerate(read_mat(path, "gt").reshape(-1), 1):
        pairs = np.asarray(cell)
        is_ranges = pairs.ndim == 2 and len(pairs) == 2 and pairs.dtype.kind in "iuf" and np.isfinite(pairs).all()
        if pairs.size and not is_ranges:
            shape = f"ranges of shape {pairs.shape} and type {pairs.dtype}"
            raise UserError(f"{path}: video {i} has {shape}, expected whole numbers 2×k")
        pairs = pairs.astype(np.int64).reshape(2, -1) - 1
        out[f"{i:02d}"] = [(int(a), int(b)) for a, b in pairs.T]
    return out


def matlab_ranges(path: Path) -> Ranges:
    """UCSDped2.m: one line `….gt_frame = [61:180, …];` per video, 1-based inclusive."""
    out = {}
    for line in path.read_text(errors="replace").splitlines():
        assignment = re.search(r"gt_frame\s*=\s*\[([^\]]*)\]", line.split("%")[0])
        if assignment:
            pairs = re.findall(r"(\d+)\s*:\s*(\d+)", assignment[1])
            out[f"{len(out) + 1:02d}"] = [(int(a) - 1, int(b) - 1) for a, b in pairs]
    if not out:
        raise UserError(f"{path} holds no line with gt_frame = [first:last]")
    return out


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
    """The array of an .npy, or the numbers of a text, int64 [frames]."""
    if path.suffix == ".npy":
        return load_array(path, "frame labels")
    problem = "must be zeros and ones separated by spaces or lines"
    with reading("frame labels", path, problem, (ValueError, OverflowError)):
        return np.array([int(float(x)) for x in read_text(path, "frame labels").replace(",", " ").split()], np.int64)


def read_masks(path: Path) -> np.ndarray:
    """bool [T, H, W] of a folder of images, Avenue's .mat (volLabel), an .npy, or the array `masks` of an .npz.

    Nonzero is abnormal; of images, what is brighter than 127.
    """
    if path.is_dir():
        files, _ = frame_files(Video(path.name, path, files=list_frames(path)))
        if None in files:  # the pictures after it would stand at other frames
            missing, before = files.count(None), files[files.index(None) - 1]
            raise UserError(f"pixel masks {path}: {missing} pictures are missing, the first after {before}")
        masks = stacked([read_grey(path / f, "pixel mask") > 127 for f in files], path)
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


def packed_masks(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """{video: function that returns its masks, bool [T, H, W]} of an .npz of bits, uint8 [T, H, width / 8]."""
    with reading("pixel masks", path, "cannot be read", Exception), np.load(path, allow_pickle=False) as z:
        return {name: partial(unpack, path, name) for name in z.files if name not in ("height", "width")}


def unpack(path: Path, name: str) -> np.ndarray:
    arrays = load_arrays(path, "pixel masks", (name, "width"))
    bits, width = arrays[name], arrays["width"]
    if bits.dtype != np.uint8 or bits.ndim != 3 or width.shape != () or not 0 < int(width) <= 8 * bits.shape[2]:
        raise UserError(f"pixel masks {path}: {name} must be packed bits, uint8 [T, H, width / 8]")
    return np.unpackbits(bits, axis=-1, count=int(width)).astype(bool)


def read_tracks(path: Path) -> np.ndarray:
    """float32 [n, 6] of lines id,frame,x1,y1,x2,y2: frames from 0, inclusive pixels."""
    with reading("tracks", path, "are not lines id,frame,x1,y1,x2,y2", ValueError):
        tracks = np.array([row for _, row in read_table(path, "tracks")], np.float32).reshape(-1, 6)
    if not np.isfinite(tracks).all():
        raise UserError(f"tracks {path} hold NaN or infinite numbers")
    return tracks
