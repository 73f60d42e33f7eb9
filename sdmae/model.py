"""AED-MAE: a self-distilled masked autoencoder on whole frames. Imports torch only.

Ristea et al., Self-Distilled Masked Auto-Encoders are Efficient Video Anomaly Detectors, CVPR 2024,
https://arxiv.org/abs/2306.12041. Parameter names are the published ones.

    net = SDMAE(patch_size=16, image_size=(320, 640)).eval()
    frames, target = torch.randn(2, 9, 320, 640), torch.randn(2, 4, 320, 640)   # both in [-1, 1]
    out = net(frames, torch.rand(2, net.tokens))
    distillation, reconstruction = error_maps(out, target, net.patch_size)   # [2, 800] each
"""

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6  # of every LayerNorm


# ------------------------------------------------------------------------------------------------------------- tokens


def patchify(x, p):
    """[N, C, H, W] -> [N, H/p·W/p, p·p·C]: a token's values by row, column, channel."""
    n, c, h, w = x.shape
    x = x.view(n, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // p) * (w // p), p * p * c)


def take_tokens(x, places):
    """[N, L, D], places [N, k] -> [N, k, D]"""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


def random_masking(noise, ratio):
    """Keep the tokens with the smallest noise, in the order of its ranks. noise [N, L].

    -> kept indices [N, L·(1-ratio)], places to take every token from when they return [N, L], mask [N, L] (1: removed).
    """
    n, length = noise.shape
    remaining = round(length * (1 - ratio))
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    mask = (restore >= remaining).to(noise.dtype)
    return order[:, :remaining], restore, mask


def gradient_masking(gradient, p, ratio):
    """The alternative: keep the tokens with the smallest maximum gradient over pixels and channels. [N, 3, H, W]."""
    return random_masking(patchify(gradient, p).amax(dim=2), ratio)


# ------------------------------------------------------------------------------------------- CvT blocks (section 3.2)


class DepthwiseProjection(nn.Module):
    """3×3 depthwise convolution and batch norm on the grid of tokens."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x):
        return self.bn(self.conv(x))

    def folded(self):
        """One convolution that equals both in evaluation mode."""
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        # without initial weights: drawing them would move the generator that training's dropout uses
        out = nn.utils.skip_init(nn.Conv2d, len(scale), len(scale), 3, padding=1, groups=len(scale))
        out.weight = nn.Parameter(self.conv.weight * scale.view(-1, 1, 1, 1))
        out.bias = nn.Parameter(self.bn.bias - self.bn.running_mean * scale)
        return out


AT_ONCE = 2**20  # probabilities that BlockwiseAttention holds at a time, so that they stay in the processor's cache


class BlockwiseAttention(torch.autograd.Function):
    """softmax(scale · q·kᵀ) v on CPUs in bf16, by whole matrix products of some heads at a time. q, k, v: [heads of all
    images, L, d].

    PyTorch's own kernel goes through the tokens in small steps and takes 1.3 to 2 times as long. As there, the backward
    pass computes the probabilities again: memory does not grow with the square of the tokens.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale):
        q, out = q * scale, torch.empty_like(v)
        for part, s, p in BlockwiseAttention.blocks(q):
            torch.bmm(q[part], k[part].transpose(1, 2), out=s)
            torch.softmax(s, 2, out=p)
            torch.bmm(p, v[part], out=out[part])
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = (torch.empty_like(out) for _ in range(3))
        mean = (grad.float() * out).sum(2, keepdim=True).to(out.dtype)  # of the gradient, over the probabilities
        for part, s, p in BlockwiseAttention.blocks(q):
            torch.bmm(q[part], k[part].transpose(1, 2), out=s)
            torch.softmax(s, 2, out=p)
            torch.bmm(p.transpose(1, 2), grad[part], out=grad_v[part])
            torch.bmm(grad[part], v[part].transpose(1, 2), out=s)
            s.sub_(mean[part]).mul_(p)
            torch.bmm(s, k[part], out=grad_q[part])
            torch.bmm(s.transpose(1, 2), q[part], out=grad_k[part])
        return grad_q.mul_(ctx.scale), grad_k, grad_v, None

    @staticmethod
    def blocks(q):
        """Yield (slice of the heads, room for their products q·kᵀ, room for the softmax of these)."""
        heads, length, _ = q.shape
        step = max(1, AT_ONCE // length**2)
        products = q.new_empty(min(step, heads), length, length)
        probabilities = torch.empty_like(products)
        for first in range(0, heads, step):
            count = min(step, heads - first)
            yield slice(first, first + count), products[:count], probabilities[:count]


def attend(q, k, v, scale):
    """softmax(scale · q·kᵀ) v, [N, heads, L, d] each."""
    cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    # Intel's matrix units (AMX): there PyTorch's kernel is slower only with its backward pass
    if cpu and not (torch.cpu._is_amx_tile_supported() and not q.requires_grad):
        heads = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        return BlockwiseAttention.apply(*heads, scale).view(q.shape)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5  # of the whole width, not of a head: as published
        self.conv_proj_q, self.conv_proj_k, self.conv_proj_v = (DepthwiseProjection(dim) for _ in range(3))
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid):
        """[N, 1 + h·w, dim]; the class token bypasses the convolutions."""
        n, length, dim = x.shape
        token, rest = x[:, :1], x[:, 1:]
        picture = rest.unflatten(1, grid).permute(0, 3, 1, 2)  # tokens are channels_last pictures: nothing is copied

        def project(conv, linear):
            # linear before joining: batch norm is slow on the gradient of a part of a joined tensor
            y = linear(conv(picture).permute(0, 2, 3, 1).flatten(1, 2))
            y = torch.cat([linear(token), y], dim=1)
            return y.view(n, length, self.heads, dim // self.heads).transpose(1, 2)

        q, k, v = (project(getattr(self, f"conv_proj_{i}"), getattr(self, f"proj_{i}")) for i in "qkv")
        y = attend(q, k, v, self.scale)
        return self.proj(y.transpose(1, 2).reshape(n, length, dim))


def dropout(x, p):
    """F.dropout(x, p); on CPUs by 16 random bits a value, where F.dropout draws a number for each and takes twice as
    long."""
    if x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * kept.to(x.dtype).div_(1 - p)


class Mlp(nn.Module):
    """1×1 convolutions on the grid, which are linear layers on the tokens; the class token bypasses them."""

    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Dropout(0.0), nn.Conv2d(hidden, dim, 1), nn.Dropout(dropout)
        )

    def forward(self, x):
        first, last = self.net[0], self.net[3]
        y = F.gelu(F.linear(x[:, 1:], first.weight.flatten(1), first.bias))
        y = F.linear(y, last.weight.flatten(1), last.bias)
        y = dropout(y, self.net[4].p) if self.training else y
        return torch.cat([x[:, :1], y], dim=1)


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio, dropout=0.1):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x, grid):
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, in_ch, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_ch, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x, kept):
        """[N, C, H, W], kept tokens [N, k] -> [N, k, dim]: the convolution, as a matrix product of only these."""
        n, c, h, w = x.shape
        p, weight = self.proj.stride[0], self.proj.weight.flatten(1)
        x = x.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, weight.shape[1])
        return self.norm(F.linear(take_tokens(x, kept), weight, self.proj.bias))


class PixelEmbed(nn.Module):
    """A PatchEmbed of frames [N, 3, C, H, W] in 0..255: w·(x - 127.5)/127.5 = (w/127.5)·x - w, as one matrix
    product. Grey frames (C = 1) need a third of it, as the weights of equal channels add up."""

    def __init__(self, embed):
        super().__init__()
        weight, self.norm = embed.proj.weight, embed.norm
        self.patch = embed.proj.stride[0]
        colour = weight.unflatten(1, (-1, 3)).permute(0, 1, 3, 4, 2) / 127.5  # [dim, frames, p, p, C]
        self.colour = nn.Parameter(colour.flatten(1), requires_grad=False)
        self.grey = nn.Parameter(colour.sum(4).flatten(1), requires_grad=False)
        self.bias = nn.Parameter(embed.proj.bias - weight.sum((1, 2, 3)), requires_grad=False)

    def forward(self, x, kept):
        n, frames, c, h, w = x.shape
        p, weight = self.patch, self.colour if x.shape[2] == 3 else self.grey
        x = x.view(n, frames, c, h // p, p, w // p, p).permute(0, 3, 5, 1, 4, 6, 2).reshape(n, -1, weight.shape[1])
        return self.norm(F.linear(take_tokens(x, kept).to(weight.dtype), weight, self.bias))


class SDMAE(nn.Module):
    """Masked autoencoder with a teacher and a student decoder (sections 3.1-3.4). No position embedding."""

    def __init__(
        self,
        *,
        patch_size=16,
        image_size=(320, 640),
        in_channels=9,
        out_channels=4,
        embed_dim=256,
        depth=3,
        heads=4,
        decoder_dim=128,
        decoder_depth=3,
        decoder_heads=4,
        mlp_ratio=2,
        mask_ratio=0.5,
        dropout=0.1,
    ):
        super().__init__()
        height, width = image_size
        if height % patch_size or width % patch_size or width // patch_size % 2:
            raise ValueError(
                f"image_size {height}×{width}: expected multiples of the patch ({patch_size}), across an even "
                "number of them"
            )
        self.patch_size, self.mask_ratio = patch_size, mask_ratio
        self.grid = height // patch_size, width // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList([Block(embed_dim, heads, mlp_ratio, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            [Block(decoder_dim, decoder_heads, mlp_ratio, dropout) for _ in range(decoder_depth)]
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=EPS)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size**2 * out_channels)
        self.decoder_student_block = Block(decoder_dim, decoder_heads, mlp_ratio, dropout)
        self.decoder_student_norm = nn.LayerNorm(decoder_dim, eps=EPS)
        self.decoder_student_pred = nn.Linear(decoder_dim, patch_size**2 * out_channels)
        init_weights(self)

    @property
    def tokens(self):
        return self.grid[0] * self.grid[1]

    def encode(self, frames, noise):
        """-> latent [N, 1 + kept, embed_dim], places to return to [N, L], mask [N, L]."""
        kept, restore, mask = random_masking(noise, self.mask_ratio)
        x = self.patch_embed(frames, kept)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        grid = self.grid[0], kept.shape[1] // self.grid[0]
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x), restore, mask

    def decode(self, latent, restore, *, student=True):
        """-> {"teacher", "student": [N, L, patch²·4]}, the student's if it is wanted."""
        shared = self.decoder_blocks[0](self.restore_tokens(latent, restore), self.grid)
        return {**({"student": self.student_head(shared)} if student else {}), "teacher": self.teacher_head(shared)}

    def forward(self, frames, noise, *, student=True):
        """frames [N, 9, H, W] in [-1, 1] (t-3, t, t+3 in BGR), noise [N, L]

        -> {"teacher", "student", "mask", "latent"}.
        """
        latent, restore, mask = self.encode(frames, noise)
        return {**self.decode(latent, restore, student=student), "mask": mask, "latent": latent}

    def student_modules(self):
        return self.decoder_student_block, self.decoder_student_norm, self.decoder_student_pred

    @torch.no_grad()
    def fold(self, dtype=torch.float32):
        """Make this network one for evaluation only, in place: weights in `dtype`, batch norms folded into the
        convolutions before them, and the scaling of pixels into the patch embedding. It takes frames [N, 3, C, H, W]
        in 0..255, grey or BGR."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Attention):
                for i in "qkv":
                    setattr(module, f"conv_proj_{i}", getattr(module, f"conv_proj_{i}").folded())
        self.patch_embed = PixelEmbed(self.patch_embed)
        return self.to(dtype, memory_format=torch.channels_last)

    def train_teacher(self):
        """Phase one: everything but the student."""
        for module in self.student_modules():
            module.requires_grad_(False)

    def train_student(self):
        """Phase two: everything but the student is frozen, its running statistics too."""
        self.requires_grad_(False)
        self.eval()
        for module in self.student_modules():
            module.requires_grad_(True).train()

    def encode_for_student(self, frames, noise):
        """-> what the student starts from (the teacher's first block), the teacher's prediction, mask."""
        latent, restore, mask = self.encode(frames, noise)
        shared = self.decoder_blocks[0](self.restore_tokens(latent, restore), self.grid)
        return shared, self.teacher_head(shared), mask

    def restore_tokens(self, latent, restore):
        """Mask tokens fill in and all return to their places: [N, 1 + kept, embed_dim] -> [N, 1 + L, decoder_dim]."""
        x = self.decoder_embed(latent)
        missing = self.mask_token.expand(x.shape[0], restore.shape[1] + 1 - x.shape[1], -1).to(x.dtype)
        return torch.cat([x[:, :1], take_tokens(torch.cat([x[:, 1:], missing], dim=1), restore)], dim=1)

    def teacher_head(self, shared):
        """The teacher's later blocks and prediction."""
        for block in self.decoder_blocks[1:]:
            shared = block(shared, self.grid)
        return self.decoder_pred(self.decoder_norm(shared))[:, 1:]

    def student_head(self, shared):
        """The student's block and prediction."""
        y = self.decoder_student_block(shared, self.grid)
        return self.decoder_student_pred(self.decoder_student_norm(y))[:, 1:]


# --------------------------------------------------------------------------------------------------- losses and scores


def token_weights(gradient, target, patch):
    """Weights [N, L] of the teacher's tokens, summing to 1 per image (section 3.3).

    gradient [N, 3, H, W] in 0..255; where the target's anomaly map (channel 3) is abnormal, the image's largest
    gradient, at least 128, is added. Without any gradient in an image, its tokens have equal weights.
    """
    strongest = gradient.flatten(1).amax(1).clamp(min=128).view(-1, 1, 1, 1)
    gradient = gradient + target[:, 3:].clamp(0, 1) * strongest
    weights = F.max_pool2d(gradient, patch).mean(1).flatten(1)
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=1e-12), 1 / weights.shape[1])


def teacher_loss(prediction, target, gradient, patch, *, weighted=True):
    """Squared error of each token, weighted by motion gradients, summed over the batch; target [N, 4, H, W]."""
    errors = (prediction.float() - patchify(target, patch)).pow(2).mean(2)
    weights = token_weights(gradient, target, patch) if weighted else 1 / errors.shape[1]
    return (errors * weights).sum()


def student_loss(student, teacher, mask):
    """Squared distance to the teacher on the removed tokens."""
    errors = (student.float() - teacher.detach().float()).pow(2).mean(2)
    return (errors * mask).sum() / mask.sum()


def error_maps(out, target, patch, norm="L2"):
    """-> distillation and reconstruction error of each token [N, L]; L2: squared, L1: absolute."""
    measure = torch.square if norm == "L2" else torch.abs
    teacher = out["teacher"].float()
    return measure(teacher - out["student"].float()).mean(2), measure(patchify(target, patch) - teacher).mean(2)


def pixel_errors(out, frame, patch, norm="L2"):
    """error_maps against a frame in 0..255 without anomaly: the same numbers with fewer passes over memory.

    frame uint8 [N, C, H, W], grey or BGR. -> [N, L] distillation error (0 without a student), [N, L] reconstruction
    error.
    """
    if frame.device.type == "cpu" and len(frame) > 1:  # one at a time stays in the processor's cache
        parts = [
            pixel_errors(
                {k: out[k][i : i + 1] for k in ("teacher", "student") if k in out}, frame[i : i + 1], patch, norm
            )
            for i in range(len(frame))
        ]
        return tuple(map(torch.cat, zip(*parts)))
    teacher = out["teacher"].float()
    n, length, size = teacher.shape
    measure = torch.Tensor.square_ if norm == "L2" else torch.Tensor.abs_
    if "student" in out:
        distill = measure(teacher - out["student"]).mean(2)
    else:
        distill = teacher.new_zeros(n, length)
    pixels = patchify(frame, patch).view(n, length, patch**2, -1).to(teacher.dtype).mul_(1 / 127.5).sub_(1)
    error = teacher.clone() if teacher is out["teacher"] else teacher
    error = error.view(n, length, patch**2, size // patch**2)
    error[..., :3] -= pixels
    error[..., 3] += 1  # the anomaly map of a normal frame is -1 everywhere
    return distill, measure(error).mean((2, 3))


def init_weights(net):
    """Xavier-uniform linear layers and patch embedding, N(0, 0.02) tokens, zero biases (as in MAE)."""
    for m in net.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    weight = net.patch_embed.proj.weight
    nn.init.xavier_uniform_(weight.view(len(weight), -1))
    for token in (net.cls_token, net.mask_token):
        nn.init.normal_(token, std=0.02)
