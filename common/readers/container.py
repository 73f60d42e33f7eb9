"""What a video file tells about its frames before any is decoded: when each is shown, and which of them are lost."""

import os
from dataclasses import dataclass, field

import cv2
import numpy as np

from common.io import opencv_path

PATIENCE = 1000  # failures in a row after which a file is taken to have ended
UNEVEN = 0.25  # frames by which a time may differ from the even rate before the rate is no longer used
MOSTLY = 0.9  # a gap is a loss where at least this share of the frames follow each other at the header's rate
FEW = 0.25  # and where at most this share of the present frames is lost
COUNTED = (".avi", ".mp4", ".m4v", ".mov")  # their header counts frames; that of others holds a duration
EDITED = (".mp4", ".m4v", ".mov")  # may hold packets that their edit list leaves out: no loss
AVI_ENTRY = [("id", "S4"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")]


@dataclass
class Clock:
    """When frames are shown. fps: frames per second, the mean where they are uneven, 0 where it is unknown.
    times: seconds of every frame after the first, float64 [T], only where they are uneven."""

    fps: float = 0.0
    times: np.ndarray | None = None

    def seconds(self, t: int) -> float | None:
        """Seconds of frame t, or None where they are unknown."""
        if self.times is not None:
            return float(self.times[min(t, len(self.times) - 1)])
        return t / self.fps if self.fps else None

    def text(self, t: int, digits: int) -> str:
        """Seconds of frame t with this number of decimals; "" where they are unknown."""
        seconds = self.seconds(t)
        return "" if seconds is None else f"{seconds:.{digits}f}"


@dataclass
class Container:
    """What the header and the packets of a video file tell.

    claimed: number of frames in the header, 0 where it has none; stamps: ms of the present frames, float64 [n], in the
    order of showing, empty where unknown; numbers: int64 [n], theirs among all frames, also the lost ones.
    """

    codec: str = ""
    claimed: int = 0
    clock: Clock = field(default_factory=Clock)
    stamps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    frames: int = 0  # of all numbers; 0 where an edit list may leave out the last ones

    def number(self, stamp: float, least: int) -> int:
        """Which frame is shown at `stamp` ms; at least `least`, the next one."""
        if not len(self.stamps):
            return least
        i = np.clip(np.searchsorted(self.stamps, stamp), 1, len(self.stamps) - 1)
        i -= stamp - self.stamps[i - 1] < self.stamps[i] - stamp
        return max(least, int(self.numbers[i]))


def open_capture(path) -> cv2.VideoCapture | None:
    """An open capture of a file (whose name may hold a colon) or an address; None where it cannot be opened."""
    place = str(path) if "://" in str(path) else os.path.abspath(path)
    try:
        capture = cv2.VideoCapture(opencv_path(place))
    except (TypeError, cv2.error):  # an OpenCV that takes no bytes
        return None
    return capture if capture.isOpened() else None


def frame_rate(capture: cv2.VideoCapture) -> float:
    """Frames per second in the header; 0 where it holds no sensible number."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps < 1000 else 0.0


def claimed_frames(capture: cv2.VideoCapture) -> int:
    """Number of frames in the header; 0 where it has none, as with a camera."""
    n = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(n) if 0 < n < 10**8 else 0


def read_container(path) -> Container:
    """An empty Container where the file cannot be opened. Fast: packets are read and not decoded."""
    capture = open_capture(path)
    if capture is None:
        return Container()
    fourcc = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True)
    fps = frame_rate(capture)
    out = Container(fourcc.decode("ascii", "replace").strip(), claimed_frames(capture), Clock(fps))
    stamps, lost = packet_times(capture)
    capture.release()
    if len(stamps) < 2 or not (np.diff(stamps) > 0).all():
        return out
    out.stamps, out.numbers = stamps, frame_numbers(stamps, lost, fps, out.claimed)
    present = avi_index(path) if out.claimed > out.numbers[-1] + 1 else None
    if present is not None and present.sum() == len(stamps):  # the reader of a damaged AVI closes the gaps
        out.numbers = np.flatnonzero(present)
        times = np.arange(out.numbers[-1] + 1) / (fps or 1)
    else:
        times = np.interp(np.arange(out.numbers[-1] + 1), out.numbers, (stamps - stamps[0]) / 1000)
    if not fps or np.abs(times - np.arange(len(times)) / fps).max() > UNEVEN / fps:
        out.clock = Clock((len(times) - 1) / times[-1], times)
    out.frames = 0 if str(path).lower().endswith(EDITED) else len(times)
    return out


def packet_times(capture: cv2.VideoCapture) -> tuple[np.ndarray, np.ndarray]:
    """-> (ms of the packets in the order of showing, float64 [n]; number of unreadable ones before each, int64 [n])"""
    stamps, failures = [], [0]  # since the packet before
    packets_only = capture.set(cv2.CAP_PROP_FORMAT, -1)
    while packets_only and failures[-1] < PATIENCE:
        if capture.grab():
            stamps.append(capture.get(cv2.CAP_PROP_POS_MSEC))
            failures.append(0)
        else:
            failures[-1] += 1
    stamps, unreadable_before = np.array(stamps), np.cumsum(failures[:-1], dtype=np.int64)
    order = np.argsort(stamps, kind="stable")
    order = order[max(0, int((stamps <= 0).sum()) - 1) :]  # a cut video leaves out what is before its beginning
    return stamps[order], np.maximum.accumulate(unreadable_before[order])


def frame_numbers(stamps: np.ndarray, lost: np.ndarray, fps: float, claimed: int) -> np.ndarray:
    """Numbers of the present frames among all frames, int64 [n]; lost [n]: unreadable packets before each.

    At an even rate the time stamps show where frames were lost. Not every gap is a loss, as recorders may leave out
    frames: as many packets must be unreadable, or the header must count the frames, and gaps be few and short.
    """
    n, duration = len(stamps), stamps[-1] - stamps[0]
    missing = int(lost[-1]) or claimed - n
    steps = round(duration * fps / 1000)
    if steps and missing > 0:
        places = (stamps - stamps[0]) * steps / duration
        numbers = np.rint(places).astype(np.int64)
        difference, gap = np.diff(numbers), steps + 1 - n
        is_loss = 0 < gap <= min(missing + 1, n * FEW) and (difference == 1).mean() >= MOSTLY
        if lost[-1]:
            is_loss = gap == missing
        if is_loss and np.abs(places - numbers).max() < UNEVEN and (difference > 0).all():
            return numbers
    return np.arange(n) + lost


def avi_index(path) -> np.ndarray | None:
    """bool [frames]: whether each frame in the index of an AVI file begins at its place; None without such an index."""
    try:
        with open(path, "rb") as f:
            data = np.memmap(f, np.uint8, "r")
    except (OSError, ValueError):
        return None
    head = data[: 2**20].tobytes()
    movi = head.find(b"movi")
    if head[:4] != b"RIFF" or head[8:12] != b"AVI " or movi < 0:
        return None
    start = movi + int.from_bytes(head[movi - 4 : movi], "little")
    if data[start : start + 4].tobytes() != b"idx1":
        return None
    size = int.from_bytes(data[start + 4 : start + 8].tobytes(), "little")
    index = data[start + 8 : start + 8 + size]
    entries = index[: len(index) // 16 * 16].view(AVI_ENTRY)
    entries = entries[[k[2:] in (b"dc", b"db") for k in entries["id"].tolist()]]
    if not len(entries):
        return None
    offsets = entries["offset"].astype(np.int64) + (movi if entries["offset"][0] < movi else 0)
    return np.array([data[o : o + 4].tobytes() == k for o, k in zip(offsets.tolist(), entries["id"].tolist())])
