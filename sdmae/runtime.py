"""Scoring with a network that sdmae/export.py wrote, by onnxruntime."""

import json
from pathlib import Path

import numpy as np

from common.io import UserError, first_line
from sdmae.scoring import ScoreConfig


class OnnxScorer:
    """What scoring.Scorer is for live.py. state: {"statistics": …}; size: (height, width) of the frames.

    Raises UserError where the file is not one of ours, or onnxruntime is missing.
    """

    def __init__(self, path):
        try:
            import onnxruntime
        except ImportError:
            raise UserError("--runtime onnx needs a package: pip install onnxruntime") from None
        if not Path(path).is_file():
            raise UserError(f"checkpoint {path} is missing: write it with sdmae/eval.py --export")
        try:
            # TensorRT would build its engine for minutes, CoreML compute in float16
            providers = [x for x in onnxruntime.get_available_providers() if not x.startswith(("Tensorrt", "CoreML"))]
            self.session = onnxruntime.InferenceSession(str(path), providers=providers)
            metadata = json.loads(self.session.get_modelmeta().custom_metadata_map["sdmae"])
        except Exception as e:  # onnxruntime raises many kinds
            raise UserError(f"checkpoint {path} was not written by sdmae/eval.py --export ({first_line(e)})") from None
        self.config = ScoreConfig(**{**metadata["config"], "parts": tuple(metadata["config"]["parts"])})
        self.grid, self.size = tuple(metadata["grid"]), tuple(metadata["size"])
        self.state = {"statistics": metadata["statistics"]}

    def token_errors(self, frames: np.ndarray, numbers) -> np.ndarray:
        """As scoring.Scorer.token_errors()."""
        frames = np.repeat(frames, 3, axis=4) if frames.shape[4] == 1 else frames
        return self.session.run(None, {"frames": frames, "numbers": np.asarray(numbers, np.int64)})[0]
