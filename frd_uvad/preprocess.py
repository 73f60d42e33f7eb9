"""Videos -> features of clips of 16 frames, an .npy [clips, crops, width] per video. train.py and eval.py run it if
they are missing.

python frd_uvad/preprocess.py --dataset folder --data-root my_videos --backbone s3d         # torchvision's own weights
python frd_uvad/preprocess.py --dataset ped2 --backbone r3d_18:r3d_18.pth --crops 10
python frd_uvad/preprocess.py --dataset demo                                       # statistics: no network, no download
"""

import argparse
import itertools
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from tqdm import tqdm

from common import cli
from common.cache import VideoFiles
from common.features.data import CLIP_FRAMES, FeatureData, FeatureVideo, clips_of_frames
from common.features.folders import canonical_features, find_features
from common.features.labels import add_label_flags
from common.io import UserError, run_script
from common.pool import map_videos, tick
from common.readers import datasets
from common.readers.dataset import UsableVideos, report_skipped
from common.readers.video import Decoder, print_warnings

# torch is imported inside functions: --help answers at once, and decoding processes never load it.

SYNONYMS = {  # flags of the published command line
    "--dataset_name": "--dataset",
    "--ckpt_path": "--checkpoint",
    "--max_epoch": "--epochs",
    "--max_seqlen": "--batch-size",
    "--batchsize": "--batch-size",
}
STAND_IN = "statistics"  # of motion and appearance; no network
ENCODED_AT_ONCE = 8  # views


@dataclass
class FeatureOptions:
    """Where features come from. features: a folder of features made elsewhere, with order and segments as in
    find_features; else they are made by `backbone`."""

    features: Path | None = None
    order: Path | None = None
    segments: bool = False
    backbone: str = STAND_IN
    weights: str = "DEFAULT"  # torchvision's name of them, or a file
    crops: int = 1  # views of each clip

    @classmethod
    def from_args(cls, args) -> "FeatureOptions":
        backbone, _, weights = args.backbone.partition(":")
        return cls(args.features, args.order, args.segments, backbone, weights or cls.weights, args.crops)

    def describe(self) -> dict:
        return {"backbone": self.backbone, "weights": str(self.weights), "crops": self.crops}


def add_data_flags(parser):
    cli.add_data_flags(parser)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        type=Path,
        help="folder of clip features made elsewhere (UCF-Crime, XD-Violence, "
        "ShanghaiTech; default for those: --data-root), instead of videos",
    )
    add_label_flags(group)
    group.add_argument(
        "--backbone",
        default=STAND_IN,
        metavar="NAME[:WEIGHTS]",
        help=f"{STAND_IN} (motion and appearance per clip, a stand-in) or a torchvision video network: s3d, r3d_18, "
        "mc3_18, r2plus1d_18, mvit_v1_b, mvit_v2_s, swin3d_t, swin3d_s, swin3d_b; WEIGHTS: a local file, or "
        "torchvision's name of other weights than its default (default: %(default)s)",
    )
    group.add_argument(
        "--crops", type=int, choices=[1, 10], default=1, help="views of each clip (default: %(default)s)"
    )
    # flags of the published command line that say what the features are
    group.add_argument(
        "--feature_pretrain_model",
        "--feature_modal",
        "--feature-name",
        dest="published",
        help=argparse.SUPPRESS,
    )


class ClipReader:
    """Iterate over the clips of a video, uint8 [CLIP_FRAMES, H, W, C]; the last one is filled up with its last frame.

    frames: number of frames read so far.
    """

    def __init__(self, decoder):
        self.decoder, self.frames = decoder, 0

    def __iter__(self):
        for clip, length in clips_of_frames(self.decoder):
            tick(length)
            self.frames += length
            yield clip

    def describe(self, shape) -> dict:
        sizes = dict(zip(("clips", "crops", "width"), shape))
        return {**sizes, "frames": self.frames, "warnings": self.decoder.warnings}


def handcrafted_features(clip: np.ndarray, grid: int = 16) -> np.ndarray:
    """The stand-in for a backbone: on a grid, mean and deviation of grey levels, mean and largest difference of
    consecutive frames. uint8 [T, H, W, C] -> float32 [1, 4 · grid²]"""
    side = 4 * grid
    grey = [cv2.cvtColor(f, cv2.COLOR_BGR2GRAY) if f.shape[2] == 3 else f[:, :, 0] for f in clip]
    grey = np.stack([cv2.resize(f, (side, side), interpolation=cv2.INTER_AREA) for f in grey]).astype(np.float32) / 255
    change = np.abs(np.diff(grey, axis=0))

    def cells(x):
        return x.reshape(grid, 4, grid, 4)

    parts = [
        cells(grey.mean(0)).mean((1, 3)),
        4 * cells(grey.std(0)).mean((1, 3)),
        10 * cells(change.mean(0)).mean((1, 3)),
        4 * cells(change.max(0)).max((1, 3)),
    ]
    return np.concatenate([p.reshape(-1) for p in parts])[None]


def encode_handcrafted(clips) -> np.ndarray:
    """The same interface as Backbone.encode."""
    return np.stack([handcrafted_features(c) for c in clips])


def make_encoder(options: FeatureOptions, run):
    """-> encode(list of clips uint8 [CLIP_FRAMES, H, W, C]) -> float32 [n, crops, width]"""
    if options.backbone == STAND_IN:
        return encode_handcrafted
    from frd_uvad.backbone import Backbone

    return Backbone(options.backbone, options.weights, options.crops, run).encode


def encode_in_batches(clips, encode, batch_size, progress=lambda frames: None):
    """Yield features float16 [n, crops, width] of at most batch_size clips."""
    clips = iter(clips)
    while batch := list(itertools.islice(clips, batch_size)):
        yield encode(batch).astype(np.float16)
        progress(len(batch) * CLIP_FRAMES)


def features_of_video(video, options: FeatureOptions, run) -> tuple[np.ndarray, int]:
    """Features of your own video [clips, crops, width], and its number of frames. Raises UserError."""
    clips = ClipReader(Decoder(video))
    encode = make_encoder(options, run)
    parts = list(encode_in_batches(clips, encode, max(1, ENCODED_AT_ONCE // options.crops)))
    print_warnings(video, clips.decoder.warnings)
    return np.concatenate(parts), clips.frames


class ClipFiles(VideoFiles):
    """Clip features. info(video): {"source", "clips", "crops", "width", "frames", "warnings"}."""

    what = "clip features"

    def __init__(self, folder, options: FeatureOptions):
        super().__init__(folder)
        self.options, self.action = options, f"encoding with {options.backbone}"

    def make(self, videos, workers, show, *, encoder):
        """encoder: a function that makes the encoder, where one is needed."""
        total, failed = sum(v.expected_frames() for v in videos), {}
        if self.options.backbone == STAND_IN:
            jobs = [(self, v) for v in videos]
            _, errors = map_videos(_write_handcrafted, jobs, workers=workers, total=total, label="features", show=show)
            return {videos[i].key: why for i, why in errors}
        encode = encoder()
        with tqdm(
            total=total, desc="features", unit="frame", dynamic_ncols=True, mininterval=2, disable=not show
        ) as bar:
            for v in videos:
                try:
                    self.write_features(v, encode, max(1, ENCODED_AT_ONCE // self.options.crops), bar.update)
                except UserError as e:
                    failed[v.key] = str(e)
        return failed

    def write_features(self, video, encode, batch_size, progress=lambda frames: None):
        clips = ClipReader(Decoder(video))
        self.write(video, encode_in_batches(clips, encode, batch_size, progress), clips.describe)


def _write_handcrafted(job):
    files, video = job
    files.write_features(video, encode_handcrafted, ENCODED_AT_ONCE)


def prepare(source: cli.DataSource, run, options: FeatureOptions, splits=("train", "test")) -> FeatureData:
    """Features made elsewhere are read; those of videos are made where they are missing. Raises UserError."""
    name = canonical_features(source.dataset)
    if options.features or name in ("ucfcrime", "xdviolence", "features"):
        folders = (source.data_root / source.dataset, source.data_root)
        root = options.features or next((p for p in folders if p.is_dir()), source.data_root)
        return find_features(name or source.dataset, root, source.labels, options.order, options.segments)
    if options.order or options.segments:
        raise UserError("--order and --segments are for --features: names and frames of videos are known")
    with run.main_first():
        data = datasets.find(source.dataset, source.data_root, source.labels)
    weights = "" if options.backbone == STAND_IN else "-" + Path(str(options.weights)).stem
    folder = data.cache_folder(source.cache) / f"clips-{options.backbone}-{options.crops}{weights}"
    files, all_videos = ClipFiles(folder, options), [v for split in splits for v in getattr(data, split)]
    videos, failed = files.prepare(
        all_videos, run, workers=source.workers, shard=source.shard, encoder=partial(make_encoder, options, run)
    )
    dataset = UsableVideos(data, videos, failed)
    train, test = (
        [FeatureVideo(v.name, v.split, [files.array(v)], path=v.path) for v in videos]
        for videos in (dataset.train, dataset.test)
    )
    features = FeatureData(
        data.name,
        data.root,
        train,
        test,
        settings=options.describe(),
        skipped=dataset.skipped,
        dataset=data,
        videos={(v.split, v.name): v for v in videos},
        all_videos=all_videos,
    )
    if data.has_labels:
        features.label_source = data.label_source
        features.annotations = {v.name: data.labels(v, files.info(v)["frames"]) for v in dataset.test}
    return features


def main(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_shard_flag(cli.add_run_flags(parser, out="not used here"))
    args = parser.parse_args(cli.with_synonyms(argv, SYNONYMS))
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        data = prepare(cli.DataSource.from_args(args), run, FeatureOptions.from_args(args))
        if run.is_main:
            for split in ("train", "test"):
                videos, shape = getattr(data, split), f"{data.crops} crops of width {data.width}"
                print(f"{split}: {len(videos)} videos, {sum(map(len, videos))} clips of {shape}")
            report_skipped(data.skipped)
            print(f"next: python frd_uvad/train.py --dataset {args.dataset}")


if __name__ == "__main__":
    run_script(main)
