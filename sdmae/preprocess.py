"""Decode a dataset's videos into uint8 frames of the network's size; all else happens while training. eval.py and train.py run
this where it is missing.

    python sdmae/preprocess.py --dataset ped2 --data-root data
    python sdmae/preprocess.py --dataset avenue --preview          # a contact sheet of pseudo anomalies and their masks
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np

from common import datasets
from common import old_training as training
from common.cache import FrameCache
from common.dataset import Usable
from common.io import UserError, run, writable_folder
from common.late import torch
from common.pictures import write_image
from common.pool import add_shard_flag, prepare_videos
from common.ubnormal import ubnormal
from sdmae import frames as input_
from sdmae import pseudo

# Input size (height, width) and patch. Avenue, ShanghaiTech and UBnormal as published: 20 × 40 tokens each. Ped2's size is not
# published, its patch is 4, which costs several times as much. 192 × 288 keeps the frame's shape (240 × 360) and leaves a
# pedestrian about 12 × 24 px, one token of 12 × 18. Ped1 keeps the published patch and makes 24 × 36 tokens.
PUBLISHED = {
    "avenue": dict(size=(320, 640), patch=16),
    "shanghaitech": dict(size=(160, 320), patch=8),
    "ubnormal": dict(size=(160, 320), patch=8),
    "ped2": dict(size=(192, 288), patch=16),
    "ped1": dict(size=(96, 144), patch=4),
    "folder": dict(size=(192, 320), patch=8),
    "demo": dict(size=(96, 160), patch=8),
}


def add_data_flags(parser):
    datasets.add_flags(parser)
    g = parser.add_argument_group("input (defaults: as the checkpoint was trained, else the paper's)")
    g.add_argument("--image-size", metavar="HEIGHTxWIDTH", default=None, help="size of the network's input, px")
    g.add_argument("--patch", type=int, choices=[4, 8, 16], default=None, help="side of a token, px")


def input_of(args, dataset):
    """-> (height, width), patch: the dataset's, or what the flags say, made divisible by the patch."""
    known = PUBLISHED.get(dataset, PUBLISHED["folder"])
    patch = args.patch or known["patch"]
    if not args.image_size and patch == known["patch"]:
        return known["size"], patch
    try:
        wanted = tuple(int(x) for x in args.image_size.lower().split("x")) if args.image_size else known["size"]
    except ValueError:
        wanted = ()
    if len(wanted) != 2 or not all(0 < x <= 8192 for x in wanted):
        raise UserError(f"--image-size {args.image_size}: expected HEIGHTxWIDTH in pixels, such as 320x640")
    size = max(2, round(wanted[0] / patch)) * patch, max(1, round(wanted[1] / patch / 2)) * 2 * patch
    if size != wanted:
        print(
            f"note: frames are resized to {size[0]}×{size[1]}: {wanted[0]}×{wanted[1]} is not made of patches of {patch} px, "
            "an even number of them across",
            flush=True,
        )
    return size, patch


class Prepared(Usable):
    """A dataset with its frames decoded at the network's size. train, test: the videos that are usable."""

    def __init__(self, data, videos, failed, cache):
        super().__init__(data, videos, failed)
        self.cache = cache

    def arrays(self, videos):
        return [self.cache.frames(v) for v in videos]

    def length(self, video):
        return self.cache.info(video)["frames"]

    def summary(self):
        for split in ("train", "test"):
            videos = getattr(self, split)
            print(f"{split}: {len(videos)} videos, {sum(map(self.length, videos))} frames")


def prepare(args, size, r, splits=("train", "test"), data=None):
    """Find the dataset and decode what is missing. Under torchrun every process does its share of the videos."""
    with r.main_first():
        data = data or datasets.find(args.dataset, args.data_root, args.labels)
    cache = FrameCache(data.cache_folder(args.cache) / f"frames-{size[0]}x{size[1]}", size)
    videos = [v for s in splits for v in getattr(data, s)]
    return Prepared(data, *prepare_videos(cache, videos, cache.build, args, r), cache)


def add_pseudo_flags(parser):
    g = parser.add_argument_group("pseudo anomalies")
    g.add_argument(
        "--pseudo",
        choices=["ubnormal", "self", "none"],
        default="self",
        help="where pasted objects come from: UBnormal's abnormal training videos (the paper), or the moving objects "
        "of the training videos themselves (default: %(default)s)",
    )
    g.add_argument(
        "--pseudo-share", type=float, default=0.25, help="share of training frames that show one (default: %(default)s)"
    )
    g.add_argument(
        "--ubnormal-root", type=Path, default=None, help="folder of UBnormal (default: --data-root/ubnormal)"
    )
    g.add_argument("--preview", action="store_true", help="write a contact sheet of pasted frames and masks, and stop")


def bank_of(args, ready, size, r):
    """The objects to paste, or None."""
    if args.pseudo == "none":
        return None
    if not 0 <= args.pseudo_share <= 1:
        raise UserError(f"--pseudo-share {args.pseudo_share} must be between 0 and 1")
    if args.pseudo == "ubnormal":
        root = args.ubnormal_root or (ready.data.root if ready.data.name == "ubnormal" else args.data_root / "ubnormal")
        channels = max(a.shape[3] for a in ready.arrays(ready.train))
        bank = pseudo.from_ubnormal(ubnormal(Path(root)), size, channels, args.seed)
    else:
        bank = pseudo.from_training(ready.arrays(ready.train), args.seed)
        if bank is None:
            r.print(
                "note: nothing moves in the training videos, so there is nothing to paste: trained without pseudo anomalies"
            )
            return None
    r.print(f"pseudo anomalies: {len(bank)} sequences of objects ({bank.source})")
    return bank


def preview(bank, ready, args, out):
    """contact_sheet of pasted frames t-3, t, t+3 and the mask of t."""
    if bank is None:
        raise UserError("--preview needs pseudo anomalies (--pseudo ubnormal or self)")
    frames = input_.Frames(ready.arrays(ready.train), steps=input_.STEPS)
    rng = np.random.default_rng(args.seed)
    rows = rng.integers(0, len(frames), 12)
    five = frames.get(rows)
    chosen = pseudo.choose(bank, len(rows), 1.0, frames.size, rng)
    seen, mask = pseudo.paste(five, bank, chosen, input_.STEPS)
    lines = []
    for pasted, m in zip(seen, mask):
        tiles = [input_.colours(pasted[i : i + 1])[0] for i in (0, 2, 4)] + [m.expand(3, -1, -1)]
        lines.append(torch.cat([framed(t) for t in tiles], dim=2))
    half = len(lines) // 2
    sheet = torch.cat([torch.cat(lines[:half], dim=1), torch.cat(lines[half:], dim=1)], dim=2).permute(1, 2, 0).numpy()
    factor = max(1, round(1600 / sheet.shape[1]))
    sheet = cv2.resize(sheet, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    path = writable_folder(out) / "pseudo_anomalies.png"
    write_image(path, sheet)
    print(f"wrote {path}: frames t-3, t, t+3 and the mask of t")


def framed(t):
    return torch.nn.functional.pad(t, (1, 1, 1, 1), value=255)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    add_shard_flag(training.add_flags(parser, out="runs/sdmae/<dataset>"))
    add_pseudo_flags(parser)
    args = parser.parse_args(argv)
    r = training.Run.from_args(args)
    name = datasets.canonical(args.dataset)
    size, patch = input_of(args, name)
    ready = prepare(args, size, r)
    if args.preview:
        preview(bank_of(args, ready, size, r), ready, args, args.out or Path("runs/sdmae") / name)
    if r.is_main:
        ready.summary()
        ready.report_skipped()
        print(f"next: python sdmae/train.py --dataset {name}")
    r.close()


if __name__ == "__main__":
    run(main)
