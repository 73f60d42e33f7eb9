"""Videos: their names, their frames in order, and decoding."""

import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from common.io import UserError, opencv_path, stamp
from common.readers.container import COUNTED, PATIENCE, Clock, Container, claimed_frames, open_capture, read_container
from common.readers.pictures import as_channels, eight_bits, read_image

IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
VIDEOS = set(
    ".avi .mp4 .mkv .mov .m4v .mpg .mpeg .webm .wmv .ts .mts .m2ts .flv .3gp .3g2 .asf .vob .ogv .ogg .h264 .264 .h265"
    " .hevc .265 .mjpeg .mjpg .dav .mxf .divx .f4v .y4m .gif".split()
)
BESIDE = set(".txt .csv .npy .npz .mat .m .json .xml .md .pdf .db .ini".split())  # files that may lie beside videos


@dataclass
class Video:
    """One video: a file, or a folder of frames (then `files` lists them in order)."""

    name: str
    path: Path
    split: str = "test"
    scene: str = ""
    files: list[str] = field(default_factory=list, repr=False)

    @property
    def key(self) -> str:
        """Unique among training and test videos together: several datasets have a 01 in both."""
        return f"{self.split}/{self.name}"

    def fingerprint(self) -> list:
        """Changes when the source does: its place, sizes, times, names of frames. Raises UserError."""
        path = Path(self.path)
        try:
            return [str(path.resolve()), *(stamp(path, self.files) if self.files else stamp(path.parent, [path.name]))]
        except OSError as e:
            raise UserError(f"video {self.name}: {e.filename} cannot be read ({e.strerror})") from None

    def content(self) -> str:
        """A hash of the names and bytes of its files; a copy, whose times differ, has the same. Raises UserError."""
        digest, path = hashlib.sha256(), Path(self.path)
        try:
            for file in [path / name for name in self.files] or [path]:
                digest.update(repr(file.name).encode(errors="backslashreplace"))
                with open(file, "rb") as f:
                    while block := f.read(2**20):
                        digest.update(block)
        except OSError as e:
            raise UserError(f"video {self.name}: {e.filename} cannot be read ({e.strerror})") from None
        return digest.hexdigest()[:16]

    def expected_frames(self) -> int:
        """Number of frames as far as is known without decoding (a container's header may be wrong)."""
        if self.files:
            try:
                return len(frame_files(self)[0])
            except UserError:  # decoding will raise it
                return len(self.files)
        capture = open_capture(self.path)
        return claimed_frames(capture) if capture is not None else 0

    def clock(self) -> Clock:
        """When its frames are shown; unknown for a folder of frames."""
        return Clock() if self.files else read_container(self.path).clock


def natural(path) -> list:
    """Sort key that puts frame 10 after frame 9, padded or not, and 0.5 after 0.25."""
    name = Path(path).name
    decimal = re.match(r"\d+\.\d+(?=\.\D|$)", name)
    if decimal:
        return [(0, float(decimal[0]), name)]
    return [(0, int(s), s) if s.isdecimal() else (1, 0, s) for s in re.split(r"(\d+)", name) if s]


def list_videos(folder, split: str = "test", walk: bool = False, left_out: list | None = None) -> list[Video]:
    """Video files and folders of frames inside `folder`, in natural order. Raises OSError.

    walk: also search folders without frames (classes, days, cameras). left_out: a list that gets the other files.
    """
    folder = Path(folder)
    videos, loose_images = [], []
    unused = []
    waiting, seen = [folder], {folder.resolve(), *folder.resolve().parents}
    while waiting:
        place = waiting.pop(0)
        for p in sorted((p for p in place.iterdir() if not p.name.startswith(".")), key=natural):
            suffix = p.suffix.lower()
            if p.name.startswith("_"):  # put aside, or __MACOSX
                unused.append(p)
            elif p.is_dir():
                files = list_frames(p)
                if files:
                    videos.append(Video(p.name, p, split, files=files))
                elif walk and p.resolve() not in seen:  # a link may lead back
                    seen.add(p.resolve())
                    waiting.append(p)
            elif suffix in VIDEOS:
                videos.append(Video(p.stem, p, split))
            elif suffix in IMAGES and place == folder:
                loose_images.append(p.name)
            else:
                unused.append(p)
    is_one_video = loose_images and not videos  # the folder itself is one video
    if left_out is not None:
        left_out += [str(p.relative_to(folder)) for p in unused if p.suffix.lower() not in BESIDE]
        left_out += [] if is_one_video else loose_images
    if is_one_video:
        return [Video(folder.name, folder, split, files=loose_images)]
    rename_equal(videos, lambda v: v.path.name if v.path.parent == folder else f"{v.path.parent.name}_{v.path.stem}")
    rename_equal(videos, lambda v: f"{v.path.parent.name}_{v.path.name}")
    return videos


def rename_equal(videos: list[Video], other_name: Callable[[Video], str]) -> None:
    """Give another name to every video that shares its name, such as a.avi and a.mp4."""
    names = [v.name for v in videos]
    for v in videos:
        if names.count(v.name) > 1:
            v.name = other_name(v)


def list_frames(folder) -> list[str]:
    """Names of the images in a folder, in natural order."""
    names = [name for name in os.listdir(folder) if Path(name).suffix.lower() in IMAGES and not name.startswith(".")]
    return sorted(names, key=natural)


def open_video(path) -> Video:
    """A video file or a folder of frames that the user names, or a recording at an address. Raises UserError."""
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


def without_secrets(address) -> str:
    """A stream's address without user and password."""
    address = re.sub(r"://.*@", "://", str(address))
    return re.sub(r"(?i)((user|usr|login|pass|pwd|token|key|auth)\w*)=[^&/;]*", r"\1=…", address)


def frame_files(video: Video) -> tuple[list[str | None], str]:
    """-> (names of a folder's frames in order, None for each missing number; a sentence about odd numbers, or "").

    The frame's number is the only number in which names differ. A folder may hold every n-th frame: then n is the step.
    Raises UserError where a number occurs twice, as jpg and png or as picture and mask.
    """
    pieces = [re.split(r"([0-9]+)", Path(f).stem) for f in video.files]  # text, digits, text, …
    files_of_number = {}
    for name, parts in zip(video.files, pieces):
        files_of_number.setdefault(tuple(int(x) for x in parts[1::2]), []).append(name)
    twice = [names for names in files_of_number.values() if len(names) > 1]
    same_name = [names for names in twice if unpadded_stem(names[0]) == unpadded_stem(names[1])]  # a.png and a.jpg
    if same_name or len(twice) > 1:
        first, second = (same_name or twice)[0][:2]
        files = f"{first} and {second}"
        raise UserError(f"video {video.name}: {video.path} holds a frame twice, {files}: keep one kind of pictures")
    numbers = {}  # last numbers of the names, by what stands before them; those of a time end below 60
    for *head, number, _ in (parts for parts in pieces if len(parts) > 1 and parts[0]):
        numbers.setdefault("".join(head), []).append(int(number))
    if len(numbers) > 1 and all(len(x) > 2 and x[0] < 2 and x[-1] > 60 for x in numbers.values()):
        return video.files, f"its files may be frames of {len(numbers)} videos: give each of them its own folder"
    differing = [i for i, column in enumerate(zip(*pieces)) if len(set(column)) > 1]
    if len({len(parts) for parts in pieces}) > 1 or len(differing) != 1 or differing[0] % 2 == 0:
        return video.files, ""
    numbers = [int(parts[differing[0]]) for parts in pieces]
    steps = [b - a for a, b in itertools.pairwise(numbers)]
    if min(steps) < 1:  # 0.25 and 0.5
        return video.files, ""
    step = math.gcd(*steps)
    count = (numbers[-1] - numbers[0]) // step + 1
    if count > 2 * len(numbers):
        span = f"{numbers[0]} to {numbers[-1]}"
        return video.files, f"its {len(numbers)} files are numbered {span} with wide gaps: read one after another"
    out = [None] * count
    for number, name in zip(numbers, video.files):
        out[(number - numbers[0]) // step] = name
    return out, ""


def unpadded_stem(name: str) -> str:
    """A file's name without suffix and without the zeros before its numbers."""
    return re.sub(r"0*([0-9]+)", r"\1", Path(name).stem)


class Decoder:
    """Iterate over a video's frames: uint8 [H, W, C], C = 1 (grey source) or 3 (BGR), all of the size of the first one.

    A damaged or lost frame of a file or folder is replaced by the one before it (at the start: by the first good one),
    so that frame numbers, times and labels stay aligned. Afterwards `warnings` holds one sentence per problem,
    `damaged` the names of files, `lost` the numbers of replaced frames, `resized` how many had another size.
    Raises UserError where no frame can be decoded.
    """

    def __init__(self, video: Video):
        self.video, self.container = video, Container()
        self.clock, self.lost = Clock(), []
        self.warnings, self.damaged = [], []
        self.resized, self.converted = 0, set()

    def __iter__(self) -> Iterator[np.ndarray]:
        self.warnings, self.damaged = [], []  # of this pass
        self.lost = []
        self.resized, self.converted = 0, set()
        first = last = None
        count, all_equal = 0, True
        for count, frame in enumerate(self._read_folder() if self.video.files else self._read_file(), 1):
            if frame is None:
                self.lost.append(count - 1)
                if last is not None:
                    yield last
                continue
            if first is None:
                first = frame
            all_equal = all_equal and np.array_equal(frame, first)
            copies = 1 if last is not None else 1 + len(self.lost)
            last = self._like_first(frame, last)
            yield from itertools.repeat(last, copies)
        if last is None:
            codec = self.container.codec or "unknown"
            why = "" if self.video.files else f" (codec {codec}): {self._convert('-c:v libx264')}"
            raise UserError(f"video {self.video.name} ({self.video.path}): no frame could be decoded{why}")
        self._add_warnings(count, all_equal and count - len(self.lost) > 1)

    def _read_folder(self):
        """Yield uint8 frames, None for those that are missing or damaged."""
        names, gaps = frame_files(self.video)
        self.warnings += [gaps] if gaps else []
        for name in names:
            image = read_image(Path(self.video.path, name), keep_type=True) if name else None
            if name and image is None:
                self.damaged.append(name)
            if image is not None and image.dtype != np.uint8:
                self.converted.add(image.dtype.name)
            yield image if image is None else eight_bits(image)

    def _read_file(self):
        """Yield frames, None for those that are lost."""
        path = self.video.path
        container, capture = read_container(path), open_capture(path)
        if capture is None:
            not_utf8 = isinstance(opencv_path(path), bytes)
            why = "its name is not UTF-8, rename it" if not_utf8 else "damaged, or not a video"
            raise UserError(f"video {self.video.name} ({path}) cannot be opened: {why}")
        self.clock, self.container = container.clock, container
        count, failed = 0, 0
        shift = 0
        try:
            while failed < PATIENCE:
                ok, frame = capture.read()
                if not ok:
                    failed += 1
                    continue
                due = count + (0 if len(container.stamps) else failed)
                number = container.number(capture.get(cv2.CAP_PROP_POS_MSEC), due + shift) - shift
                if count == 0 and not failed:  # nothing failed: the decoder's time stamps are behind, and begin here
                    number, shift = 0, number
                yield from itertools.repeat(None, number - count)
                count, failed = number + 1, 0
                yield frame
        finally:
            capture.release()
        yield from itertools.repeat(None, container.frames - shift - count if count else 0)

    def _convert(self, options):
        return f"convert it with `ffmpeg -i {self.video.path} {options} OUT.mp4`"

    def _add_warnings(self, count, all_equal):
        warn = self.warnings.append
        if self.damaged:
            warn(f"{len(self.damaged)} damaged frames replaced by the one before: {shortened(self.damaged)}")
        without_file = len(self.lost) - len(self.damaged)
        if without_file:
            what = "have no file" if self.video.files else "could not be decoded"
            warn(f"{without_file} frames {what} and were replaced by the one before: frames {self._lost_spans()}")
        claimed = 0 if self.clock.times is not None else self.container.claimed
        if claimed - count > (0 if str(self.video.path).lower().endswith(COUNTED) else max(2, claimed // 10)):
            missing = f"{claimed - count} of the {claimed} frames that its header promises"
            warn(f"{missing} could not be decoded; {count} were")
        if self.resized:
            warn(f"{self.resized} frames of another size were resized to the size of its first frame")
        if self.converted:
            types = ", ".join(sorted(self.converted))
            how = "16 bits by their high byte, floats from 0 to 1"
            warn(f"pictures of type {types} were read as 8 bits ({how}): convert them yourself if too dark or bright")
        if all_equal:
            way_out = self._convert("-vf yadif")
            warn(f"all its {count} frames are one and the same picture; if it should move and is interlaced, {way_out}")

    def _lost_spans(self):
        """The lost frames as first..last, with seconds where they are known."""
        spans = []
        for part in np.split(self.lost, np.flatnonzero(np.diff(self.lost) > 1) + 1):
            begin, end = (self.clock.text(t, 2) for t in (part[0], part[-1]))
            spans.append(f"{part[0]}..{part[-1]}" + (f" ({begin}..{end} s)" if begin else ""))
        return shortened(spans)

    def _like_first(self, frame, like):
        """`frame` as uint8 [H, W, C] in the size and channels of `like`, where that is given."""
        if frame.ndim == 2:
            frame = frame[:, :, None]
        if like is None:
            return frame
        if frame.shape[:2] != like.shape[:2]:
            self.resized += 1
            frame = cv2.resize(frame, like.shape[1::-1], interpolation=cv2.INTER_AREA).reshape(*like.shape[:2], -1)
        return as_channels(frame, like.shape[2])


def shortened(words: list[str], most: int = 5) -> str:
    return (", ".join(words[:most]) or "nothing") + (" …" if len(words) > most else "")


_printed = set()


def print_warnings(video: Video, warnings: Iterable[str]) -> None:
    """Print the warnings of a Decoder, each one once in a run."""
    for sentence in warnings:
        if (str(video.path), sentence) not in _printed:
            print(f"warning: video {video.name}: {sentence}", flush=True)
        _printed.add((str(video.path), sentence))


def select_frames(frames, numbers: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, frame) for these numbers, in order. frames: an array [T, …], or an iterable of all frames."""
    numbers = sorted(numbers)
    if hasattr(frames, "__getitem__"):
        yield from ((t, frames[t]) for t in numbers)
    elif numbers:
        selected = set(numbers)
        yield from ((t, f) for t, f in enumerate(itertools.islice(frames, numbers[-1] + 1)) if t in selected)


def frames_and_clock(video: Video) -> tuple[Decoder, Clock]:
    return Decoder(video), video.clock()
