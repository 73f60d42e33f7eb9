"""Files of frame labels and pixel masks, in the formats that datasets come with."""

import re
from pathlib import Path

import numpy as np

from common.io import UserError, first_line, load_array, load_arrays, read_table, read_text
from common.pictures import read_grey
from common.video import Video, frame_files, list_frames


def read_mat(path, key):
    from scipy import io

    try:
        content = io.loadmat(path)
    except Exception as e:  # scipy raises many kinds on damaged files
        raise UserError(f"{path} is not a readable MATLAB file ({first_line(e)})") from None
    if key not in content:
        raise UserError(f"{path} has no variable {key!r}; it holds {', '.join(k for k in content if k[0] != '_')}")
    return content[key]


def mat_ranges(path):
    """`gt` of ped2.mat and avenue.mat: per video 2×k, 1-based inclusive."""
    out = {}
    for i, cell in enumerate(read_mat(path, "gt").reshape(-1)):
        pairs = np.asarray(cell)
        if pairs.size and (
            pairs.ndim != 2 or len(pairs) != 2 or pairs.dtype.kind not in "iuf" or not np.isfinite(pairs).all()
        ):
            raise UserError(
                f"{path}: video {i + 1} has ranges of shape {pairs.shape} and type {pairs.dtype}, expected whole numbers 2×k"
            )
        pairs = pairs.astype(np.int64)
        out[f"{i + 1:02d}"] = [(int(a) - 1, int(b) - 1) for a, b in pairs.reshape(2, -1).T]
    return out


def matlab_ranges(path):
    """UCSDped2.m: one line `….gt_frame = [61:180, …];` per video, 1-based inclusive."""
    out = {}
    for line in Path(path).read_text(errors="replace").splitlines():
        m = re.search(r"gt_frame\s*=\s*\[([^\]]*)\]", line.split("%")[0])
        if m:
            pairs = re.findall(r"(\d+)\s*:\s*(\d+)", m.group(1))
            out[f"{len(out) + 1:02d}"] = [(int(a) - 1, int(b) - 1) for a, b in pairs]
    if not out:
        raise UserError(f"{path} holds no line with gt_frame = [first:last]")
    return out


def csv_ranges(path, names, canonical_name=str):
    """Lines video,start,end of a csv -> {video name: [(first, last)]}; a video of `names` without a line is normal."""
    out = {n: [] for n in names}
    for i, row in read_table(path, "frame labels", names):
        if [x.lower() for x in row] == ["video", "start", "end"]:
            continue
        try:
            name, start, end = canonical_name(row[0]), int(row[1]), int(row[2])
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


def frame_labels(path):
    if path.suffix == ".npy":
        return load_array(path, "frame labels")
    try:
        return np.array([int(float(x)) for x in read_text(path, "frame labels").replace(",", " ").split()], np.int64)
    except (ValueError, OverflowError):
        raise UserError(f"frame labels {path} must be zeros and ones separated by spaces or lines") from None


def stacked(masks, path):
    """Masks [H, W] of one video as bool [T, H, W]; nonzero is abnormal."""
    masks = [np.asarray(m) for m in masks]
    shapes = {m.shape for m in masks}
    if len(shapes) != 1:
        raise UserError(
            f"pixel masks {path}: expected pictures of one size, got {', '.join(map(str, sorted(shapes))) or 'none'}"
        )
    return volume(np.stack(masks), path)


def mask_images(path):
    """A folder of black and white images, one per frame."""
    files, _ = frame_files(Video(path.name, path, files=list_frames(path)))
    if None in files:  # those behind it would stand at other frames
        raise UserError(
            f"pixel masks {path}: {files.count(None)} pictures are missing, the first after {files[files.index(None) - 1]}"
        )
    return stacked([read_grey(path / f, "pixel mask") > 127 for f in files], path)


def volume_masks(path):
    """Avenue's `volLabel`: a cell of H×W masks."""
    return stacked(read_mat(path, "volLabel").reshape(-1), path)


def npz_names(path):
    try:
        with np.load(path, allow_pickle=False) as z:
            return list(z.files)
    except Exception as e:
        raise UserError(f"pixel masks {path} cannot be read ({first_line(e)})") from None


def packed_masks(path, name):
    arrays = load_arrays(path, "pixel masks", (name, "width"))
    bits, width = arrays[name], arrays["width"]
    if bits.dtype != np.uint8 or bits.ndim != 3 or width.shape != () or not 0 < int(width) <= 8 * bits.shape[2]:
        raise UserError(f"pixel masks {path}: {name} must be packed bits, uint8 [T, H, width / 8]")
    return np.unpackbits(bits, axis=-1, count=int(width)).astype(bool)


def any_masks(path):
    """bool [T, H, W] of a folder of images, Avenue's .mat, an .npy, or the array `masks` of an .npz."""
    if path.is_dir():
        return mask_images(path)
    if path.suffix == ".mat":
        return volume_masks(path)
    if path.suffix == ".npy":
        return volume(load_array(path, "pixel masks"), path)
    arrays = load_arrays(path, "pixel masks")
    if "masks" not in arrays:
        raise UserError(f"pixel masks {path} has no array called masks; it holds {', '.join(arrays) or 'nothing'}")
    return volume(arrays["masks"], path)


def volume(masks, path):
    """bool [T, H, W] of an array; nonzero is abnormal."""
    if masks.ndim != 3 or masks.dtype.kind not in "biuf":
        raise UserError(
            f"pixel masks {path}: expected numbers [T, H, W], got shape {masks.shape} of type {masks.dtype}"
        )
    return masks != 0
