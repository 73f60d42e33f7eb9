"""Speed of the scoring network of AED-MAE by torch, onnxruntime and OpenVINO, in turn, on random frames.

python tests/tools/runtimes.py                                        # 320 x 640, patch 16, random weights
python tests/tools/runtimes.py --image-size 192x288 --patch 8 --batch 1

Needs onnx, onnxscript and onnxruntime; OpenVINO is measured where it is installed (pip install openvino).
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from common import cli
from common.distributed import Run, seed_everything
from common.io import run_script
from sdmae import export, scoring
from sdmae.runtime import OnnxScorer
from tests.perf.rates import line, rates


def openvino_scorer(path):
    """token_errors(frames, numbers) of an exported network by OpenVINO; None where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino

    network = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda frames, numbers: network({"frames": frames, "numbers": numbers})[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", default="320x640", help="HEIGHTxWIDTH (default: %(default)s)")
    parser.add_argument("--patch", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="frames at once (default: 1 16)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default: %(default)s)")
    args = parser.parse_args(argv)
    size = cli.parse_size("--image-size", args.image_size, 8192, "HEIGHTxWIDTH, such as 320x640")
    seed_everything(0)
    net = scoring.build_model({"patch_size": args.patch, "image_size": size}).eval()
    config = scoring.score_config("avenue")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export.export(net, config, None, path)
        exact = scoring.Scorer(net, config, Run("cpu", "fp32"))
        ways = {
            "torch, float32": exact.token_errors,
            "torch, bf16": scoring.Scorer(net, config, Run("cpu", "bf16")).token_errors,
            "onnxruntime, float32": OnnxScorer(path).token_errors,
            "OpenVINO, float32": openvino_scorer(path),
        }
        ways = {name: way for name, way in ways.items() if way is not None}
        print(f"AED-MAE, {size[0]}×{size[1]}, {net.tokens} tokens, {torch.get_num_threads()} threads of torch")
        for batch in args.batch:
            frames = np.random.default_rng(0).integers(0, 256, (batch, 3, *size, 3), np.uint8)
            numbers = np.arange(batch)
            expected = exact.token_errors(frames, numbers)
            functions = [lambda way=way, frames=frames, numbers=numbers: way(frames, numbers) for way in ways.values()]
            for name, function, rate in zip(
                ways, functions, rates(functions, batch, torch.device("cpu"), args.seconds)
            ):
                off = np.abs(function() - expected).max() / expected.max()
                line(f"{name}, {batch} at once", rate, "frames/s", f"errors differ by {off:.1e}")


if __name__ == "__main__":
    run_script(main)
