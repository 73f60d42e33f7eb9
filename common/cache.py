"""Files made once from every video, one .npy each, and memory-mapped from then on; decoded frames are such files."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from common.io import UserError, load_array, read_json, safe_filename, stream_npy, write_json
from common.pool import cores, map_videos, shard_of, tick
from common.readers.container import Clock
from common.readers.pictures import resize
from common.readers.video import Decoder, Video, print_warnings


class VideoFiles:
    """One .npy per video under `folder`, and beside it a .json with the fingerprint and the content of its source.

    A subclass has make(videos, workers, show, **options): it calls write() for each video, shows its progress if
    `show`, and returns {video key: why} of those that failed.
    """

    what, action = "cached file", "preparing"  # one file, in errors; what make() does, in its announcement

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, video: Video) -> Path:
        return self.folder / video.split / f"{safe_filename(video.name)}.npy"

    def info(self, video: Video) -> dict | None:
        """What its .json holds; None if there is no file or its source has changed. A video that was copied anew has
        other times: then all its bytes are compared. Raises UserError."""
        path = self.path(video)
        json_path = path.with_suffix(".json")
        if not json_path.exists() or not path.exists():
            return None
        info, source = read_json(json_path, f"{self.what}'s entry"), video.fingerprint()
        if info.get("source") != source:
            same_size = info.get("source", [])[:3] == source[:3]  # place, number of files, bytes
            if not same_size or info.get("content") != video.content():
                return None
            info["source"] = source
            write_json(json_path, info)
        return info

    def array(self, video: Video) -> np.ndarray:
        """Read-only memory map. Raises UserError."""
        return load_array(self.path(video), self.what, mmap=True)

    def write(self, video: Video, parts: Iterable[np.ndarray], describe: Callable[[tuple], dict], dtype=None) -> None:
        """Stream `parts` [n_i, …] into the video's file; describe(shape of all) -> further entries of its .json."""
        # before reading begins
        source = {"source": video.fingerprint(), "content": video.content()}
        shape = stream_npy(self.path(video), parts, dtype)
        write_json(self.path(video).with_suffix(".json"), {**source, **describe(shape)})

    def missing(self, videos: Iterable[Video]) -> tuple[list[Video], dict[str, str]]:
        """-> (videos that must be made, {video key: why} of those whose source cannot be read)"""
        missing, failed = [], {}
        for v in videos:
            try:
                if self.info(v) is None:
                    missing.append(v)
            except UserError as e:
                failed[v.key] = str(e)
        return missing, failed

    def run_jobs(self, function: Callable, videos: list[Video], frames_of: Callable, workers, label, show) -> dict:
        """map_videos() of function((self, video)). frames_of(video): frames to count. -> {video key: why it failed}"""
        total, jobs = sum(map(frames_of, videos)), [(self, v) for v in videos]
        _, errors = map_videos(function, jobs, workers=workers, total=total, label=label, show=show and bool(videos))
        return {videos[i].key: why for i, why in errors}

    def build(self, videos: list[Video], workers: int | None, show: bool = True, **options) -> tuple[list[Video], dict]:
        """Make the files that are missing, and print the warnings of all. options: for make().

        -> (usable videos, {video key: why} of those that failed)
        """
        missing, failed = self.missing(videos)
        if missing:
            if show:
                print(f"{self.action}: {len(missing)} of {len(videos)} videos, into {self.folder}", flush=True)
            failed.update(self.make(missing, workers, show, **options))
        usable = [v for v in videos if v.key not in failed]
        for v in usable:
            print_warnings(v, (self.info(v) or {}).get("warnings", ()))
        return usable, failed

    def prepare(self, videos: list[Video], run, *, workers=None, shard=None, all_videos=None, **options) -> tuple:
        """Build what is missing: every rank its share of `videos`, or a job of an array (shard "I/N") its own.

        all_videos: the complete list. Shards are taken from it, because concurrent jobs see different remaining videos.
        options: for build(). -> (usable videos, {video key: why} of those that failed on any rank)
        """
        share = shard_of(all_videos or videos, shard, run)
        workers = workers or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size)))
        _, failed = self.build([v for v in videos if v.key in share], workers, run.is_main, **options)
        failed = {key: why for part in run.all_gather_object(failed) for key, why in part.items()}
        videos = [v for v in videos if v.key not in failed]
        missing = {v.key for part in run.all_gather_object(self.missing(videos)[0]) for v in part}
        if not shard:  # else they are left to other jobs
            why = "the process that was to prepare it could not, or not every machine sees this --cache"
            failed.update(dict.fromkeys(missing, why))
        return [v for v in videos if v.key not in missing], failed


class FrameCache(VideoFiles):
    """Decoded videos of one dataset under `folder`; a video whose source has not changed is never decoded again.

    size: (height, width) of the cached frames, by default the video's. info(video): {"source", "frames", "height",
    "width", "channels", "source_size", "fps", "damaged", "lost", "resized", "warnings"}.
    """

    what, action = "cached video", "decoding"

    def __init__(self, folder, size: tuple[int, int] | None = None):
        super().__init__(folder)
        self.size = size

    frames = VideoFiles.array  # uint8 [T, H, W, C]

    def source_of(self, video: Video) -> str | list:
        """Fingerprint for what is made from its frames: the hash of its files, the same for a copy; frames cached by
        older versions have none."""
        return (self.info(video) or {}).get("content") or video.fingerprint()

    def make(self, videos: list[Video], workers: int, show: bool) -> dict[str, str]:
        return self.run_jobs(_decode, videos, Video.expected_frames, workers, "decode", show)

    def clock(self, video: Video) -> Clock:
        """When its frames are shown. The file of their times exists only where these are uneven."""
        path = self.path(video).with_suffix(".times")
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
        times = cache.path(video).with_suffix(".times")
        times.unlink(missing_ok=True)
        if decoder.clock.times is not None:
            stream_npy(times, [decoder.clock.times])
        sizes = dict(zip(("frames", "height", "width", "channels"), shape))
        problems = {name: getattr(decoder, name) for name in ("damaged", "lost", "resized", "warnings")}
        return {**sizes, "source_size": source_size, "fps": decoder.clock.fps, **problems}

    cache.write(video, frames(), describe)
