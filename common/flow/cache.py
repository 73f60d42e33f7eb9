"""Optical flow of a network, computed once per video and kept as float16 memory maps beside the decoded frames.

Optional, with raft.py: a copy without them has DIS and flow from files.
"""

import time
from pathlib import Path

import numpy as np

from common.cache import FrameCache, VideoFiles
from common.flow.sources import StoredFlow, fingerprint, flow_scale
from common.io import optional_module, short_hash
from common.pool import tick
from common.readers.video import Video

PAIRS = 8  # at once on a GPU, if their correlations fit; on a CPU that of one is large enough


class FlowCache(VideoFiles):
    """float16 [T, H, W, 2] per video: entry t holds the flow from frame t-1 to t in pixels, the first one is zero.

    Its folder is named by what decides the flow, so that all methods share it. info(video): {"source", "frames"}.
    """

    what, action = "cached flow", "computing optical flow"

    def __init__(
        self, cache: FrameCache, folder, method: str, scale: float, updates: int, precision: str, device: str = "cpu"
    ):
        super().__init__(Path(folder) / f"flow-{short_hash(fingerprint(method, scale, updates, precision))}")
        self.cache, self.device = cache, device
        self.method, self.scale = method, scale
        self.updates, self.precision = updates, precision
        self.net = None

    def __getstate__(self):  # the processes that cut cubes need no network
        return {**self.__dict__, "net": None}

    def load(self) -> None:
        """Read the network. Raises UserError."""
        raft = optional_module("common.flow.raft", f"--flow {self.method}", "choose dis")
        self.net = self.net or raft.load_raft(self.method, self.device)

    def make(self, videos: list[Video], workers: int, show: bool) -> dict[str, str]:
        self.load()
        sizes = {v.key: self.cache.info(v) for v in videos}
        pairs = sum(x["frames"] - 1 for x in sizes.values())
        if show:
            self.announce(videos, sizes, pairs)
        began = time.perf_counter()
        failed = self.run_jobs(_compute, videos, lambda v: sizes[v.key]["frames"], 1, "optical flow", show)
        if show and pairs:
            print(f"optical flow: {pairs / (time.perf_counter() - began):.2f} pairs/s", flush=True)
        return failed

    def flows(self, video: Video, limit: int | None = None):
        """Yield the flow into every frame but the first of `limit` frames, float32 [H, W, 2]."""
        from common.flow.raft import video_flow

        frames = self.cache.frames(video)[:limit]
        scale = flow_scale(self.method, self.scale, *frames.shape[1:3])
        options = {"scale": scale, "updates": self.updates, "bf16": self.precision == "bf16"}
        yield from video_flow(self.net, frames, batch=self.batch(*frames.shape[1:3], scale), **options)

    def batch(self, height: int, width: int, scale: float) -> int:
        """Pairs at once: their correlations, float32 of all places at an eighth of the size, take a third of a GPU's
        free memory at most."""
        if self.device == "cpu":
            return 1
        import torch

        pair = 5.4 * (height * scale / 8 * width * scale / 8) ** 2  # bytes, with smaller copies of it
        return max(1, min(PAIRS, int(torch.cuda.mem_get_info(self.device)[0] / 3 / pair)))

    def announce(self, videos: list[Video], sizes: dict, pairs: int) -> None:
        """Print the size on disk and the time that is needed, measured on the first frames of the longest video."""
        longest = max(videos, key=lambda v: sizes[v.key]["frames"])
        info = sizes[longest.key]
        scale = flow_scale(self.method, self.scale, info["height"], info["width"])
        batch = self.batch(info["height"], info["width"], scale)
        done = [time.perf_counter(), *(time.perf_counter() for _ in self.flows(longest, 3 * batch))]
        first = max(1, batch - 1) if len(done) > batch + 1 else 0  # pairs of the first batch, which is slower
        seconds = (done[-1] - done[first]) / max(1, len(done) - 1 - first)
        size = sum(4 * x["frames"] * x["height"] * x["width"] for x in sizes.values()) / 2**30
        print(
            f"optical flow of {pairs} pairs of frames by {self.method}, frames enlarged {scale:.3g} times, "
            f"{self.updates} updates, {self.precision}: {size:.2f} GiB on disk, about {duration(pairs * seconds)} "
            f"({seconds:.2f} s a pair); finished videos are kept if it is stopped",
            flush=True,
        )

    def read(self, video: Video, shape: tuple, first_pair: tuple) -> StoredFlow:
        return StoredFlow(self.array(video), self.path(video), shape, first_pair)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _compute(job):
    store, video = job
    info = store.cache.info(video)

    def parts():
        yield np.zeros((1, info["height"], info["width"], 2), np.float16)
        tick()
        for flow in store.flows(video):
            yield flow.astype(np.float16)[None]
            tick()

    store.write(video, parts(), lambda shape: {"frames": shape[0]})
