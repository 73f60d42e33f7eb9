"""Scene-aware autoencoder of frame features: a transformer that reconstructs segments, and a contrastive loss over
scenes.

The authors published code and results, https://github.com/SkiddieAhn/Study-Scene-aware-VAD. Imports torch only.
Parameter names are the published ones.

    net = SceneAwareAE(input_dim=768, num_scenes=4)
    features, scenes = torch.randn(8, 16, 768), torch.arange(8) // 2   # 8 segments of 16 frames
    loss = losses(net(features), features, scenes, mode=1)["total"]
"""

import torch
import torch.nn.functional as F
from torch import nn


def layers(dim, heads, hidden, depth, dropout):
    layer = nn.TransformerEncoderLayer(dim, heads, hidden, dropout, batch_first=True)  # post-norm, ReLU
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class SceneAwareAE(nn.Module):
    """Post-norm transformer autoencoder. The scene feature is the mean over a segment's frames after the latent.

    variational: the latent is drawn from a normal distribution whose mean and log-variance are predicted per frame.
    """

    def __init__(
        self,
        *,
        input_dim=768,
        hidden_dim=256,
        latent_dim=256,
        num_scenes=4,
        num_layers=2,
        num_heads=4,
        dropout=0.1,
        max_length=512,
        variational=False,
    ):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, max_length, input_dim))
        self.encoder = layers(input_dim, num_heads, hidden_dim, num_layers, dropout)
        self.decoder = layers(input_dim, num_heads, hidden_dim, num_layers, dropout)
        self.proj_to_latent = nn.Linear(input_dim, latent_dim)
        self.proj_to_log_variance = nn.Linear(input_dim, latent_dim) if variational else None
        self.recon_to_org = nn.Linear(latent_dim, input_dim)
        self.output_proj = nn.Linear(input_dim, input_dim)
        self.classifier = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, num_scenes)
        )

    def forward(self, features):
        """[N, T, D] -> {"recon": [N, T, D], "scene_feature": [N, D], "logits": [N, scenes]}.

        The variational variant adds "mean" and "log_variance" [N, T, latent].
        """
        out = {}
        x = self.encoder(features + self.pos_embedding[:, : features.shape[1]])
        latent = self.proj_to_latent(x)
        if self.proj_to_log_variance is not None:
            out["mean"], out["log_variance"] = latent, self.proj_to_log_variance(x).clamp(-20, 20)
            if self.training:
                latent = latent + torch.randn_like(latent) * (out["log_variance"] / 2).exp()
        x = self.recon_to_org(latent)
        out["scene_feature"] = x.mean(1)
        out["logits"] = self.classifier(out["scene_feature"])
        out["recon"] = self.output_proj(self.decoder(x))
        return out


def supcon(features, scenes, temperature=0.07):
    """Supervised contrastive loss (Khosla et al. 2020): positives are the other segments of the same scene.

    features [N, D], scenes int64 [N]; the only segment of a scene has no positives and is left out.
    """
    z = F.normalize(features.float(), dim=1)
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (scenes[:, None] == scenes) & ~itself
    count = positive.sum(1)
    each = -(log_p * positive).sum(1) / count.clamp(min=1)
    return (each * (count > 0)).sum() / (count > 0).sum().clamp(min=1)


def losses(out, features, scenes, *, mode=1, temperature=0.07):
    """-> {"total", "mse", and by mode "supcon" (1, 2), "ce" (2); "kl" of the variational variant}."""
    parts = {"mse": F.mse_loss(out["recon"].float(), features.float())}
    total = 2 * parts["mse"]
    if mode >= 1:
        parts["supcon"] = supcon(out["scene_feature"], scenes, temperature)
        total = total + parts["supcon"]
    if mode == 2:
        parts["ce"] = F.cross_entropy(out["logits"].float(), scenes)
        total = total + 0.05 * parts["ce"]
    if "log_variance" in out:
        mean, log_variance = out["mean"].float(), out["log_variance"].float()
        parts["kl"] = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()
        total = total + parts["kl"]
    return {"total": total, **parts}


def segment_scores(recon, features):
    """Maximum over a segment's frames of the mean squared error of their features. [N, T, D] -> [N]"""
    return (recon.float() - features.float()).pow(2).mean(2).amax(1)
