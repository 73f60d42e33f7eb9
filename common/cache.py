"""What is made of videos once and kept: one .npy per video, and decoded frames, memory-mapped ever after."""

from pathlib import Path

import numpy as np

from common.container import Clock
from common.io import UserError, atomic_write, load_array, read_json, safe_filename, stream_npy, write_json
from common.pictures import resize
from common.pool import cores, map_videos, shard_of, tick
from common.video import Decoder, print_warnings


class VideoFiles:
    """One .npy per video under `folder`, and beside it a .json that says which source it was made from."""

    what = "cached file"

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, video):
        return self.folder / video.split / f"{safe_filename(video.name)}.npy"

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

    def prepare(self, videos, run, *, workers=None, shard=None, all_videos=None, **options):
        """Build what is missing: every rank its share of `videos`, or a job of an array (shard "I/N") its own.

        all_videos: the complete list. Shards are taken from it, not from `videos`, because concurrent jobs see different
        remaining videos. options: passed on to build(). -> (usable videos, {video key: why} of those that failed).
        """
        first, step = shard_of(shard, run)
        own = {v.key for v in (all_videos or videos)[first::step]}
        workers = workers or max(1, cores() // run.world_size)
        _, failed = self.build([v for v in videos if v.key in own], workers, run.is_main, **options)
        videos, failed = self.collect(videos, failed, shard, run)
        return [v for v in videos if v.key not in failed], failed

    def collect(self, videos, failed, sharded, r):
        """What there is once every process of Run `r` has done its share. sharded: what is not there is other jobs' work, no failure.

        -> (videos that count, {video key: why} of all that failed).
        """
        failed = {k: why for part in r.all_gather_object(failed) for k, why in part.items()}
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
            _, errors = map_videos(
                _decode, [(self, v) for v in fresh], workers=workers, total=total, label="decode", show=show
            )
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
            with atomic_write(times) as tmp, open(tmp, "wb") as f:
                np.save(f, decoder.clock.times)
        return {
            **dict(zip(("frames", "height", "width", "channels"), shape)),
            "source_size": source_size,
            "fps": decoder.clock.fps,
            "damaged": decoder.damaged,
            "lost": decoder.lost,
            "resized": decoder.resized,
            "warnings": decoder.warnings,
        }

    cache.write(video, frames(), describe)
