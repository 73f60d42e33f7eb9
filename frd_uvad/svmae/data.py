"""The training set of the detector: segments of normal and abnormal videos, and caption embeddings, if any."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.io import UserError, load_array
from frd_uvad.features.data import FeatureData, FeatureVideo, is_normal_by_name
from frd_uvad.features.labels import listed_names

SEGMENTS = 32  # of a bag


def find_bags(data: FeatureData, normal=None, abnormal=None) -> tuple[list[FeatureVideo], list[FeatureVideo]]:
    """The normal and the abnormal training videos.

    normal, abnormal: files with their names, by default normal.txt and abnormal.txt beside the features; without both,
    the names of the videos tell. Raises UserError where this is unknown, or where there are none of one kind.
    """
    lists = [given or data.root / name for given, name in ((normal, "normal.txt"), (abnormal, "abnormal.txt"))]
    has_lists = all(path in (normal, abnormal) or path.exists() for path in lists)
    bags = listed_bags(data, *lists) if has_lists else bags_by_name(data)
    if not all(bags):
        counts = " and ".join(str(len(videos)) for videos in bags)
        raise UserError(f"the detector needs normal and abnormal training videos; there are {counts}")
    return bags


def listed_bags(data, normal: Path, abnormal: Path):
    """The videos of two lists; notes are printed about videos that are in neither, or have no features."""
    by_name, bags = {v.name: v for v in data.train}, []
    for path in (normal, abnormal):
        names = set(listed_names(path, by_name))
        bags.append([by_name[name] for name in sorted(names & set(by_name))])
        if missing := sorted(names - set(by_name)):
            print(f"note: {len(missing)} videos of {path} have no features, such as {missing[0]}")
    normal_names, abnormal_names = ({v.name for v in videos} for videos in bags)
    if both := normal_names & abnormal_names:
        raise UserError(f"the training video {min(both)} is in {normal} and in {abnormal}: leave it in one")
    if unlisted := sorted(set(by_name) - normal_names - abnormal_names):
        print(f"note: {len(unlisted)} training videos are in neither list and left out, such as {unlisted[0]}")
    return tuple(bags)


def bags_by_name(data):
    normal = [v for v in data.train if is_normal_by_name(v.name)]
    if not normal:
        raise UserError(
            "which training videos are normal is not known: put normal.txt and abnormal.txt with their names into "
            f"{data.root}, or give --normal and --abnormal"
        )
    return normal, [v for v in data.train if v not in normal]


def pool_segments(clips: np.ndarray, count: int = SEGMENTS) -> np.ndarray:
    """Mean of the clips in each of `count` equal parts of a video; the nearest clip if there are fewer.

    [clips, …] -> [count, …]
    """
    edges = np.linspace(0, len(clips), count + 1).astype(int)
    first = np.minimum(edges[:-1], len(clips) - 1)
    return np.stack([clips[a : max(b, a + 1)].mean(0) for a, b in zip(first, edges[1:])])


def read_clips(video: FeatureVideo) -> np.ndarray:
    """float32 [clips, crops, width]. Raises UserError."""
    clips = video.clips(range(len(video))).astype(np.float32)
    if not np.isfinite(clips).all():
        raise UserError(
            f"features of video {video.name} ({video.path}) hold NaN or infinite numbers: encode it again, or take it "
            "away"
        )
    return clips


def text_path(folder: Path, video) -> Path:
    """A video's caption embeddings, in a folder for its split if a training and a test video have the same name."""
    path = folder / video.split / f"{video.name}.npy"
    return path if path.exists() else folder / f"{video.name}.npy"


def read_captions(folder: Path, video: FeatureVideo) -> np.ndarray:
    """Caption embeddings, one per clip; published files have one more or less. float32 [rows, width]; UserError."""
    path = text_path(folder, video)
    x = load_array(path, "caption embeddings")
    if x.ndim != 2 or not x.size or x.dtype.kind not in "iuf" or not np.isfinite(x).all():
        raise UserError(f"caption embeddings {path}: expected finite numbers [clips, width], got shape {x.shape}")
    if abs(len(x) - len(video)) > 1:
        clips = f"{len(x)} rows for video {video.name} of {len(video)} clips"
        raise UserError(f"caption embeddings {path}: {clips}: expected one per clip")
    return np.asarray(x, np.float32)


def fingerprint(video: FeatureVideo, text: Path | None) -> list:
    """Changes when a video's features or caption embeddings do."""
    path = text and text_path(text, video)
    return [*video.fingerprint(), str(path), path.stat().st_mtime_ns if path and path.exists() else 0]


class Bags:
    """Segments of the training videos, on the device: visual [N, crops, 32, C], text [N, crops, 32, D] or None.

    A sample is the number of a bag; normal videos come first. text: folder of caption embeddings, or None.
    """

    def __init__(self, normal: list[FeatureVideo], abnormal: list[FeatureVideo], text: Path | None, run):
        self.run, self.counts = run, [len(normal), len(abnormal)]
        videos, show = [*normal, *abnormal], run.is_main
        bar = tqdm(videos, "read bags", unit="video", dynamic_ncols=True, mininterval=5, disable=not show)
        bags = (pool_segments(read_clips(v)).transpose(1, 0, 2)[None] for v in bar)
        self.visual, self.text = run.keep_on_device(bags, len(videos)), None
        if text:
            words = (pool_segments(read_captions(text, v)) for v in videos)
            crops = self.visual.shape[1]
            self.text = run.keep_on_device((np.repeat(x[None, None], crops, axis=1) for x in words), len(videos))

    def draw(self, rng, bags: int) -> np.ndarray:
        """`bags` normal and `bags` abnormal videos, without repetition if there are enough. int [2 · bags]"""
        normal, abnormal = (rng.choice(n, bags, replace=n < bags) for n in self.counts)
        return np.concatenate([normal, self.counts[0] + abnormal])

    def read(self, rows: np.ndarray):
        return self.run.pin(rows)  # the bags themselves are on the device

    def to_device(self, rows):
        """Numbers int [n] that read() returned -> visual [n, crops, 32, C], text [n, crops, 32, D] or None."""
        rows = rows.to(self.run.device, non_blocking=True)
        return self.visual[rows], None if self.text is None else self.text[rows]
