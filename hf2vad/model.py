"""HF2-VAD's networks and losses. Imports torch only.

Liu et al., A Hybrid Video Anomaly Detection Framework via Memory-Augmented Flow Reconstruction and Flow-Guided Frame
Prediction, ICCV 2021, https://arxiv.org/abs/2108.06852. Parameter names are the published ones, so checkpoints can be
exchanged with the authors' code.

    net = HF2VAD().eval()
    frames, flows = torch.rand(2, 15, 32, 32), torch.randn(2, 8, 32, 32)   # BGR in [0, 1], flow in pixels
    flow_score, frame_score = cube_scores(net(frames, flows), frames, flows)   # [2], [2]
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def full(x):
    """Half precision to float32, where a small difference or a long sum matters; anything wider stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ---------------------------------------------------------------- ML-MemAE-SC: flow reconstruction (paper section 3.1)


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


class InConv(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.conv = DoubleConv(in_ch, out_ch)

    def forward(self, x):
        return self.conv(x)


class OutConv(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x):
        return self.conv(x)


class Down(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.mpconv = nn.Sequential(nn.Conv2d(in_ch, in_ch * 2, 3, stride=2, padding=1), DoubleConv(in_ch * 2, out_ch))

    def forward(self, x):
        return self.mpconv(x)


class Up(nn.Module):
    def __init__(self, in_ch, skip_ch, out_ch, op):
        super().__init__()
        if op not in ("none", "concat", "add"):
            raise ValueError(f"skip op {op!r}: expected none, concat or add")
        self.op = op
        self.up = nn.ConvTranspose2d(in_ch, in_ch // 2, 3, stride=2, padding=1, output_padding=1)
        self.conv = DoubleConv(in_ch // 2 + (skip_ch if op == "concat" else 0), out_ch)

    def forward(self, x, skip):
        x = self.up(x)
        if self.op == "concat":
            x = torch.cat([skip, x], dim=1)
        elif self.op == "add":
            x = x + skip
        return self.conv(x)


class Memory(nn.Module):
    """Soft addressing of learned slots with hard shrinkage (Gong et al., ICCV 2019, eq. 3-7)."""

    def __init__(self, num_slots, slot_dim, shrink_threshold):
        super().__init__()
        self.shrink_threshold = shrink_threshold
        self.memMatrix = nn.Parameter(torch.empty(num_slots, slot_dim))
        nn.init.uniform_(self.memMatrix, -(slot_dim**-0.5), slot_dim**-0.5)

    def forward(self, x):
        """[N, C, H, W] -> the same shape read from the memory, and the addressing [N, slots]."""
        flat = x.flatten(1)
        slots = self.memMatrix.to(flat.dtype)  # cast once: copying it and its gradient is what a step on CPUs does most
        w = F.softmax(F.linear(flat, slots).float(), dim=1)  # the threshold is 1/slots: too fine for bf16
        if self.shrink_threshold > 0:
            d = w - self.shrink_threshold
            w = F.relu(d) * w / (d.abs() + 1e-12)
            w = F.normalize(w, p=1, dim=1, eps=1e-12)
        return (w.to(flat.dtype) @ slots).view(x.shape), w


class MLMemAE(nn.Module):
    """Multi-level memory autoencoder with skip connections. [N, flow_channels, S, S] -> reconstruction, addressings."""

    def __init__(
        self,
        *,
        flow_channels=2,
        features_root=32,
        num_slots=2000,
        shrink_threshold=0.0005,
        mem_usage=(False, True, True, True),
        skip_ops=("none", "concat", "concat"),
        spatial_size=32,
    ):
        super().__init__()
        if mem_usage[0] or len(mem_usage) != 4 or len(skip_ops) != 3:
            raise ValueError("mem_usage needs four entries with the first False, skip_ops needs three")
        c, s = features_root, spatial_size
        self.in_conv = InConv(flow_channels, c)
        self.down_1, self.down_2 = Down(c, 2 * c), Down(2 * c, 4 * c)
        self.down_3 = Down(4 * c, 8 * c)
        for level, use in enumerate(mem_usage):
            if use:
                dim = c * 2**level * (s // 2**level) ** 2
                setattr(self, f"mem{level}", Memory(num_slots, dim, shrink_threshold))
        self.mem_usage = tuple(mem_usage)
        self.up_3 = Up(8 * c, 4 * c, 4 * c, skip_ops[2])
        self.up_2 = Up(4 * c, 2 * c, 2 * c, skip_ops[1])
        self.up_1 = Up(2 * c, c, c, skip_ops[0])
        self.out_conv = OutConv(c, flow_channels)
        init_weights(self)

    def _remember(self, level, x, attention):
        if self.mem_usage[level]:
            x, attention[level] = getattr(self, f"mem{level}")(x)
        return x

    def forward(self, x):
        """-> {"recon": like x, "attention": {level: [N, slots]}}"""
        attention = {}
        x0 = self.in_conv(x)
        x1 = self.down_1(x0)
        x2 = self.down_2(x1)
        x3 = self._remember(3, self.down_3(x2), attention)
        x = self._remember(2, self.up_3(x3, x2), attention)
        x = self._remember(1, self.up_2(x, x1), attention)
        return {"recon": self.out_conv(self.up_1(x, x0)), "attention": attention}


# -------------------------------------------------- CVAE: flow-guided frame prediction (section 3.2; VUnet, Esser 2018)


class WeightNorm(nn.Module):
    """The parameters of a weight-normalised convolution: w = g * v / |v|."""

    def __init__(self, in_ch, out_ch, kernel):
        super().__init__()
        plain = nn.Conv2d(in_ch, out_ch, kernel)  # PyTorch's default initialisation
        self.bias, self.weight_v = plain.bias, plain.weight
        self.weight_g = nn.Parameter(plain.weight.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1))

    def weight(self):
        return self.weight_v * (self.weight_g / self.weight_v.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


class NormConv2d(nn.Module):
    """gamma * weight_normed_conv(x) + beta, computed as one convolution: scale and shift go into its weights."""

    def __init__(self, in_ch, out_ch, kernel, stride=1):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1, out_ch, 1, 1))
        self.gamma = nn.Parameter(torch.ones(1, out_ch, 1, 1))
        self.conv = WeightNorm(in_ch, out_ch, kernel)
        self.stride, self.padding = stride, kernel // 2

    def fused(self):
        gamma = self.gamma.flatten()
        return self.conv.weight() * gamma.view(-1, 1, 1, 1), self.conv.bias * gamma + self.beta.flatten()

    def forward(self, x):
        weight, bias = self.fused()
        return F.conv2d(x, weight, bias, self.stride, self.padding)


def space_to_depth(x):
    """[N, C, H, W] -> [N, 4C, H/2, W/2], channel = (row * 2 + column) * C + c."""
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 2, 2, c)  # rows of channels are copied whole
    return x.permute(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)


def depth_to_space(x):
    """Inverse of space_to_depth."""
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h, w, 2, 2, c // 4)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4).permute(0, 3, 1, 2)


class Residual(nn.Module):
    def __init__(self, ch, skip=False, dropout=0.1):
        super().__init__()
        self.conv2d = NormConv2d(2 * ch if skip else ch, ch, 3)
        if skip:
            self.pre = NormConv2d(ch, ch, 1)
        self.dropout = dropout

    def forward(self, x, skip=None):
        h = F.elu(x) if skip is None else F.elu(torch.cat([x, self.pre(F.elu(skip))], dim=1), inplace=True)
        return self.conv2d(F.dropout(h, self.dropout, self.training)).add_(x)


class DownConv(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.down = NormConv2d(in_ch, out_ch, 3, stride=2)

    def forward(self, x):
        return self.down(x)


class UpConv(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.up = NormConv2d(in_ch, 4 * out_ch, 3)

    def forward(self, x):
        return depth_to_space(self.up(x))


class Encoder(nn.Module):
    """-> {"s<stage>_<1|2>": map}; stage 1 at full size, each later stage at half the one before."""

    def __init__(self, in_ch, widths, dropout):
        super().__init__()
        self.in_op = NormConv2d(in_ch, widths[0], 1)
        self.blocks = nn.ModuleDict(
            {f"s{s}_{i}": Residual(w, dropout=dropout) for s, w in enumerate(widths, 1) for i in (1, 2)}
        )
        self.downs = nn.ModuleDict({f"s{s}": DownConv(widths[s - 2], widths[s - 1]) for s in range(2, len(widths) + 1)})
        self.stages = len(widths)

    def forward(self, x):
        maps, x = {}, self.in_op(x)
        for s in range(1, self.stages + 1):
            if s > 1:
                x = self.downs[f"s{s}"](x)
            for i in (1, 2):
                x = maps[f"s{s}_{i}"] = self.blocks[f"s{s}_{i}"](x)
        return maps


class Posterior(nn.Module):
    """q(z | appearance, flow): two maps of unit variance. -> means and samples, coarse first."""

    def __init__(self, widths, dropout):
        super().__init__()
        ch, self.stages = widths[-1], len(widths)
        self.blocks = nn.ModuleList([Residual(ch, skip=True, dropout=dropout) for _ in range(3)])
        self.conv1x1 = NormConv2d(ch, ch, 1)
        self.up = UpConv(ch, ch)
        self.channel_norm = NormConv2d(2 * ch, ch, 1)

    def forward(self, maps):
        coarse, fine = f"s{self.stages}", f"s{self.stages - 1}"
        h = self.conv1x1(maps[f"{coarse}_2"])
        q4 = self.blocks[0](h, maps[f"{coarse}_2"])
        z4 = q4 + torch.randn_like(q4) if self.training else q4
        h = self.blocks[1](q4, self.channel_norm(torch.cat([maps[f"{coarse}_1"], z4], dim=1)))
        q8 = self.blocks[2](self.up(h), maps[f"{fine}_2"])
        z8 = q8 + torch.randn_like(q8) if self.training else q8
        return [q4, q8], [z4, z8]


class Bottleneck(nn.Module):
    """Feeds the latents to the decoder; on request the prior p(z | flow), autoregressive over four channel groups."""

    def __init__(self, widths, dropout):
        super().__init__()
        ch, n = widths[-1], len(widths)
        self.names = [f"s{n}", f"s{n - 1}"]
        self.blocks = nn.ModuleDict(
            {f"{s}_{i}": Residual(ch, skip=True, dropout=dropout) for s in self.names for i in (1, 2)}
        )
        self.channel_norm = nn.ModuleDict({s: NormConv2d(2 * ch, ch, 1) for s in self.names})
        self.conv1x1 = NormConv2d(ch, ch, 1)
        self.up = UpConv(ch, ch)
        self.auto_blocks = nn.ModuleList([Residual(ch, skip=i > 0, dropout=dropout) for i in range(4)])
        self.param_converter = NormConv2d(4 * ch, ch, 1)

    def prior_mean(self, h, z):
        groups = [self.param_converter(space_to_depth(self.auto_blocks[0](h)))]
        for block, part in zip(self.auto_blocks[1:], space_to_depth(z).chunk(4, dim=1)):
            groups.append(block(groups[-1], part))
        return depth_to_space(torch.cat(groups, dim=1))

    def forward(self, maps, latents, prior):
        p_means, h = [], self.conv1x1(maps[f"{self.names[0]}_2"])
        for i, (s, z) in enumerate(zip(self.names, latents)):
            if i:
                h = self.up(h)
            h = self.blocks[f"{s}_2"](h, maps[f"{s}_2"])
            if prior:
                p_means.append(self.prior_mean(h, z))
            h = self.blocks[f"{s}_1"](h, self.channel_norm[s](torch.cat([maps[f"{s}_1"], z], dim=1)))
        return h, p_means


class Decoder(nn.Module):
    def __init__(self, widths, out_ch, dropout):
        super().__init__()
        self.stages = range(len(widths) - 2, 0, -1)
        self.blocks = nn.ModuleDict(
            {f"s{s}_{i}": Residual(widths[s - 1], skip=True, dropout=dropout) for s in self.stages for i in (2, 1)}
        )
        self.ups = nn.ModuleDict({f"s{s + 1}": UpConv(widths[s], widths[s - 1]) for s in self.stages})
        self.final_layer = NormConv2d(widths[0], out_ch, 1)

    def forward(self, h, maps):
        for s in self.stages:
            h = self.ups[f"s{s + 1}"](h)
            for i in (2, 1):
                h = self.blocks[f"s{s}_{i}"](h, maps[f"s{s}_{i}"])
        return torch.sigmoid(self.final_layer(h).float())  # bf16 has 128 numbers between 0.5 and 1


class VUnet(nn.Module):
    def __init__(
        self,
        *,
        appearance_channels,
        flow_channels,
        out_channels=3,
        nf_start=64,
        nf_max=128,
        spatial_size=32,
        dropout=0.1,
    ):
        super().__init__()
        stages = int(math.log2(spatial_size)) - 1  # down to a bottleneck of 4 px
        if stages < 3:
            raise ValueError(f"spatial_size {spatial_size}: the CVAE needs at least 16 px")
        widths = [min(nf_start * 2**i, nf_max) for i in range(stages)]
        if widths[-1] != widths[-2]:
            raise ValueError("nf_max must be reached one stage before the bottleneck")
        self.f_phi = Encoder(appearance_channels + flow_channels, widths, dropout)
        self.e_theta = Encoder(flow_channels, widths, dropout)
        self.zc = Posterior(widths, dropout)
        self.bottleneck = Bottleneck(widths, dropout)
        self.decoder = Decoder(widths, out_channels, dropout)

    def forward(self, appearance, flow, prior=True):
        """[N, 3*past, S, S] in [0, 1], [N, 2*flows, S, S] -> prediction in [0, 1], posterior and prior means."""
        f_maps = self.f_phi(torch.cat([appearance, flow], dim=1))
        q_means, latents = self.zc(f_maps)
        h, p_means = self.bottleneck(self.e_theta(flow), latents, prior)
        return {"frame_pred": self.decoder(h, f_maps), "q_means": q_means, "p_means": p_means}


class HF2VAD(nn.Module):
    """The whole method: every flow of the cube through ML-MemAE-SC, then the CVAE on past frames and reconstructed
    flow."""

    def __init__(
        self,
        *,
        features_root=32,
        num_slots=2000,
        shrink_threshold=0.0005,
        mem_usage=(False, True, True, True),
        skip_ops=("none", "concat", "concat"),
        nf_start=64,
        nf_max=128,
        spatial_size=32,
        clip_hist=4,
        clip_pred=1,
        dropout=0.1,
    ):
        super().__init__()
        if clip_pred != 1:
            raise ValueError("clip_pred: only one predicted frame is defined by the method")
        self.clip_hist, self.past_channels = clip_hist, 3 * clip_hist
        self.memAE = MLMemAE(
            features_root=features_root,
            num_slots=num_slots,
            shrink_threshold=shrink_threshold,
            mem_usage=mem_usage,
            skip_ops=skip_ops,
            spatial_size=spatial_size,
        )
        self.vunet = VUnet(
            appearance_channels=3 * clip_hist,
            flow_channels=2 * clip_hist,
            nf_start=nf_start,
            nf_max=nf_max,
            spatial_size=spatial_size,
            dropout=dropout,
        )

    def reconstruct(self, flows):
        """[N, 2*clip_hist, S, S] -> the same shape, and addressings of the N*clip_hist single flows (one batch)."""
        n, c, h, w = flows.shape
        out = self.memAE(flows.reshape(n * c // 2, 2, h, w))
        return out["recon"].reshape(n, c, h, w), out["attention"]

    def forward(self, frames, flows, prior=True):
        """frames [N, 3*(clip_hist+1), S, S] BGR in [0, 1], frame-major; flows [N, 2*clip_hist, S, S] in pixels."""
        recon, attention = self.reconstruct(flows)
        out = self.vunet(frames[:, : self.past_channels], recon, prior=prior)
        return {**out, "of_recon": recon, "attention": attention}


# ------------------------------------------------------------------------------------------------ losses and scores


def sparsity_loss(attention):
    """Entropy of the addressings, summed over levels, mean over samples (section 3.1, eq. 3)."""
    return sum(-(w * torch.log(w + 1e-12)).sum(1).mean() for w in attention.values())


def kl_loss(q_means, p_means):
    """Half the squared distance of the means (unit variances): mean over samples, sum over the two maps."""
    return sum(0.5 * (full(p) - full(q)).pow(2).flatten(1).sum(1).mean() for q, p in zip(q_means, p_means))


def gradient_loss(pred, target):
    """L1 distance of image gradients; channels are summed before the absolute value, as in the published code."""
    d = (full(pred) - target).sum(1)
    dx = d - F.pad(d, (1, 0))[:, :, :-1]
    dy = d - F.pad(d, (0, 0, 1, 0))[:, :-1]
    return dx.abs().mean() + dy.abs().mean()


def memae_losses(out, flow, *, sparsity_weight=0.0002):
    """Stage `memae`: {"recon", "sparsity", "total"}."""
    recon, sparsity = F.mse_loss(full(out["recon"]), flow), sparsity_loss(out["attention"])
    return {"recon": recon, "sparsity": sparsity, "total": recon + sparsity_weight * sparsity}


def cvae_losses(out, target):
    """Stage `cvae`: KL, intensity and gradient with weights 1 (section 3.3); target [N, 3, S, S] in [0, 1]."""
    losses = {
        "kl": kl_loss(out["q_means"], out["p_means"]),
        "intensity": F.mse_loss(full(out["frame_pred"]), target),
        "gradient": gradient_loss(out["frame_pred"], target),
    }
    return {**losses, "total": sum(losses.values())}


def full_losses(out, frames, flows, *, sparsity_weight=0.0002):
    """Stage `finetune`: the sums of both stages."""
    losses = cvae_losses(out, frames[:, -3:])
    losses["recon"] = F.mse_loss(full(out["of_recon"]), flows)
    losses["sparsity"] = sparsity_loss(out["attention"])
    losses["total"] = losses["total"] + losses["recon"] + sparsity_weight * losses["sparsity"]
    return losses


def cube_scores(out, frames, flows):
    """-> flow score [N], frame score [N]: summed squared errors (section 3.4, before normalisation)."""
    flow = (full(out["of_recon"]) - flows).pow(2).flatten(1).sum(1)
    frame = (full(out["frame_pred"]) - frames[:, -3:]).pow(2).flatten(1).sum(1)
    return flow, frame


# ------------------------------------------------------------------------------------------ initialisation and speed


def init_weights(net):
    """Kaiming-normal (a = 0.1, fan-in) convolutions, N(1, 0.02) batch-norm weights, zero biases.

    Weight-normalised convolutions keep PyTorch's default: with Kaiming there, the residual chains of a small model
    started with a KL of 4e7 and training failed. (Setting `.weight` under weight norm has no effect; g and v are what
    counts.)
    """
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(m.weight, a=0.1)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.02)
            nn.init.zeros_(m.bias)


def fold(net):
    """Change a network for inference, same outputs: batch norm into the convolution before it, weight norm
    multiplied out."""
    net = net.eval().requires_grad_(False)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NormConv2d):
                weight, bias = child.fused()
                # without initial weights: drawing them would move the generator that training's dropout uses
                conv = nn.utils.skip_init(
                    nn.Conv2d,
                    weight.shape[1],
                    weight.shape[0],
                    weight.shape[2],
                    child.stride,
                    child.padding,
                    device=weight.device,
                )
                conv.weight, conv.bias = nn.Parameter(weight.detach(), False), nn.Parameter(bias.detach(), False)
                setattr(module, name, conv)
            elif isinstance(child, DoubleConv):
                layers = list(child.conv)
                for i in (0, 3):
                    layers[i] = nn.utils.fusion.fuse_conv_bn_eval(layers[i], layers[i + 1])
                child.conv = nn.Sequential(layers[0], layers[2], layers[3], layers[5])
    return net
