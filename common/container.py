"""What a video file says of its frames before any is decoded: when each is shown, and which of them are lost."""

import os
from dataclasses import dataclass, field

import cv2
import numpy as np

from common.io import opencv_path

PATIENCE = 1000  # failures in a row after which nothing more is expected of a file
UNEVEN = 0.25  # frames by which a time may differ from the even rate before the rate is no longer believed
MOSTLY = 0.9  # share of frames that follow each other at the header's rate where a gap counts as lost frames
FEW = 0.25  # of the frames that are there: as many may be lost in such gaps
COUNTED = (".avi", ".mp4", ".m4v", ".mov")  # whose header counts the frames; that of others tells a duration
EDITED = (".mp4", ".m4v", ".mov")  # may hold packets that their edit list leaves out: no loss


@dataclass
class Clock:
    """When frames are shown. fps: frames per second, the mean where they are uneven, 0 where nothing is known; times: seconds of every
    frame after the first, float64 [T], only where they are uneven."""

    fps: float = 0.0
    times: np.ndarray = None

    def seconds(self, t):
        """Seconds of frame t, or None where nothing is known."""
        if self.times is not None:
            return float(self.times[min(t, len(self.times) - 1)])
        return t / self.fps if self.fps else None

    def text(self, t, digits):
        """Seconds of frame t with so many decimals; "" where nothing is known."""
        seconds = self.seconds(t)
        return "" if seconds is None else f"{seconds:.{digits}f}"


@dataclass
class Container:
    """What the header and the packets of a video file say.

    claimed: frames that the header promises, 0 where it promises nothing; stamps: ms, float64 [n] of the frames that are there, in the
    order in which they are shown, empty where they are not told; numbers: int64 [n], theirs among all frames, lost ones counted.
    """

    codec: str = ""
    claimed: int = 0
    clock: Clock = field(default_factory=Clock)
    stamps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    frames: int = 0  # of all numbers; those at the end that an edit list may leave out are not counted

    def number(self, stamp, least):
        """Which frame is shown at `stamp` ms; `least`, the one that is due, where that is not known or was shown already."""
        if not len(self.stamps):
            return least
        i = min(max(1, int(np.searchsorted(self.stamps, stamp))), len(self.stamps) - 1)
        i -= stamp - self.stamps[i - 1] < self.stamps[i] - stamp
        return max(least, int(self.numbers[i]))


def open_capture(path):
    """An open cv2.VideoCapture of a file or an address, or None. A name with a colon is a file's all the same."""
    place = str(path) if "://" in str(path) else os.path.abspath(path)
    try:
        capture = cv2.VideoCapture(opencv_path(place))
    except (TypeError, cv2.error):  # an OpenCV that takes no bytes
        return None
    return capture if capture.isOpened() else None


def rate_of(capture):
    """Frames per second of an open cv2.VideoCapture; 0 where it says nothing sensible."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps < 1000 else 0.0


def claimed_frames(capture):
    """Frames that the header of an open cv2.VideoCapture promises; 0 where it promises nothing, as a camera does."""
    n = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(n) if 0 < n < 10**8 else 0


def read_container(path):
    """-> Container; an empty one where the file cannot be opened. Packets are read and not decoded, which takes no time to speak of."""
    capture = open_capture(path)
    if capture is None:
        return Container()
    fourcc = int(capture.get(cv2.CAP_PROP_FOURCC))
    out = Container(
        fourcc.to_bytes(4, "little", signed=True).decode("ascii", "replace").strip(), claimed_frames(capture)
    )
    fps = rate_of(capture)
    out.clock.fps = fps
    stamps, lost = packets(capture)
    capture.release()
    if len(stamps) < 2 or not (np.diff(stamps) > 0).all():
        return out
    out.numbers = numbers_of(stamps, lost, fps, out.claimed)
    there = avi_index(path) if out.claimed > out.numbers[-1] + 1 else None
    if there is not None and there.sum() == len(stamps):  # the reader of a damaged AVI closes its gaps up
        out.numbers = np.flatnonzero(there)
        times = np.arange(out.numbers[-1] + 1) / (fps or 1)
    else:
        times = np.interp(np.arange(out.numbers[-1] + 1), out.numbers, (stamps - stamps[0]) / 1000)
    if not fps or np.abs(times - np.arange(len(times)) / fps).max() > UNEVEN / fps:
        out.clock = Clock((len(times) - 1) / times[-1], times)
    out.stamps = stamps
    out.frames = 0 if str(path).lower().endswith(EDITED) else len(times)
    return out


def packets(capture):
    """Time stamps (ms) of all video packets in the order of showing, and how many unreadable ones came before each: [n], [n]."""
    stamps, before, failed, row = [], [], 0, 0
    if not capture.set(cv2.CAP_PROP_FORMAT, -1):
        row = PATIENCE
    while row < PATIENCE:
        if not capture.grab():
            row += 1
            continue
        failed += row
        row = 0
        stamps.append(capture.get(cv2.CAP_PROP_POS_MSEC))
        before.append(failed)
    stamps, before = np.array(stamps), np.array(before, np.int64)
    order = np.argsort(stamps, kind="stable")
    order = order[max(0, int((stamps <= 0).sum()) - 1) :]  # before the beginning: left out when the video was cut
    return stamps[order], np.maximum.accumulate(before[order])


def numbers_of(stamps, lost, fps, claimed):
    """Numbers of the frames that are there among all frames. int64 [n]

    At an even rate the time stamps tell where the lost ones were. A gap alone is no loss: recorders leave out frames on purpose. It is
    one where as many packets could not be read, or where the header counts the frames of the gap, and gaps are few and short.
    """
    n, missing = len(stamps), int(lost[-1]) or max(0, claimed - len(stamps))
    steps = round((stamps[-1] - stamps[0]) * fps / 1000)
    if missing and steps:
        places = (stamps - stamps[0]) * steps / (stamps[-1] - stamps[0])
        numbers, gap = np.rint(places).astype(np.int64), steps + 1 - n
        even = np.abs(places - numbers).max() < UNEVEN and (np.diff(numbers) > 0).all()
        if even and (
            gap == missing
            if lost[-1]
            else 0 < gap <= min(missing + 1, n * FEW) and (np.diff(numbers) == 1).mean() >= MOSTLY
        ):
            return numbers
    return np.arange(n) + lost


def avi_index(path):
    """bool [frames]: whether the frames that the index of an AVI file lists begin where it says; None without such an index."""
    try:
        with open(path, "rb") as f:
            data = np.memmap(f, np.uint8, "r") if os.path.getsize(path) > 12 else np.zeros(0, np.uint8)
    except (OSError, ValueError):
        return None
    head = data[: 2**20].tobytes()
    if head[:4] != b"RIFF" or head[8:12] != b"AVI " or (movi := head.find(b"movi")) < 0:
        return None
    at = movi + int.from_bytes(head[movi - 4 : movi], "little")
    if data[at : at + 4].tobytes() != b"idx1":
        return None
    size = int.from_bytes(data[at + 4 : at + 8].tobytes(), "little") // 16 * 16
    entries = data[at + 8 : at + 8 + size]
    entries = entries[: len(entries) // 16 * 16].view(
        [("id", "S4"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")]
    )
    entries = entries[[k[2:] in (b"dc", b"db") for k in entries["id"].tolist()]]
    if not len(entries):
        return None
    offsets = entries["offset"].astype(np.int64) + (movi if entries["offset"][0] < movi else 0)
    return np.array([data[o : o + 4].tobytes() == k for o, k in zip(offsets.tolist(), entries["id"].tolist())])
