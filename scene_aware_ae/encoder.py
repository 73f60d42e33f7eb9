"""Which frozen encoder makes the frame features: a network of images, features made elsewhere, or a stand-in.

encoder = make_encoder(EncoderOptions(EncoderSpec("clip", "ViT-L-14-quickgelu")), dataset, "cache", run)
encoder.encode(frames)        # uint8 [n, H, W, 3 or 1] of encoder.size -> float32 [n, encoder.width]
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.features.encoders import (
    IMAGE_KINDS,
    RANDOM,
    EncoderSpec,
    check_description,
    check_model,
    image_networks,
    parse_encoder,
)
from common.io import UserError, first_line, load_array, read_json, safe_filename, stamp

# torch, open_clip and timm are imported inside functions: --help answers at once.

CLIP = EncoderSpec("clip", "ViT-L-14-quickgelu", "openai")  # the paper's
STAND_IN, STAND_IN_STEPS = EncoderSpec("stand-in", "autoencoder"), 1500
KINDS = (*IMAGE_KINDS, "files", str(STAND_IN))
DEFAULT_ENCODER = {"demo": STAND_IN}
OLD_STAND_IN = "none:autoencoder"  # how caches, checkpoints and older command lines call it
PREPROCESS = ("clip", "whole", "paper")
CLIP_FRAMES = 16  # that a row of features made per clip stands for


@dataclass
class EncoderOptions:
    """The encoder and how it is used. encoder, preprocess: None for what the checkpoint was trained on, else the
    defaults; weights: a file or name of them, instead of the encoder's."""

    encoder: EncoderSpec | None = None
    weights: str | None = None
    preprocess: str | None = None
    stand_in_steps: int = STAND_IN_STEPS
    batch_size: int = 64  # frames encoded at once
    seed: int = 0  # of the stand-in

    @classmethod
    def from_args(cls, args) -> "EncoderOptions":
        """Raises UserError for an encoder that is not known."""
        spec = parse_encoder(args.encoder, KINDS) if args.encoder else args.clip and spec_of_name(args.clip)
        how = (args.preprocess, args.stand_in_steps, args.encode_batch, args.seed)
        return cls(spec or None, args.pretrained, *how)


def spec_of_name(name: str) -> EncoderSpec:
    """The encoder that an older command line calls --clip NAME, or the description of features in a checkpoint."""
    if name == OLD_STAND_IN:
        return STAND_IN
    if name.startswith("none:"):
        raise UserError(f"--clip {name} is not known: the stand-in is called {STAND_IN}")
    is_clip = not name.startswith(("files:", "timm:", "torchvision:"))
    return EncoderSpec("clip", name) if is_clip else parse_encoder(name, KINDS)


def save_weights(spec: EncoderSpec, path) -> None:
    """Download a model of open_clip and write its weights into one file for a machine without a network. UserError."""
    import open_clip

    from common.training import save_checkpoint

    if spec.kind != "clip":
        raise UserError(f"--save-weights is for clip:MODEL: {spec} is loaded from its own file, {spec.kind}:MODEL:FILE")
    check_model(spec)
    name, weights = image_networks(spec).config_of(spec.model, spec.weights or "openai"), spec.weights or "openai"
    try:
        model = open_clip.create_model(name, pretrained=weights)
    except Exception as e:
        raise UserError(f"--save-weights: {name} with {weights!r} could not be loaded ({first_line(e)})") from None
    save_checkpoint(path, {"state_dict": model.state_dict(), "quick_gelu": name.endswith("-quickgelu")})
    print(f"wrote {path}; copy it, and give --encoder clip:{name}:{Path(path).name} there")


def choose_encoder(options: EncoderOptions, dataset: str, trained: dict) -> EncoderSpec:
    """The encoder that the options name, else the one of a checkpoint, else the dataset's default. Raises UserError."""
    spec = options.encoder
    if spec is None and trained:
        flag = trained.get("flag")
        spec = parse_encoder(flag, KINDS) if flag else spec_of_name(trained["encoder"])
    spec = spec or DEFAULT_ENCODER.get(dataset, CLIP)
    if options.weights and spec.kind in IMAGE_KINDS:
        spec = EncoderSpec(spec.kind, spec.model, options.weights)
    if spec.is_video:
        raise UserError(f"--encoder {spec} is a network of clips: a network of images is needed here, for every frame")
    check_model(spec)
    return spec


def make_encoder(
    options: EncoderOptions, data, cache, run, *, trained: dict | None = None, only_features=True, measuring=False
):
    """The encoder that the options name, or that a checkpoint was `trained` on (its describe()).

    data: the Dataset, on whose training videos a stand-in is trained. only_features: False where videos must be
    encoded, which files of features cannot; measuring: its speed, for which random weights will do. Raises UserError.
    """
    trained = trained or {}
    spec = choose_encoder(options, data.name, trained)
    preprocess = options.preprocess or trained.get("preprocess")
    preprocess = preprocess if preprocess in PREPROCESS else None
    folder, advice = data.cache_folder(cache), "give the same --encoder and --preprocess"
    if spec == STAND_IN:
        from scene_aware_ae.stand_in import StandIn

        seed, steps = trained.get("seed", options.seed), trained.get("steps", options.stand_in_steps)
        encoder = StandIn(folder, run, data.train or data.test, seed, steps)
        advice = f"give the same --encoder, or the --cache that holds its stand-in (looked in {folder})"
    elif spec.kind == "files":
        if not only_features or measuring:
            raise UserError(
                f"--encoder {spec} holds features, and no network that could encode a video: make the video's features "
                "in the same way, as a dataset of its own"
            )
        encoder = GivenFeatures(spec.model)
    else:
        if spec.weights == RANDOM and not measuring:
            raise UserError(f"--encoder {spec} is for tests/perf/bench.py: features of random weights say nothing")
        encoder = image_networks(spec).ImageEncoder(
            spec, run, preprocess, offline_advice(spec) if spec.kind == "clip" else ""
        )
    if trained:
        check_description(trained, encoder.describe(), advice)
    encoder.flag = str(spec)
    return encoder


def offline_advice(spec: EncoderSpec) -> str:
    """How to get weights of CLIP onto a machine without a network."""
    named = f"--encoder clip:{spec.model}"
    save = f"python scene_aware_ae/preprocess.py {named}:{spec.weights or 'openai'} --save-weights {spec.model}.pt"
    copy = f"then copy the file here and give {named}:{spec.model}.pt"
    return f"where there is a network, run: {save} — {copy}; or take --encoder {STAND_IN}"


class GivenFeatures:
    """Features made elsewhere: <folder>/<split>/<video>.npy, one row per frame [frames, width], or one per clip of 16.

    Features of clips, [clips, width], [clips, crops, width] or [crops, clips, width], are given to all frames of the
    clip (their mean over crops). Raises UserError where the folder has none.
    """

    preprocess = "none"

    def __init__(self, folder):
        self.folder, self.name = Path(folder), f"files:{folder}"
        files = sorted(p for split in ("train", "test") for p in self.folder.glob(f"{split}/*.npy"))
        if not files:
            raise UserError(f"--encoder {self.name}: there are no features <split>/<video>.npy in {folder}")
        self.width = int(load_array(files[0], "features", mmap=True).shape[-1])
        settings = self.folder / "settings.json"
        origin = settings.read_text() if settings.exists() else str(self.width)
        self.hash = hashlib.sha256(origin.encode()).hexdigest()[:16]
        self.stamp = stamp(self.folder, [str(f.relative_to(self.folder)) for f in files])

    def load(self, video) -> np.ndarray:
        """float16 [frames, width]. Raises UserError."""
        path = self.folder / video.split / f"{video.name}.npy"
        if not path.exists():
            path = path.with_name(f"{safe_filename(video.name)}.npy")  # as this toolkit names them
        entry = path.with_suffix(".json")
        frames = read_json(entry, "the features' entry")["frames"] if entry.exists() else video.expected_frames()
        x = load_array(path, "features")
        if x.ndim not in (2, 3) or x.shape[-1] != self.width or not np.isfinite(x).all():
            raise UserError(
                f"features {path}: expected finite numbers of width {self.width}, [frames or clips, width], got shape "
                f"{x.shape}"
            )
        clips = -(-frames // CLIP_FRAMES)
        if x.ndim == 3:
            fits = [n in (frames, clips) for n in x.shape[:2]]
            if all(fits) and x.shape[1] > 1 and not entry.exists():
                raise UserError(
                    f"features {path}: {x.shape} may be [clips, crops, width] or [crops, clips, width]: save their "
                    "mean over crops"
                )
            x = x.mean(0 if fits == [False, True] else 1)
        if len(x) == frames:
            return x.astype(np.float16)
        if len(x) != clips:
            raise UserError(
                f"features {path}: {len(x)} rows for a video of {frames} frames; expected one per frame or per "
                f"{CLIP_FRAMES} frames"
            )
        return np.repeat(x, CLIP_FRAMES, axis=0)[:frames].astype(np.float16)

    def describe(self) -> dict:
        return {"encoder": self.name, "weights": self.hash, "preprocess": self.preprocess, "width": self.width}
