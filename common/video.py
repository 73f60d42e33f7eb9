"""Videos: their names, their frames in order, and decoding."""

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from common.container import COUNTED, PATIENCE, Clock, claimed_frames, open_capture, read_container
from common.io import UserError, opencv_path, stamp
from common.pictures import as_channels, eight_bits, read_any_image

IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
VIDEOS = {
    ".avi",
    ".mp4",
    ".mkv",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".webm",
    ".wmv",
    ".ts",
    ".mts",
    ".m2ts",
    ".flv",
    ".3gp",
    ".3g2",
    ".asf",
    ".vob",
    ".ogv",
    ".ogg",
    ".h264",
    ".264",
    ".h265",
    ".hevc",
    ".265",
    ".mjpeg",
    ".mjpg",
    ".dav",
    ".mxf",
    ".divx",
    ".f4v",
    ".y4m",
    ".gif",
}
BESIDE = {
    ".txt",
    ".csv",
    ".npy",
    ".npz",
    ".mat",
    ".m",
    ".json",
    ".xml",
    ".md",
    ".pdf",
    ".db",
    ".ini",
}  # what lies beside videos rightly


@dataclass
class Video:
    """One video: a file, or a folder of frames (then `files` lists them in order)."""

    name: str
    path: Path
    split: str = "test"
    scene: str = ""
    files: list = field(default_factory=list, repr=False)

    @property
    def key(self):
        """Names it among training and test videos together: in several datasets both have a 01."""
        return f"{self.split}/{self.name}"

    def fingerprint(self):
        """Changes when the source does: where it is, how much, how new, how its frames are called."""
        path = Path(self.path)
        try:
            return [str(path.resolve()), *(stamp(path, self.files) if self.files else stamp(path.parent, [path.name]))]
        except OSError as e:
            raise UserError(f"video {self.name}: {e.filename} cannot be read ({e.strerror})") from None

    def expected_frames(self):
        """Number of frames as far as is known without decoding (a container's header may be wrong)."""
        if self.files:
            try:
                return len(numbered(self)[0])
            except UserError:  # which decoding will raise
                return len(self.files)
        capture = open_capture(self.path)
        return claimed_frames(capture) if capture is not None else 0

    def clock(self):
        """common.container.Clock: when its frames are shown; a folder of frames does not say."""
        return Clock() if self.files else read_container(self.path).clock


def natural(path):
    """Sort key under which frame 10 follows frame 9, however they are padded, and 0.5 follows 0.25."""
    name = Path(path).name
    decimal = re.match(r"\d+\.\d+(?=\.\D|$)", name)
    if decimal:
        return [(0, float(decimal[0]), name)]
    return [(0, int(s), s) if s.isdecimal() else (1, 0, s) for s in re.split(r"(\d+)", name) if s]


def list_videos(folder, split="test", walk=False, left_out=None):
    """Video files and folders of frames inside `folder`, in natural order; [] where there is none.

    walk: go down into folders without frames (classes, days, cameras). left_out: list that gets the files that are no part of a video.
    """
    folder, found, loose = Path(folder), [], []
    waiting, seen = [folder], {folder.resolve(), *folder.resolve().parents}
    while waiting:
        place = waiting.pop(0)
        for p in sorted(place.iterdir(), key=natural):
            suffix = p.suffix.lower()
            if p.name.startswith("."):
                continue
            if p.name.startswith("_"):  # put aside, or __MACOSX
                if left_out is not None and suffix not in BESIDE:
                    left_out.append(str(p.relative_to(folder)))
            elif p.is_dir():
                files = list_frames(p)
                if files:
                    found.append(Video(p.name, p, split, files=files))
                elif walk and p.resolve() not in seen:  # a link may lead back
                    seen.add(p.resolve())
                    waiting.append(p)
            elif suffix in VIDEOS:
                found.append(Video(p.stem, p, split))
            elif suffix in IMAGES and place == folder:
                loose.append(p.name)
            elif suffix not in BESIDE and left_out is not None:
                left_out.append(str(p.relative_to(folder)))
    if loose and not found:
        return [Video(folder.name, folder, split, files=loose)]
    if left_out is not None:
        left_out += loose
    rename_doubles(
        found, lambda v: v.path.name if v.path.parent == folder else f"{v.path.parent.name}_{v.path.stem}"
    )  # a.avi, a.mp4
    rename_doubles(found, lambda v: f"{v.path.parent.name}_{v.path.name}")
    return found


def rename_doubles(videos, other_name):
    """Give videos that share a name another one each."""
    names = [v.name for v in videos]
    for v in videos:
        if names.count(v.name) > 1:
            v.name = other_name(v)


def list_frames(folder):
    return sorted(
        (p.name for p in os.scandir(folder) if Path(p.name).suffix.lower() in IMAGES and not p.name.startswith(".")),
        key=natural,
    )


def open_video(path):
    """A Video for a file or a folder of frames that the user names, or for a recording at an address."""
    if "://" in str(path):
        return Video(without_secrets(path).split("://")[-1], str(path))
    path = Path(path)
    if path.is_dir():
        files = list_frames(path)
        if not files:
            raise UserError(f"{path} holds no frames ({', '.join(sorted(IMAGES))})")
        return Video(path.resolve().name, path, files=files)
    if not path.exists():
        raise UserError(f"video {path} does not exist")
    return Video(path.stem, path)


def without_secrets(address):
    """A stream's address without user and password."""
    return re.sub(
        r"(?i)((user|usr|login|pass|pwd|token|key|auth)\w*)=[^&/;]*", r"\1=…", re.sub(r"://.*@", "://", str(address))
    )


def numbered(video):
    """-> (names of a folder's frames in order, None for each number that is missing; a sentence where numbers have wide gaps, or "").

    The one number in which names differ is the frame's. Every fifth frame is a sampling: what counts as missing is what breaks the
    step. One number twice, as jpg and png or as picture and mask, is refused.
    """
    pieces = [re.split(r"([0-9]+)", Path(f).stem) for f in video.files]
    seen, twice = {}, {}
    for name, parts in zip(video.files, pieces):
        key = tuple(int(x) for x in parts[1::2])
        first = seen.setdefault(key, name)
        if first != name:
            twice.setdefault(key, (first, name))
    alike = next(
        (pair for pair in twice.values() if bare(pair[0]) == bare(pair[1])), None
    )  # 1.png and 001.png, a.png and a.jpg
    if alike or len(twice) > 1:
        first, second = alike or next(iter(twice.values()))
        raise UserError(
            f"video {video.name}: {video.path} holds a frame twice, {first} and {second}: keep one kind of pictures in it"
        )
    same = {(len(parts), *parts[::2]) for parts in pieces}
    differing = (
        [i for i in range(1, len(pieces[0]), 2) if len({parts[i] for parts in pieces}) > 1] if len(same) == 1 else []
    )
    if len(differing) != 1:
        return video.files, ""
    numbers = np.array([int(parts[differing[0]]) for parts in pieces], object)
    step = int(np.gcd.reduce(np.diff(numbers)))
    places = [int(x) for x in (numbers - numbers[0]) // step]
    if places[-1] + 1 > 2 * len(places):
        return (
            video.files,
            f"its {len(places)} files are numbered {numbers[0]} to {numbers[-1]} with wide gaps: read one after another",
        )
    out = [None] * (places[-1] + 1)
    for i, name in zip(places, video.files):
        out[i] = name
    return out, ""


def bare(name):
    """A file's name without suffix and the zeros before its numbers."""
    return re.sub(r"0*([0-9]+)", r"\1", Path(name).stem)


class Decoder:
    """Iterate over a video's frames: uint8 [H, W, C], C = 1 (grey source) or 3 (BGR), all of the first one's size.

    A frame that is damaged or lost, in a file or in a folder, is replaced by the one before it (at the start: by the first good one),
    so that frame numbers, times and labels stay aligned. Afterwards `warnings` says in sentences what was done; `damaged` names files,
    `lost` numbers such frames, `resized` counts those that came in another size.
    """

    def __init__(self, video):
        self.video, self.clock, self.warnings = video, Clock(), []
        self.damaged, self.lost, self.resized, self.converted = [], [], 0, set()

    def __iter__(self):
        last, waiting, first, still, n = None, 0, None, 0, 0
        for n, frame in enumerate(self._files() if self.video.files else self._capture(), 1):
            if frame is None:
                self.lost.append(n - 1)
                if last is None:
                    waiting += 1
                    continue
                yield last
                continue
            if first is None:
                first = frame
            elif still == n - 1 - len(self.lost):  # so far all of them were alike
                still += frame.shape == first.shape and bool((frame == first).all())
            still += last is None
            frame = self._fit(frame, last)
            for _ in range(waiting):
                yield frame
            waiting, last = 0, frame
            yield frame
        if last is None:
            raise UserError(f"video {self.video.name} ({self.video.path}): no frame could be decoded" + self._why)
        self._warn(n, still == n - len(self.lost) > 1)

    def _files(self):
        names, said = numbered(self.video)
        self.warnings += [said] if said else []
        for name in names:
            image = read_any_image(Path(self.video.path, name)) if name else None
            if name and image is None:
                self.damaged.append(name)
            if image is not None and image.dtype != np.uint8:
                self.converted.add(image.dtype.name)
            yield image if image is None else eight_bits(image)

    def _capture(self):
        container, capture = read_container(self.video.path), open_capture(self.video.path)
        if capture is None:
            strange = isinstance(opencv_path(self.video.path), bytes)
            raise UserError(
                f"video {self.video.name} ({self.video.path}) cannot be opened: "
                + ("its name is not UTF-8, rename it" if strange else "damaged, or not a video")
            )
        self.clock, self.container, n, failed, shift = container.clock, container, 0, 0, 0
        try:
            while failed < PATIENCE:
                ok, frame = capture.read()
                if not ok:
                    failed += 1
                    continue
                due = n + (0 if len(container.stamps) else failed)
                number = container.number(capture.get(cv2.CAP_PROP_POS_MSEC), due + shift) - shift
                if n == 0 and not failed:  # nothing failed: the decoder's time stamps are behind, and begin here
                    number, shift = 0, number
                for _ in range(number - n):
                    yield None
                n, failed = number + 1, 0
                yield frame
        finally:
            capture.release()
        for _ in range(container.frames - shift - n if n else 0):
            yield None

    @property
    def _why(self):
        if self.video.files:
            return ""
        return f" (codec {self.container.codec or 'unknown'}): convert it with `ffmpeg -i {self.video.path} -c:v libx264 OUT.mp4`"

    def _warn(self, frames, still):
        claimed = 0 if self.video.files or self.clock.times is not None else self.container.claimed
        if self.damaged:
            self.warnings.append(
                f"{len(self.damaged)} damaged frames replaced by the one before: {shortened(self.damaged)}"
            )
        if lost := len(self.lost) - len(self.damaged):
            what = "have no file" if self.video.files else "could not be decoded"
            self.warnings.append(f"{lost} frames {what} and were replaced by the one before: frames {self._spans()}")
        if claimed - frames > (0 if str(self.video.path).lower().endswith(COUNTED) else max(2, claimed // 10)):
            self.warnings.append(
                f"{claimed - frames} of the {claimed} frames that its header promises could not be decoded; {frames} "
                "were"
            )
        if self.resized:
            self.warnings.append(f"{self.resized} frames of another size were resized to the size of its first frame")
        if self.converted:
            self.warnings.append(
                f"pictures of type {', '.join(sorted(self.converted))} were read as 8 bits (16 bits by their high byte, "
                "floats from 0 to 1): convert them yourself where that makes them too dark or too bright"
            )
        if still:
            self.warnings.append(
                f"all its {frames} frames are one and the same picture; if it should move and is interlaced, convert it "
                f"with `ffmpeg -i {self.video.path} -vf yadif OUT.mp4`"
            )

    def _spans(self):
        """The lost frames as first..last, with seconds where they are known."""
        numbers, out = np.array(self.lost), []
        for part in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
            first, last = (self.clock.text(t, 2) for t in (part[0], part[-1]))
            out.append(f"{part[0]}..{part[-1]}" + (f" ({first}..{last} s)" if first else ""))
        return shortened(out)

    def _fit(self, frame, like):
        if frame.ndim == 2:
            frame = frame[:, :, None]
        if like is None:
            return frame
        if frame.shape[:2] != like.shape[:2]:
            self.resized += 1
            frame = cv2.resize(frame, like.shape[1::-1], interpolation=cv2.INTER_AREA).reshape(*like.shape[:2], -1)
        return as_channels(frame, like.shape[2])


def shortened(words):
    return ", ".join(words[:5]) + (" …" if len(words) > 5 else "")


_said = set()


def print_warnings(video, warnings):
    """What a Decoder found, for every method in the same words, once in a run."""
    for sentence in warnings:
        if (str(video.path), sentence) not in _said:
            print(f"warning: video {video.name}: {sentence}", flush=True)
        _said.add((str(video.path), sentence))


def pick(frames, wanted):
    """Yield (number, frame) of the `wanted` frames in order; frames: an array, or whatever yields them one after another."""
    wanted = sorted(wanted)
    if hasattr(frames, "__getitem__"):
        yield from ((t, frames[t]) for t in wanted)
    elif wanted:
        among = set(wanted)
        yield from ((t, f) for t, f in enumerate(itertools.islice(frames, wanted[-1] + 1)) if t in among)


def decoded(video):
    """-> (its frames, one after another; their common.container.Clock)"""
    return Decoder(video), video.clock()
