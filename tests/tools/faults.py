"""Kill every script again and again at random moments, start it anew each time, and compare what it ends with to an
uninterrupted run: weights, features, cubes and scores must be equal to the last bit (CPU, one thread).

    python tests/tools/faults.py --kills 20                   # all scripts; 25 minutes on one core
    python tests/tools/faults.py --kills 20 --only hf2vad spr_uvad/train.py
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from common import training
from common.io import load_array, load_arrays
from tests.helpers import ROOT, tiny_folder

FOLDER = ["--dataset", "folder", "--workers", "1", "--device", "cpu"]
TRAINING = {  # --save-minutes 0 saves after every step, so that a kill finds something half done
    "hf2vad": "--size small --epochs 2,1,1 --batch-size 16 --motion-area 60 --save-minutes 0".split(),
    "spr_uvad": "--size small --epochs 3 --warmup 1 --batch-size 16 --save-minutes 0 --flow".split(),
    "sdmae": "--size small --image-size 32x64 --patch 8 --epochs 3 --batch-size 8 --save-minutes 0".split(),
    "scene_aware_ae": (
        "--encoder stand-in:autoencoder --stand-in-steps 30 --iterations 200 --segments-per-scene 4"
        " --mode 0 --save-minutes 0"
    ).split(),
    "frd_uvad": "--epochs 3 --batch-size 8 --num-blocks 2 --cross-clip 2 --auxiliary self --save-minutes 0".split(),
    "frd_uvad/svmae": (
        "--preset tiny --size 32 --frames 4 --stride 1 --batch-size 6 --epochs 4 --save-minutes 0"
    ).split(),
}
PREPARING = {
    "hf2vad": ["--motion-area", "60"],
    "spr_uvad": [],
    "sdmae": ["--image-size", "32x64", "--patch", "8"],
    "scene_aware_ae": ["--encoder", "stand-in:autoencoder", "--stand-in-steps", "30"],
    "frd_uvad": [],
}
CHECKPOINTS = {
    "hf2vad": "finetune.pt",
    "spr_uvad": "spr.pt",
    "sdmae": "sdmae.pt",
    "scene_aware_ae": "scene_aware_ae.pt",
    "frd_uvad": "frd.pt",
}


def jobs(base, root):
    """{script: flags}, in an order in which each finds what it needs in the uninterrupted runs of those before it."""
    out = {}
    for method, flags in PREPARING.items():
        out[f"{method}/preprocess.py"] = [*FOLDER, "--data-root", root, *flags]
        out[f"{method}/train.py"] = [*FOLDER, "--data-root", root, *TRAINING[method], "--protocol", "strict"]
        checkpoint = base / "whole" / f"{method}_train.py" / "out" / CHECKPOINTS[method]
        out[f"{method}/eval.py"] = [*FOLDER, "--data-root", root, "--checkpoint", checkpoint]
    encoder = base / "whole" / "frd_uvad_svmae_pretrain.py" / "out" / "pretrain.pt"
    features = base / "whole" / "frd_uvad_svmae_preprocess.py" / "out"
    detector = base / "whole" / "frd_uvad_svmae_train.py" / "out" / "detector.pt"
    out["frd_uvad/svmae/pretrain.py"] = [*FOLDER, "--data-root", root, *TRAINING["frd_uvad/svmae"]]
    out["frd_uvad/svmae/preprocess.py"] = [*FOLDER, "--data-root", root, "--checkpoint", encoder, "--encode-batch", "1"]
    out["frd_uvad/svmae/train.py"] = [
        "--features",
        features,
        "--iterations",
        "200",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--save-minutes",
        "0",
    ]
    out["frd_uvad/svmae/eval.py"] = ["--features", features, "--checkpoint", detector, "--device", "cpu"]
    return out


def command_of(name, flags, place):
    """The script with a cache and an output folder of its own. preprocess.py of a method writes into the cache
    alone."""
    where = [] if name in ("frd_uvad/svmae/train.py", "frd_uvad/svmae/eval.py") else ["--cache", place / "cache"]
    return [sys.executable, ROOT / name, *flags, *where, "--out", place / "out"]


def start(command, log):
    return subprocess.Popen(
        [str(x) for x in command],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(name, command, place):
    with open(place / "log.txt", "w") as log:
        if start(command, log).wait() != 0:
            raise SystemExit(f"{name} failed:\n{(place / 'log.txt').read_text()[-3000:]}")


def killed(name, command, place, kills, seconds, rng):
    """Start and kill the script until it was killed so often; then let it finish. -> numbers of kills, and of runs
    that ended before theirs and began anew."""
    early = done = 0
    while done < kills and early < 2 * kills:
        with open(place / "log.txt", "w") as log:
            began, process = time.perf_counter(), start(command, log)
            try:
                if process.wait(rng.uniform(0.3, 1.0) * seconds) != 0:
                    raise SystemExit(f"{name} failed after a kill:\n{(place / 'log.txt').read_text()[-3000:]}")
                early += 1  # it was done: from the beginning again, and faster than was thought
                seconds = min(seconds, time.perf_counter() - began)
                for x in ("cache", "out"):
                    shutil.rmtree(place / x, ignore_errors=True)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
    finish(name, command, place)
    return done, early


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def differences(a, b):
    """Files of `a` that `b` lacks or holds otherwise: arrays, archives and the weights of checkpoints."""
    out = []
    for path in sorted(p for p in a.rglob("*") if p.suffix in (".npy", ".npz", ".pt") and not p.name.startswith(".")):
        other = b / path.relative_to(a)
        if not other.exists():
            out.append(f"{path.relative_to(a)} is missing")
        elif path.suffix == ".npy":
            x, y = load_array(path, "array"), load_array(other, "array")
            if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                out.append(f"{path.relative_to(a)} differs")
        elif path.suffix == ".npz":
            x, y = load_arrays(path, "archive"), load_arrays(other, "archive")
            if x.keys() != y.keys() or any(not np.array_equal(x[k], y[k]) for k in x if k not in ("seconds", "source")):
                out.append(f"{path.relative_to(a)} differs")
        else:
            x, y = (training.load_checkpoint(p) for p in (path, other))
            if not all(same(x.get(k), y.get(k)) for k in ("model_state_dict", "encoder")):
                out.append(f"the weights in {path.relative_to(a)} differ")
    return out + [f"{p.relative_to(b)} was left behind" for p in b.rglob(".*.part*")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of every script (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=None, help="scripts, or methods, to kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    base, failed = Path(tempfile.mkdtemp(prefix="faults ")), 0
    root = tiny_folder(base / "data", train=4, frames=40)
    (root / "normal.txt").write_text("a0\na1\n")
    (root / "abnormal.txt").write_text("a2\na3\n")
    chosen = jobs(base, root)
    wanted = [n for n in chosen if not args.only or any(n == x or n.startswith(x.rstrip("/") + "/") for x in args.only)]
    for name, flags in chosen.items():
        methods = {n.rsplit("/", 1)[0] for n in wanted}
        if name.rsplit("/", 1)[0] not in methods:
            continue
        place = base / "whole" / name.replace("/", "_")
        place.mkdir(parents=True)
        began = time.perf_counter()
        finish(name, command_of(name, flags, place), place)
        seconds = time.perf_counter() - began
        if name not in wanted:
            continue
        other = base / "killed" / name.replace("/", "_")
        other.mkdir(parents=True)
        kills, early = killed(
            name, command_of(name, flags, other), other, args.kills, seconds, random.Random(f"{args.seed} {name}")
        )
        found = differences(place, other)
        failed += bool(found)
        print(
            f"{name}: {kills} kills, {early} runs were done before theirs; "
            + (f"DIFFERS: {'; '.join(found[:5])}" if found else f"equal to the uninterrupted run ({seconds:.1f} s)"),
            flush=True,
        )
    if failed:
        raise SystemExit(f"{failed} scripts did not end as they do undisturbed; see {base}")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
