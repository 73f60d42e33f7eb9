"""Decoding, and the frame cache: every video is decoded once into a uint8 .npy and memory-mapped ever after."""
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from common.files import UserError, load_array, read_json, stream_npy, write_json
from common.parallel import map_videos, tick

IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
VIDEOS = {".avi", ".mp4", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".webm", ".wmv", ".ts", ".mts", ".m2ts", ".flv", ".3gp", ".3g2", ".asf",
          ".vob", ".ogv", ".ogg", ".h264", ".264", ".h265", ".hevc", ".265", ".mjpeg", ".mjpg", ".dav", ".mxf", ".divx", ".f4v", ".y4m",
          ".gif"}
BESIDE = {".txt", ".csv", ".npy", ".npz", ".mat", ".m", ".json", ".xml", ".md", ".pdf", ".db", ".ini"}   # what lies beside videos rightly


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
        """Changes when the source does: where it is, how much, how new."""
        paths = [Path(self.path, f) for f in self.files] or [self.path]
        try:
            stats = [os.stat(p) for p in paths]
        except OSError as e:
            raise UserError(f"video {self.name}: {e.filename} cannot be read ({e.strerror})") from None
        return [str(Path(self.path).resolve()), len(paths), sum(s.st_size for s in stats),
                max(s.st_mtime_ns for s in stats)]

    def expected_frames(self):
        """Number of frames as far as is known without decoding (a container's header may be wrong)."""
        if self.files:
            return len(self.files)
        capture = cv2.VideoCapture(str(self.path))
        n = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        return n if 0 < n < 10 ** 8 else 0

    def fps(self):
        """Frames per second as a container says; 0 where it does not, or for a folder of frames."""
        if self.files:
            return 0.0
        return rate_of(cv2.VideoCapture(str(self.path)))


def rate_of(capture):
    """Frames per second of an open cv2.VideoCapture; 0 where it says nothing sensible."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps < 1000 else 0.0


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
    waiting, seen = [folder], {folder.resolve()}
    while waiting:
        place = waiting.pop(0)
        for p in sorted(place.iterdir(), key=natural):
            suffix = p.suffix.lower()
            if p.name.startswith((".", "_")):
                continue
            if p.is_dir():
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
    """A Video for a file or a folder of frames that the user names."""
    path = Path(path)
    if path.is_dir():
        files = list_frames(path)
        if not files:
            raise UserError(f"{path} holds no frames ({', '.join(sorted(IMAGES))})")
        return Video(path.resolve().name, path, files=files)
    if not path.exists():
        raise UserError(f"video {path} does not exist")
    return Video(path.stem, path)


def read_image(path):
    """uint8 [H, W] or [H, W, 3] BGR, or None where the file is damaged, truncated or no image."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError:
        return None
    if data.size < 16 or max(image_size(data)) > 20000:
        return None
    tail, suffix = data[-4096:].tobytes(), Path(path).suffix.lower()
    if (suffix in (".jpg", ".jpeg") and b"\xff\xd9" not in tail) or (suffix == ".png" and b"IEND" not in tail):
        return None  # OpenCV would fill the missing part with grey and say nothing
    if data[:2].tobytes() == b"BM" and int.from_bytes(data[2:6].tobytes(), "little") > data.size:
        return None
    try:
        return cv2.imdecode(data, cv2.IMREAD_ANYCOLOR)
    except cv2.error:
        return None


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

    A damaged frame inside a folder is replaced by the one before it (at the start: by the first good one), so that
    frame numbers and labels stay aligned; `damaged` names it. `resized` counts frames that came in another size.
    """

    def __init__(self, video):
        self.video, self.damaged, self.resized, self.fps, self.missing = video, [], 0, 0.0, 0

    def __iter__(self):
        last, waiting = None, 0
        for frame in self._files() if self.video.files else self._capture():
            if frame is None:
                if last is None:
                    waiting += 1
                    continue
                yield last
                continue
            frame = self._fit(frame, last)
            for _ in range(waiting):
                yield frame
            waiting, last = 0, frame
            yield frame
        if last is None:
            raise UserError(f"video {self.video.name} ({self.video.path}): no frame could be decoded")

    def _files(self):
        for name in self.video.files:
            frame = read_image(Path(self.video.path, name))
            if frame is None:
                self.damaged.append(name)
            yield frame

    def _capture(self):
        capture = cv2.VideoCapture(str(self.video.path))
        if not capture.isOpened():
            raise UserError(f"video {self.video.name} ({self.video.path}) cannot be opened: damaged, or not a video")
        self.fps = rate_of(capture)
        claimed, n = self.video.expected_frames(), 0
        try:
            while True:
                ok, frame = capture.read()
                if not ok:
                    break
                n += 1
                yield frame
        finally:
            capture.release()
        self.missing = max(0, claimed - n)

    def _fit(self, frame, like):
        if frame.ndim == 2:
            frame = frame[:, :, None]
        if like is None:
            return frame
        if frame.shape[:2] != like.shape[:2]:
            self.resized += 1
            frame = cv2.resize(frame, like.shape[1::-1], interpolation=cv2.INTER_AREA).reshape(*like.shape[:2], -1)
        return as_channels(frame, like.shape[2])


def pick(frames, wanted):
    """Yield (number, frame) of the `wanted` frames in order; frames: an array, or whatever yields them one after another."""
    wanted = sorted(wanted)
    if hasattr(frames, "__getitem__"):
        yield from ((t, frames[t]) for t in wanted)
    elif wanted:
        among = set(wanted)
        yield from ((t, f) for t, f in enumerate(itertools.islice(frames, wanted[-1] + 1)) if t in among)


def decoded(video):
    """-> (its frames, one after another; frames per second, 0 where unknown)"""
    return Decoder(video), video.fps()


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
        return self.folder / video.split / f"{video.name}.npy"

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
    "channels", "source_size", "fps", "damaged", "resized", "missing"}.
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
            for v in fresh:
                if v.key not in failed:
                    self._report(v)
        return [v for v in videos if v.key not in failed], failed

    def _report(self, video):
        info = self.info(video)
        if info["damaged"]:
            print(f"warning: video {video.name}: {len(info['damaged'])} damaged frames replaced by the one before: "
                  + ", ".join(info["damaged"][:5]) + (" …" if len(info["damaged"]) > 5 else ""))
        if info["resized"]:
            print(f"warning: video {video.name}: {info['resized']} frames of another size were resized to "
                  f"{info['width']}×{info['height']}, the size of its first frame")
        if info["missing"]:
            print(f"warning: video {video.name}: {info['missing']} of the frames that its header promises could not "
                  f"be decoded; {info['frames']} were")


def _decode(job):
    cache, video = job
    decoder, source_size = Decoder(video), []

    def frames():
        for frame in decoder:
            tick()
            source_size[:] = frame.shape[:2]
            yield resize(frame, cache.size)[None]

    def describe(shape):
        return {**dict(zip(("frames", "height", "width", "channels"), shape)), "source_size": source_size, "fps": decoder.fps,
                "damaged": decoder.damaged, "resized": decoder.resized, "missing": decoder.missing}

    cache.write(video, frames(), describe)
