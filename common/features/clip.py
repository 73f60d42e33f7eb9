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
from common.readers.pictures import resize
from common.training import weights_hash

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, of RGB in [0, 1]
RANDOM = "random"  # weights for tests/perf/bench.py: speed does not depend on them
DOWNLOAD = "save the model's state_dict where there is a network, copy the file here and give it as --pretrained FILE"


def uses_quick_gelu(path) -> bool | None:
    """Whether the weights in a file were trained with QuickGELU, which their values do not show; None if unknown.

    OpenAI's files are TorchScript archives, all with QuickGELU; files of this toolkit hold an entry `quick_gelu`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return True
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("quick_gelu")
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, AttributeError):
        return None  # open_clip will say what is wrong with it


def config_of(name: str, pretrained) -> str:
    """`name`, with or without "-quickgelu" as the weights `pretrained`, an open_clip tag or a file, were trained."""
    import open_clip

    plain = name.removesuffix("-quickgelu")
    quick = f"{plain}-quickgelu"
    if quick not in open_clip.list_models():
        return name
    if Path(str(pretrained)).is_file():
        trained_quick = uses_quick_gelu(pretrained)
        if trained_quick is None and name == plain:
            advice = f"OpenAI's, MetaCLIP's and DFN's weights need --clip {quick}"
            print(
                f"note: the activation of {pretrained} is unknown, and --clip {name} takes GELU; {advice}", flush=True
            )
    else:
        trained_quick = open_clip.get_pretrained_cfg(plain, str(pretrained)).get("quick_gelu")
    if trained_quick is None:
        return name
    return quick if trained_quick else plain


class ClipEncoder:
    """The image half of an open_clip model, in fp16 on a GPU, on a CPU in bf16 or fp32 as `run` says.

    preprocess "clip": as the model was trained (shorter side to the input size, centre, RGB, the model's mean and std);
    "paper": the whole frame resized to a square, BGR, in [-1, 1].
    advice: how to get weights that cannot be downloaded, for the error. Raises UserError.
    """

    def __init__(self, name: str, pretrained, preprocess: str, run, advice: str = DOWNLOAD):
        import open_clip

        name = name if pretrained == RANDOM else config_of(name, pretrained)
        try:
            model = open_clip.create_model(name, pretrained=None if pretrained == RANDOM else str(pretrained))
        except Exception as e:  # open_clip and the hub raise many kinds
            if Path(str(pretrained)).exists():
                raise UserError(f"--pretrained {pretrained} does not fit --clip {name} ({first_line(e)})") from None
            missing = f"not on this machine and could not be downloaded ({type(e).__name__})"
            raise UserError(f"the weights {pretrained!r} of {name} are {missing}: {advice}") from None
        visual = model.visual.eval().requires_grad_(False)  # the text half is not needed
        self.name, self.preprocess = name, preprocess
        self.run, self.hash = run, weights_hash(visual)
        size = visual.image_size
        self.size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        mean, std = getattr(visual, "image_mean", None) or MEAN, getattr(visual, "image_std", None) or STD
        if preprocess == "paper":
            mean = std = (0.5, 0.5, 0.5)
        self.mean, self.std = (torch.tensor(x, device=run.device).view(1, 3, 1, 1) * 255 for x in (mean, std))
        cpu_type = torch.bfloat16 if run.precision == "bf16" else torch.float32
        self.dtype = torch.float16 if run.device.type == "cuda" else cpu_type
        # cast once: under autocast, PyTorch's attention copies its weights for every position
        self.visual = visual.to(run.device, self.dtype, memory_format=torch.channels_last)
        self.width = self.encode(np.zeros((1, *self.size, 3), np.uint8)).shape[1]

    def preprocess_frame(self, frame: np.ndarray) -> np.ndarray:
        """A frame of any size at the size of the input, for the decoding thread. uint8 [H, W, C] -> [S, S, C]"""
        if self.preprocess == "paper":
            return resize(frame, self.size)
        height, width = self.size
        scale = max(height / frame.shape[0], width / frame.shape[1])
        frame = resize(frame, tuple(max(n, round(m * scale)) for n, m in zip(self.size, frame.shape)))
        top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
        return frame[top : top + height, left : left + width]

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [n, S, S, 1 or 3] BGR -> embeddings float32 [n, width] on the device."""
        x = torch.from_numpy(np.ascontiguousarray(frames))
        if self.run.device.type == "cuda":
            x = x.pin_memory().to(self.run.device, non_blocking=True)
        x = x.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        if self.preprocess == "clip":
            x = x.flip(1)  # BGR -> RGB
        x = x.to(torch.float32, copy=True).sub_(self.mean).div_(self.std)
        return self.visual(x.to(self.dtype, memory_format=torch.channels_last)).float()

    def describe(self) -> dict:
        return {"encoder": self.name, "weights": self.hash, "preprocess": self.preprocess, "width": self.width}
