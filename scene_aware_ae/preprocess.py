"""Encode every frame of a dataset's videos by a frozen encoder: one float16 .npy per video. train.py and eval.py run this where
it is missing.

    python scene_aware_ae/preprocess.py --dataset shanghaitech-sd --pretrained openai
    torchrun --nproc-per-node 8 scene_aware_ae/preprocess.py --dataset shanghaitech     # or --shard 0/8 … --shard 7/8
    python scene_aware_ae/preprocess.py --pretrained openai --save-weights ViT-L-14-quickgelu.pt    # for a machine offline
"""

import hashlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from common import cli, datasets
from common import old_training as training
from common.cache import VideoFiles
from common.dataset import UsableVideos
from common.features.prefetch import VideoPrefetcher
from common.io import UserError, read_table, run
from common.pool import prepare_videos
from scene_aware_ae import encoder as encoders

CLIP, PRETRAINED = "ViT-L-14-quickgelu", "openai"
DEFAULT_CLIP = {"demo": encoders.STAND_IN}


def add_data_flags(parser):
    cli.add_data_flags(parser)
    g = parser.add_argument_group("features (defaults: as the checkpoint was trained, else the paper's)")
    g.add_argument(
        "--clip",
        default=None,
        help=f"an open_clip model; {encoders.STAND_IN}, which needs no download; or "
        f"{encoders.FILES}DIR, features made elsewhere, such as svmae's (default: {CLIP}; on demo {encoders.STAND_IN})",
    )
    g.add_argument(
        "--pretrained",
        default=PRETRAINED,
        help="open_clip's name of weights, a local file, or with tests/perf/bench.py random (default: %(default)s)",
    )
    g.add_argument(
        "--preprocess",
        choices=encoders.PREPROCESS,
        default=None,
        help="clip: as the model was trained; paper: whole frames, BGR, in [-1, 1], as the authors (default: clip)",
    )
    g.add_argument(
        "--stand-in-steps",
        type=int,
        default=encoders.StandIn.STEPS,
        help=f"training steps of {encoders.STAND_IN} (default: %(default)s)",
    )
    g.add_argument("--encode-batch", type=int, default=64, help="frames encoded at once (default: %(default)s)")
    g.add_argument(
        "--scenes", type=Path, default=None, help="csv with lines video,scene, instead of the reader's scenes"
    )


class Features(VideoFiles):
    """Features of one dataset's videos by one encoder. info(video): {"source", "frames", "width", "encoder", "weights",
    "preprocess", "warnings"}."""

    what = "features"

    def __init__(self, folder, description, made_from=None):
        """made_from: what changes when the files do that they are taken from, where they were made elsewhere."""
        known = repr(sorted(description.items())) + (str(made_from) if made_from else "")
        key = hashlib.sha256(known.encode(errors="backslashreplace")).hexdigest()[:10]
        super().__init__(Path(folder) / f"features-{key}")
        self.description = description

    def build(self, videos, workers, show=True, *, encoder, batch):
        """Encode what is missing, reading ahead. -> (videos that are there, {video key: why} of those that could not be read)."""
        fresh, failed = self.missing(videos)
        self._encode(fresh, failed, workers, show and fresh, encoder, batch)
        self.report(v for v in videos if v.key not in failed)
        return [v for v in videos if v.key not in failed], failed

    def _encode(self, fresh, failed, workers, show, encoder, batch):
        if show:
            print(f"encoding {len(fresh)} videos with {self.description['encoder']} into {self.folder}", flush=True)
        if isinstance(encoder, encoders.GivenFeatures):
            for video in fresh:
                try:
                    self.write(video, iter([encoder.of(video)]), lambda shape: {"frames": shape[0], **self.description})
                except UserError as e:
                    failed[video.key] = str(e)
            return
        total = sum(v.expected_frames() for v in fresh)
        with tqdm(total=total, desc="encode", unit="frame", dynamic_ncols=True, mininterval=2, disable=not show) as bar:
            for video, source in VideoPrefetcher(fresh, encoder.preprocess_frame, max(1, min(workers, 4))):
                try:
                    self.write(
                        video,
                        self._encoded(source, encoder, batch, bar),
                        lambda shape, d=source.decoder: {
                            "frames": shape[0],
                            **self.description,
                            "warnings": d.warnings,
                        },
                    )
                except UserError as e:
                    failed[video.key] = str(e)

    @staticmethod
    def _encoded(source, encoder, batch, bar):
        waiting = []
        for frame in source:
            waiting.append(frame)
            if len(waiting) == batch:
                yield encoder.encode(np.stack(waiting)).cpu().numpy().astype(np.float16)
                bar.update(len(waiting))
                waiting = []
        if waiting:
            yield encoder.encode(np.stack(waiting)).cpu().numpy().astype(np.float16)
            bar.update(len(waiting))


class Prepared(UsableVideos):
    """A dataset with its features. train, test: the videos that are usable."""

    def __init__(self, data, videos, failed, features):
        super().__init__(data, videos, failed)
        self.features = features

    def arrays(self, videos):
        return [self.features.array(v) for v in videos]

    def length(self, video):
        return self.features.info(video)["frames"]

    def summary(self):
        for split in ("train", "test"):
            videos = getattr(self, split)
            scenes, frames = len({v.scene for v in videos}), sum(map(self.length, videos))
            print(f"{split}: {len(videos)} videos of {scenes} scenes, {frames} frames")


def read_scenes(path, data):
    """Replace the reader's scenes by those of a csv with lines video,scene."""
    rows = [row for _, row in read_table(path, "--scenes")]
    bad = next((row for row in rows if len(row) < 2), None)
    if bad:
        raise UserError(f"--scenes {path}: expected lines video,scene, got {','.join(bad)!r}")
    known = {row[0]: row[1] for row in rows}
    for v in data.train + data.test:
        if v.name not in known:
            raise UserError(f"--scenes {path} has no line for the video {v.name}")
        v.scene = known[v.name]


def make_encoder(args, data, folder, r, trained=None, measuring=False):
    """The encoder that the flags name, or that a checkpoint was `trained` on. measuring: its speed alone, for which random weights do."""
    from common.features.clip import RANDOM, ClipEncoder

    name = args.clip or (trained or {}).get("encoder") or DEFAULT_CLIP.get(data.name, CLIP)
    preprocess = args.preprocess or (trained or {}).get("preprocess")
    preprocess = preprocess if preprocess in encoders.PREPROCESS else "clip"
    encoders.check(name, preprocess)
    if name == encoders.STAND_IN:
        seed, steps = ((trained or {}).get(k, v) for k, v in (("seed", args.seed), ("steps", args.stand_in_steps)))
        encoder = encoders.StandIn(folder, r, data.train or data.test, seed, steps)
    elif name.startswith(encoders.FILES):
        if getattr(args, "video", None) or measuring:
            raise UserError(
                f"--clip {name} holds features, and no network that could encode a video: make the video's features alike, as "
                "a dataset of its own"
            )
        encoder = encoders.GivenFeatures(name.removeprefix(encoders.FILES))
    else:
        if args.pretrained == RANDOM and not measuring:
            raise UserError("--pretrained random is for tests/perf/bench.py: features of random weights say nothing")
        advice = (
            f"where there is a network, run: python scene_aware_ae/preprocess.py --clip {name} --pretrained "
            f"{args.pretrained} --save-weights {name}.pt — then copy the file here and give --pretrained {name}.pt; or "
            f"take --clip {encoders.STAND_IN}"
        )
        encoder = ClipEncoder(name, args.pretrained, preprocess, r, advice)
    if trained and trained["weights"] != encoder.hash:
        raise UserError(
            f"the checkpoint was trained on features of {trained['encoder']} with other weights "
            f"({trained['weights']}, here {encoder.hash}): give the same --clip and --pretrained"
            + (f", or the --cache that holds its stand-in (looked in {folder})" if name == encoders.STAND_IN else "")
        )
    if trained and trained["preprocess"] != encoder.describe()["preprocess"]:
        raise UserError(
            f"the checkpoint was trained on features with --preprocess {trained['preprocess']}, not {preprocess}"
        )
    return encoder


def encoder_of(args, data, r, trained=None, measuring=False):
    """The encoder of a dataset; under torchrun the first process trains a stand-in and the others wait."""
    if not r.is_main:
        r.barrier()
    encoder = make_encoder(args, data, data.cache_folder(args.cache), r, trained, measuring)
    if r.is_main:
        r.barrier()
    return encoder


def prepare(args, r, splits=("train", "test"), data=None, trained=None, encoder=None, with_encoder=False):
    """Find the dataset and encode what is missing. Under torchrun every process encodes its share."""
    with r.main_first():
        data = data or datasets.find(args.dataset, args.data_root, args.labels)
    if args.scenes:
        read_scenes(args.scenes, data)
    encoder = encoder or encoder_of(args, data, r, trained)
    features = Features(data.cache_folder(args.cache), encoder.describe(), getattr(encoder, "stamp", None))
    videos = [v for s in splits for v in getattr(data, s)]
    videos, failed = prepare_videos(
        features, videos, partial(features.build, encoder=encoder, batch=args.encode_batch), args, r
    )
    ready = Prepared(data, videos, failed, features)
    return (ready, encoder) if with_encoder else ready


def main(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_shard_flag(cli.add_run_flags(parser, out="runs/scene_aware_ae/<dataset>"))
    parser.add_argument(
        "--save-weights",
        type=Path,
        default=None,
        metavar="FILE",
        help="download the model and write its weights into FILE, for a machine without a network, and stop",
    )
    args = parser.parse_args(argv)
    if args.save_weights:
        encoders.check(args.clip or CLIP, "clip")
        return encoders.save_weights(args.clip or CLIP, args.pretrained, args.save_weights)
    r = training.Run.from_args(args)
    ready = prepare(args, r)
    if r.is_main:
        ready.summary()
        ready.report_skipped()
        print(f"next: python scene_aware_ae/train.py --dataset {ready.data.name}")
    r.close()


if __name__ == "__main__":
    run(main)
