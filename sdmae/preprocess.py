"""Decode a dataset's videos into uint8 frames of the network's size; train.py and eval.py run this if it is missing.

python sdmae/preprocess.py --dataset ped2 --data-root data
python sdmae/preprocess.py --dataset avenue --preview          # a contact sheet of pseudo anomalies and their masks
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np

from common import cli
from common.cache import FrameCache
from common.io import UserError, run_script, writable_folder
from common.readers import datasets
from common.readers.dataset import UsableVideos, report_skipped
from common.readers.pictures import write_image

# Input size (height, width) and patch. Avenue, ShanghaiTech and UBnormal as published: 20 × 40 tokens. Of Ped2 only the
# patch is published, 4, which costs several times as much; 192 × 288 keeps the frame's shape, and a pedestrian of
# 12 × 24 px is about two tokens. Ped1 is not in the paper: the patch of Ped2, 24 × 36 tokens.
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
    cli.add_data_flags(parser)
    group = parser.add_argument_group("input (defaults: as the checkpoint was trained, else the paper's)")
    group.add_argument("--image-size", metavar="HEIGHTxWIDTH", help="size of the network's input, px")
    group.add_argument("--patch", type=int, choices=[4, 8, 16], help="side of a token, px")


def input_size(dataset: str, image_size: str | None = None, patch: int | None = None) -> tuple[tuple[int, int], int]:
    """-> (height, width), patch: the dataset's, or the given ones ("320x640"), made divisible by the patch."""
    published = PUBLISHED.get(dataset.removesuffix("-sd"), PUBLISHED["folder"])  # ShanghaiTech-SD: the same videos
    patch = patch or published["patch"]
    if not image_size and patch == published["patch"]:
        return published["size"], patch
    requested = published["size"]
    if image_size:
        requested = cli.parse_size("--image-size", image_size, 8192, "HEIGHTxWIDTH in pixels, such as 320x640")
    size = max(2, round(requested[0] / patch)) * patch, max(1, round(requested[1] / patch / 2)) * 2 * patch
    if size != requested:
        print(
            f"note: frames are resized to {size[0]}×{size[1]}: {requested[0]}×{requested[1]} is not made of patches of "
            f"{patch} px, an even number of them across",
            flush=True,
        )
    return size, patch


class FrameVideos(UsableVideos):
    """A dataset with its frames decoded at the network's size. train, test: the usable videos."""

    def __init__(self, data, videos, failed, cache):
        super().__init__(data, videos, failed)
        self.cache = cache

    def arrays(self, videos) -> list:
        """uint8 [T, H, W, C] memory map of each video."""
        return [self.cache.frames(v) for v in videos]

    def frames(self, video) -> int:
        return self.cache.info(video)["frames"]

    def summary(self) -> str:
        splits = {"train": self.train, "test": self.test}
        return "\n".join(f"{k}: {len(v)} videos, {sum(map(self.frames, v))} frames" for k, v in splits.items())


def prepare(source: cli.DataSource, size: tuple[int, int], run, *, splits=("train", "test")) -> FrameVideos:
    """Find the dataset and decode what is missing at `size` (height, width); every rank does its share of the
    videos."""
    with run.main_first():
        data = datasets.find(source.dataset, source.data_root, source.labels)
    cache = FrameCache(data.cache_folder(source.cache) / f"frames-{size[0]}x{size[1]}", size)
    videos = [v for split in splits for v in getattr(data, split)]
    return FrameVideos(data, *cache.prepare(videos, run, workers=source.workers, shard=source.shard), cache)


def add_pseudo_flags(parser):
    group = parser.add_argument_group("pseudo anomalies")
    group.add_argument(
        "--pseudo",
        choices=["ubnormal", "self", "none"],
        default="self",
        help="where pasted objects come from: UBnormal's abnormal training videos (the paper), or the moving objects "
        "of the training videos themselves (default: %(default)s)",
    )
    group.add_argument(
        "--pseudo-share",
        type=cli.share,
        default=0.25,
        help="share of training frames that show one (default: %(default)s)",
    )
    group.add_argument("--ubnormal-root", type=Path, help="folder of UBnormal (default: --data-root/ubnormal)")
    group.add_argument("--preview", action="store_true", help="write a contact sheet of pasted frames, and stop")


def make_bank(dataset: FrameVideos, size, run, *, pseudo="self", ubnormal_root=None, seed=0):
    """The objects to paste into training frames: a pseudo.ObjectBank, or None."""
    from sdmae.pseudo import from_training, from_ubnormal

    if pseudo == "none":
        return None
    if not dataset.train:
        raise UserError(
            f"{dataset.data.name} has no training videos under {dataset.data.root}: put normal ones into train/"
        )
    arrays = dataset.arrays(dataset.train)
    if pseudo == "ubnormal":
        root = dataset.data.root if dataset.data.name == "ubnormal" else ubnormal_root
        bank = from_ubnormal(datasets.find("ubnormal", root), size, max(a.shape[3] for a in arrays), seed)
    else:
        bank = from_training(arrays, seed)
        if bank is None:
            run.print("note: nothing moves in the training videos: trained without pseudo anomalies")
            return None
    run.print(f"pseudo anomalies: {len(bank)} sequences of objects ({bank.source})")
    return bank


def preview(bank, dataset: FrameVideos, out, run, seed=0) -> None:
    """Contact sheet of pasted frames t-3, t, t+3 and the mask of t."""
    import torch

    from sdmae.data import SAMPLE_OFFSETS, FrameDataset, colours
    from sdmae.pseudo import choose, of_part, paste

    if bank is None:
        raise UserError("--preview needs pseudo anomalies (--pseudo ubnormal or self)")
    data = FrameDataset(dataset.arrays(dataset.train), run, SAMPLE_OFFSETS)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(data), 12)
    samples = data.to_device(data.read(rows))
    chosen = of_part(choose(bank, len(rows), 1.0, data.size, rng), slice(None), run)
    seen, mask = (x.cpu() for x in paste(samples, bank.to(run.device), chosen, SAMPLE_OFFSETS))
    lines = []
    for pasted, m in zip(seen, mask):
        tiles = [colours(pasted[i : i + 1])[0] for i in (0, 2, 4)] + [m.expand(3, -1, -1)]
        lines.append(torch.cat([torch.nn.functional.pad(t, (1, 1, 1, 1), value=255) for t in tiles], dim=2))
    half = len(lines) // 2
    sheet = torch.cat([torch.cat(lines[:half], dim=1), torch.cat(lines[half:], dim=1)], dim=2).permute(1, 2, 0).numpy()
    factor = max(1, round(1600 / sheet.shape[1]))
    sheet = cv2.resize(sheet, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    path = writable_folder(out) / "pseudo_anomalies.png"
    write_image(path, sheet)
    print(f"wrote {path}: frames t-3, t, t+3 and the mask of t")


def pseudo_options(args) -> dict:
    """What make_bank() takes, from the flags."""
    return dict(pseudo=args.pseudo, ubnormal_root=args.ubnormal_root or args.data_root / "ubnormal", seed=args.seed)


def main(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_shard_flag(cli.add_run_flags(parser, out="runs/sdmae/<dataset>"))
    add_pseudo_flags(parser)
    args = parser.parse_args(argv)
    name = cli.dataset_name(args)
    size, _ = input_size(name, args.image_size, args.patch)
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        dataset = prepare(cli.DataSource.from_args(args), size, run)
        if args.preview:
            bank = make_bank(dataset, size, run, **pseudo_options(args))
            preview(bank, dataset, args.out or Path("runs/sdmae") / name, run, args.seed)
        run.print(dataset.summary())
        if run.is_main:
            report_skipped(dataset.skipped)
        run.print(f"next: {cli.next_command('sdmae/train.py', argv, '--shard', '--preview')}")


if __name__ == "__main__":
    run_script(main)
