"""Frozen frame encoders: CLIP through open_clip, features made elsewhere, or a compact stand-in that needs no download.

encoder = ClipEncoder("ViT-L-14-quickgelu", "openai", "clip", run)
encoder.encode(frames)        # uint8 [n, H, W, 3 or 1] of encoder.size -> float32 [n, encoder.width]
"""

import hashlib
import itertools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import old_training as training
from common.io import UserError, first_line, load_array, read_json, safe_filename, stamp
from common.late import Late, torch
from common.pictures import as_channels, resize
from common.video import Decoder

frame_autoencoder = Late("scene_aware_ae.frame_autoencoder")

CLIP_FRAMES = 16  # that a row of features made per clip stands for
STAND_IN = "none:autoencoder"
PREPROCESS = ("clip", "paper")


FILES = "files:"  # and a folder of features made elsewhere


def check(name, preprocess):
    """Refuse an unknown name before any work."""
    if name.startswith(FILES):
        return
    if name.startswith("none:"):
        if name != STAND_IN:
            raise UserError(f"--clip {name} is not known: the stand-in is called {STAND_IN}")
        return
    if preprocess not in PREPROCESS:
        raise UserError(f"--preprocess {preprocess} is not known; choose one of {', '.join(PREPROCESS)}")
    import open_clip

    if name not in open_clip.list_models() and ":" not in name:
        raise UserError(
            f'--clip {name} is not a model of open_clip {open_clip.__version__}; its list: python -c "import '
            'open_clip; print(open_clip.list_models())"'
        )


def save_weights(name, pretrained, path):
    """Download a model and write its weights into one file for a machine without a network."""
    import open_clip

    from common.features.clip import config_of

    name = config_of(name, pretrained)
    try:
        model = open_clip.create_model(name, pretrained=str(pretrained))
    except Exception as e:
        raise UserError(f"--save-weights: {name} with {pretrained!r} could not be loaded ({first_line(e)})") from None
    training.save_checkpoint(path, {"state_dict": model.state_dict(), "quick_gelu": name.endswith("-quickgelu")})
    print(f"wrote {path}; copy it, and give --clip {name} --pretrained {Path(path).name} there")


class GivenFeatures:
    """Features made elsewhere: <folder>/<split>/<video>.npy, one row per frame [frames, width], or one per clip of 16 frames, [clips,
    width], [clips, crops, width] or [crops, clips, width], which all of its frames take (their mean over crops)."""

    preprocess = "none"

    def __init__(self, folder):
        self.folder, self.name = Path(folder), f"{FILES}{folder}"
        files = sorted(
            p for split in ("train", "test") for p in self.folder.glob(f"{split}/*.npy")
        )  # and no labels/*.npy
        if not files:
            raise UserError(f"--clip {self.name}: there are no features <split>/<video>.npy in {folder}")
        self.width = int(load_array(files[0], "features", mmap=True).shape[-1])
        settings = self.folder / "settings.json"
        said = settings.read_text() if settings.exists() else str(self.width)
        self.hash = hashlib.sha256(said.encode()).hexdigest()[:16]
        self.stamp = stamp(self.folder, [str(f.relative_to(self.folder)) for f in files])

    def of(self, video):
        """float16 [frames, width]"""
        path = self.folder / video.split / f"{video.name}.npy"
        if not path.exists():
            path = path.with_name(f"{safe_filename(video.name)}.npy")  # as this toolkit calls them
        side = path.with_suffix(".json")
        frames = read_json(side, "the features' entry")["frames"] if side.exists() else video.expected_frames()
        x = load_array(path, "features")
        if x.ndim not in (2, 3) or x.shape[-1] != self.width or not np.isfinite(x).all():
            raise UserError(
                f"features {path}: expected finite numbers of width {self.width}, [frames or clips, width], got shape "
                f"{x.shape}"
            )
        clips = -(-frames // CLIP_FRAMES)
        if x.ndim == 3:
            fits = [n in (frames, clips) for n in x.shape[:2]]
            if all(fits) and x.shape[1] > 1 and not side.exists():
                raise UserError(
                    f"features {path}: {x.shape} may be [clips, crops, width] or [crops, clips, width]: save their "
                    "mean over crops"
                )
            x = x.mean(0 if fits == [False, True] else 1)
        if len(x) == frames:
            return x.astype(np.float16)
        if len(x) != clips:
            raise UserError(
                f"features {path}: {len(x)} rows for a video of {frames} frames; expected one per frame or per {CLIP_FRAMES} frames"
            )
        return np.repeat(x, CLIP_FRAMES, axis=0)[:frames].astype(np.float16)

    def describe(self):
        return {"encoder": self.name, "weights": self.hash, "preprocess": self.preprocess, "width": self.width}


# ----------------------------------------------------------------------------------------------------------- stand-in


class StandIn:
    """An autoencoder trained on the dataset's own training frames: a stand-in for CLIP where nothing can be downloaded.

    Pixels that differ from their video's median frame weigh more, so that the code speaks of what moves.
    """

    name, size = STAND_IN, (96, 160)
    STEPS, BATCH, LR = 1500, 16, 2e-3
    MOST, TOTAL = 400, 12000  # frames of a video that it is trained on, spread over all; of all videos together

    def __init__(self, folder, r, videos=(), seed=0, steps=STEPS):
        self.run, self.net, self.seed, self.steps = r, frame_autoencoder.FrameAutoencoder(), seed, steps
        path = Path(folder) / f"stand_in-{seed}-{steps}.pt"
        if path.exists():
            state = training.load_checkpoint(path, "scene_aware_ae")
            self.net.load_state_dict(state["encoder"])
            self.mean, self.std = state["mean"], state["std"]
        else:
            if not videos:
                raise UserError(f"--clip {STAND_IN} is trained on training videos, and there are none")
            print(
                f"note: {self.name} is a stand-in for CLIP that knows nothing but this dataset's training videos",
                flush=True,
            )
            self.train(videos)
            training.save_checkpoint(
                path, {"method": "scene_aware_ae", "encoder": self.net.state_dict(), "mean": self.mean, "std": self.std}
            )
        self.net.eval().requires_grad_(False).to(r.device)
        self.hash = training.weights_hash(self.net)
        self.width = self.net.CHANNELS * (self.size[0] // 16) * (self.size[1] // 16)

    def sample(self, video, most):
        """Up to `most` small frames of a video, spread over all; more where its length is not known beforehand."""
        step = -(-video.expected_frames() // most) or 1
        return np.stack([self.preprocess_frame(f) for f in itertools.islice(Decoder(video), 0, 20 * most * step, step)])

    def train(self, videos):
        rng = np.random.default_rng(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net = frame_autoencoder.FrameAutoencoder()
        videos = videos[:: -(-len(videos) // (self.TOTAL // 8))]  # medians want a few frames of each
        most = min(self.MOST, self.TOTAL // len(videos))
        small = [
            self.sample(v, most)
            for v in tqdm(videos, desc="read training frames", unit="video", dynamic_ncols=True, mininterval=5)
        ]
        middle = [np.median(a, axis=0).astype(np.float32) for a in small]
        net = self.net.to(self.run.device).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=self.LR, fused=True)
        bar = tqdm(range(self.steps), desc="train the stand-in encoder", unit="step", dynamic_ncols=True, mininterval=2)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = self.LR * min(1.0, (self.steps - step) / (0.3 * self.steps))
            picked = [(v, rng.integers(0, len(small[v]))) for v in rng.integers(0, len(small), self.BATCH)]
            frames = np.stack([small[v][t] for v, t in picked])
            weight = np.stack([np.abs(small[v][t] - middle[v]).max(-1) for v, t in picked])
            x = self.tensor(frames)
            w = 1 + 30 * torch.nn.functional.max_pool2d(torch.from_numpy(weight > 20).float()[:, None], 3, 1, 1).to(
                x.device
            )
            with self.run.autocast():
                out, code = net(x)
            loss = ((out.float() - x).pow(2) * w).mean() + 1e-4 * code.float().pow(2).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                training.check_finite(float(loss.detach()), f"in step {step} of the stand-in encoder")
                bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
        net.eval()
        with torch.inference_mode():
            codes = torch.cat([net.encoder(self.tensor(a[::10])).flatten(1).cpu() for a in small])
        self.mean, self.std = codes.mean(0), codes.std(0).clamp(min=1e-3)

    def preprocess_frame(self, frame):
        return as_channels(resize(frame, self.size), 3)

    def tensor(self, frames):
        x = torch.from_numpy(np.ascontiguousarray(frames)).to(self.run.device)
        return (x.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def encode(self, frames):
        with torch.inference_mode():
            code = self.net.encoder(self.tensor(frames)).flatten(1).float()
            return (code - self.mean.to(code.device)) / self.std.to(code.device)

    def describe(self):
        return {
            "encoder": self.name,
            "weights": self.hash,
            "preprocess": "none",
            "width": self.width,
            "seed": self.seed,
            "steps": self.steps,
        }
