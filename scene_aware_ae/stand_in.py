"""A stand-in for CLIP where nothing can be downloaded: an autoencoder trained on the dataset's own training frames."""

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import training
from common.io import UserError
from common.readers.pictures import as_channels, resize
from common.readers.video import Decoder


class FrameAutoencoder(nn.Module):
    """Convolutional autoencoder of small frames, each side divisible by 16; its code keeps a grid, so it says where
    things are."""

    CHANNELS = 8

    def __init__(self):
        super().__init__()

        def down(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(4, b), nn.GELU())

        def up(a, b):
            return nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1), nn.GroupNorm(4, b), nn.GELU())

        self.encoder = nn.Sequential(
            down(3, 24), down(24, 48), down(48, 96), down(96, 128), nn.Conv2d(128, self.CHANNELS, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(self.CHANNELS, 128, 1),
            nn.GELU(),
            up(128, 96),
            up(96, 48),
            up(48, 24),
            nn.ConvTranspose2d(24, 3, 4, 2, 1),
        )

    def forward(self, x):
        code = self.encoder(x)
        return self.decoder(code), code


class StandIn:
    """Encoder with the interface of common.features.image.ImageEncoder; trained once and kept in `folder`.

    videos: those to train on. Pixels that differ from their video's median frame weigh more in its loss, so that the
    code tells what moves. Raises UserError where it was not trained and there are no videos.
    """

    name, size = "none:autoencoder", (96, 160)  # in caches and checkpoints; the flag says stand-in:autoencoder
    BATCH, LR = 16, 2e-3
    MAX_FRAMES, TOTAL_FRAMES = 400, 12000  # to train on: of one video, spread over all of it; of all videos together

    def __init__(self, folder, run, videos=(), seed: int = 0, steps: int = 1500):
        self.run, self.net = run, FrameAutoencoder()
        self.seed, self.steps = seed, steps
        path = Path(folder) / f"stand_in-{seed}-{steps}.pt"
        if path.exists():
            state = training.load_checkpoint(path, "scene_aware_ae")
            self.net.load_state_dict(state["encoder"])
            self.mean, self.std = state["mean"], state["std"]
        elif not videos:
            raise UserError("stand-in:autoencoder is trained on training videos, and there are none")
        else:
            print(
                "note: stand-in:autoencoder is no pretrained network: it is trained on this dataset's videos",
                flush=True,
            )
            self.train(videos)
            state = {"encoder": self.net.state_dict(), "mean": self.mean, "std": self.std}
            training.save_checkpoint(path, {"method": "scene_aware_ae", **state})
        self.net.eval().requires_grad_(False).to(run.device)
        self.hash = training.weights_hash(self.net)
        self.width = self.net.CHANNELS * (self.size[0] // 16) * (self.size[1] // 16)

    def sample_frames(self, video, most):
        """Up to `most` small frames of a video, spread over all; more where its length is not known beforehand."""
        step = -(-video.expected_frames() // most) or 1
        return np.stack([self.preprocess_frame(f) for f in itertools.islice(Decoder(video), 0, 20 * most * step, step)])

    def train(self, videos):
        rng = np.random.default_rng(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net = FrameAutoencoder()
        videos = videos[:: -(-len(videos) // (self.TOTAL_FRAMES // 8))]  # a median needs at least 8 frames of each
        most = min(self.MAX_FRAMES, self.TOTAL_FRAMES // len(videos))
        bar = tqdm(videos, desc="read training frames", unit="video", dynamic_ncols=True, mininterval=5)
        frames = []
        for v in bar:
            try:
                frames.append(self.sample_frames(v, most))
            except UserError:  # named when its features are made
                pass
        if not frames:
            raise UserError(f"no training video can be read, the first is {videos[0].path}: the stand-in needs some")
        medians = [np.median(x, axis=0).astype(np.float32) for x in frames]
        net = self.net.to(self.run.device).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=self.LR, fused=True)
        bar = tqdm(range(self.steps), desc="train the stand-in encoder", unit="step", dynamic_ncols=True, mininterval=2)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = self.LR * min(1.0, (self.steps - step) / (0.3 * self.steps))
            batch = [(v, rng.integers(0, len(frames[v]))) for v in rng.integers(0, len(frames), self.BATCH)]
            x = self.tensor(np.stack([frames[v][t] for v, t in batch]))
            difference = np.stack([np.abs(frames[v][t] - medians[v]).max(-1) for v, t in batch])
            moving = F.max_pool2d(torch.from_numpy(difference > 20).float()[:, None], 3, 1, 1).to(x.device)
            with self.run.autocast():
                out, code = net(x)
            loss = ((out.float() - x).pow(2) * (1 + 30 * moving)).mean() + 1e-4 * code.float().pow(2).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                value = float(loss.detach())
                if not np.isfinite(value):
                    raise UserError(
                        f"the loss of the stand-in encoder became {value} in step {step}: try --precision fp32"
                    )
                bar.set_postfix(loss=f"{value:.4f}")
        net.eval()
        with torch.inference_mode():
            codes = torch.cat([net.encoder(self.tensor(x[::10])).flatten(1).cpu() for x in frames])
        self.mean, self.std = codes.mean(0), codes.std(0).clamp(min=1e-3)

    def preprocess_frame(self, frame: np.ndarray) -> np.ndarray:
        return as_channels(resize(frame, self.size), 3)

    def tensor(self, frames):
        x = torch.from_numpy(np.ascontiguousarray(frames)).to(self.run.device)
        return (x.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [n, *size, 3] -> float32 [n, width] on the device, standardized by the training frames."""
        code = self.net.encoder(self.tensor(frames)).flatten(1).float()
        return (code - self.mean.to(code.device)) / self.std.to(code.device)

    def describe(self) -> dict:
        description = {"encoder": self.name, "weights": self.hash, "preprocess": "none", "width": self.width}
        return {**description, "seed": self.seed, "steps": self.steps}
