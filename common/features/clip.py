"""Frozen image encoders of CLIP through open_clip: uint8 frames in, embeddings out.

encoder = ClipEncoder("ViT-B-16-quickgelu", "openai", "clip", run)
encoder.encode(np.stack([encoder.preprocess_frame(f) for f in frames]))      # float32 [n, encoder.width]
"""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

from common.io import UserError, first_line
from common.pictures import resize
from common.training import weights_hash

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RANDOM = "random"  # weights for tests/perf/bench.py: speed does not depend on them


def uses_quick_gelu(path):
    """Whether a file's weights were trained with QuickGELU, which their values do not show; None where the file does not say.

    OpenAI's files are TorchScript archives, and all of them use it; --save-weights writes it down.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return True
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("quick_gelu")
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        AttributeError,
    ):  # open_clip will say what is wrong with it
        return None


def config_of(name, pretrained):
    """The open_clip model that the weights were trained as: `name`, or `name`-quickgelu, which differs in the activation alone."""
    import open_clip

    generic = name.removesuffix("-quickgelu")
    if f"{generic}-quickgelu" not in open_clip.list_models():
        return name
    path = Path(str(pretrained))
    if path.is_file():
        quick = uses_quick_gelu(path)
        if quick is None and name == generic:
            print(
                f"note: {path} does not say which activation it was trained with, and --clip {name} takes GELU; OpenAI's, MetaCLIP's and "
                f"DFN's weights need --clip {name}-quickgelu",
                flush=True,
            )
    else:
        quick = open_clip.get_pretrained_cfg(generic, str(pretrained)).get("quick_gelu")
    if quick is None:
        return name
    return f"{generic}-quickgelu" if quick else generic


class ClipEncoder:
    """The image half of an open_clip model. preprocess clip: its own (short side to the input size, centre, RGB, its mean and
    deviation); paper: the whole frame squeezed to a square, BGR, in [-1, 1], as the authors feed it."""

    def __init__(self, name, pretrained, preprocess, r, instead=""):
        import open_clip

        name = name if pretrained == RANDOM else config_of(name, pretrained)
        self.name, self.preprocess, self.run = name, preprocess, r
        self.dtype = (
            torch.float16 if r.device.type == "cuda" else torch.bfloat16 if r.precision == "bf16" else torch.float32
        )
        try:
            model = open_clip.create_model(name, pretrained=None if pretrained == RANDOM else str(pretrained))
        except Exception as e:  # open_clip and the hub raise many kinds
            if Path(str(pretrained)).exists():
                raise UserError(f"--pretrained {pretrained} does not fit --clip {name} ({first_line(e)})") from None
            raise UserError(
                f"the weights {pretrained!r} of {name} are not on this machine and could not be downloaded ({type(e).__name__}). "
                f"Where there is a network, run: python scene_aware_ae/preprocess.py --clip {name} --pretrained {pretrained} "
                f"--save-weights {name}.pt — then copy the file here and give --pretrained {name}.pt{instead}"
            ) from None
        visual = model.visual  # the text half is let go
        self.hash = weights_hash(visual)
        size = visual.image_size
        self.size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        mean, std = (getattr(visual, k, None) or v for k, v in (("image_mean", MEAN), ("image_std", STD)))
        if preprocess == "paper":
            mean = std = (0.5, 0.5, 0.5)
        self.mean, self.std = (torch.tensor(x, device=r.device).view(1, 3, 1, 1) * 255 for x in (mean, std))
        # cast once: under autocast PyTorch's attention copies its weights for every position
        self.visual = visual.eval().requires_grad_(False).to(r.device, self.dtype, memory_format=torch.channels_last)
        with torch.inference_mode():
            self.width = int(self.encode(np.zeros((1, *self.size, 3), np.uint8)).shape[1])

    def preprocess_frame(self, frame):
        """A frame of any size to the encoder's input, in the reading process. uint8 [H, W, C] -> [S, S, C]"""
        h, w = frame.shape[:2]
        th, tw = self.size
        if self.preprocess == "paper":
            return resize(frame, (th, tw))
        scale = max(th / h, tw / w)
        frame = resize(frame, (max(th, round(h * scale)), max(tw, round(w * scale))))
        top, left = (frame.shape[0] - th) // 2, (frame.shape[1] - tw) // 2
        return frame[top : top + th, left : left + tw]

    def encode(self, frames):
        x = torch.from_numpy(np.ascontiguousarray(frames))
        if self.run.device.type == "cuda":
            x = x.pin_memory().to(self.run.device, non_blocking=True)
        x = x.permute(0, 3, 1, 2)
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if self.preprocess == "clip":
            x = x.flip(1)  # cached frames are BGR
        x = (
            x.to(torch.float32, copy=True)
            .sub_(self.mean)
            .div_(self.std)
            .to(self.dtype, memory_format=torch.channels_last)
        )
        with torch.inference_mode():
            return self.visual(x).float()

    def describe(self):
        return {"encoder": self.name, "weights": self.hash, "preprocess": self.preprocess, "width": self.width}
