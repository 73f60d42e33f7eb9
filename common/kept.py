"""What scoring finds, kept per video: a killed evaluation goes on, a second protocol costs nothing, and jobs of an array share the work."""

import hashlib
import json
import time
from pathlib import Path

from tqdm import tqdm

from common.io import UserError, load_arrays, safe_filename, save_arrays
from common.pool import shard_of


class Kept:
    """The arrays that scoring gave, one .npz per video under folder/scored-….

    settings: {name: value} of whatever they depend on besides the video (weights, precision, …); source(video): what changes when its
    input does; code: a file of the method, whose folder's Python files count too: who changes a method does not want its old scores.
    """

    def __init__(self, folder, settings, source, code):
        known = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for path in sorted(Path(code).parent.glob("*.py")):
            known.update(path.read_bytes())
        self.folder, self.source = folder / f"scored-{known.hexdigest()[:10]}", source

    def path(self, video):
        return self.folder / video.split / f"{safe_filename(video.name)}.npz"

    def load(self, video):
        """-> {name: array}, "seconds" that scoring took among them; None where it is missing, damaged or of an older input."""
        path = self.path(video)
        if not path.exists():
            return None
        try:
            found = load_arrays(path, "scores of a video")
        except UserError:
            return None
        return found if str(found.pop("source", "")) == json.dumps(self.source(video)) and "seconds" in found else None

    def make(self, videos, score, r, *, size, unit, among=None, shard=None):
        """score(video, tick) -> {name: array} for every video that has none; tick(n) moves the bar by n of its size(video) units.

        torchrun's processes share the videos. shard: "I/N", the part of an array's job, of the list `among` (whose order says whose a
        video is). -> {video key: {name: array}} on the first process; None on the others, and for a job of an array.
        """
        first, step = shard_of(shard, r)
        mine = {v.key for v in (among or videos)[first::step]}
        left = [v for v in videos if v.key in mine and self.load(v) is None]
        with tqdm(
            total=sum(map(size, left)),
            desc="score",
            unit=unit,
            disable=not r.is_main,
            dynamic_ncols=True,
            mininterval=2,
        ) as bar:
            for v in left:
                began, source = time.perf_counter(), json.dumps(self.source(v))
                arrays = score(v, bar.update)
                save_arrays(self.path(v), {**arrays, "seconds": time.perf_counter() - began, "source": source})
        r.barrier()
        if shard:
            r.print(
                f"shard {shard}: {sum(v.key in mine for v in videos)} videos are scored, in {self.folder}\n"
                "next: once every shard is done, the same command without --shard shows the results"
            )
            return None
        if not r.is_main:
            return None
        found = {v.key: self.load(v) for v in videos}
        if lost := [k for k, x in found.items() if x is None]:
            raise UserError(
                f"scores of {lost[0]} are not in {self.folder}, or its source changed meanwhile: run the same command again; "
                "processes on several machines need an --out that all of them see"
            )
        return found


def seconds_of(found):
    """Seconds that scoring took, summed over videos, whichever processes they were."""
    return float(sum(x["seconds"] for x in found.values()))
