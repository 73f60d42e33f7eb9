"""SVMAE: a video masked autoencoder whose masking and loss depend on the scene. Imports torch only.

Scene-aware Probabilistic Masking and Fusion for Video Anomaly Detection, https://github.com/Sumutan/SVMAE (code of the
detector). Parameter names are VideoMAE's.

    net = SVMAE(**PRESETS["vit_s"], frames=16, size=224)
    clips, nearness = torch.rand(1, 3, 16, 224, 224), torch.rand(1, 224, 224)   # RGB and nearness, in [0, 1]
    tokens, near = tokenize(clips), pool(nearness, net.grid)                    # [1, 1568, 3, 512], [1, 1568]
    mask = draw_mask(mask_probability(cube_difference(tokens, net.grid), near), 0.9, torch.rand(1, 1568))
    prediction, hidden = net(tokens, mask)
    loss = reconstruction_loss(prediction, tokens, hidden, perspective_weights(near))
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

TUBELET, PATCH = 2, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the input's RGB, as VideoMAE's weights expect
BANDS = (1.2, 1.0, 0.8, 0.6)  # loss weights from far to near
PRESETS = {
    "tiny": dict(dim=96, depth=2, heads=3, decoder_dim=48, decoder_depth=1, decoder_heads=3),  # for the demo and tests
    "vit_s": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "vit_b": dict(dim=768, depth=12, heads=12, decoder_dim=384, decoder_depth=4, decoder_heads=6),
    "vit_l": dict(dim=1024, depth=24, heads=16, decoder_dim=512, decoder_depth=12, decoder_heads=8),
}


# ------------------------------------------------------------------------------------------------------------- tokens


def tokenize(clips):
    """[N, C, T, H, W] -> cubes of 2 × 16 × 16 pixels [N, L, C, 512]; L by time, row, column."""
    n, c, t, h, w = clips.shape
    x = clips.view(n, c, t // TUBELET, TUBELET, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n, -1, c, TUBELET * PATCH**2)


def untokenize(tokens, grid):
    """Inverse of tokenize. [N, L, C, 512] -> [N, C, T, H, W]"""
    n, _, c, _ = tokens.shape
    t, h, w = grid
    x = tokens.view(n, t, h, w, c, TUBELET, PATCH, PATCH)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(n, c, t * TUBELET, h * PATCH, w * PATCH)


def pool(maps, grid):
    """Maps of a clip's pixels [N, H, W] -> their means over tokens, the same at all times [N, L]."""
    small = F.avg_pool2d(maps[:, None], PATCH)  # [N, 1, h, w]
    return small.expand(-1, grid[0], -1, -1).flatten(1)


def cube_difference(tokens, grid):
    """Mean absolute difference of each cube to the one before it in time (the first: to the one after).

    [N, L, C, P] -> [N, L]
    """
    x = tokens.unflatten(1, (grid[0], -1))  # [N, T', h·w, C, P]
    if grid[0] == 1:
        return tokens.new_zeros(tokens.shape[:2])
    change = (x[:, 1:] - x[:, :-1]).abs().mean((3, 4))
    return torch.cat([change[:, :1], change], dim=1).flatten(1)


def positions(length, dim):
    """Sinusoidal positions [length, dim]: sine on even, cosine on odd columns."""
    frequencies = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
    angles = torch.arange(length).float()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]


# ------------------------------------------------------------------------------------------------------------ masking


def mask_probability(difference, near, space=0.5, time=0.5, floor=0.1):
    """Scene-aware probability that a token is masked, [N, L], summing to 1: near tokens and moving ones more often.

    difference, near: [N, L]. Each is scaled to mean 1 in its clip; then they are added with weights `time` and `space`.
    The paper gives no weights: these are ours, and so is `floor`, which is added for every token, so that tokens of a
    still scene are drawn evenly.
    """
    near, difference = (x / x.mean(1, keepdim=True).clamp(min=1e-6) for x in (near, difference))
    p = space * near + time * difference + floor
    return p / p.sum(1, keepdim=True)


def masked_tokens(ratio, tokens):
    """How many of a clip's tokens a mask hides: at least one of them stays visible."""
    return min(round(ratio * tokens), tokens - 1)


def draw_mask(probability, ratio, noise):
    """Draw masked_tokens(ratio, L) tokens without replacement by their probability: Gumbel top-k.

    noise uniform in [0, 1), [N, L]. -> bool [N, L], True: masked; the same number in every sample.
    """
    count = masked_tokens(ratio, probability.shape[1])
    gumbel = -torch.log(-torch.log(noise.clamp(1e-7, 1 - 1e-7)))
    chosen = (probability.log() + gumbel).topk(count, dim=1).indices
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(1, chosen, True)


def random_mask(ratio, noise):
    """Every token has the same probability. noise [N, L] -> bool [N, L]"""
    return draw_mask(torch.ones_like(noise), ratio, noise)


def tube_mask(ratio, noise, grid):
    """The same places at all times (VideoMAE). noise [N, L] -> bool [N, L]"""
    first = noise.unflatten(1, (grid[0], -1))[:, 0]
    return random_mask(ratio, first).repeat(1, grid[0])


def make_mask(masking, tokens, near, grid, noise, ratio, space=0.5, time=0.5):
    """A mask of the kind "scene", "random" or "tube". tokens [N, L, C, P], near and noise [N, L] -> bool [N, L]"""
    if masking == "random":
        return random_mask(ratio, noise)
    if masking == "tube":
        return tube_mask(ratio, noise, grid)
    return draw_mask(mask_probability(cube_difference(tokens, grid), near, space, time), ratio, noise)


# -------------------------------------------------------------------------------------------------------------- model

SHORT = 256  # tokens up to which the backward pass of attention is faster in float32 than in bf16 on CPUs


def attend(q, k, v):
    """softmax(q·kᵀ / √d) v, [..., L, d] each."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and q.shape[-2] <= SHORT:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        n, length, dim = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(n, length, dim))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Encoder(nn.Module):
    """Vision transformer over the cubes that it is shown."""

    def __init__(self, dim, depth, heads, length):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, dim, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH))})
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("position", positions(length, dim), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1), persistent=False)

    def forward(self, tokens, places=None):
        """tokens [N, K, 3, 512] in [0, 1] -> [N, K, dim]. places: in the clip, int64 [N, K]; None: all, in order."""
        proj = self.patch_embed["proj"]
        x = F.linear(((tokens - self.mean) / self.std).flatten(2), proj.weight.flatten(1), proj.bias)
        x = x + (self.position if places is None else self.position[places])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, dim, depth, heads):
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 3 * TUBELET * PATCH**2)


class SVMAE(nn.Module):
    """Masked autoencoder of clips: the encoder sees only the visible tokens, a light decoder predicts the others."""

    def __init__(
        self, *, dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3, frames=16, size=224
    ):
        super().__init__()
        if frames % TUBELET or size % PATCH:
            raise ValueError(f"{frames} frames of {size} px: expected a multiple of {TUBELET} and of {PATCH}")
        self.grid = frames // TUBELET, size // PATCH, size // PATCH  # tokens of a clip: times, rows, columns
        self.tokens = math.prod(self.grid)
        self.encoder = Encoder(dim, depth, heads, self.tokens)
        self.encoder_to_decoder = nn.Linear(dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder = Decoder(decoder_dim, decoder_depth, decoder_heads)
        self.register_buffer("position", positions(self.tokens, decoder_dim), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        weight = self.encoder.patch_embed["proj"].weight
        nn.init.xavier_uniform_(weight.data.view(len(weight), -1))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens, mask, masked=None):
        """tokens [N, L, 3, 512] in [0, 1]; mask bool [N, L], with the same number of True in every sample: `masked`, or
        None to count them, which waits for a GPU.

        -> predicted values [N, M, 3, 512] of the masked tokens (normalised cubes, see target), places int64 [N, M].
        """
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        seen = mask.shape[1] - (int(mask[0].sum()) if masked is None else masked)
        visible, hidden = order[:, :seen], order[:, seen:]
        x = self.encoder_to_decoder(self.encoder(take_tokens(tokens, visible), visible)) + self.position[visible]
        x = torch.cat([x, (self.mask_token + self.position[hidden]).to(x.dtype)], dim=1)
        for block in self.decoder.blocks:
            x = block(x)
        out = self.decoder.head(self.decoder.norm(x[:, seen:]))
        return out.unflatten(2, (3, -1)), hidden


def take_tokens(x, places):
    """Rows of [N, L, …] at places [N, K] -> [N, K, …]."""
    index = places.view(*places.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


# ------------------------------------------------------------------------------------------------------------- losses


def target(tokens):
    """VideoMAE's target: cubes normalised by their mean and deviation per channel.

    [N, L, C, P] -> the same shape, mean [N, L, C, 1], deviation [N, L, C, 1]
    """
    mean, std = tokens.mean(3, keepdim=True), tokens.var(3, keepdim=True).sqrt() + 1e-6
    return (tokens - mean) / std, mean, std


def perspective_weights(near):
    """Loss weights of tokens by four equal bands of nearness in [0, 1]: 1.2 for the farthest, 0.6 for the nearest."""
    weights = torch.full_like(near, BANDS[0])
    for i, weight in enumerate(BANDS[1:], 1):
        weights = weights.masked_fill(near >= i / len(BANDS), weight)
    return weights


def reconstruction_loss(prediction, tokens, hidden, weights=None):
    """Mean squared error of the masked tokens, weighted by `weights` [N, L], if any.

    prediction [N, M, 3, 512] and hidden [N, M]: what SVMAE returns; tokens [N, L, 3, 512].
    """
    normalised, _, _ = target(take_tokens(tokens, hidden).float())
    errors = (prediction.float() - normalised).pow(2).mean((2, 3))  # [N, M]
    return errors.mean() if weights is None else (errors * take_tokens(weights, hidden)).mean()


# ------------------------------------------------------------------------------------------------------------- fusion


def fuse_tokens(features, difference, near, ratio=0.5, alpha=0.05):
    """Scene-aware token fusion: the `ratio` of a clip's tokens that move most, with weights 1 + alpha · farness.

    features [N, L, D], difference and near [N, L] -> weighted mean [N, D]. Farness is 1 - near, stretched to [0, 1]
    among these tokens.
    """
    count = max(1, round(ratio * features.shape[1]))
    moving = difference.topk(count, dim=1).indices
    far = 1 - take_tokens(near, moving)
    low, high = far.amin(1, keepdim=True), far.amax(1, keepdim=True)
    weights = 1 + alpha * (far - low) / (high - low).clamp(min=1e-6)
    return (take_tokens(features, moving) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


# --------------------------------------------------------------------------------------------------------- checkpoints


def encoder_weights(state):
    """VideoMAE's weights of an encoder, pre-trained (encoder.*) or fine-tuned, under the names of Encoder."""
    prefix = "encoder." if any(k.startswith("encoder.") for k in state) else ""
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = {k.replace("fc_norm.", "norm."): v for k, v in state.items()}
    weights = {k: v for k, v in state.items() if not k.endswith((".q_bias", ".v_bias"))}
    for k, q in state.items():
        if k.endswith("attn.q_bias"):  # the projection of keys has no bias there
            value = state[k.replace("q_bias", "v_bias")]
            weights[k.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), value])
    return weights


def load_encoder(encoder, state):
    """Put the weights that fit into an Encoder. -> unexpected keys (of the file), missing keys (unchanged)."""
    parameters, weights = encoder.state_dict(), encoder_weights(state)
    fitting = {k: v for k, v in weights.items() if k in parameters and parameters[k].shape == v.shape}
    encoder.load_state_dict(fitting, strict=False)
    return sorted(set(weights) - set(fitting)), sorted(set(parameters) - set(fitting))
