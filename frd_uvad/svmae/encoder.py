"""Clips -> features by the frozen encoder of SVMAE, with token fusion."""

import itertools
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common import training
from common.distributed import seed_everything
from common.features.encoders import RANDOM
from common.io import UserError
from common.readers.pictures import resize
from common.readers.video import Decoder
from frd_uvad.features.data import CLIP_FRAMES
from frd_uvad.svmae import model
from frd_uvad.svmae.clips import WHOLE_FRAME, Depth, crop_clips

PRETRAINED = "svmae"  # of checkpoints that pretrain.py writes
CROP = 7 / 8  # side of a view, of which 10 are taken, in a frame
CORNERS = [(0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1)]  # centre and corners, in -1..1 of the border around a crop


def load_pretrained(checkpoint, options, run) -> tuple[model.SVMAE, str]:
    """-> (SVMAE whose encoder is used, what identifies the encoder).

    checkpoint: of pretrain.py, VideoMAE's weights, or "random"; options: options.EncoderOptions, whose preset, size
    and frames are those of an encoder that is not pretrain.py's. Raises UserError.
    """
    if str(checkpoint) == RANDOM:
        seed_everything(options.seed)
        return build_model(options), f"{RANDOM} {options.seed}"
    state = training.load_checkpoint(checkpoint, PRETRAINED)
    if "method" in state:
        net = training.load_weights(
            lambda: model.SVMAE(**state["model_args"]), state.get("model_state_dict"), checkpoint
        )
        if not state.get("done"):
            run.print(f"note: the pre-training of {checkpoint} has not finished")
        return net, training.weights_hash(net.encoder)
    net = build_model(options)
    _, missing = model.load_encoder(net.encoder, bare_weights(state))
    if missing:
        entries = len(net.encoder.state_dict())
        raise UserError(
            f"checkpoint {checkpoint} does not fill the encoder {options.preset} (of {entries} entries {len(missing)} "
            f"are missing, such as {missing[0]}): choose its --preset"
        )
    return net, training.weights_hash(net.encoder)


def build_model(options) -> model.SVMAE:
    try:
        return model.SVMAE(**model.PRESETS[options.preset], frames=options.frames, size=options.size)
    except ValueError as e:
        raise UserError(f"--frames and --size do not fit the encoder: {e}") from None


def bare_weights(state: dict) -> dict:
    """The weights of a checkpoint: ours, or VideoMAE's, which are under `model` or `module`."""
    return state.get("model_state_dict") or state.get("model") or state.get("module") or state


class Encoder:
    """The encoder of `net`, ready for inference, with the interface of frd_uvad.encoders.ImageClips.

    digest: what identifies it; options: options.EncoderOptions.
    """

    clips_at_once = 8

    def __init__(self, net: model.SVMAE, digest: str, options, run):
        self.net, self.options = net.eval().requires_grad_(False).to(run.device), options
        self.digest, self.run = digest, run
        self.frames, self.size = net.grid[0] * model.TUBELET, net.grid[1] * model.PATCH
        self.views, self.crops = WHOLE_FRAME, options.crops
        if options.crops == 10:
            views = [(x * (1 - CROP), y * (1 - CROP), CROP, CROP) for x, y in CORNERS]
            self.views = np.array(views + [(x, y, -w, h) for x, y, w, h in views], np.float32)
        self.width = net.encoder.norm.weight.shape[0]
        self.depth_of = None, None  # the last video, and its depth

    def preprocess_frame(self, frame: np.ndarray) -> np.ndarray:
        """A frame with 8/7 of the encoder's input along its shorter side, for the decoding thread. uint8 [H, W, C]"""
        scale = self.size * 8 / 7 / min(frame.shape[:2])
        return resize(frame, tuple(round(side * scale) for side in frame.shape[:2]))

    def encode(self, clips: list[np.ndarray], middles: list[int], video, folder) -> np.ndarray:
        """Clips uint8 [CLIP_FRAMES, H, W, C] of a video, and the numbers of their middle frames -> features float32
        [n, crops, width]. folder: for the maps of MiDaS."""
        if self.depth_of[0] is not video:
            self.depth_of = video, self.depth(video, clips[0].shape[1:3], folder)
        nearness = [self.depth_of[1].map(0, middle) for middle in middles]
        return self.encode_clips(np.stack(clips), np.stack(nearness)).cpu().numpy()

    def describe(self) -> dict:
        return {"encoder": "svmae", "weights": self.digest, **asdict(self.options), "width": self.width}

    def depth(self, video, size: tuple, folder) -> Depth:
        """Nearness of one video's frames at `size` (height, width)."""
        source, frames = self.options.depth, np.zeros((1, *size, 1), np.uint8)
        if source == "midas":
            for middle in itertools.islice(Decoder(video), video.expected_frames() // 2 + 1):
                frames = middle[None]  # a header may promise more frames than there are: then the last one
            frames = resize(frames[0], size)[None]
        elif source != "perspective":  # a folder: its maps belong to this number of frames
            frames = np.broadcast_to(frames, (video.expected_frames(), *size, 1))
        return Depth(source, [video], [frames], Path(folder), self.run.device)

    @torch.inference_mode()
    def encode_clips(self, clips: np.ndarray, near: np.ndarray) -> torch.Tensor:
        """Clips uint8 [n, CLIP_FRAMES, H, W, C] and nearness uint8 [n, H, W] -> features float32 [n, crops, width] on
        the device."""
        n, numbers = len(clips), np.arange(self.frames) * CLIP_FRAMES // self.frames
        frames, nearness = self.run.to_device(clips[:, numbers]), self.run.to_device(near)
        crops = self.run.to_device(self.views)[:, None].expand(-1, n, -1)
        views = [crop_clips(frames, nearness, crop, self.size) for crop in crops]
        return torch.stack([self.encode_view(*view) for view in views], dim=1)

    def encode_view(self, clips: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """Clips float32 [n, 3, T, S, S] and their nearness [n, S, S], cropped -> features float32 [n, width]."""
        tokens, grid = model.tokenize(clips), self.net.grid
        with self.run.autocast():
            features = self.net.encoder(tokens)
        features = features.float()
        if self.options.pool == "mean":
            return features.mean(1)
        difference, nearness = model.cube_difference(tokens, grid), model.pool(near, grid)
        return model.fuse_tokens(features, difference, nearness, self.options.motion_ratio, self.options.alpha)
