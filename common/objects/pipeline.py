"""What object-level methods share: from a dataset to cubes, and from scores of cubes to results."""

import argparse
import hashlib
import json
import time
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
from tqdm import tqdm

from common import datasets, evaluation
from common import old_training as training
from common.cache import FrameCache
from common.dataset import Usable
from common.io import UserError, load_arrays, safe_filename, save_arrays
from common.objects import detectors, flow
from common.objects.cubes import CubeStore, Settings, motion_boxes
from common.pool import add_shard_flag, map_videos, prepare_videos, tick

FLAGS = (
    "boxes",
    "tile",
    "flow",
    "min_score",
    "min_area",
    "covered",
    "motion_blur",
    "motion_threshold",
    "motion_area",
    "motion_close",
)


def add_foreground_flags(parser):
    """-> the argument group, to which a method may add its own."""
    g = parser.add_argument_group("foreground (defaults: as the checkpoint was trained, else the paper's constants)")
    g.add_argument(
        "--boxes", help=f"{detectors.KINDS} (default: motion); motion boxes always add what the detector misses"
    )
    g.add_argument(
        "--tile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="detect in the frame and in 2×2 overlapping quarters: for small objects (default: no)",
    )
    g.add_argument("--min-score", type=float, help="least score of a detection, 0..1")
    g.add_argument("--min-area", type=float, help="least area of a detection, px²")
    g.add_argument("--covered", type=float, help="drop a box covered more than this by a larger one, 0..1")
    g.add_argument("--motion-area", type=float, help="least area of a motion box, px²")
    return g


def add_difference_flags(group):
    """Flags of motion boxes that come from frame differences."""
    group.add_argument("--flow", help=f"{flow.HELP} (default: dis)")
    group.add_argument("--motion-blur", type=int, help="Gaussian kernel before differencing, px, odd")
    group.add_argument("--motion-threshold", type=int, help="least grey-level difference, 0..255")
    group.add_argument(
        "--motion-close", type=int, help="join moving parts up to this many px apart (default: 0, on demo 9)"
    )


def for_own_video(trained, boxes):
    """Settings of a checkpoint for footage that a boxes file knows nothing of: motion boxes, unless --boxes says better."""
    trained = dict(trained or {})
    if str(trained.get("boxes")).startswith("file:") and boxes is None:
        print(
            f"note: trained with boxes from {trained['boxes']}, which knows nothing of this video: motion boxes are used; the "
            "same detector (--boxes) would score best",
            flush=True,
        )
        trained["boxes"] = "motion"
    return trained


def settings_of(args, published, dataset, trained=None):
    """Settings of the dataset's `published` constants, or those a checkpoint was `trained` with; flags override both."""
    chosen = {k: getattr(args, k) for k in FLAGS if getattr(args, k, None) is not None}
    if chosen.get("motion_blur", 1) % 2 == 0:
        raise UserError("--motion-blur must be odd")
    base = published.get(dataset, published["folder"])
    if trained:
        base = {k: tuple(v) if isinstance(v, list) else v for k, v in trained.items()}
    return Settings(**{**base, **chosen})


class Prepared(Usable):
    """A dataset with its frames decoded and its cubes cut. train, test: the videos that are usable."""

    def __init__(self, data, videos, failed, cache, store):
        super().__init__(data, videos, failed)
        self.cache, self.store = cache, store

    def frames(self, video):
        return self.cache.info(video)["frames"]

    def pictures(self, video):
        """-> (uint8 [T, H, W, C], their common.container.Clock)"""
        return self.cache.frames(video), self.cache.clock(video)

    def sizes(self, videos):
        """(height, width) of each video."""
        return [(i["height"], i["width"]) for i in map(self.cache.info, videos)]

    def column(self, videos, field):
        """One small field (frame, box, speed) of every video's records, copied; the memory maps are closed again."""
        return [np.array(self.store.records(v)[field]) for v in videos]

    def records(self, videos):
        return [self.store.records(v) for v in videos]

    def summary(self):
        for split in ("train", "test"):
            videos = getattr(self, split)
            print(
                f"{split}: {len(videos)} videos, {sum(map(self.frames, videos))} frames, "
                f"{sum(self.store.info(v)['cubes'] for v in videos)} cubes"
            )


def prepare(args, published, r, splits=("train", "test"), data=None, trained=None):
    """Find the dataset and do what is missing of decoding, detection, flow and cubes (cut as a checkpoint was `trained`).

    Under torchrun every process does its share of the videos.
    """
    with r.main_first():
        data = data or datasets.find(args.dataset, args.data_root, args.labels)
    settings = settings_of(args, published, data.name, trained)
    folder = data.cache_folder(args.cache)
    videos = [v for s in splits for v in getattr(data, s)]
    cache = FrameCache(folder / "frames")
    store = CubeStore(cache, folder, settings)  # refuses wrong settings before any work
    usable, failed = prepare_videos(cache, videos, cache.build, args, r)
    there, lost = prepare_videos(store, usable, partial(store.build, device=r.device), args, r, among=videos)
    return Prepared(data, there, {**failed, **lost}, cache, store)


def preprocess_alone(prepare, add_data_flags, argv, about, script):
    """A method's preprocess.py as a command of its own: cubes in the cache. prepare, add_data_flags: the method's."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    add_shard_flag(training.add_flags(parser, out="not used here"))
    args = parser.parse_args(argv)
    start, r = time.perf_counter(), training.Run.from_args(args)
    ready = prepare(args, r)
    if r.is_main:
        ready.summary()
        print(f"cubes are in {ready.store.folder} ({time.perf_counter() - start:.1f} s)")
        ready.report_skipped()
        print(f"next: python {script} --dataset {args.dataset}")
    r.close()


# ------------------------------------------------------------------------------------------- from cube scores to results


def frame_scores(cube_frames, scores, frames, empty):
    """Maximum over a frame's cubes; `empty` for frames without any. -> float32 [frames]."""
    out = np.full(frames, -np.inf, np.float32)
    np.maximum.at(out, cube_frames, scores)
    return np.where(np.isneginf(out), np.float32(empty), out)


def per_video(ready, videos, cube_scores, empty):
    """Scores of all cubes of `videos`, in order [N] -> {video: frame scores [T]}, {video: detections [n, 6]}.

    A detection is frame, x1, y1, x2, y2, score.
    """
    scores, detections, start = {}, {}, 0
    for v in videos:
        frames, boxes = (ready.column([v], k)[0] for k in ("frame", "box"))
        s = cube_scores[start : start + len(frames)]
        start += len(frames)
        scores[v.name] = frame_scores(frames, s, ready.frames(v), empty)
        detections[v.name] = np.column_stack([frames, boxes.reshape(-1, 4), s]).astype(np.float32)
    return scores, detections


def baselines(ready, videos):
    """The two trivial scores that every result is shown beside."""
    difference, fastest = {}, {}
    for v in tqdm(videos, desc="trivial baselines", unit="video", dynamic_ncols=True, mininterval=5):
        frames, speeds = (ready.column([v], k)[0] for k in ("frame", "speed"))
        difference[v.name] = evaluation.frame_difference(ready.cache.frames(v))
        fastest[v.name] = evaluation.fastest_box(frames, speeds, ready.frames(v))
    return {"frame difference": difference, "fastest box": fastest}


def frame_baselines(cache, videos, workers):
    """The two trivial scores for methods without boxes: those of motion boxes and DIS flow, on the frames that the method sees.

    Computed once per video and kept beside the cached frames.
    """
    names = ("frame difference", "fastest box")
    missing = [v for v in videos if not _baseline_file(cache, v).exists()]
    if missing:
        _, errors = map_videos(
            _baseline,
            [(cache, v) for v in missing],
            workers=workers,
            label="trivial baselines",
            total=sum(cache.info(v)["frames"] for v in missing),
        )
        if errors:
            raise UserError(errors[0][1])
    kept = {v.name: load_arrays(_baseline_file(cache, v), "trivial baselines") for v in videos}
    return {k: {name: kept[name][k] for name in kept} for k in names}


def _baseline_file(cache, video):
    stamp = hashlib.sha256(json.dumps(video.fingerprint()).encode()).hexdigest()[:8]
    return cache.folder / "baselines" / video.split / f"{safe_filename(video.name)}-{stamp}.npz"


def _baseline(job):
    cache, video = job
    frames, s, method = cache.frames(video), Settings(), flow.make_flow("dis")
    speeds = np.zeros(len(frames), np.float32)
    last = len(frames) - 1
    grey = lambda t: cv2.GaussianBlur(np.ascontiguousarray(flow.gray(frames[min(max(t, 0), last)])), (3, 3), 0)
    area = s.motion_area * frames.shape[1] * frames.shape[2] / (240 * 360)  # its default belongs to frames of 240 × 360
    for t in range(1, len(frames)):
        boxes = motion_boxes(grey(t - 1), grey(t), grey(t + 1), [], replace(s, motion_area=area))
        if len(boxes):
            x, y = np.moveaxis(method([(frames[t - 1], frames[t])])[0], 2, 0)
            speed = cv2.magnitude(np.ascontiguousarray(x), np.ascontiguousarray(y))
            speeds[t] = max(speed[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1].mean() for x1, y1, x2, y2 in boxes)
        tick()
    save_arrays(
        _baseline_file(cache, video), {"frame difference": evaluation.frame_difference(frames), "fastest box": speeds}
    )
