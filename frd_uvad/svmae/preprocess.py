"""Clip features from videos by a pre-trained SVMAE: one .npy [clips, crops, width] of every 16 frames per video, as the
detector here and frd_uvad read them. train.py --encoder runs this if it is missing.

python frd_uvad/svmae/preprocess.py --dataset folder --data-root data/fights --checkpoint runs/svmae/folder/pretrain.pt
python frd_uvad/svmae/preprocess.py --dataset ped2 --checkpoint videomae.pth --preset vit_b --crops 10
python frd_uvad/train.py --dataset features --features features/svmae/ped2       # what frd_uvad makes of them
"""

import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from common import cli
from common.cache import VideoFiles
from common.features.prefetch import VideoPrefetcher
from common.io import UserError, atomic_write, read_json, run_script, safe_filename, writable_folder, write_json
from common.pool import cores
from common.readers import datasets
from common.readers.dataset import UsableVideos

# torch is imported inside functions: --help answers at once.

PRESETS = ("tiny", "vit_s", "vit_b", "vit_l")  # of model.py, which --help need not load
DEPTHS = "perspective, a folder of maps, or midas"
LISTS = ("normal.txt", "abnormal.txt")  # names of the training videos that are bags of the detector
BATCH_SIZE = 8  # clips encoded at once


@dataclass
class EncoderOptions:
    """How clips become features; settings.json of a folder of features holds them. preset, size and frames are those of
    an encoder that is not pretrain.py's, seed is that of an untrained one."""

    preset: str = "vit_b"
    size: int = 224
    frames: int = 16
    seed: int = 0
    pool: str = "fusion"
    motion_ratio: float = 0.5
    alpha: float = 0.05
    depth: str = "perspective"
    crops: int = 1
    clip: str | None = None
    pretrained: str = "openai"

    @classmethod
    def from_dict(cls, values: dict) -> "EncoderOptions":
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def add_data_flags(parser):
    cli.add_data_flags(parser)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--checkpoint",
        required=True,
        help="pretrain.py's, VideoMAE's weights (with --preset), or random: an untrained encoder to compare with",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default=EncoderOptions.preset,
        help="size of an encoder that is not pretrain.py's (default: %(default)s)",
    )
    group.add_argument(
        "--size",
        type=cli.positive_int,
        default=EncoderOptions.size,
        help="side of its input, px (default: %(default)s)",
    )
    group.add_argument(
        "--frames",
        type=cli.positive_int,
        default=EncoderOptions.frames,
        help="frames of its clips (default: %(default)s)",
    )
    group.add_argument(
        "--pool",
        choices=["fusion", "mean"],
        default=EncoderOptions.pool,
        help="scene-aware token fusion, or the mean of all tokens (default: %(default)s)",
    )
    group.add_argument(
        "--motion-ratio",
        type=cli.share,
        default=EncoderOptions.motion_ratio,
        help="share of tokens that are fused, those that move most (default: %(default)s)",
    )
    group.add_argument(
        "--alpha",
        type=float,
        default=EncoderOptions.alpha,
        help="how much more far tokens weigh (default: %(default)s)",
    )
    group.add_argument("--depth", default=EncoderOptions.depth, help=f"{DEPTHS} (default: %(default)s)")
    group.add_argument(
        "--crops",
        type=int,
        choices=[1, 10],
        default=EncoderOptions.crops,
        help="views of each clip: the whole frame; or corners and centre at 7/8 of it, and their mirror images "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--clip",
        metavar="MODEL",
        help="also the mean CLIP embedding of the clip's frames, by this open_clip model, such as ViT-B-16-quickgelu "
        "(default: none)",
    )
    group.add_argument(
        "--pretrained",
        default=EncoderOptions.pretrained,
        help="its weights: a name of open_clip's or a local file (default: %(default)s)",
    )
    group.add_argument(
        "--encode-batch", type=cli.positive_int, default=BATCH_SIZE, help="clips encoded at once (default: %(default)s)"
    )
    cli.add_shard_flag(group)


class Features(VideoFiles):
    """Features of clips, float16 [clips, crops, width].

    info(video): {"source", "clips", "crops", "width", "frames", "warnings"}.
    """

    what, action = "clip features", "encoding"

    def make(self, videos, workers, show, *, encoder, batch_size=BATCH_SIZE):
        total, failed = sum(v.expected_frames() for v in videos), {}
        with tqdm(
            total=total, desc="features", unit="frame", dynamic_ncols=True, mininterval=5, disable=not show
        ) as bar:
            for video, thread in VideoPrefetcher(videos, encoder.preprocess_frame, max(1, min(workers, 4))):
                try:
                    self.encode(video, thread, encoder, batch_size, bar)
                except UserError as e:
                    failed[video.key] = str(e)
        return failed

    def encode(self, video, thread, encoder, batch_size, bar):
        lengths = []  # frames of each clip

        def tick(n):
            lengths.append(n)
            bar.update(n)

        def describe(shape):
            sizes = dict(zip(("clips", "crops", "width"), shape))
            return {**sizes, "frames": sum(lengths), "warnings": thread.decoder.warnings}

        self.write(video, encoder.encode_video(video, thread, self.folder, batch_size, tick), describe)


class FeatureVideos(UsableVideos):
    """A dataset whose videos were encoded. train, test: the usable videos; files: their features."""

    def __init__(self, data, videos, failed, files):
        super().__init__(data, videos, failed)
        self.files = files

    def summary(self) -> str:
        videos = self.train + self.test
        info = self.files.info(videos[0]) if videos else {"crops": 0, "width": 0}
        return (
            f"{len(self.train)} training and {len(self.test)} test videos, {info['crops']} crops of width "
            f"{info['width']}, in {self.files.folder}"
        )


def prepare(source: cli.DataSource, checkpoint, run, *, out, options=None, batch_size=BATCH_SIZE) -> FeatureVideos:
    """Encode the videos of a dataset into the folder `out`, those that are missing; every rank does its share.

    checkpoint: of the encoder, or "random"; options: EncoderOptions. Raises UserError, also where `out` holds features
    of another encoder or of other options.
    """
    from frd_uvad.svmae.encoder import Encoder, load_pretrained

    options = options or EncoderOptions()
    net, digest = load_pretrained(checkpoint, options, run)  # a wrong file is refused before any work
    with run.main_first():
        data = datasets.find(source.dataset, source.data_root, source.labels)
    encoder, out = Encoder(net, options, run), writable_folder(out)
    check_settings(out, {"encoder": digest, **asdict(options)}, checkpoint, run)
    files = Features(out)
    usable = files.prepare(
        data.train + data.test,
        run,
        workers=source.workers,
        shard=source.shard,
        encoder=encoder,
        batch_size=batch_size,
    )
    dataset = FeatureVideos(data, *usable, files)
    if run.is_main:
        write_labels(out, dataset)
    run.barrier()
    return dataset


def write_labels(out: Path, dataset: FeatureVideos) -> None:
    """What the detector needs beside the features: labels of the test videos, lists of bags."""
    data = dataset.data
    for video in dataset.test if data.has_labels else ():
        with atomic_write(out / "labels" / f"{safe_filename(video.name)}.npy") as tmp:
            np.save(tmp, data.labels(video, dataset.files.info(video)["frames"]))
    for name in LISTS:
        if (Path(data.root) / name).exists():
            shutil.copyfile(Path(data.root) / name, out / name)


def read_settings(folder: Path) -> dict | None:
    """How the features of a folder were made, or None if they were made elsewhere."""
    path = Path(folder) / "settings.json"
    return read_json(path, "settings of the features") if path.exists() else None


def check_settings(out: Path, settings: dict, checkpoint, run) -> None:
    """All features of a folder are made in the same way. Raises UserError."""
    saved = read_settings(out)
    if saved:
        for key, value in settings.items():
            if saved.get(key) != value:
                raise UserError(
                    f"{out} holds features with {key} = {saved.get(key)}, now it is {value}: choose another --out (of "
                    "train.py: --features)"
                )
    elif run.is_main:
        write_json(out / "settings.json", {**settings, "checkpoint": str(checkpoint)})
    run.barrier()


def encode_own_video(video, settings: dict, checkpoint, run, *, encoder=None, workers=None):
    """Features of a video that is in no dataset -> [clips, crops, width], number of frames.

    settings: of the features that the detector `checkpoint` was trained on; encoder: the file, if it has moved since.
    Raises UserError.
    """
    from frd_uvad.svmae.encoder import Encoder, load_pretrained

    missing = {"encoder", "checkpoint", *asdict(EncoderOptions())} - set(settings)
    if missing:
        raise UserError(
            f"the settings.json of the features that {checkpoint} was trained on lacks {', '.join(sorted(missing))}: "
            "make the features by preprocess.py, and train again"
        )
    options, encoder = EncoderOptions.from_dict(settings), str(encoder or settings["checkpoint"])
    net, digest = load_pretrained(encoder, options, run)
    if digest != settings["encoder"]:
        raise UserError(f"--encoder {encoder} is not the one that made the detector's features: name that file")
    encoder = Encoder(net, options, run)
    with tempfile.TemporaryDirectory() as folder:
        files = Features(folder)
        failed = files.make([video], workers or cores(), True, encoder=encoder)
        if failed:
            raise UserError(failed[video.key])
        files.report([video])
        return np.array(files.array(video)), files.info(video)["frames"]


def main(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_run_flags(parser, out="features/svmae/<dataset>")
    args = parser.parse_args(argv)
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        out = args.out or Path("features/svmae") / cli.dataset_name(args)
        options = EncoderOptions.from_dict(vars(args))
        source = cli.DataSource.from_args(args)
        dataset = prepare(source, args.checkpoint, run, out=out, options=options, batch_size=args.encode_batch)
        run.print(dataset.summary())
        if run.is_main:
            dataset.report_skipped()
        run.print(
            f"next: python frd_uvad/svmae/train.py --features {out}, or python frd_uvad/train.py --dataset features "
            f"--features {out}"
        )


if __name__ == "__main__":
    run_script(main)
