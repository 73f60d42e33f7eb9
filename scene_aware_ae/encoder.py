"""Which frozen encoder makes the frame features: CLIP through open_clip, features made elsewhere, or a stand-in.

encoder = make_encoder(EncoderOptions("ViT-L-14-quickgelu", "openai"), dataset, "cache", run)
encoder.encode(frames)        # uint8 [n, H, W, 3 or 1] of encoder.size -> float32 [n, encoder.width]
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.io import UserError, first_line, load_array, read_json, safe_filename, stamp

# torch and open_clip are imported inside functions: --help answers at once.

CLIP, PRETRAINED = "ViT-L-14-quickgelu", "openai"  # the paper's
STAND_IN, STAND_IN_STEPS = "none:autoencoder", 1500
FILES = "files:"  # and a folder of features made elsewhere
DEFAULT_CLIP = {"demo": STAND_IN}
PREPROCESS = ("clip", "paper")
CLIP_FRAMES = 16  # that a row of features made per clip stands for


@dataclass
class EncoderOptions:
    """The encoder and how it is used. clip, preprocess: None for what the checkpoint was trained on, else the
    paper's."""

    clip: str | None = None
    pretrained: str = PRETRAINED
    preprocess: str | None = None
    stand_in_steps: int = STAND_IN_STEPS
    batch_size: int = 64  # frames encoded at once
    seed: int = 0  # of the stand-in

    @classmethod
    def from_args(cls, args) -> "EncoderOptions":
        return cls(args.clip, args.pretrained, args.preprocess, args.stand_in_steps, args.encode_batch, args.seed)


def check_name(name: str) -> None:
    """Refuse an unknown encoder before any work (UserError)."""
    if name.startswith(FILES) or name == STAND_IN:
        return
    if name.startswith("none:"):
        raise UserError(f"--clip {name} is not known: the stand-in is called {STAND_IN}")
    import open_clip

    if name not in open_clip.list_models() and ":" not in name:
        raise UserError(
            f"--clip {name} is not a model of open_clip {open_clip.__version__}; its list: python -c "
            '"import open_clip; print(open_clip.list_models())"'
        )


def save_weights(name: str, pretrained: str, path) -> None:
    """Download a model and write its weights into one file for a machine without a network. Raises UserError."""
    import open_clip

    from common.features.clip import config_of
    from common.training import save_checkpoint

    check_name(name)
    name = config_of(name, pretrained)
    try:
        model = open_clip.create_model(name, pretrained=str(pretrained))
    except Exception as e:
        raise UserError(f"--save-weights: {name} with {pretrained!r} could not be loaded ({first_line(e)})") from None
    save_checkpoint(path, {"state_dict": model.state_dict(), "quick_gelu": name.endswith("-quickgelu")})
    print(f"wrote {path}; copy it, and give --clip {name} --pretrained {Path(path).name} there")


def make_encoder(
    options: EncoderOptions, data, cache, run, *, trained: dict | None = None, only_features=True, measuring=False
):
    """The encoder that the options name, or that a checkpoint was `trained` on (its describe()).

    data: the Dataset, on whose training videos a stand-in is trained. only_features: False where videos must be
    encoded, which files of features cannot; measuring: its speed, for which random weights will do. Raises UserError.
    """
    from common.features.clip import RANDOM, ClipEncoder

    trained = trained or {}
    name = options.clip or trained.get("encoder") or DEFAULT_CLIP.get(data.name, CLIP)
    preprocess = options.preprocess or trained.get("preprocess")
    preprocess = preprocess if preprocess in PREPROCESS else "clip"
    check_name(name)
    folder = data.cache_folder(cache)
    if name == STAND_IN:
        from scene_aware_ae.stand_in import StandIn

        seed, steps = trained.get("seed", options.seed), trained.get("steps", options.stand_in_steps)
        encoder = StandIn(folder, run, data.train or data.test, seed, steps)
    elif name.startswith(FILES):
        if not only_features or measuring:
            raise UserError(
                f"--clip {name} holds features, and no network that could encode a video: make the video's features in "
                "the same way, as a dataset of its own"
            )
        encoder = GivenFeatures(name.removeprefix(FILES))
    else:
        if options.pretrained == RANDOM and not measuring:
            raise UserError("--pretrained random is for tests/perf/bench.py: features of random weights say nothing")
        advice = (
            f"where there is a network, run: python scene_aware_ae/preprocess.py --clip {name} --pretrained "
            f"{options.pretrained} --save-weights {name}.pt — then copy the file here and give --pretrained {name}.pt; "
            f"or take --clip {STAND_IN}"
        )
        encoder = ClipEncoder(name, options.pretrained, preprocess, run, advice)
    if trained and trained["weights"] != encoder.hash:
        raise UserError(
            f"the checkpoint was trained on features of {trained['encoder']} with other weights "
            f"({trained['weights']}, here {encoder.hash}): give the same --clip and --pretrained"
            + (f", or the --cache that holds its stand-in (looked in {folder})" if name == STAND_IN else "")
        )
    if trained and trained["preprocess"] != encoder.describe()["preprocess"]:
        raise UserError(
            f"the checkpoint was trained on features with --preprocess {trained['preprocess']}, not {preprocess}"
        )
    return encoder


class GivenFeatures:
    """Features made elsewhere: <folder>/<split>/<video>.npy, one row per frame [frames, width], or one per clip of 16.

    Features of clips, [clips, width], [clips, crops, width] or [crops, clips, width], are given to all frames of the
    clip (their mean over crops). Raises UserError where the folder has none.
    """

    preprocess = "none"

    def __init__(self, folder):
        self.folder, self.name = Path(folder), f"{FILES}{folder}"
        files = sorted(p for split in ("train", "test") for p in self.folder.glob(f"{split}/*.npy"))
        if not files:
            raise UserError(f"--clip {self.name}: there are no features <split>/<video>.npy in {folder}")
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
