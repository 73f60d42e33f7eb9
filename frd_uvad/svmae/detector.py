"""The weakly supervised detector of SVMAE: multi-scale temporal network, fusion, RTFM losses. Imports torch only.

Scene-aware Probabilistic Masking and Fusion for Video Anomaly Detection, https://github.com/Sumutan/SVMAE. Parameter
names are the published ones.

    net = Detector(feature_size=1536, text_dim=768, fusion="concat", feature_group="both")
    visual, text = torch.rand(4, 1, 32, 1536), torch.rand(4, 1, 32, 768)   # 4 bags, 1 crop, 32 segments
    loss = losses(net(visual, text))["total"]   # the first half of the bags is normal, the second abnormal
"""

import torch
import torch.nn.functional as F
from torch import nn

FUSIONS = ("concat", "add", "product", "add_up")
PAPER_WIDTH = 1536  # of the paper's features, which the margin of its loss is for


class NonLocal(nn.Module):
    """Dot-product attention over time, divided by the number of segments. [N, C, T] -> the same shape"""

    def __init__(self, dim):
        super().__init__()
        self.g, self.theta, self.phi = (nn.Conv1d(dim, dim // 2, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv1d(dim // 2, dim, 1), nn.BatchNorm1d(dim))
        nn.init.zeros_(self.W[1].weight)
        nn.init.zeros_(self.W[1].bias)

    def forward(self, x):
        query, key = self.theta(x).transpose(1, 2), self.phi(x)
        value = self.g(x).transpose(1, 2)
        if x.shape[2] > x.shape[1]:  # without a softmax the order is free: a long video needs no [N, T, T]
            attended = query @ (key @ value / x.shape[2])
        else:
            attended = query @ key / x.shape[2] @ value
        return self.W(attended.transpose(1, 2)) + x


class Aggregate(nn.Module):
    """Multi-scale temporal network (Tian et al., ICCV 2021). [N, T, C] -> the same shape"""

    def __init__(self, dim):
        super().__init__()
        quarter = dim // 4

        def dilated(step):
            return nn.Sequential(
                nn.Conv1d(dim, quarter, 3, padding=step, dilation=step), nn.ReLU(), nn.BatchNorm1d(quarter)
            )

        self.conv_1, self.conv_2 = dilated(1), dilated(2)
        self.conv_3 = dilated(4)
        self.conv_4 = nn.Sequential(nn.Conv1d(dim, quarter, 1, bias=False), nn.ReLU())
        self.non_local = NonLocal(quarter)
        self.conv_5 = nn.Sequential(nn.Conv1d(dim, dim, 3, padding=1, bias=False), nn.ReLU(), nn.BatchNorm1d(dim))

    def forward(self, x):
        x = x.transpose(1, 2)
        scales = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.non_local(self.conv_4(x))]
        return (self.conv_5(torch.cat(scales, dim=1)) + x).transpose(1, 2)


def fit_length(text, length):
    """Text rows cut, or their last row repeated, to the number of visual ones. [N, T', C] -> [N, length, C]"""
    if text.shape[1] >= length:
        return text[:, :length]
    return torch.cat([text, text[:, -1:].expand(-1, length - text.shape[1], -1)], dim=1)


class Detector(nn.Module):
    """Scores of a video's segments from visual features and, with feature_group `both`, text features.

    aggregate_text: whether text passes another multi-scale temporal network before the fusion. input_size: width of
    visual features that `components` brings to feature_size, see fit_components(); None: they have it.

    forward: visual [B, crops, T, C], text [B, crops, T', D] or None -> {"scores": [B, T, 1], "magnitudes": [B, T],
    "features": [crops, B, T, width]}.
    """

    def __init__(
        self,
        *,
        feature_size=1536,
        text_dim=768,
        fusion="concat",
        feature_group="both",
        aggregate_text=True,
        dropout=0.7,
        input_size=None,
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion {fusion!r}: expected one of {', '.join(FUSIONS)}")
        if feature_group not in ("both", "vis", "text"):
            raise ValueError(f"feature_group {feature_group!r}: expected both, vis or text")
        self.fusion, self.group = fusion, feature_group
        self.aggregate_text = aggregate_text
        if input_size:
            self.register_buffer("mean", torch.zeros(input_size))
            self.register_buffer("components", torch.zeros(input_size, feature_size))
        self.reduces = bool(input_size)
        # published files hold both networks, also where only one of them is applied
        self.Aggregate = Aggregate(feature_size)
        self.Aggregate_text = Aggregate(text_dim)
        if feature_group == "both" and fusion in ("add", "product"):
            self.fc0 = nn.Linear(feature_size, text_dim)
            width = text_dim
        elif feature_group == "both":
            width = feature_size + text_dim
            if fusion == "add_up":
                self.fc_vis = nn.Linear(feature_size, width)
                self.fc_text = nn.Linear(text_dim, width)
        else:
            width = feature_size if feature_group == "vis" else text_dim
        self.fc1 = nn.Linear(width, 512)
        self.fc2 = nn.Linear(512, 128)
        self.fc3 = nn.Linear(128, 1)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(self.not_applied))

    @property
    def not_applied(self):
        """Prefixes of the parameters that this configuration holds, as published files do, and does not use."""
        text = () if self.aggregate_text and self.group != "vis" else ("Aggregate_text.",)
        return text + (("Aggregate.",) if self.group == "text" else ())

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As torch's, but parameters that are not applied may be missing; layers of an unused fusion are ignored."""
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [k for k in keys.missing_keys if not k.startswith(self.not_applied)]
        fusion_layers = () if self.group == "both" else ("fc0.", "fc_vis.", "fc_text.")
        unexpected = [k for k in keys.unexpected_keys if not k.startswith(fusion_layers)]
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing parameters {missing[:3]}, unexpected parameters {unexpected[:3]}")
        return keys

    def fuse(self, visual, text):
        """[N, T, C], [N, T, D] -> [N, T, width]"""
        if self.fusion == "concat":
            return torch.cat([visual, text], dim=2)
        if self.fusion == "add_up":
            return self.dropout(F.relu(self.fc_vis(visual))) + self.dropout(F.relu(self.fc_text(text)))
        visual = self.dropout(F.relu(self.fc0(visual)))
        return visual + text if self.fusion == "add" else visual * text

    def encode_text(self, text, length):
        """[N, T', D] -> [N, length, D]; without `aggregate_text` the rows are fused as they are."""
        if self.aggregate_text:
            text = self.dropout(self.Aggregate_text(text))
        return fit_length(text, length)

    def forward(self, visual, text=None):
        b, crops, length, _ = visual.shape
        if self.reduces:
            visual = (visual - self.mean) @ self.components
        if self.group == "text":
            x = self.encode_text(text.flatten(0, 1), length)
        else:
            x = self.dropout(self.Aggregate(visual.flatten(0, 1)))
            if self.group == "both":
                x = self.fuse(x, self.encode_text(text.flatten(0, 1), length))
        h = self.dropout(F.relu(self.fc1(x)))
        h = self.dropout(F.relu(self.fc2(h)))
        # in float32 under autocast too: bf16 makes ties of high scores, and what it rounds to 1 has no gradient
        scores = torch.sigmoid((h.float() * self.fc3.weight).sum(-1) + self.fc3.bias)
        scores = scores.view(b, crops, length, 1).mean(1)
        features = x.view(b, crops, length, -1).transpose(0, 1)
        return {"scores": scores, "magnitudes": features.norm(dim=3).mean(0), "features": features}


def fit_components(x, count):
    """The first principal components of features x [M, C], each channel scaled to deviation 1: ours, for few bags.

    A channel of small values, such as a deviation over frames, so counts as much as one of large values. -> mean [C],
    matrix [C, count]: the root mean square of (x - mean) @ matrix over rows and components is 1.
    """
    x = x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = std + 1e-3 * std.mean() + 1e-8
    y = (x - mean) / std
    values, vectors = torch.linalg.eigh(y.T @ y / len(y))  # from the smallest
    scale = values[-count:].clamp(min=0).mean().clamp(min=1e-12).sqrt()
    matrix = vectors[:, -count:].flip(1) / (std[:, None] * scale)
    return mean.float(), matrix.float().contiguous()  # NCCL broadcasts nothing else


def select(out, bags, top_k, dropout=0.0):
    """The top_k segments by feature magnitude of the bags in a slice.

    -> their features [crops · bags, top_k, width] (crops outermost), mean score [bags, 1]. dropout: share of hidden
    segments.
    """
    magnitudes = out["magnitudes"][bags]
    if dropout:
        magnitudes = magnitudes * F.dropout(torch.ones_like(magnitudes), dropout)
    index = magnitudes.topk(top_k, dim=1).indices  # [bags, k]
    features = out["features"][:, bags]
    selected = features.gather(2, index[None, :, :, None].expand(len(features), -1, -1, features.shape[3])).flatten(
        0, 1
    )
    return selected, out["scores"][bags].gather(1, index[:, :, None]).mean(1)


def margin_of(width):
    """The margin of features of this width, and the weight of its loss, which stays as large as at PAPER_WIDTH."""
    share = width / PAPER_WIDTH
    return {"margin": 100.0 * share**0.5, "alpha": 1e-4 / share}


def losses(out, *, top_k=3, margin=100.0, alpha=1e-4, smooth=8e-4, sparse=8e-3, dropout=0.0):
    """RTFM's losses; the first half of the bags is normal, the second abnormal.

    margin, alpha: the published ones, for features of PAPER_WIDTH; magnitudes grow with the root of the width, see
    margin_of().
    -> {"total", "rtfm", "smooth", "sparsity"} and the selected features and scores.
    """
    half = len(out["scores"]) // 2
    normal, normal_score = select(out, slice(0, half), top_k, dropout)
    abnormal, abnormal_score = select(out, slice(half, None), top_k, dropout)
    score = torch.cat([normal_score, abnormal_score])[:, 0]
    label = torch.cat([torch.zeros_like(normal_score), torch.ones_like(abnormal_score)])[:, 0]
    far = (margin - abnormal.mean(1).norm(dim=1)).abs()
    near = normal.mean(1).norm(dim=1)
    # NaN stays NaN, but does not reach CUDA's cross-entropy, which would end the process
    entropy = F.binary_cross_entropy(score.nan_to_num(0.5), label) + 0 * score.sum()
    rtfm = entropy + alpha * (far + near).pow(2).mean()
    # all abnormal bags one after another, as published: the norm and some differences span bags
    scores = out["scores"][half:].flatten()
    parts = {
        "rtfm": rtfm,
        "smooth": smooth * (scores[1:] - scores[:-1]).pow(2).sum(),
        "sparsity": sparse * scores.norm(),
    }
    return {
        "total": sum(parts.values()),
        **parts,
        "feat_normal": normal,
        "feat_abnormal": abnormal,
        "score_normal": normal_score,
        "score_abnormal": abnormal_score,
    }
