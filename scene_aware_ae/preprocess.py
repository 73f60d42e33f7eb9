"""Videos -> features of every frame by a frozen encoder, a float16 .npy per video. train.py and eval.py run it if they
are missing.

python scene_aware_ae/preprocess.py --dataset shanghaitech-sd --encoder timm:tf_efficientnet_lite0
torchrun --nproc-per-node 8 scene_aware_ae/preprocess.py --dataset shanghaitech     # or --shard 0/8 … --shard 7/8
python scene_aware_ae/preprocess.py --save-weights ViT-L-14-quickgelu.pt    # CLIP's, for a machine without a network
"""

import argparse
import hashlib
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.cache import VideoFiles
from common.features.encoders import describe_forms
from common.features.prefetch import encode_videos
from common.io import UserError, read_table, run_script
from common.readers import datasets
from common.readers.dataset import UsableVideos, report_skipped
from scene_aware_ae import encoder as encoders
from scene_aware_ae.encoder import EncoderOptions, GivenFeatures, make_encoder


def add_data_flags(parser):
    cli.add_data_flags(parser)
    group = parser.add_argument_group("features (defaults: as the checkpoint was trained, else as below)")
    group.add_argument(
        "--encoder",
        help=f"what makes a feature of a frame: {describe_forms(encoders.KINDS)}; the last needs no download, files "
        f"are features made elsewhere, such as svmae's (default: {encoders.CLIP}; on demo {encoders.STAND_IN})",
    )
    for old in ("--clip", "--pretrained"):  # of older command lines: open_clip's model, and its weights
        group.add_argument(old, help=argparse.SUPPRESS)
    group.add_argument(
        "--preprocess",
        choices=encoders.PREPROCESS,
        help="clip: as networks are trained, the shorter side and the centre; whole: the whole frame; paper: the same "
        "in BGR and [-1, 1], as the authors (default: clip for clip:, else whole; for an authors' checkpoint paper)",
    )
    group.add_argument(
        "--stand-in-steps",
        type=cli.positive_int,
        default=encoders.STAND_IN_STEPS,
        help=f"training steps of {encoders.STAND_IN} (default: %(default)s)",
    )
    group.add_argument(
        "--encode-batch", type=cli.positive_int, default=64, help="frames encoded at once (default: %(default)s)"
    )
    group.add_argument("--scenes", type=Path, help="csv with lines video,scene, instead of the reader's scenes")


class Features(VideoFiles):
    """Features of one dataset's videos by one encoder. info(video): {"source", "frames", "width", "encoder", "weights",
    "preprocess", "warnings"}."""

    what = "features"

    def __init__(self, folder, description: dict, stamp=None):
        """description: the encoder's describe(); stamp: changes when the files do that features made elsewhere come
        from."""
        settings = repr(sorted(description.items())) + (str(stamp) if stamp else "")
        key = hashlib.sha256(settings.encode(errors="backslashreplace")).hexdigest()[:10]
        super().__init__(Path(folder) / f"features-{key}")
        self.description = description
        self.action = f"encoding with {description['encoder'].replace(encoders.OLD_STAND_IN, str(encoders.STAND_IN))}"

    def make(self, videos, workers, show, *, encoder, batch_size):
        failed = {}
        if isinstance(encoder, GivenFeatures):
            for video in videos:
                try:
                    parts = iter([encoder.load(video)])
                    self.write(video, parts, lambda shape: {"frames": shape[0], **self.description})
                except UserError as e:
                    failed[video.key] = str(e)
            return failed

        def encode(video, frames, tick):
            def describe(shape):
                return {"frames": shape[0], **self.description, "warnings": frames.decoder.warnings}

            self.write(video, encode_in_batches(frames, encoder, batch_size, tick), describe)

        return encode_videos(videos, encoder.preprocess_frame, encode, workers, show)


def encode_in_batches(frames, encoder, batch_size, progress=lambda n: None):
    """Yield features float16 [n, width] of at most batch_size of `frames`."""
    frames = iter(frames)
    while batch := list(itertools.islice(frames, batch_size)):
        yield encoder.encode(np.stack(batch)).cpu().numpy().astype(np.float16)
        progress(len(batch))


class EncodedVideos(UsableVideos):
    """The usable videos of a dataset, with their features."""

    def __init__(self, data, videos, failed, features: Features, encoder):
        super().__init__(data, videos, failed)
        self.features, self.encoder = features, encoder

    def arrays(self, videos) -> list[np.ndarray]:
        """Features of each video, float16 [T, width] memory maps."""
        return [self.features.array(v) for v in videos]

    def frames(self, video) -> int:
        return self.features.info(video)["frames"]

    def print_summary(self):
        for split in ("train", "test"):
            videos = getattr(self, split)
            scenes, frames = len({v.scene for v in videos}), sum(map(self.frames, videos))
            print(f"{split}: {len(videos)} videos of {scenes} scenes, {frames} frames")


def read_scenes(path, data):
    """Replace the reader's scenes by those of a csv with lines video,scene. Raises UserError."""
    scene_of = {}
    for _, row in read_table(path, "--scenes"):
        if len(row) < 2:
            raise UserError(f"--scenes {path}: expected lines video,scene, got {','.join(row)!r}")
        scene_of[row[0]] = row[1]
    for v in data.train + data.test:
        if v.name not in scene_of:
            raise UserError(f"--scenes {path} has no line for the video {v.name}")
        v.scene = scene_of[v.name]


def prepare(
    source: cli.DataSource,
    run,
    options: EncoderOptions,
    *,
    splits=("train", "test"),
    scenes=None,
    data=None,
    trained=None,
    encoder=None,
) -> EncodedVideos:
    """Encode what is missing; under torchrun every rank encodes its share.

    scenes: the csv of --scenes; data: instead of the dataset that `source` names; trained: the encoder's description in
    a checkpoint; encoder: instead of the one that `options` name.
    """
    with run.main_first():
        data = data or datasets.find(source.dataset, source.data_root, source.labels)
    if scenes:
        read_scenes(scenes, data)
    if encoder is None:
        with run.main_first():  # rank 0 trains a stand-in, or downloads weights
            encoder = make_encoder(options, data, source.cache, run, trained=trained)
    features = Features(data.cache_folder(source.cache), encoder.describe(), getattr(encoder, "stamp", None))
    videos, failed = features.prepare(
        [v for split in splits for v in getattr(data, split)],
        run,
        workers=source.workers,
        shard=source.shard,
        encoder=encoder,
        batch_size=options.batch_size,
    )
    return EncodedVideos(data, videos, failed, features, encoder)


def main(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_shard_flag(cli.add_run_flags(parser, out="not used here"))
    parser.add_argument(
        "--save-weights",
        type=Path,
        metavar="FILE",
        help="download the model and write its weights into FILE, for a machine without a network, and stop",
    )
    args = parser.parse_args(argv)
    if args.save_weights:
        options = EncoderOptions.from_args(args)
        return encoders.save_weights(encoders.choose_encoder(options, "", {}), args.save_weights)
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        dataset = prepare(cli.DataSource.from_args(args), run, EncoderOptions.from_args(args), scenes=args.scenes)
        if run.is_main:
            dataset.print_summary()
            report_skipped(dataset.skipped)
            print(f"next: {cli.next_command('scene_aware_ae/train.py', argv, '--shard')}")


if __name__ == "__main__":
    run_script(main)
