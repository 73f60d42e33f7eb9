"""Clip features from videos by a pre-trained SVMAE, image networks, or both side by side: one .npy [clips, crops,
width] of every 16 frames per video, as the detector here and frd_uvad read them. train.py --encoder runs this if it is
missing.

python frd_uvad/svmae/preprocess.py --dataset folder --data-root data/fights --checkpoint runs/svmae/folder/pretrain.pt
python frd_uvad/svmae/preprocess.py --dataset ped2 --checkpoint pretrain.pt --encoder timm:tf_efficientnet_lite0
python frd_uvad/svmae/preprocess.py --dataset ped2 --checkpoint videomae.pth --preset vit_b --crops 10
python frd_uvad/train.py --dataset features --features features/svmae/ped2       # what frd_uvad makes of them
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common import cli
from common.features.encoders import FORMS, IMAGE_KINDS, EncoderSpec, check_description, describe_forms, parse_encoders
from common.io import UserError, atomic_write, read_json, run_script, safe_filename, writable_folder, write_json
from common.pool import cores
from common.readers import datasets
from common.readers.dataset import UsableVideos, report_skipped
from frd_uvad.clip_files import ClipFiles, features_of_video
from frd_uvad.preprocess import PARTS, add_view_flags
from frd_uvad.svmae.options import EncoderOptions

# torch is imported inside functions: --help answers at once.

PRESETS = ("tiny", "vit_s", "vit_b", "vit_l")  # of model.py, which --help need not load
DEPTHS = "perspective, a folder of maps, or midas"
LISTS = ("normal.txt", "abnormal.txt")  # names of the training videos that are bags of the detector
KINDS = ("svmae", *IMAGE_KINDS)


def parse_specs(text: str) -> list[EncoderSpec]:
    """The encoders that a flag names; a bare FILE is SVMAE's. Raises UserError."""
    is_bare = str(text).partition(":")[0] not in FORMS
    return [EncoderSpec("svmae", str(text))] if is_bare else parse_encoders(text, KINDS)


def specs_of(args) -> list[EncoderSpec]:
    """The encoders of --checkpoint and --encoder, or of older command lines. Raises UserError."""
    specs = [EncoderSpec("svmae", args.checkpoint)] if args.checkpoint else []
    specs += parse_specs(args.encoder) if args.encoder else []
    specs += [EncoderSpec("clip", args.clip, args.pretrained)] if args.clip else []
    if not specs:
        raise UserError("nothing makes features: give --checkpoint FILE of pretrain.py, or --encoder")
    return specs


def add_data_flags(parser):
    cli.add_data_flags(parser)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--checkpoint",
        help="pretrain.py's, VideoMAE's weights (with --preset), or random: an untrained encoder to compare with; the "
        "same as --encoder svmae:FILE",
    )
    group.add_argument(
        "--encoder",
        help=f"beside it, or instead: {describe_forms(KINDS)}; several joined by + stand side by side; image networks "
        "give mean and deviation over a clip's frames",
    )
    for old in ("--clip", "--pretrained"):  # of older command lines: open_clip's model, and its weights
        group.add_argument(old, help=argparse.SUPPRESS)
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
    add_view_flags(group)
    parser.set_defaults(crops=EncoderOptions.crops)
    group.add_argument(
        "--encode-batch", type=cli.positive_int, help="clips encoded at once (default: 8, with image networks 1)"
    )
    cli.add_shard_flag(group)


class FeatureVideos(UsableVideos):
    """A dataset whose videos were encoded. train, test: the usable videos; files: their features."""

    def __init__(self, data, videos, failed, files):
        super().__init__(data, videos, failed)
        self.files = files

    @property
    def shape(self) -> tuple[int, int]:
        """Crops and width of the features; zeros where there are none."""
        videos = self.train + self.test
        info = self.files.info(videos[0]) if videos else {"crops": 0, "width": 0}
        return info["crops"], info["width"]

    def summary(self) -> str:
        videos = f"{len(self.train)} training and {len(self.test)} test videos"
        return f"{videos}, {self.shape[0]} crops of width {self.shape[1]}, in {self.files.folder}"


def prepare(
    source: cli.DataSource,
    specs: list[EncoderSpec],
    run,
    *,
    out,
    options: EncoderOptions | None = None,
    preprocess: str | None = None,
    clips_at_once: int | None = None,
) -> FeatureVideos:
    """Encode the videos of a dataset into the folder `out`, those that are missing; every rank does its share.

    specs: the encoders; options: of SVMAE's; preprocess: of image networks. Raises UserError, also where `out` holds
    features of another encoder or of other options.
    """
    from frd_uvad.encoders import make_encoder

    options = options or EncoderOptions()
    with run.main_first():
        encoder = make_encoder(specs, options.crops, run, preprocess=preprocess, svmae=options)  # refuses wrong files
        data = datasets.find(source.dataset, source.data_root, source.labels)
    out = writable_folder(out)
    check_settings(out, settings_of(encoder), {"flag": encoder.flag, "preprocess_flag": preprocess}, run)
    files = ClipFiles(out)
    usable = files.prepare(
        data.train + data.test,
        run,
        workers=source.workers,
        shard=source.shard,
        encoder=encoder,
        clips_at_once=clips_at_once,
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


def settings_of(encoder) -> dict:
    """What the features of a folder depend on, for its settings.json; only SVMAE's are as older versions wrote them."""
    description = encoder.describe()
    if len(encoder.parts) > 1 or description["encoder"] != "svmae":
        return description
    return {"encoder": description["weights"], **asdict(encoder.parts[0].options)}


def check_settings(out: Path, settings: dict, flags: dict, run) -> None:
    """All features of a folder are made in the same way. flags: kept beside, not compared. Raises UserError."""
    saved = read_settings(out)
    if saved:
        for key, value in {**settings, "clip": None}.items():  # older versions had CLIP's name there
            if saved.get(key) != value:
                raise UserError(
                    f"{out} holds features with {key} = {saved.get(key)}, now it is {value}: choose another --out (of "
                    "train.py: --features)"
                )
    elif run.is_main:
        checkpoint = next((spec.model for spec in parse_specs(flags["flag"]) if spec.kind == "svmae"), None)
        write_json(out / "settings.json", {**settings, **flags, "checkpoint": checkpoint})
    run.barrier()


def check_same_encoder(trained: dict | None, folder: Path) -> None:
    """Refuse the features of a folder where both its settings and those that a detector was `trained` with are known,
    and differ (UserError)."""
    made = read_settings(folder)
    if trained and made:
        # of SVMAE by itself, "encoder" is the hash of its weights
        both = [{"weights": s["encoder"], **s} for s in (trained, made)]
        places = ("checkpoint", "clip")
        advice = f"score the features of another folder than {folder}"
        check_description({k: v for k, v in both[0].items() if k not in places}, both[1], advice)


def encoder_of_settings(settings: dict, checkpoint, run, encoder: str | None = None):
    """The encoder that made a detector's features -> encoders.ClipEncoder. Raises UserError.

    settings, checkpoint, encoder: see encode_own_video().
    """
    from frd_uvad.encoders import make_encoder

    joined = "weights" in settings  # else of SVMAE by itself
    missing = {"encoder", *({"flag", "crops"} if joined else {"checkpoint", *asdict(EncoderOptions())})} - set(settings)
    if missing or settings.get("clip"):
        lacks = f"lacks {', '.join(sorted(missing))}" if missing else "is of an older version, with CLIP"
        raise UserError(
            f"the settings.json of the features that {checkpoint} was trained on {lacks}: make the features by "
            "preprocess.py, and train again"
        )
    specs = parse_specs(encoder or settings.get("flag") or settings["checkpoint"])
    parts = settings.get("parts", [settings])
    svmae_part = next((part for part in parts if not joined or part["encoder"] == "svmae"), None)
    made = make_encoder(
        specs,
        settings["crops"],
        run,
        preprocess=settings.get("preprocess_flag"),
        svmae=EncoderOptions.from_dict(svmae_part) if svmae_part else None,
    )
    named = "+".join(map(str, specs))
    if joined:
        check_description({k: v for k, v in settings.items() if k != "checkpoint"}, made.describe(), "name its files")
    elif settings_of(made).get("encoder") != settings["encoder"]:
        raise UserError(f"--encoder {named} is not the one that made the detector's features: name that file")
    return made


def encode_own_video(video, settings: dict, checkpoint, run, *, encoder=None, workers=None):
    """Features of a video that is in no dataset -> [clips, crops, width], number of frames.

    settings: of the features that the detector `checkpoint` was trained on; encoder: what --encoder says, if files have
    moved since. Raises UserError.
    """
    encoder = encoder_of_settings(settings, checkpoint, run, encoder and str(encoder))
    with tempfile.TemporaryDirectory() as folder:
        return features_of_video(ClipFiles(folder), video, encoder, workers or cores())


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
        how = dict(options=options, preprocess=args.preprocess, clips_at_once=args.encode_batch)
        dataset = prepare(source, specs_of(args), run, out=out, **how)
        run.print(dataset.summary())
        if run.is_main:
            report_skipped(dataset.skipped)
        fits = dataset.shape[1] % PARTS == 0  # what FRD-UVAD can cut into its parts
        other = f", or python frd_uvad/train.py --dataset features --features {out}" if fits else ""
        run.print(f"next: python frd_uvad/svmae/train.py --features {out}{other}")


if __name__ == "__main__":
    run_script(main)
