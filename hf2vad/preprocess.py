"""Videos -> space-time cubes on disk. Run by train.py and eval.py where it is missing, or alone:

    python hf2vad/preprocess.py --dataset ped2 --data-root data --boxes file:boxes.npz
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets, detectors, flow, training  # noqa: E402
from common.files import UserError, run, writable_folder  # noqa: E402
from common.foreground import CubeStore, Settings  # noqa: E402
from common.video import FrameCache  # noqa: E402

# Constants of the paper's configuration: areas in square pixels, the rest as in common.foreground.Settings.
PUBLISHED = {
    "ped1":         dict(min_score=0.5, min_area=10**2, covered=0.6, motion_blur=3, motion_threshold=18, motion_area=10**2),
    "ped2":         dict(min_score=0.5, min_area=10**2, covered=0.6, motion_blur=3, motion_threshold=18, motion_area=10**2),
    "avenue":       dict(min_score=0.25, min_area=40**2, covered=0.6, motion_blur=5, motion_threshold=18, motion_area=40**2),
    "shanghaitech": dict(min_score=0.5, min_area=8**2, covered=0.65, motion_blur=5, motion_threshold=15, motion_area=40**2),
    "folder":       dict(min_score=0.5, min_area=10**2, covered=0.6, motion_blur=5, motion_threshold=18, motion_area=20**2),
    "demo":         dict(min_score=0.5, min_area=10**2, covered=0.6, motion_blur=5, motion_threshold=10, motion_area=10**2,
                         motion_close=9),
}


def add_data_flags(parser):
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", "--dataset_name", default="demo", help=f"one of {', '.join(datasets.ALIASES)}; the papers' "
                   "spellings are understood (default: %(default)s)")
    g.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds the dataset (default: %(default)s)")
    g.add_argument("--cache", type=Path, default=Path("cache"), help="folder for decoded frames and cubes (default: %(default)s)")
    g.add_argument("--labels", type=Path, default=None, help="frame labels to use instead of the dataset's own: an .npz of "
                   "video name -> 0/1 per frame")
    g = parser.add_argument_group("foreground (defaults: as the checkpoint was trained, else the paper's constants)")
    g.add_argument("--boxes", help=f"{detectors.KINDS} (default: motion); motion boxes always add what the detector misses")
    g.add_argument("--tile", action=argparse.BooleanOptionalAction, default=None,
                   help="detect in the frame and in 2×2 overlapping quarters: for small objects (default: no)")
    g.add_argument("--flow", choices=flow.METHODS, help="optical flow (default: dis)")
    g.add_argument("--min-score", type=float, help="least score of a detection, 0..1")
    g.add_argument("--min-area", type=float, help="least area of a detection, px²")
    g.add_argument("--covered", type=float, help="drop a box covered more than this by a larger one, 0..1")
    g.add_argument("--motion-blur", type=int, help="Gaussian kernel before differencing, px, odd")
    g.add_argument("--motion-threshold", type=int, help="least grey-level difference, 0..255")
    g.add_argument("--motion-area", type=float, help="least area of a motion box, px²")
    g.add_argument("--motion-close", type=int, help="join moving parts up to this many px apart (default: 0, on demo 9)")


def settings_of(args, dataset, trained=None):
    """Settings of the dataset's constants, or those a checkpoint was `trained` with; flags override both."""
    chosen = {k: getattr(args, k) for k in ("boxes", "tile", "flow", *PUBLISHED["demo"]) if getattr(args, k) is not None}
    if chosen.get("motion_blur", 1) % 2 == 0:
        raise UserError("--motion-blur must be odd")
    base = PUBLISHED.get(dataset, PUBLISHED["folder"])
    if trained:
        base = {k: tuple(v) if isinstance(v, list) else v for k, v in trained.items()}
    return Settings(**{**base, **chosen})


class Prepared:
    """A dataset with its frames decoded and its cubes cut. train, test: the videos that are usable."""

    def __init__(self, data, cache, store, train, test, skipped):
        self.data, self.cache, self.store, self.train, self.test, self.skipped = data, cache, store, train, test, skipped

    def frames(self, video):
        return self.cache.info(video)["frames"]

    def records(self, videos):
        return [self.store.records(v) for v in videos]


def cache_folder(root, data):
    """One folder per dataset and place it was read from, so that two copies never mix."""
    import hashlib
    tag = hashlib.sha256(str(Path(data.root).resolve()).encode()).hexdigest()[:6]
    return Path(root) / f"{data.name}-{tag}"


def prepare(args, device="cpu", splits=("train", "test"), data=None, trained=None):
    """Find the dataset and do what is missing of decoding, detection, flow and cubes (cut as a checkpoint was `trained`)."""
    data = data or datasets.find(args.dataset, args.data_root, args.labels)
    settings = settings_of(args, data.name, trained)
    detectors.check(settings.boxes)
    folder = cache_folder(writable_folder(args.cache), data)
    workers = args.workers or training.cores()
    videos = [v for s in splits for v in getattr(data, s)]
    cache = FrameCache(folder / "frames")
    usable, skipped = cache.build(videos, workers)
    store = CubeStore(cache, folder, settings)
    usable, more = store.build(usable, workers, device)
    skipped = dict(skipped + more)
    if videos and not usable:
        raise UserError(f"none of the {len(videos)} videos of {data.name} could be used; the first: "
                        f"{next(iter(skipped.values()))}")
    return Prepared(data, cache, store, [v for v in usable if v.split == "train"],
                    [v for v in usable if v.split == "test"], skipped)


def report_skipped(skipped):
    if skipped:
        print(f"skipped {len(skipped)} videos:")
        for name, why in skipped.items():
            print(f"  {name}: {why}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    add_data_flags(parser)
    training.add_flags(parser, out="not used here")
    args = parser.parse_args(argv)
    start = time.time()
    r = training.Run(args.device, args.precision)
    ready = prepare(args, r.device)
    seconds = time.time() - start
    for split in ("train", "test"):
        videos = getattr(ready, split)
        print(f"{split}: {len(videos)} videos, {sum(map(ready.frames, videos))} frames, "
              f"{sum(ready.store.info(v)['cubes'] for v in videos)} cubes")
    print(f"cubes are in {ready.store.folder} ({seconds:.1f} s)")
    report_skipped(ready.skipped)
    print(f"next: python hf2vad/train.py --dataset {args.dataset}")


if __name__ == "__main__":
    run(main)
