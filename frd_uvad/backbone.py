"""Video networks of torchvision as encoders of clips."""

from pathlib import Path

import cv2
import numpy as np
import torch

from common.io import UserError, first_line
from common.training import load_checkpoint

BACKBONES = ("s3d", "r3d_18", "mc3_18", "r2plus1d_18", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b")
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # of torchvision's Kinetics models
SIDE, RESIZED = 224, 256


class Backbone:
    """A torchvision video network without its classifier.

    weights: torchvision's name of them, or a file; crops: views of each clip, 1 or 10. Raises UserError.
    """

    def __init__(self, name: str, weights, crops: int, run):
        from torchvision.models import get_model

        if name not in BACKBONES:
            raise UserError(f"--backbone {name} is not known; choose statistics or one of {', '.join(BACKBONES)}")
        is_file = weights is not None and Path(weights).is_file()
        try:
            net = get_model(name, weights=None if is_file else weights)
            if is_file:
                net.load_state_dict(load_checkpoint(weights))
        except UserError:
            raise
        except Exception as e:  # torchvision and the network raise many kinds
            raise UserError(
                f"--backbone {name}:{weights} could not be loaded ({first_line(e)}); without a network put the file of "
                f"torchvision's {name} weights here and give --backbone {name}:FILE, or take --backbone statistics"
            ) from None
        for head in ("classifier", "head", "fc"):
            if hasattr(net, head):
                setattr(net, head, torch.nn.Identity())
        self.net, self.crops = net.eval().requires_grad_(False).to(run.device), crops
        self.run = run
        for p in self.net.parameters():
            if p.ndim == 5:
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        self.mean, self.std = (torch.tensor(x, device=run.device).view(3, 1, 1, 1) for x in (MEAN, STD))

    def views(self, clip: np.ndarray) -> torch.Tensor:
        """uint8 [T, H, W, C] BGR or grey -> [crops, 3, T, 224, 224] RGB: the centre; or corners and centre, and
        their mirror images."""
        h, w = clip.shape[1:3]
        scale = RESIZED / min(h, w)
        size = max(SIDE, round(w * scale)), max(SIDE, round(h * scale))
        frames = np.stack([cv2.resize(f, size).reshape(size[1], size[0], -1) for f in clip])
        x = torch.from_numpy(frames).to(self.run.device).permute(3, 0, 1, 2)
        x = (x.flip(0) if x.shape[0] == 3 else x.expand(3, -1, -1, -1)).float() / 255
        x = (x - self.mean) / self.std
        bottom, right = x.shape[2] - SIDE, x.shape[3] - SIDE
        corners = [(bottom // 2, right // 2)]
        if self.crops == 10:
            corners += [(0, 0), (0, right), (bottom, 0), (bottom, right)]
        views = [x[:, :, top : top + SIDE, left : left + SIDE] for top, left in corners]
        return torch.stack(views + [v.flip(3) for v in views] if self.crops == 10 else views)

    @torch.inference_mode()
    def encode(self, clips: list[np.ndarray]) -> np.ndarray:
        """Clips uint8 [T, H, W, C] -> float32 [n, crops, width]."""
        with self.run.autocast():
            x = self.net(torch.cat([self.views(c) for c in clips]).contiguous(memory_format=torch.channels_last_3d))
        return x.float().flatten(1).view(len(clips), self.crops, -1).cpu().numpy()
