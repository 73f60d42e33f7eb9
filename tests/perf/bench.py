"""Speed of a method on this machine, and the plain version beside it.

python tests/perf/bench.py hf2vad --dataset demo                     # scoring; any flag of hf2vad/eval.py
python tests/perf/bench.py hf2vad train --dataset demo --seconds 5   # training; any flag of hf2vad/train.py
python tests/perf/bench.py svmae pretrain --dataset folder --data-root videos
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose profile.py is not Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.io import UserError, run_script

PARTS = {
    "hf2vad": ("eval", "train"),
    "spr_uvad": ("train",),
    "sdmae": ("eval", "train"),
    "scene_aware_ae": ("eval", "train"),
    "frd_uvad": ("train",),
    "svmae": ("pretrain",),
}  # the first one by default


def seconds(text):
    value = float(text)
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"{text} seconds must be above 0")
    return value


def main(argv=None):
    from common.distributed import Run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=PARTS)
    parser.add_argument("part", nargs="?", choices=["eval", "train", "pretrain"], help="the script that is measured")
    parser.add_argument("--seconds", type=seconds, default=2.0, help="of each measurement (default: %(default)s)")
    args, rest = parser.parse_known_args(argv)
    part = args.part or PARTS[args.method][0]
    if part not in PARTS[args.method]:
        raise UserError(f"{args.method} has no {part} to measure; choose {' or '.join(PARTS[args.method])}")
    package = "frd_uvad.svmae" if args.method == "svmae" else args.method
    flags = importlib.import_module(f"{package}.{part}").parse(rest)
    measure = getattr(importlib.import_module(f"tests.perf.bench_{args.method}"), f"measure_{part}")
    with Run(flags.device, flags.precision) as run:
        measure(flags, args.seconds, run)


if __name__ == "__main__":
    run_script(main)
