"""Reading one picture: right, or None; and its size and channels."""

import re

import cv2
import numpy as np

from common.io import UserError, atomic_write

MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG's segments and its end, as pixels never look


def read_image(path):
    """uint8 [H, W] or [H, W, 3] BGR, turned as its EXIF says, without transparency; None where the file is damaged or no image."""
    image = read_any_image(path)
    return image if image is None else eight_bits(image)


def eight_bits(image):
    """16 bits by their high byte; floats, which mean 0 to 1, by 255."""
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind == "f":
        return (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8)
    return (image.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)


def read_any_image(path):
    """[H, W] or [H, W, 3] BGR in its own type, or None where the file is damaged, truncated or no image."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError:
        return None
    if data.size < 16 or max(image_size(data)) > 20000 or not whole(data.tobytes()):
        return None  # OpenCV would fill the missing part with grey and say nothing
    try:
        image = cv2.imdecode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        return None
    return image[:, :, :3] if image is not None and image.ndim == 3 else image


def whole(data):
    """Whether a JPEG, PNG or BMP reaches its end; whatever lies behind it. Other formats are left to OpenCV."""
    if data[:2] == b"\xff\xd8":
        at = 2
        while (found := MARKER.search(data, at)) and found[0] != b"\xff\xd9":
            at = found.end() + int.from_bytes(
                data[found.end() : found.end() + 2], "big"
            )  # over a thumbnail that has an end of its own
        return bool(found)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        at = 8
        while at < len(data) and data[at + 4 : at + 8] != b"IEND":
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        return at < len(data)
    return data[:2] != b"BM" or int.from_bytes(data[2:6], "little") <= len(data)


def read_grey(path, what):
    """uint8 [H, W] of an image that must be there and whole."""
    image = read_image(path)
    if image is None:
        raise UserError(f"{what} {path} cannot be read: missing, damaged, or no image")
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)


def image_size(data):
    """(width, height) that a PNG or BMP header claims, so that a lie is not allocated; (0, 0) for other formats."""
    head = data[:26].tobytes()
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head[:2] == b"BM":
        return int.from_bytes(head[18:22], "little"), abs(int.from_bytes(head[22:26], "little", signed=True))
    return 0, 0


def as_channels(frame, channels):
    """uint8 [H, W, C] as grey (1) or BGR (3)."""
    if frame.shape[2] == channels:
        return frame
    return cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)[:, :, None] if channels == 1 else np.repeat(frame, 3, axis=2)


def resize(frame, size):
    """uint8 [H, W, C] at (height, width) `size`: averaged over areas, or cubic where it grows; unchanged without a size."""
    if size is None or frame.shape[:2] == tuple(size):
        return frame
    way = cv2.INTER_AREA if frame.shape[0] > size[0] else cv2.INTER_CUBIC
    return cv2.resize(frame, tuple(size)[::-1], interpolation=way).reshape(*size, -1)


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        tmp.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
