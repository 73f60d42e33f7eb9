"""Videos -> features of clips of 16 frames, an .npy [clips, crops, width] per video. train.py and eval.py run it if
they are missing.

python frd_uvad/preprocess.py --dataset ped2 --encoder timm:tf_efficientnet_lite0 --crops 10
python frd_uvad/preprocess.py --dataset folder --data-root my_videos --encoder torchvision:s3d:s3d.pth
python frd_uvad/preprocess.py --dataset demo                                       # statistics: no network, no download
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.features.encoders import (
    IMAGE_KINDS,
    EncoderSpec,
    check_description,
    describe_forms,
    parse_encoders,
)
from common.io import UserError, run_script, short_hash
from common.pool import tick
from common.readers import datasets
from common.readers.dataset import UsableVideos, report_skipped
from common.readers.video import Decoder, Video
from frd_uvad.clip_files import ClipFiles, features_of_video
from frd_uvad.features.data import FeatureData, FeatureVideo, canonical_features, clips_of_frames
from frd_uvad.features.folders import find_features, npy_files
from frd_uvad.stand_in import Statistics

# torch is imported inside functions: --help answers at once, and decoding processes never load it.

SYNONYMS = {  # flags of the published command line
    "--dataset_name": "--dataset",
    "--ckpt_path": "--checkpoint",
    "--model_path": "--checkpoint",
    "--model_save_path": "--out",
    "--max_epoch": "--epochs",
    "--max_seqlen": "--batch-size",
    "--batchsize": "--batch-size",
}
STAND_IN = EncoderSpec("stand-in", "statistics")  # of motion and appearance; no network
KINDS = (*IMAGE_KINDS, "svmae", "files", str(STAND_IN))
PARTS = 256  # 16 of a feature, with 16 heads each, as model.py cuts it


@dataclass
class FeatureOptions:
    """Where features come from. features: a folder of features made elsewhere, with order and segments as in
    find_features; else they are made by `encoders`, side by side, or as a checkpoint was trained (None)."""

    features: Path | None = None
    order: Path | None = None
    segments: bool = False
    encoders: list[EncoderSpec] | None = None
    crops: int | None = None  # views of each clip: 1 or 10
    preprocess: str | None = None

    @classmethod
    def from_args(cls, args) -> "FeatureOptions":
        """Raises UserError for an encoder that is not known."""
        specs = parse_specs(args.encoder) if args.encoder else args.backbone and [spec_of_backbone(args.backbone)]
        features = args.features
        if any(spec.kind == "files" for spec in specs or ()):
            if len(specs) > 1 or features:
                raise UserError(f"--encoder {args.encoder}: files cannot be joined with other features")
            features, specs = Path(specs[0].model), None
        return cls(features, args.order, args.segments, specs or None, args.crops, args.preprocess)

    def trained_as(self, features: dict | None) -> "FeatureOptions":
        """These options, where they leave it open as the features of a checkpoint were made, else the defaults."""
        features = features or {}
        if "backbone" in features:  # of an older version
            backbone, weights = features["backbone"], features["weights"]
            trained = [spec_of_backbone(backbone if weights == "DEFAULT" else f"{backbone}:{weights}")]
        else:
            trained = parse_specs(features["flag"]) if "flag" in features else [STAND_IN]
        how = (self.crops or features.get("crops", 1), self.preprocess or features.get("preprocess_flag"))
        return FeatureOptions(self.features, self.order, self.segments, self.encoders or trained, *how)

    def flags(self) -> dict:
        """What names these encoders again, kept with a checkpoint beside what the features depend on."""
        return {"flag": "+".join(map(str, self.encoders)), "preprocess_flag": self.preprocess}


def parse_specs(text: str) -> list[EncoderSpec]:
    return parse_encoders(str(STAND_IN) if text == STAND_IN.model else text, KINDS)


def spec_of_backbone(text: str) -> EncoderSpec:
    """The encoder that older command lines call --backbone NAME[:WEIGHTS]."""
    name, _, weights = text.partition(":")
    return STAND_IN if name == STAND_IN.model else EncoderSpec("torchvision", name, weights or None)


def add_label_flags(group) -> None:
    group.add_argument(
        "--order",
        type=Path,
        help="list of the test videos, a name or path a line, in the order of the label vector gt*.npy (default: a "
        "*.list or *.txt beside the features that names exactly these videos)",
    )
    group.add_argument(
        "--segments",
        action="store_true",
        help="the features are equal parts of each video (32 as a rule), not clips of 16 frames: scores are stretched "
        "to the frames that its labels have",
    )


def add_view_flags(group) -> None:
    """What encoders see of a clip, here and in svmae/preprocess.py."""
    group.add_argument(
        "--crops",
        type=int,
        choices=[1, 10],
        help="views of each clip: one; or corners and centre at 7/8 of it, and their mirror images (default: 1)",
    )
    group.add_argument(
        "--preprocess",
        choices=["clip", "whole"],
        help="what image networks see, clip: as they are trained, the shorter side and the centre; whole: the whole "
        "frame (default: clip for clip:, else whole)",
    )


def add_data_flags(parser):
    cli.add_data_flags(parser)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        type=Path,
        help="folder of clip features made elsewhere, instead of videos (default for --dataset ucfcrime, xdviolence "
        "and features: --data-root)",
    )
    add_label_flags(group)
    group.add_argument(
        "--encoder",
        help=f"what makes features of videos: {describe_forms(KINDS)}; several joined by + stand side by side; image "
        "networks give mean and deviation over a clip's frames (default: as the checkpoint was trained, else "
        f"{STAND_IN}, which needs no download)",
    )
    group.add_argument("--backbone", help=argparse.SUPPRESS)  # of older command lines: NAME[:WEIGHTS]
    add_view_flags(group)
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


def make_encoder(options: FeatureOptions, run, trained: dict | None = None):
    """-> encoders.ClipEncoder, or the stand-in, which needs no torch. trained: features of a checkpoint, with which
    it must agree (UserError)."""
    if options.encoders == [STAND_IN]:
        if (options.crops or 1) > 1:
            raise UserError(f"--crops {options.crops}: {STAND_IN} knows whole frames only; choose another --encoder")
        encoder = Statistics()
    else:
        from frd_uvad.encoders import make_encoder as make

        encoder = make(options.encoders, options.crops, run, preprocess=options.preprocess)
    if trained and "backbone" not in trained:  # older versions did not name weights
        check_description(trained, encoder.describe(), f"give the same features as with --encoder {trained['flag']}")
    return encoder


def check_width(width: int) -> None:
    """Refuse features that the model cannot cut into its parts (UserError)."""
    if width % PARTS:
        raise UserError(
            f"features of width {width} do not fit: the model cuts them into 16 parts for 16 heads, so it must be a "
            f"multiple of {PARTS}; several encoders joined by + have the sum of their widths"
        )


def encode_own_video(video, options: FeatureOptions, run, trained: dict | None = None) -> tuple[np.ndarray, int]:
    """Features of a video that is in no dataset [clips, crops, width], and its number of frames. trained: see
    make_encoder. Raises UserError."""
    encoder = make_encoder(options, run, trained)
    with tempfile.TemporaryDirectory() as folder:
        return features_of_video(files_of(Path(folder), options, encoder), video, encoder, 1)


class StatisticsFiles(ClipFiles):
    """Clip features of the stand-in, each video in a process that loads no torch."""

    def make(self, videos, workers, show, *, encoder, clips_at_once=None):
        return self.run_jobs(_write_statistics, videos, Video.expected_frames, workers, "features", show)


def _write_statistics(job):
    files, video = job
    clips = ClipReader(Decoder(video))
    files.write(video, (Statistics().encode([clip]).astype(np.float16) for clip in clips), clips.describe)


def files_of(folder: Path, options: FeatureOptions, encoder) -> ClipFiles:
    """The stand-in's folder is called as in older versions; others by what their features depend on."""
    if isinstance(encoder, Statistics):
        return StatisticsFiles(folder / f"clips-{STAND_IN.model}-{options.crops}", f"encoding with {STAND_IN}")
    key = short_hash(encoder.describe())
    names = "+".join(spec.model if spec.kind in IMAGE_KINDS else spec.kind for spec in options.encoders)
    name = "".join(c if c.isalnum() or c in "-+._" else "_" for c in names)[:60]
    return ClipFiles(folder / f"clips-{name}-{options.crops}-{key}", f"encoding with {encoder.describe()['encoder']}")


def prepare(
    source: cli.DataSource, run, options: FeatureOptions, splits=("train", "test"), trained: dict | None = None
) -> FeatureData:
    """Features made elsewhere are read; those of videos are made where they are missing. trained: features of the
    checkpoint that will score them. Raises UserError."""
    name = canonical_features(source.dataset)
    if options.features or name in ("ucfcrime", "xdviolence", "features"):
        folders = (source.data_root / source.dataset, source.data_root)
        root = options.features or next((p for p in folders if p.is_dir()), source.data_root)
        if not options.features and root.is_dir() and not any(npy_files(root)):
            way_out = "its videos are for --dataset folder, in train/ and test/ (UCF-Crime: tests/tools/ucf_crime.py)"
            raise UserError(f"--dataset {source.dataset} reads clip features (.npy), and {root} holds none; {way_out}")
        return find_features(name or source.dataset, root, source.labels, options.order, options.segments)
    if options.order or options.segments:
        raise UserError("--order and --segments are for --features: names and frames of videos are known")
    options = options.trained_as(trained)
    with run.main_first():
        encoder = make_encoder(options, run, trained)  # a wrong file is refused before any work
    check_width(encoder.width)
    with run.main_first():
        data = datasets.find(source.dataset, source.data_root, source.labels)
    files = files_of(data.cache_folder(source.cache), options, encoder)
    all_videos = [v for split in splits for v in getattr(data, split)]
    videos, failed = files.prepare(all_videos, run, workers=source.workers, shard=source.shard, encoder=encoder)
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
        settings={**encoder.describe(), **options.flags()},
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
            print(f"next: {cli.next_command('frd_uvad/train.py', argv, '--shard')}")


if __name__ == "__main__":
    run_script(main)
