"""Decoding, and the frame cache: every video is decoded once into a uint8 .npy and memory-mapped ever after."""
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from common.container import COUNTED, PATIENCE, Clock, claimed_frames, open_capture, read_container
from common.files import UserError, load_array, opencv_path, read_json, replacing, safe, stamp, stream_npy, write_json
from common.parallel import map_videos, tick

IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
VIDEOS = {".avi", ".mp4", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".webm", ".wmv", ".ts", ".mts", ".m2ts", ".flv", ".3gp", ".3g2", ".asf",
          ".vob", ".ogv", ".ogg", ".h264", ".264", ".h265", ".hevc", ".265", ".mjpeg", ".mjpg", ".dav", ".mxf", ".divx", ".f4v", ".y4m",
          ".gif"}
BESIDE = {".txt", ".csv", ".npy", ".npz", ".mat", ".m", ".json", ".xml", ".md", ".pdf", ".db", ".ini"}   # what lies beside videos rightly
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")     # of a JPEG's segments and its end, as pixels never look


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
            except UserError:            # which decoding will raise
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
            if p.name.startswith("_"):                       # put aside, or __MACOSX
                if left_out is not None and suffix not in BESIDE:
                    left_out.append(str(p.relative_to(folder)))
            elif p.is_dir():
                files = list_frames(p)
                if files:
                    found.append(Video(p.name, p, split, files=files))
                elif walk and p.resolve() not in seen:       # a link may lead back
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
    rename_doubles(found, lambda v: v.path.name if v.path.parent == folder else f"{v.path.parent.name}_{v.path.stem}")   # a.avi, a.mp4
    rename_doubles(found, lambda v: f"{v.path.parent.name}_{v.path.name}")
    return found


def rename_doubles(videos, other_name):
    """Give videos that share a name another one each."""
    names = [v.name for v in videos]
    for v in videos:
        if names.count(v.name) > 1:
            v.name = other_name(v)


def list_frames(folder):
    return sorted((p.name for p in os.scandir(folder) if Path(p.name).suffix.lower() in IMAGES
                   and not p.name.startswith(".")), key=natural)


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
    return re.sub(r"(?i)((user|usr|login|pass|pwd|token|key|auth)\w*)=[^&/;]*", r"\1=…", re.sub(r"://.*@", "://", str(address)))


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
    alike = next((pair for pair in twice.values() if bare(pair[0]) == bare(pair[1])), None)      # 1.png and 001.png, a.png and a.jpg
    if alike or len(twice) > 1:
        first, second = alike or next(iter(twice.values()))
        raise UserError(f"video {video.name}: {video.path} holds a frame twice, {first} and {second}: keep one kind of pictures in it")
    same = {(len(parts), *parts[::2]) for parts in pieces}
    differing = [i for i in range(1, len(pieces[0]), 2) if len({parts[i] for parts in pieces}) > 1] if len(same) == 1 else []
    if len(differing) != 1:
        return video.files, ""
    numbers = np.array([int(parts[differing[0]]) for parts in pieces], object)
    step = int(np.gcd.reduce(np.diff(numbers)))
    places = [int(x) for x in (numbers - numbers[0]) // step]
    if places[-1] + 1 > 2 * len(places):
        return video.files, f"its {len(places)} files are numbered {numbers[0]} to {numbers[-1]} with wide gaps: read one after another"
    out = [None] * (places[-1] + 1)
    for i, name in zip(places, video.files):
        out[i] = name
    return out, ""


def bare(name):
    """A file's name without suffix and the zeros before its numbers."""
    return re.sub(r"0*([0-9]+)", r"\1", Path(name).stem)


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
        return None                                  # OpenCV would fill the missing part with grey and say nothing
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
            at = found.end() + int.from_bytes(data[found.end():found.end() + 2], "big")   # over a thumbnail that has an end of its own
        return bool(found)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        at = 8
        while at < len(data) and data[at + 4:at + 8] != b"IEND":
            at += 12 + int.from_bytes(data[at:at + 4], "big")
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
            elif still == n - 1 - len(self.lost):    # so far all of them were alike
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
            raise UserError(f"video {self.video.name} ({self.video.path}) cannot be opened: "
                            + ("its name is not UTF-8, rename it" if strange else "damaged, or not a video"))
        self.clock, self.container, n, failed, shift = container.clock, container, 0, 0, 0
        try:
            while failed < PATIENCE:
                ok, frame = capture.read()
                if not ok:
                    failed += 1
                    continue
                due = n + (0 if len(container.stamps) else failed)
                number = container.number(capture.get(cv2.CAP_PROP_POS_MSEC), due + shift) - shift
                if n == 0 and not failed:            # nothing failed: the decoder's time stamps are behind, and begin here
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
            self.warnings.append(f"{len(self.damaged)} damaged frames replaced by the one before: {shortened(self.damaged)}")
        if lost := len(self.lost) - len(self.damaged):
            what = "have no file" if self.video.files else "could not be decoded"
            self.warnings.append(f"{lost} frames {what} and were replaced by the one before: frames {self._spans()}")
        if claimed - frames > (0 if str(self.video.path).lower().endswith(COUNTED) else max(2, claimed // 10)):
            self.warnings.append(f"{claimed - frames} of the {claimed} frames that its header promises could not be decoded; {frames} "
                                 "were")
        if self.resized:
            self.warnings.append(f"{self.resized} frames of another size were resized to the size of its first frame")
        if self.converted:
            self.warnings.append(f"pictures of type {', '.join(sorted(self.converted))} were read as 8 bits (16 bits by their high byte, "
                                 "floats from 0 to 1): convert them yourself where that makes them too dark or too bright")
        if still:
            self.warnings.append(f"all its {frames} frames are one and the same picture; if it should move and is interlaced, convert it "
                                 f"with `ffmpeg -i {self.video.path} -vf yadif OUT.mp4`")

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


class VideoFiles:
    """One .npy per video under `folder`, and beside it a .json that says which source it was made from."""
    what = "cached file"

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, video):
        return self.folder / video.split / f"{safe(video.name)}.npy"

    def info(self, video):
        """What was written with it, or None where it is missing or its source has changed since."""
        side = self.path(video).with_suffix(".json")
        if not side.exists() or not self.path(video).exists():
            return None
        info = read_json(side, f"{self.what}'s entry")
        return info if info.get("source") == video.fingerprint() else None

    def array(self, video):
        return load_array(self.path(video), self.what, mmap=True)

    def missing(self, videos):
        """-> (videos that are still to be made, {video key: why} of those whose source cannot be read)."""
        fresh, failed = [], {}
        for v in videos:
            try:
                if self.info(v) is None:
                    fresh.append(v)
            except UserError as e:
                failed[v.key] = str(e)
        return fresh, failed

    def report(self, videos):
        """Say what reading these videos ran into; every preparation ends with it."""
        for v in videos:
            print_warnings(v, (self.info(v) or {}).get("warnings", ()))

    def gathered(self, videos, failed, sharded, r):
        """What there is once every process of Run `r` has done its share. sharded: what is not there is other jobs' work, no failure.

        -> (videos that count, {video key: why} of all that failed).
        """
        failed = {k: why for part in r.everyone(failed) for k, why in part.items()}
        rest = {v.key for v in self.missing([v for v in videos if v.key not in failed])[0]}
        if sharded:
            return [v for v in videos if v.key not in rest], failed
        return videos, {**failed, **{k: "the process that was to prepare it could not" for k in rest}}

    def write(self, video, parts, describe, dtype=None):
        """Stream `parts` [n_i, …] into the video's file; describe(shape) -> what is worth knowing of it."""
        source = video.fingerprint()  # as it was before reading began
        shape = stream_npy(self.path(video), parts, dtype)
        write_json(self.path(video).with_suffix(".json"), {"source": source, **describe(shape)})


class FrameCache(VideoFiles):
    """Decoded videos of one dataset under `folder`; a video whose source has not changed is never decoded again.

    size: (height, width) that frames are kept in, by default their own. info(video): {"source", "frames", "height", "width",
    "channels", "source_size", "fps", "damaged", "lost", "resized", "warnings"}; uneven times are in a file of their own.
    """
    what = "cached video"

    def __init__(self, folder, size=None):
        super().__init__(folder)
        self.size = size

    def frames(self, video):
        """uint8 [T, H, W, C] memory map."""
        return self.array(video)

    def build(self, videos, workers, show=True):
        """Decode what is missing. -> (videos that are there, {video key: why} of those that could not be decoded)."""
        fresh, failed = self.missing(videos)
        if fresh:
            total = sum(v.expected_frames() for v in fresh)
            if show:
                print(f"decoding {len(fresh)} of {len(videos)} videos into {self.folder}", flush=True)
            _, errors = map_videos(_decode, [(self, v) for v in fresh], workers=workers, total=total, label="decode", show=show)
            failed.update({fresh[i].key: e for i, e in errors})
        self.report(v for v in videos if v.key not in failed)
        return [v for v in videos if v.key not in failed], failed

    def times_path(self, video):
        return self.path(video).with_suffix(".times")

    def clock(self, video):
        """common.container.Clock of a cached video."""
        path = self.times_path(video)
        return Clock(self.info(video)["fps"], load_array(path, "times of a cached video") if path.exists() else None)


def _decode(job):
    cache, video = job
    decoder, source_size = Decoder(video), []

    def frames():
        for frame in decoder:
            tick()
            source_size[:] = frame.shape[:2]
            yield resize(frame, cache.size)[None]

    def describe(shape):
        times = cache.times_path(video)
        times.unlink(missing_ok=True)
        if decoder.clock.times is not None:
            with replacing(times) as tmp, open(tmp, "wb") as f:
                np.save(f, decoder.clock.times)
        return {**dict(zip(("frames", "height", "width", "channels"), shape)), "source_size": source_size, "fps": decoder.clock.fps,
                "damaged": decoder.damaged, "lost": decoder.lost, "resized": decoder.resized, "warnings": decoder.warnings}

    cache.write(video, frames(), describe)
