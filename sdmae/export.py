"""The scoring network as one ONNX file; runtime.py and camera.py score with it.

    python sdmae/eval.py --checkpoint runs/sdmae/folder/sdmae.pt --export sdmae.onnx
    python sdmae/eval.py --video my.mp4 --checkpoint sdmae.onnx --runtime onnx
    python sdmae/camera.py --video 0 --model sdmae.onnx          # needs only numpy, OpenCV and onnxruntime

Inputs: frames t-3, t and t+3, uint8 [N, 3, H, W, 3] BGR at the network's size; their numbers t, int64 [N], which choose
the masks. Output: token_errors, float32 [N, rows, columns], the configured errors summed and averaged over masks. The
metadata entry `sdmae` holds as JSON what else scoring needs: sizes, the configuration, scores of normal frames.
"""

import json
from pathlib import Path

import torch
from torch import nn

from common.distributed import Run
from common.io import UserError, atomic_write
from sdmae import model, scoring
from sdmae.data import NOISE_ROWS

OPSET = 18
PACKAGES = "pip install onnx onnxscript onnxruntime"


class ScoringNetwork(nn.Module):
    """frames uint8 [N, 3, H, W, 3], numbers int64 [N] -> the configured error of every token [N, rows, columns]."""

    def __init__(self, scorer: scoring.Scorer):
        super().__init__()
        self.net, self.config = scorer.net, scorer.config
        self.patch, self.grid = scorer.patch, scorer.grid
        self.register_buffer("tables", scorer.tables)

    def forward(self, frames, numbers):
        seen = frames.permute(0, 1, 4, 2, 3)
        image = seen[:, 1].float() / 127.5 - 1
        target = torch.cat([image, torch.full_like(image[:, :1], -1)], dim=1)  # no anomaly
        removed_only = self.config.tokens == "removed"
        distilled = reconstructed = 0
        removed = 0
        for table in self.tables:
            out = self.net(seen, table[numbers % NOISE_ROWS])
            d, r = model.error_maps(out, target, self.patch, self.config.norm)
            distilled = distilled + (d * out["mask"] if removed_only else d)
            reconstructed, removed = reconstructed + r, removed + out["mask"]
        draws = len(self.tables)
        parts = {
            "distillation": distilled / (removed.clamp(min=1) if removed_only else draws),
            "reconstruction": reconstructed / draws,
        }
        return sum(parts[name] for name in self.config.parts).unflatten(1, self.grid)


def export(net, config, statistics: dict | None, path, *, draws: int = 1) -> None:
    """Write a trained network as ONNX (opset 18, any batch), in float32 from the CPU. statistics: as
    scoring.statistics() makes them, or None.

    Raises UserError where the packages are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UserError(f"--export needs the package {e.name}: {PACKAGES}") from None
    scorer = scoring.Scorer(net, config, Run("cpu", "fp32"), draws=draws)
    height, width = (n * scorer.patch for n in scorer.grid)
    metadata = {
        "size": [height, width],
        "grid": list(scorer.grid),
        "config": config.state_dict(),
        "statistics": statistics,
    }
    inputs = torch.zeros(2, 3, height, width, 3, dtype=torch.uint8), torch.arange(2)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.inference_mode(), atomic_write(Path(path)) as tmp:
        program = torch.onnx.export(
            ScoringNetwork(scorer).eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=["frames", "numbers"],
            output_names=["token_errors"],
            dynamic_shapes={"frames": {0: batch}, "numbers": {0: batch}},
            verbose=False,
        )
        program.model.metadata_props["sdmae"] = json.dumps(metadata)
        program.save(tmp, external_data=False)
