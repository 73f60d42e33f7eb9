"""Reading one picture, or noticing that it is damaged; its size, type and channels."""

import re
from pathlib import Path

import cv2
import numpy as np

from common.io import UserError, atomic_write

MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # begins a JPEG's segment or end; no pixels look like it
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 20000  # pixels along a side


def read_image(path, keep_type: bool = False) -> np.ndarray | None:
    """[H, W] or [H, W, 3] BGR, turned as its EXIF says, without transparency; None if damaged or no image.

    keep_type: do not convert 16 bits and floats to uint8.
    """
    try:
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH) if is_sound(data.tobytes()) else None
    except (OSError, cv2.error):
        return None
    if image is None:
        return None
    image = image if image.ndim == 2 else image[:, :, :3]
    return image if keep_type else eight_bits(image)


def eight_bits(image: np.ndarray) -> np.ndarray:
    """To uint8: of 16 bits the high byte, floats in 0..1 times 255."""
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind == "f":
        return (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8)
    return (image.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)


def is_sound(data: bytes) -> bool:
    """Whether a JPEG, PNG or BMP reaches its end and has at most LARGEST pixels a side; True for other formats.

    OpenCV would allocate any size in the header, and fill missing parts with grey.
    """
    if len(data) < 26:
        return False
    if data.startswith(b"\xff\xd8"):
        i = 2
        while (marker := MARKER.search(data, i)) and marker[0] != b"\xff\xd9":
            i = marker.end()
            i += int.from_bytes(data[i : i + 2], "big")  # skip the segment: a thumbnail has an end of its own
        return bool(marker)
    if data.startswith(PNG):
        i = 8
        while i < len(data) and data[i + 4 : i + 8] != b"IEND":
            i += 12 + int.from_bytes(data[i : i + 4], "big")
        return i < len(data) and max(np.frombuffer(data, ">u4", 2, 16)) <= LARGEST
    if data.startswith(b"BM"):
        width_height = np.frombuffer(data, "<i4", 2, 18).astype(np.int64)  # the height may be negative
        return int.from_bytes(data[2:6], "little") <= len(data) and max(abs(width_height)) <= LARGEST
    return True


def read_grey(path, what: str) -> np.ndarray:
    """uint8 [H, W]. Raises UserError ("{what} {path} …") where the image is missing or damaged."""
    image = read_image(path)
    if image is None:
        raise UserError(f"{what} {path} cannot be read: missing, damaged, or no image")
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)


def as_channels(frame: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [H, W, C] as grey (1) or BGR (3)."""
    if frame.shape[2] == channels:
        return frame
    return cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)[:, :, None] if channels == 1 else np.repeat(frame, 3, axis=2)


def resize(frame: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W, C] at (height, width) `size`: area mean, or cubic where it grows; None: unchanged."""
    if size is None or frame.shape[:2] == tuple(size):
        return frame
    interpolation = cv2.INTER_AREA if frame.shape[0] > size[0] else cv2.INTER_CUBIC
    return cv2.resize(frame, tuple(size)[::-1], interpolation=interpolation).reshape(*size, -1)


def write_image(path: Path, image: np.ndarray) -> None:
    with atomic_write(path) as tmp:
        tmp.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
