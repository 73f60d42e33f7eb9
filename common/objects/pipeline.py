"""What object-level methods share: from a dataset to cubes, and from scores of cubes to scores of frames."""

import argparse
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from common import evaluation
from common.cache import FrameCache
from common.cli import DataSource, given, positive_float, positive_int
from common.flow import sources
from common.io import UserError
from common.loader import take_rows
from common.objects import detectors
from common.objects.cubes import CubeStore, Settings
from common.readers import datasets
from common.readers.container import Clock
from common.readers.dataset import Dataset, UsableVideos, report_skipped
from common.readers.video import Video

FLAGS = (
    "boxes tile flow flow_scale flow_updates min_score min_area covered motion_blur motion_threshold motion_area "
    "motion_close"
).split()


def add_foreground_flags(parser: argparse.ArgumentParser):
    """-> the argument group, to which a method may add more."""
    group = parser.add_argument_group("foreground (defaults: as the checkpoint was trained, else as in the paper)")
    group.add_argument("--boxes", help=f"{detectors.KINDS} (default: motion); motion boxes add what a detector misses")
    tile = "detect in the frame and in 2×2 overlapping quarters: for small objects (default: no)"
    group.add_argument("--tile", action=argparse.BooleanOptionalAction, default=None, help=tile)
    group.add_argument("--min-score", type=float, help="least score of a detection, 0..1")
    group.add_argument("--min-area", type=float, help="least area of a detection, px²")
    group.add_argument("--covered", type=float, help="drop a box covered more than this by a larger one, 0..1")
    group.add_argument("--motion-area", type=float, help="least area of a motion box, px²")
    longest = f"the longer side to {sources.PUBLISHED_SIDE} for raft, else 1"
    scale = f"frames are enlarged so much before the flow, whose vectors are divided by it (default: {longest})"
    group.add_argument("--flow-scale", type=positive_float, help=scale)
    group.add_argument("--flow-updates", type=positive_int, help="updates of raft's flow (default: 12)")
    return group


def add_difference_flags(group) -> None:
    """Flags of motion boxes from frame differences."""
    group.add_argument("--flow", help=f"{sources.HELP} (default: dis)")
    group.add_argument("--motion-blur", type=int, help="Gaussian kernel before differencing, px, odd")
    group.add_argument("--motion-threshold", type=int, help="least grey-level difference, 0..255")
    group.add_argument("--motion-close", type=int, help="join moving parts this near, px (default: 0, on demo 9)")


class CubeVideos(UsableVideos):
    """A dataset with its frames decoded and its cubes cut. train, test: the usable videos."""

    def __init__(self, data, videos, failed, cache: FrameCache, store: CubeStore):
        super().__init__(data, videos, failed)
        self.cache, self.store = cache, store

    def frames(self, video: Video) -> int:
        return self.cache.info(video)["frames"]

    def cubes(self, video: Video) -> int:
        return self.store.info(video)["cubes"]

    def pictures(self, video: Video) -> tuple[np.ndarray, Clock]:
        """-> (uint8 [T, H, W, C], when they are shown)"""
        return self.cache.frames(video), self.cache.clock(video)

    def sizes(self, videos: list[Video]) -> list[tuple[int, int]]:
        """(height, width) of each video."""
        return [(i["height"], i["width"]) for i in map(self.cache.info, videos)]

    def column(self, videos: list[Video], field: str) -> list[np.ndarray]:
        """One small field (frame, box, speed) of every video's records, copied; the memory maps are closed again."""
        return [np.array(self.store.array(v)[field]) for v in videos]

    def records(self, videos: list[Video]) -> list[np.ndarray]:
        return [self.store.array(v) for v in videos]

    def summary(self) -> str:
        lines = []
        for split, videos in (("train", self.train), ("test", self.test)):
            frames, cubes = sum(map(self.frames, videos)), sum(map(self.cubes, videos))
            lines.append(f"{split}: {len(videos)} videos, {frames} frames, {cubes} cubes")
        return "\n".join([*lines, f"cubes are in {self.store.folder}"])


def prepare(
    source: DataSource, published: dict, run, *, foreground=None, splits=("train", "test"), video=None, trained=None
) -> CubeVideos:
    """Find the dataset and do what is missing of decoding, detection, flow and cubes; every rank does its share.

    published: {dataset: settings}; trained: those of a checkpoint instead; foreground: {name: value} given by flags,
    which override both; video: one Video instead of the dataset. Raises UserError for wrong settings before any work.
    """
    foreground = foreground or {}
    if video is None:
        with run.main_first():
            data = datasets.find(source.dataset, source.data_root, source.labels)
    else:
        data = Dataset("video", video.path.resolve().parent, [], [video])
        if str((trained or {}).get("boxes")).startswith("file:") and "boxes" not in foreground:
            note = f"note: trained with boxes from {trained['boxes']}, which cannot cover this video"
            run.print(f"{note}: motion boxes are used; the same detector (--boxes) would score best")
            trained = {**trained, "boxes": "motion"}
    if foreground.get("motion_blur", 1) % 2 == 0:
        raise UserError("--motion-blur must be odd")
    name = data.name.removesuffix("-sd")  # ShanghaiTech-SD: the same videos
    constants = {**(trained or published.get(name, published["folder"])), **foreground}
    constants.setdefault("flow_precision", run.precision)
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in constants.items()})
    folder = data.cache_folder(source.cache)
    videos = [v for split in splits for v in getattr(data, split)]
    cache = FrameCache(folder / "frames")
    store = CubeStore(cache, folder, settings, str(run.device))
    if store.flows and store.missing(videos)[0]:
        store.flows.load()  # a wrong file is refused before the work begins
    usable, undecoded = cache.prepare(videos, run, workers=source.workers, shard=source.shard)
    usable, failed = store.prepare(usable, run, workers=source.workers, shard=source.shard, all_videos=videos)
    return CubeVideos(data, usable, {**undecoded, **failed}, cache, store)


def frame_scores(cube_frames: np.ndarray, scores: np.ndarray, frames: int, empty: float) -> np.ndarray:
    """Maximum over a frame's cubes; `empty` for frames without any. -> float32 [frames]."""
    out = np.full(frames, -np.inf, np.float32)
    np.maximum.at(out, cube_frames, scores)
    return np.where(np.isneginf(out), np.float32(empty), out)


def per_video(dataset: CubeVideos, videos: list, cube_scores: np.ndarray, empty: float) -> tuple[dict, dict]:
    """Scores [N] of all cubes of `videos` in order -> {video: frame scores [T]}, {video: [n, 6]: frame, box, score}."""
    scores, detections = {}, {}
    parts = np.split(cube_scores, np.cumsum([dataset.cubes(v) for v in videos])[:-1])
    for v, part in zip(videos, parts):
        (frames,), (boxes,) = dataset.column([v], "frame"), dataset.column([v], "box")
        scores[v.name] = frame_scores(frames, part, dataset.frames(v), empty)
        detections[v.name] = np.column_stack([frames, boxes, part]).astype(np.float32)
    return scores, detections


def flow_energies(records: np.ndarray, number: int) -> np.ndarray:
    """Mean squared length of each cube's flow, the one of this number. records [n] -> float32 [n], px²."""
    out, part = np.zeros(len(records), np.float32), slice(number, number + 1)
    shape = records["flow"][:0, part].shape[1:]
    for start in range(0, len(records), 1024):
        rows = np.arange(start, min(start + 1024, len(records)))
        flow = take_rows([records], [0], rows, shape, np.float16, "flow", part)
        out[rows] = np.square(flow, dtype=np.float32).sum((1, 2)).mean((1, 2))
    return out


def baselines(dataset: CubeVideos, videos: list) -> dict:
    """The three trivial scores beside every result. -> {title: {video: float32 [T]}}"""
    out = {title: {} for title in evaluation.BASELINES}
    now = dataset.store.s.flows.index(0)
    for v in tqdm(videos, desc="trivial baselines", unit="video", dynamic_ncols=True, mininterval=5):
        (frames,), (speeds,) = dataset.column([v], "frame"), dataset.column([v], "speed")
        out["frame difference"][v.name] = evaluation.frame_difference(dataset.cache.frames(v))
        energies = flow_energies(dataset.store.array(v), now)
        for title, values in (("fastest box", speeds), ("flow energy", energies)):  # of the boxes, 0 without any
            out[title][v.name] = np.zeros(dataset.frames(v), np.float32)
            np.maximum.at(out[title][v.name], frames, values)
    return out


def preprocess(prepare: Callable, args: argparse.Namespace, next_command: str) -> None:
    """main() of a method's preprocess.py: cubes in the cache. prepare(source, run, foreground=…): the method's."""
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        dataset = prepare(DataSource.from_args(args), run, foreground=given(args, FLAGS))
        run.print(dataset.summary())
        if run.is_main:
            report_skipped(dataset.skipped)
        run.print(f"next: {next_command}")
