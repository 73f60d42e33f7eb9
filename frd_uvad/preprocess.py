"""Clip features from videos: one .npy [clips, crops, width] of every 16 frames per video. train.py runs this where it is missing.

python frd_uvad/preprocess.py --dataset folder --data-root my_videos --backbone s3d         # torchvision's own weights
python frd_uvad/preprocess.py --dataset ped2 --backbone r3d_18 --weights r3d_18.pth --crops 10
python frd_uvad/preprocess.py --dataset demo                                                # statistics: no network, no download
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from tqdm import tqdm

from common import cli, datasets
from common import old_training as training
from common.cache import VideoFiles
from common.dataset import UsableVideos, report_skipped
from common.features.data import CLIP_FRAMES, FeatureData, FeatureVideo
from common.features.folders import canonical_features, find_features
from common.features.labels import add_label_flags
from common.io import UserError, first_line, run
from common.late import torch
from common.pool import map_videos, prepare_videos, tick
from common.video import Decoder, print_warnings

SYNONYMS = {  # flags of the published command line
    "--dataset_name": "--dataset",
    "--ckpt_path": "--checkpoint",
    "--max_epoch": "--epochs",
    "--max_seqlen": "--batch-size",
    "--batchsize": "--batch-size",
}
STAND_IN = "statistics"  # of motion and appearance; no network
BACKBONES = ("s3d", "r3d_18", "mc3_18", "r2plus1d_18", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b")
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # of torchvision's Kinetics models
SIDE, RESIZED = 224, 256


def add_data_flags(parser):
    cli.add_data_flags(parser)
    g = parser.add_argument_group("features")
    g.add_argument(
        "--features",
        type=Path,
        default=None,
        help="folder of clip features made elsewhere (UCF-Crime, XD-Violence, "
        "ShanghaiTech; default for those: --data-root), instead of videos",
    )
    add_label_flags(g)
    g.add_argument(
        "--backbone",
        default=STAND_IN,
        help=f"{STAND_IN} (motion and appearance per clip, a stand-in) or a torchvision "
        f"video network: {', '.join(BACKBONES)} (default: %(default)s)",
    )
    g.add_argument(
        "--weights", default="DEFAULT", help="torchvision's name of the weights, or a local file (default: %(default)s)"
    )
    g.add_argument("--crops", type=int, choices=[1, 10], default=1, help="views of each clip (default: %(default)s)")
    # flags of the published command line that say what the features are
    g.add_argument(
        "--feature_pretrain_model",
        "--feature_modal",
        "--feature-name",
        dest="published",
        default=None,
        help=argparse.SUPPRESS,
    )


def clips_of(decoder, count):
    """Yield uint8 [CLIP_FRAMES, H, W, C] of consecutive frames; the last clip is filled up with its last frame. count[0] counts frames."""
    frames = []
    for frame in decoder:
        tick()
        count[0] += 1
        frames.append(frame)
        if len(frames) == CLIP_FRAMES:
            yield np.stack(frames)
            frames = []
    if frames:
        yield np.stack(frames + [frames[-1]] * (CLIP_FRAMES - len(frames)))


def statistics(clip, grid=16):
    """Stand-in features of one clip: on a 16 × 16 grid the mean and deviation of grey levels, the mean and largest difference of
    consecutive frames. float32 [1, 1024]"""
    grey = (
        np.stack(
            [
                cv2.resize(
                    cv2.cvtColor(f, cv2.COLOR_BGR2GRAY) if f.shape[2] == 3 else f[:, :, 0],
                    (4 * grid, 4 * grid),
                    interpolation=cv2.INTER_AREA,
                )
                for f in clip
            ]
        ).astype(np.float32)
        / 255
    )
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


class Backbone:
    """A torchvision video network without its classifier. encode: list of clips uint8 [CLIP_FRAMES, H, W, C] ->
    float32 [n, crops, width]."""

    def __init__(self, name, weights, crops, r):
        from torchvision.models import get_model

        if name not in BACKBONES:
            raise UserError(f"--backbone {name} is not known; choose {STAND_IN} or one of {', '.join(BACKBONES)}")
        local = weights is not None and Path(weights).is_file()
        try:
            net = get_model(name, weights=None if local else weights)
            if local:
                net.load_state_dict(training.load_checkpoint(weights))
        except UserError:
            raise
        except Exception as e:  # torchvision and the network raise many kinds
            raise UserError(
                f"--weights {weights}: {name} could not be loaded ({first_line(e)}); without a network put the file of "
                f"torchvision's {name} weights here and name it, or take --backbone {STAND_IN}"
            ) from None
        for head in ("classifier", "head", "fc"):
            if hasattr(net, head):
                setattr(net, head, torch.nn.Identity())
        self.net, self.crops, self.run = net.eval().requires_grad_(False).to(r.device), crops, r
        for p in self.net.parameters():
            if p.ndim == 5:
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        self.mean, self.std = (torch.tensor(x, device=r.device).view(3, 1, 1, 1) for x in (MEAN, STD))

    def views(self, clip):
        """uint8 [CLIP_FRAMES, H, W, C] -> [crops, 3, CLIP_FRAMES, 224, 224] RGB: the centre; or corners and centre,
        and their mirror images."""
        h, w = clip.shape[1:3]
        scale = RESIZED / min(h, w)
        size = max(SIDE, round(w * scale)), max(SIDE, round(h * scale))
        frames = np.stack([cv2.resize(f, size).reshape(size[1], size[0], -1) for f in clip])
        x = torch.from_numpy(frames).to(self.run.device).permute(3, 0, 1, 2)
        x = (x.flip(0) if x.shape[0] == 3 else x.expand(3, -1, -1, -1)).float() / 255
        x = (x - self.mean) / self.std
        bottom, right = x.shape[2] - SIDE, x.shape[3] - SIDE
        at = [(bottom // 2, right // 2)]
        if self.crops == 10:
            at += [(0, 0), (0, right), (bottom, 0), (bottom, right)]
        views = [x[:, :, a : a + SIDE, b : b + SIDE] for a, b in at]
        return torch.stack(views + [v.flip(3) for v in views] if self.crops == 10 else views)

    def encode(self, clips):
        with torch.inference_mode(), self.run.autocast():
            x = self.net(torch.cat([self.views(c) for c in clips]).contiguous(memory_format=torch.channels_last_3d))
        return x.float().flatten(1).view(len(clips), self.crops, -1).cpu().numpy()


def statistics_of(clips):
    """The same interface as Backbone.encode."""
    return np.stack([statistics(c) for c in clips])


def encoder_of(backbone, weights, crops, r):
    """-> function(list of clips uint8 [CLIP_FRAMES, H, W, C]) giving float32 [n, crops, width]."""
    return statistics_of if backbone == STAND_IN else Backbone(backbone, weights, crops, r).encode


def batches_of(clips, encode, batch):
    """Features float16 [n, crops, width], `batch` clips at a time."""
    waiting = []
    for clip in clips:
        waiting.append(clip)
        if len(waiting) == batch:
            yield encode(waiting).astype(np.float16)
            waiting = []
    if waiting:
        yield encode(waiting).astype(np.float16)


def features_of_video(video, settings, r):
    """One's own footage -> features [clips, crops, width], number of frames."""
    decoder, count = Decoder(video), [0]
    encode = encoder_of(settings["backbone"], settings["weights"], settings["crops"], r)
    parts = list(batches_of(clips_of(decoder, count), encode, max(1, 8 // settings["crops"])))
    print_warnings(video, decoder.warnings)
    return np.concatenate(parts), count[0]


class ClipFiles(VideoFiles):
    what = "clip features"


def build(videos, workers, show=True, *, files, args, r):
    """Encode what is missing. -> (videos that are there, {video key: why} of those that could not be read)."""
    fresh, failed = files.missing(videos)
    if fresh:
        if show:
            print(f"encoding {len(fresh)} of {len(videos)} videos with {args.backbone} into {files.folder}", flush=True)
        failed.update(encoded(fresh, workers, show, files, args, r))
    files.report(v for v in videos if v.key not in failed)
    return [v for v in videos if v.key not in failed], failed


def encoded(fresh, workers, show, files, args, r):
    """-> {video key: why} of those that could not be read."""
    total, failed = sum(v.expected_frames() for v in fresh), {}
    if args.backbone == STAND_IN:
        _, errors = map_videos(
            _statistics, [(files, v) for v in fresh], workers=workers, total=total, label="features", show=show
        )
        return {fresh[i].key: e for i, e in errors}
    encode = encoder_of(args.backbone, args.weights, args.crops, r)
    with tqdm(total=total, desc="features", unit="frame", dynamic_ncols=True, mininterval=2, disable=not show) as bar:
        for v in fresh:
            count, before, decoder = [0], bar.n, Decoder(v)
            try:
                parts = batches_of(clips_of(decoder, count), encode, max(1, 8 // args.crops))
                files.write(v, counted(parts, bar), lambda shape, n=count, d=decoder: describe(shape, n, d))
            except UserError as e:
                failed[v.key] = str(e)
            bar.n = before + v.expected_frames()
    return failed


def counted(parts, bar):
    for part in parts:
        yield part
        bar.update(len(part) * CLIP_FRAMES)


def _statistics(job):
    (files, video), count = job, [0]
    decoder = Decoder(video)
    files.write(
        video, batches_of(clips_of(decoder, count), statistics_of, 8), lambda shape: describe(shape, count, decoder)
    )


def describe(shape, count, decoder):
    return {**dict(zip(("clips", "crops", "width"), shape)), "frames": count[0], "warnings": decoder.warnings}


def prepare(args, r, splits=("train", "test")):
    """-> FeatureData. Features made elsewhere are read; those of videos are made where missing."""
    name = canonical_features(args.dataset)
    if args.features or name in ("ucfcrime", "xdviolence", "features"):
        root = args.features or next(
            (p for p in (args.data_root / args.dataset, args.data_root) if p.is_dir()), args.data_root
        )
        return find_features(name or args.dataset, root, args.labels, args.order, args.segments)
    if args.order or args.segments:
        raise UserError("--order and --segments are for --features: names and frames of videos are known")
    with r.main_first():
        data = datasets.find(args.dataset, args.data_root, args.labels)
    own = f"{args.backbone}-{args.crops}" + ("" if args.backbone == STAND_IN else "-" + Path(str(args.weights)).stem)
    files = ClipFiles(data.cache_folder(args.cache) / f"clips-{own}")
    wanted = [v for s in splits for v in getattr(data, s)]
    videos, failed = prepare_videos(files, wanted, partial(build, files=files, args=args, r=r), args, r)
    ready = UsableVideos(data, videos, failed)

    def feature(v):
        return FeatureVideo(v.name, v.split, [files.array(v)], path=v.path)

    out = FeatureData(data.name, data.root, [feature(v) for v in ready.train], [feature(v) for v in ready.test])
    if data.has_labels:
        out.label_source = data.label_source
        out.annotations = {v.name: data.labels(v, files.info(v)["frames"]) for v in ready.test}
    out.settings = {k: str(getattr(args, k)) if k != "crops" else args.crops for k in ("backbone", "weights", "crops")}
    out.dataset = data
    out.skipped, out.all_videos, out.videos = ready.skipped, wanted, {(v.split, v.name): v for v in videos}
    return out


def main(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_shard_flag(cli.add_run_flags(parser, out="runs/frd_uvad/<dataset>"))
    args = parser.parse_args(cli.with_synonyms(argv, SYNONYMS))
    r = training.Run.from_args(args)
    data = prepare(args, r)
    for split in ("train", "test"):
        videos = getattr(data, split)
        print(f"{split}: {len(videos)} videos, {sum(map(len, videos))} clips of {data.crops} crops, width {data.width}")
    report_skipped(data.skipped)
    print(f"next: python frd_uvad/train.py --dataset {args.dataset}")


if __name__ == "__main__":
    run(main)
