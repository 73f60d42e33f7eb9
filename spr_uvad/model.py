"""LBR-SPR's autoencoders, self-paced weights and losses. Imports torch only.

Yu et al., Deep Anomaly Discovery From Unlabeled Videos via Normality Advantage and Self-Paced Refinement, CVPR 2022,
https://arxiv.org/abs/2108.01975. Parameter names are the published ones.

    net, cubes = LBR(use_flow=True), torch.rand(8, 15, 32, 32)
    out = net(cubes)                                  # {"raw": [8, 15, 32, 32], "flow": [8, 10, 32, 32]}
    errors = cube_errors(out["raw"], cubes)           # [8]
    weights = self_paced_weights(errors, step=0)      # [8] in [0, 1]
"""

import torch
import torch.nn.functional as F
from torch import nn

MODES = ("mixture", "hard", "linear", "huber")


class DoubleConv(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_ch, out_ch, 3, padding=1),
            nn.BatchNorm2d(out_ch),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_ch, out_ch, 3, padding=1),
            nn.BatchNorm2d(out_ch),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.conv(x)

    def folded(self, x):
        """forward() of evaluation mode with batch norm multiplied into the convolutions; the module stays as it is."""
        for conv, norm in ((self.conv[0], self.conv[1]), (self.conv[3], self.conv[4])):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            bias = (conv.bias - norm.running_mean) * scale + norm.bias
            x = F.relu_(F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), bias, padding=1))
        return x


class InConv(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.conv = DoubleConv(in_ch, out_ch)

    def forward(self, x):
        return self.conv(x)

    def folded(self, x):
        return self.conv.folded(x)


class Down(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.mpconv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_ch, out_ch))

    def forward(self, x):
        return self.mpconv(x)

    def folded(self, x):
        return self.mpconv[1].folded(self.mpconv[0](x))


class Up(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_ch, in_ch, 3, stride=2, padding=1, output_padding=1)
        self.conv = DoubleConv(in_ch, out_ch)

    def forward(self, x):
        return self.conv(self.up(x))

    def folded(self, x):
        return self.conv.folded(self.up(x))


class OutConv(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x):
        return self.conv(x)

    def folded(self, x):
        return self.conv(x)


def autoencoder(in_ch, out_ch, root):
    """[N, in_ch, S, S] -> [N, out_ch, S, S] through a bottleneck of 8·root channels at an eighth of the size; no
    skips."""
    return nn.Sequential(
        InConv(in_ch, root),
        Down(root, 2 * root),
        Down(2 * root, 4 * root),
        Down(4 * root, 8 * root),
        Up(8 * root, 4 * root),
        Up(4 * root, 2 * root),
        Up(2 * root, root),
        OutConv(root, out_ch),
    )


def folded(net, x):
    """An autoencoder's output in evaluation mode, for a scoring pass between two training steps."""
    for layer in net:
        x = layer.folded(x)
    return x


class LBR(nn.Module):
    """Reconstructs the cube from itself, and with `use_flow` predicts its optical flow from the cube too (section
    3.2)."""

    def __init__(self, *, features_root=32, num_frames=5, use_flow=False):
        super().__init__()
        self.raw_ae = autoencoder(3 * num_frames, 3 * num_frames, features_root)
        if use_flow:
            self.of_ae = autoencoder(3 * num_frames, 2 * num_frames, features_root)
        self.use_flow = use_flow

    def forward(self, cubes):
        """[N, 3*frames, S, S] in [0, 1] -> {"raw": like cubes, "flow": [N, 2*frames, S, S] in pixels (with flow)}."""
        out = {"raw": self.raw_ae(cubes)}
        if self.use_flow:
            out["flow"] = self.of_ae(cubes)
        return out

    def folded(self, cubes, flow=True):
        """forward() of evaluation mode, with folded norms; `flow=False` leaves the flow part out."""
        out = {"raw": folded(self.raw_ae, cubes)}
        if self.use_flow and flow:
            out["flow"] = folded(self.of_ae, cubes)
        return out


def cube_errors(out, target):
    """Summed squared error of each cube. [N, C, S, S] twice -> [N]."""
    out = out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
    return (out - target).pow(2).flatten(1).sum(1)


def self_paced_weights(scores, step, *, mode="mixture", shrink=0.005, init_std_range=4.0):
    """Weights [N] in [0, 1] of cubes with errors `scores` [N] at refined step number `step` (section 3.3, eq. 5-9).

    Up to l1 = mean + deviation a cube counts as normal; l2 = mean + (init_std_range - step * shrink) deviations, never
    below l1, is where it is given up (huber: where its influence stops growing).
    """
    deviation = scores.std() if len(scores) > 1 else scores.new_zeros(())
    low = scores.mean() + deviation
    high = torch.maximum(scores.mean() + (init_std_range - step * shrink) * deviation, low)
    if mode == "huber":
        return torch.where(scores < high, torch.ones_like(scores), high / scores)
    inside = (scores < high).to(scores.dtype)
    if mode == "hard":
        return inside
    if mode == "linear":
        return inside * (1 - scores / high)
    if mode == "mixture":
        between = low * (high - scores) / (scores * (high - low))
        return torch.where(
            scores < low, torch.ones_like(scores), torch.where(scores < high, between, torch.zeros_like(scores))
        )
    raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}")


def weighted_loss(errors, weights, size):
    """Σ wᵢ·SEᵢ / (B·C·H·W); errors [B] of cubes of `size` = C·H·W values, weights [B] or 1."""
    return (errors * weights).sum() / (len(errors) * size)
