"""Raw scores of a dataset's videos, kept on disk: a killed evaluation continues, a second protocol costs nothing."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.io import UserError, load_arrays, safe_filename, save_arrays, short_hash, writable_folder
from common.pool import shard_of


class ScoreCache:
    """One .npz per video under folder/scored-…, which the jobs of an array share.

    settings: {name: value} of everything besides the video that the scores depend on (weights, precision, the method's
    SCORES_VERSION, …); source(video): fingerprint of the input.
    """

    def __init__(self, folder, settings: dict, source: Callable):
        self.folder, self.source = Path(folder) / f"scored-{short_hash(settings)}", source

    def path(self, video) -> Path:
        return self.folder / video.split / f"{safe_filename(video.name)}.npz"

    def load(self, video, without=()) -> dict[str, np.ndarray] | None:
        """-> {name: array} and "seconds", but those in `without`; None if missing, damaged or of another input."""
        path = self.path(video)
        if not path.exists():
            return None
        try:
            arrays = load_arrays(path, "scores of a video", without=without)
        except UserError:
            return None
        same = str(arrays.pop("source", "")) == json.dumps(self.source(video))
        return arrays if same and "seconds" in arrays else None

    def compute(
        self, videos, score: Callable, run, *, size: Callable, unit: str, all_videos=None, shard=None, on_disk=()
    ) -> dict | None:
        """score(video, tick) -> {name: array} for every video that has none; tick(n) moves the bar by n of its
        size(video) units. The ranks share the videos.

        shard "I/N": score only every N-th video of `all_videos`, starting at I. on_disk: names of large arrays.
        -> {video key: {name: array, or for those on disk a function that reads it}} on rank 0; None on the other
        ranks, and for a shard.
        """
        selected = shard_of(all_videos or videos, shard, run)
        missing = [v for v in videos if v.key in selected and self.load(v) is None]
        total = sum(map(size, missing))
        with tqdm(
            total=total, desc="score", unit=unit, disable=not run.is_main, dynamic_ncols=True, mininterval=2
        ) as bar:
            for v in missing:
                began, source = time.perf_counter(), json.dumps(self.source(v))
                arrays = score(v, bar.update)
                save_arrays(self.path(v), {**arrays, "seconds": time.perf_counter() - began, "source": source})
        run.barrier()
        if shard:
            run.print(
                f"shard {shard}: {sum(v.key in selected for v in videos)} videos are scored, in {self.folder}\n"
                "next: once every shard is done, the same command without --shard shows the results"
            )
            return None
        if not run.is_main:
            return None
        scores = {v.key: self.load(v, without=on_disk) for v in videos}
        if absent := [k for k, x in scores.items() if x is None]:
            raise UserError(
                f"scores of {absent[0]} are not in {self.folder}, or its source changed meanwhile: run the command "
                "again; processes on several machines need an --out that all of them see"
            )
        for v in videos:
            scores[v.key].update({name: partial(self.read, v, name) for name in on_disk})
        return scores

    def read(self, video, name: str) -> np.ndarray:
        return load_arrays(self.path(video), "scores of a video", [name])[name]


def total_seconds(scores: dict) -> float:
    """Seconds that scoring took, summed over the videos of ScoreCache.compute()."""
    return float(sum(x["seconds"] for x in scores.values()))


def need_test_videos(dataset) -> None:
    """Raises UserError for a dataset without test videos. dataset: a UsableVideos"""
    if not dataset.test:
        raise UserError(f"{dataset.data.name} has no test videos under {dataset.data.root}; --video scores single ones")


def score_test_set(dataset, score: Callable, run, *, out, settings: dict, source: Callable, **options) -> dict | None:
    """Raw scores of all test videos, cached in `out`; settings, source: see ScoreCache; options, result: see its
    compute(). dataset: a UsableVideos. Raises UserError without test videos."""
    need_test_videos(dataset)
    cache = ScoreCache(writable_folder(out), {**settings, "device": run.device.type}, source)
    return cache.compute(dataset.test, score, run, all_videos=dataset.data.test, **options)
