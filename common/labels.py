"""Files of frame labels and pixel masks, in the formats that datasets come with."""
import csv
import re
from pathlib import Path

import cv2
import numpy as np

from common.files import UserError, first_line, load_array, load_arrays
from common.video import natural


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
        pairs = np.asarray(cell).astype(np.int64)
        if pairs.size and pairs.shape[0] != 2:
            raise UserError(f"{path}: video {i + 1} has ranges of shape {pairs.shape}, expected 2×k")
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


def csv_ranges(path, names):
    out = {n: [] for n in names}
    with open(path, newline="", encoding="utf-8-sig") as f:
        for i, row in enumerate(csv.reader(f), 1):
            if not row or row[0].startswith("#") or [x.strip().lower() for x in row] == ["video", "start", "end"]:
                continue
            try:
                name, start, end = row[0].strip(), int(row[1]), int(row[2])
            except (IndexError, ValueError):
                raise UserError(f"{path} line {i}: expected video,start,end, got {','.join(row)!r}") from None
            if name not in out:
                raise UserError(f"{path} line {i}: there is no test video {name}")
            if not 0 <= start < end:
                raise UserError(f"{path} line {i}: the range {start}..{end} is empty (start is the first abnormal "
                                "frame, counted from 0; end is the one after the last)")
            out[name].append((start, end - 1))
    return out


def frame_labels(path):
    if path.suffix == ".npy":
        return load_array(path, "frame labels")
    try:
        return np.array(path.read_text().replace(",", " ").split(), dtype=np.float32).astype(np.int64)
    except ValueError:
        raise UserError(f"frame labels {path} must be zeros and ones separated by spaces or lines") from None


def mask_images(path):
    """A folder of black and white images, one per frame."""
    files = sorted((p for p in path.iterdir() if p.suffix.lower() in (".bmp", ".png", ".tif", ".jpg")), key=natural)
    images = [cv2.imdecode(np.fromfile(p, np.uint8), cv2.IMREAD_GRAYSCALE) if p.stat().st_size else None for p in files]
    if not images or any(x is None for x in images):
        bad = next((p for p, x in zip(files, images) if x is None), path)
        raise UserError(f"pixel masks: {bad} cannot be read")
    return np.stack(images) > 127


def volume_masks(path):
    """Avenue's `volLabel`: a cell of H×W masks."""
    return np.stack([np.asarray(x) != 0 for x in read_mat(path, "volLabel").reshape(-1)])


def npz_names(path):
    try:
        with np.load(path, allow_pickle=False) as z:
            return list(z.files)
    except Exception as e:
        raise UserError(f"pixel masks {path} cannot be read ({first_line(e)})") from None


def packed_masks(path, name):
    with np.load(path, allow_pickle=False) as z:
        return np.unpackbits(z[name], axis=-1, count=int(z["width"])).astype(bool)


def any_masks(path):
    if path.is_dir():
        return mask_images(path)
    if path.suffix == ".npy":
        return load_array(path, "pixel mask") != 0
    arrays = load_arrays(path, "pixel mask")
    if "masks" not in arrays:
        raise UserError(f"pixel mask {path} has no array called masks; it holds {', '.join(arrays) or 'nothing'}")
    return arrays["masks"] != 0
