"""Frozen encoders of clips: image networks, video networks, SVMAE's, the stand-in, and several of them side by side.

encoder = make_encoder([EncoderSpec("timm", "tf_efficientnet_lite0")], 10, run)
frames = (encoder.preprocess_frame(f) for f in Decoder(video))
features = np.concatenate(list(encoder.encode_video(video, frames, "cache")))      # float16 [clips, crops, width]
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import cv2
import numpy as np
import torch

from common.features.encoders import RANDOM, EncoderSpec, check_model, image_networks
from common.io import UserError
from common.readers.pictures import resize
from common.training import weights_hash
from frd_uvad.features.data import CLIP_FRAMES
from frd_uvad.stand_in import Statistics
from frd_uvad.svmae.encoder import Encoder as SVMAEClips
from frd_uvad.svmae.encoder import load_pretrained
from frd_uvad.svmae.options import EncoderOptions as SVMAEOptions

SIDE, RESIZED = 224, 256  # of video networks' input, and of the shorter side that it is cut from
BORDER = 8 / 7  # how much larger a frame is than each of 10 crops of it
AT_ONCE = 64  # images that a network sees at once


def crop_places(height: int, width: int, size: tuple[int, int], crops: int) -> list[tuple[int, int]]:
    """Top left corners of crops of `size`: the centre, and of 10 crops the corners. The other five are mirrored."""
    bottom, right = height - size[0], width - size[1]
    places = [(bottom // 2, right // 2)]
    return places + [(0, 0), (0, right), (bottom, 0), (bottom, right)] if crops == 10 else places


class ImageClips:
    """Mean and standard deviation of an image network's features over the frames of a clip: width 2 · the network's.

    image: an image.ImageEncoder; crops: 1, or 10: the centre and the corners at 7/8, and their mirror images.
    """

    clips_at_once = 1  # one has frames enough for a batch

    def __init__(self, image, crops: int):
        self.image, self.crops = image, crops
        self.width = 2 * image.width

    def preprocess_frame(self, frame: np.ndarray) -> np.ndarray:
        """For the decoding thread: uint8 [H, W, C], the crop itself, or the frame that 10 crops are cut from."""
        if self.crops == 1:
            return self.image.preprocess_frame(frame)
        return resize(frame, self.image.view_size(*frame.shape[:2], BORDER)[0])

    def views(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, C] of preprocess_frame() -> their crops [n, crops, S, S, C]."""
        if self.crops == 1:
            return frames[:, None]
        height, width = frames.shape[1:3]
        squeezed = self.image.preprocess != "clip"
        h, w = (round(height / BORDER), round(width / BORDER)) if squeezed else self.image.size
        places = crop_places(height, width, (h, w), self.crops)
        views = [frames[:, top : top + h, left : left + w] for top, left in places]
        return np.stack(views + [view[:, :, ::-1] for view in views], axis=1)

    def encode(self, clips, *_) -> np.ndarray:
        """Clips uint8 [T, H, W, C] of preprocess_frame() -> float32 [n, crops, width]. All crops of a frame are encoded
        together."""
        return np.stack([self.encode_clip(clip) for clip in clips])

    def encode_clip(self, clip: np.ndarray) -> np.ndarray:
        step, parts = max(1, AT_ONCE // self.crops), []
        for views in (self.views(clip[i : i + step]) for i in range(0, len(clip), step)):
            parts.append(self.image.encode(views.reshape(-1, *views.shape[2:])).view(len(views), self.crops, -1))
        x = torch.cat(parts)
        return torch.cat([x.mean(0), x.std(0, correction=0)], dim=1).cpu().numpy()

    def describe(self) -> dict:
        return {**self.image.describe(), "width": self.width, "crops": self.crops, "pool": "mean, deviation"}


class VideoClips:
    """A torchvision video network without its classifier. crops: views of each clip, 1 or 10. Raises UserError."""

    def __init__(self, spec: EncoderSpec, crops: int, run):
        net, self.input, self.name = image_networks(spec).load_torchvision(spec, "")
        net = net.eval().requires_grad_(False)
        self.hash, self.run = weights_hash(net), run
        self.net, self.crops = net.to(run.device), crops
        self.clips_at_once = max(1, 8 // crops)
        for p in self.net.parameters():
            if p.ndim == 5:
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        mean_std = (self.input.mean, self.input.std)
        self.mean, self.std = (torch.tensor(x, device=run.device).view(3, 1, 1, 1) for x in mean_std)
        self.width = self.encode([np.zeros((CLIP_FRAMES, RESIZED, RESIZED, 3), np.uint8)]).shape[2]

    def preprocess_frame(self, frame: np.ndarray) -> np.ndarray:
        """For the decoding thread: uint8 [H, W, C] with a shorter side of RESIZED pixels."""
        h, w = frame.shape[:2]
        scale = RESIZED / min(h, w)
        size = max(SIDE, round(w * scale)), max(SIDE, round(h * scale))
        return cv2.resize(frame, size).reshape(size[1], size[0], -1)

    def views(self, clip: np.ndarray) -> torch.Tensor:
        """uint8 [T, H, W, C] of preprocess_frame(), BGR or grey -> [crops, 3, T, 224, 224] RGB: the centre; or corners
        and centre, and their mirror images."""
        x = self.run.to_device(np.ascontiguousarray(clip)).permute(3, 0, 1, 2)
        x = (x.flip(0) if x.shape[0] == 3 else x.expand(3, -1, -1, -1)).float() / 255
        x = (x - self.mean) / self.std
        places = crop_places(*x.shape[2:], (SIDE, SIDE), self.crops)
        views = [x[:, :, top : top + SIDE, left : left + SIDE] for top, left in places]
        return torch.stack(views + [v.flip(3) for v in views] if self.crops == 10 else views)

    @torch.inference_mode()
    def encode(self, clips, *_) -> np.ndarray:
        """Clips uint8 [T, H, W, C] of preprocess_frame() -> float32 [n, crops, width]."""
        with self.run.autocast():
            x = self.net(torch.cat([self.views(c) for c in clips]).contiguous(memory_format=torch.channels_last_3d))
        return x.float().flatten(1).view(len(clips), self.crops, -1).cpu().numpy()

    def describe(self) -> dict:
        sizes = {"size": [SIDE, SIDE], "mean": list(self.input.mean), "std": list(self.input.std)}
        shape = {"width": self.width, "crops": self.crops}
        return {"encoder": self.name, "weights": self.hash, **shape, **sizes, "resize": f"shorter side {RESIZED}"}


class ClipEncoder:
    """Encoders of clips side by side: their features of a clip, concatenated. flag: the text that names them."""

    def __init__(self, parts: list, flag: str):
        self.parts, self.flag = parts, flag
        self.crops, self.width = parts[0].crops, sum(part.width for part in parts)

    def preprocess_frame(self, frame: np.ndarray) -> tuple[np.ndarray, ...]:
        """What each encoder wants of a frame, decoded once, for the decoding thread."""
        return tuple(part.preprocess_frame(frame) for part in self.parts)

    def encode_video(
        self, video, frames: Iterable[tuple], folder, clips_at_once: int | None = None, tick: Callable = lambda n: None
    ) -> Iterator[np.ndarray]:
        """Yield features of the clips of one video, float16 [n, crops, width]; a shorter last clip repeats its last
        frame.

        frames: of preprocess_frame(); folder: for what an encoder keeps of a video; tick(n) is called for every n
        frames.
        """
        at_once = clips_at_once or min(part.clips_at_once for part in self.parts)
        frames, first = iter(frames), 0
        clips, middles = [], []
        while clip := list(itertools.islice(frames, CLIP_FRAMES)):
            length = len(clip)
            clip += [clip[-1]] * (CLIP_FRAMES - length)
            clips.append([np.stack(part) for part in zip(*clip)])
            middles.append(first + min(CLIP_FRAMES // 2, length - 1))
            first += length
            if len(clips) == at_once:
                yield self.encode(clips, middles, video, folder)
                clips, middles = [], []
            tick(length)
        if clips:
            yield self.encode(clips, middles, video, folder)

    def encode(self, clips: list[list[np.ndarray]], middles: list[int], video, folder) -> np.ndarray:
        """clips: of each, what each encoder wants of it; middles: the numbers of their middle frames."""
        features = [part.encode(list(x), middles, video, folder) for part, x in zip(self.parts, zip(*clips))]
        return np.concatenate(features, axis=2).astype(np.float16)

    def describe(self) -> dict:
        """What the features depend on; of several encoders, {"parts": what each says} too."""
        parts = [part.describe() for part in self.parts]
        if len(parts) == 1:
            return parts[0]
        joined = {key: "+".join(part[key] for part in parts) for key in ("encoder", "weights")}
        return {**joined, "width": self.width, "crops": self.crops, "parts": parts}


def make_encoder(
    specs: list[EncoderSpec],
    crops: int,
    run,
    *,
    preprocess: str | None = None,
    svmae: SVMAEOptions | None = None,
) -> ClipEncoder:
    """The encoders `specs`, side by side. crops: 1 or 10; preprocess: see ImageEncoder; svmae: how its encoder is used.

    Raises UserError, before anything is loaded where a name or file is wrong.
    """
    for spec in specs:
        check_model(spec)
    parts = []
    for spec in specs:
        if spec.kind == "svmae":
            options = replace(svmae or SVMAEOptions(), crops=crops)
            parts.append(SVMAEClips(*load_pretrained(spec.model, options, run), options, run))
        elif spec.kind == "stand-in":
            parts.append(Statistics(crops))
        elif spec.weights == RANDOM:
            raise UserError(f"--encoder {spec}: features of random weights say nothing")
        elif spec.is_video:
            parts.append(VideoClips(spec, crops, run))
        else:
            parts.append(ImageClips(image_networks(spec).ImageEncoder(spec, run, preprocess), crops))
    return ClipEncoder(parts, "+".join(map(str, specs)))
