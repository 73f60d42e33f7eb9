"""FRD-UVAD: feature reconstruction with disruption. Imports torch only.

Tao et al., Feature Reconstruction with Disruption for Unsupervised Video Anomaly Detection, IEEE Transactions on
Multimedia 2024, https://doi.org/10.1109/TMM.2024.3405716. Parameter names are the published ones.

    net = FRD(feature_size=2048, num_blocks=8)
    out = net(torch.rand(4, 10, 4, 2048))   # windows of 4 consecutive clips, 10 crops each
    loss = losses(out)["total"]
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PATCHES = 16  # parts that a clip's feature is cut into


def positions(length, dim):
    """Sinusoidal positions [length, dim]: sine on even, cosine on odd columns."""
    at = torch.arange(length).float()[:, None] * torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
    out = torch.zeros(length, dim)
    out[:, 0::2], out[:, 1::2] = at.sin(), at.cos()
    return out


def attend(q, k, v):
    """softmax(q·kᵀ / √d) v, [..., L, d] each.

    For so few tokens the fused attention of CPUs takes twice as long in bf16 as in float32. On GPUs, where nothing was
    measured yet, flash attention is left out: its backward pass pads 16 tokens of 8 channels to 128 of 32 in float32.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    if q.is_cuda:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, across):
        """[N, T, parts, dim]. across: the queries of clip k - 1 attend to clip k (clip 0: its own); otherwise each
        clip to itself."""
        n, t, length, dim = x.shape
        q, k, v = self.qkv(x).view(n, t, length, 3, self.heads, dim // self.heads).unbind(3)
        if across and t > 1:
            q = torch.cat([q[:, :1], q[:, :-1]], dim=1)
        q, k, v = (y.flatten(0, 1).transpose(1, 2) for y in (q, k, v))
        y = attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, length, dim))


class Block(nn.Module):
    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))

    def forward(self, x, across=False):
        x = x + self.attn(self.norm1(x), across)
        return x + self.mlp(self.norm2(x))


class Reconstructor(nn.Module):
    """A clip's feature from its own parts and, in the second half of the blocks, from the clips before it."""

    def __init__(self, feature_size, num_blocks, heads, ratio, dropout=0.5):
        super().__init__()
        dim = feature_size // PATCHES
        self.dropout = nn.Dropout(dropout)
        self.decoder_embed = nn.Linear(dim, dim)
        self.register_buffer("position", positions(PATCHES, dim), persistent=False)
        self.decoder_blocks = nn.ModuleList([Block(dim, heads, ratio) for _ in range(num_blocks)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, features):
        """[N, T, C] -> [N, T, C]"""
        x = features.unflatten(2, (PATCHES, -1))
        x = self.decoder_embed(self.dropout(x)) + self.position
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, across=i >= len(self.decoder_blocks) // 2)
        return self.norm(x).flatten(2)


class Autoencoder(nn.Module):
    """Instead of the reconstructor, with num_blocks = 0."""

    def __init__(self, feature_size, hidden=512):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(feature_size, hidden), nn.Linear(hidden, feature_size)

    def forward(self, features):
        return self.decoder(F.relu(self.encoder(features)))


def probability(layer, x):
    """Sigmoid of a last layer with one output, in float32 under autocast too: in bf16 there are 26 numbers between 0.9
    and 1, and what is rounded to 1 has no gradient. [..., C] -> [..., 1]"""
    return torch.sigmoid((x.float() * layer.weight).sum(-1, keepdim=True) + layer.bias)


class Scorer(nn.Module):
    """[N, crops, T, C] -> scores [N, T, 1], the mean over crops."""

    def __init__(self, feature_size, dropout=0.7):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(feature_size, 1024), nn.Linear(1024, 128)
        self.classifier, self.dropout = nn.Linear(128, 1), nn.Dropout(dropout)

    def forward(self, features):
        x = self.dropout(F.relu(self.fc1(features)))
        x = self.dropout(F.relu(self.fc2(x)))
        return probability(self.classifier, x).mean(1)


class C2FPLScorer(nn.Module):
    """The scorer of C2FPL (Al-lahham et al. 2024), whose published weights serve as auxiliary scorer.

    [N, crops, T, C] -> [N, T, 1]. Its files also hold attention layers (fc_att1, fc_att2), which FRD-UVAD does not use.
    """

    def __init__(self, feature_size, dropout=0.6):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(feature_size, 512), nn.Linear(512, 32)
        self.fc3 = nn.Linear(32, 1)
        self.fc_att1 = nn.Sequential(nn.Linear(feature_size, 512))
        self.fc_att2 = nn.Sequential(nn.Linear(512, 32))
        self.dropout = nn.Dropout(dropout)

    def forward(self, features):
        x = self.dropout(F.relu(self.fc1(features)))
        x = self.dropout(F.relu(self.fc2(x)))
        return probability(self.fc3, x).mean(1)


class FRD(nn.Module):
    """Reconstructor and scorer.

    forward: windows of clips [N, crops, T, C] -> {"recon": the same shape, "error": [N, T], "score": [N, T, 1]}. The
    error of a clip is the largest of its crops' mean squared errors.
    """

    def __init__(self, *, feature_size=2048, num_blocks=8, heads=16, mlp_ratio=4):
        super().__init__()
        if feature_size % (PATCHES * heads):
            raise ValueError(f"feature_size {feature_size}: expected a multiple of {PATCHES * heads}")
        self.decoder = Reconstructor(feature_size, num_blocks, heads, mlp_ratio) if num_blocks else None
        self.AE = None if num_blocks else Autoencoder(feature_size)  # the published files hold both
        self.scorer = Scorer(feature_size)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    @property
    def reconstructor(self):
        return self.decoder or self.AE

    def reconstruct(self, features):
        return self.reconstructor(features.flatten(0, 1)).view(features.shape)

    def error(self, features):
        return clip_errors(self.reconstruct(features), features)

    def forward(self, features):
        recon = self.reconstruct(features)
        return {"recon": recon, "error": clip_errors(recon, features), "score": self.scorer(features)}


def clip_errors(recon, features):
    """[N, crops, T, C] -> [N, T]: mean squared error, the largest over crops."""
    return (recon.float() - features.float()).pow(2).mean(3).amax(1)


def cumulative(scores):
    """Position k of a window gets the mean of its scores 0..k. [N, T, 1] -> [N, T, 1]"""
    return scores.cumsum(1) / torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype).view(
        1, -1, 1
    )


def losses(out, auxiliary=None, bank_error=None, weights=(1.0, 1.0, 1.0)):
    """The three losses of a step and its pseudo labels.

    out: of FRD on the batch; auxiliary: scores [N, T] in 0..1 that must agree (>= 0.5), or None; bank_error: [M, T] of
    the latent anomaly bank's windows when it is in use. -> {"total", "reconstruction", "disruption", "scorer",
    "pseudo": [N, T], "threshold"}.
    """
    error = out["error"]
    with torch.no_grad():
        errors = error.flatten() if bank_error is None else torch.cat([error.flatten(), bank_error.flatten()])
        threshold = errors.mean() + errors.std()
        pseudo = (error >= threshold).float()
        if auxiliary is not None:
            pseudo = pseudo * (auxiliary >= 0.5)
    score = cumulative(out["score"].float())[..., 0]
    # NaN stays NaN, but does not reach CUDA's cross-entropy, which would end the process
    entropy = F.binary_cross_entropy(score.nan_to_num(0.5), pseudo) + 0 * score.sum()
    parts = {
        "reconstruction": error.mean(),
        "disruption": error.new_zeros(()),
        "scorer": entropy,
    }
    if bank_error is not None:
        parts["disruption"] = F.relu(-(bank_error - threshold).mean())
    total = sum(w * v for w, v in zip(weights, parts.values()))
    return {"total": total, **parts, "pseudo": pseudo, "threshold": threshold}


def select_for_bank(pseudo, scores, kind, delta):
    """Which windows join the bank: bool [N]. pseudo, scores [N, T].

    A pseudo label survives where the score is at least mean + delta · deviation of the batch's scores; `wlab` (weak)
    asks for one such position in the window, `slab` (strong) for all.
    """
    keep = (pseudo > 0) & (scores >= scores.mean() + delta * scores.std())
    return keep.any(1) if kind == "wlab" else keep.all(1)
