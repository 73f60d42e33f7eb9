"""One command that proves every method on a GPU, and measures it there. No network and no dataset are needed.

    python tests/perf/gpu.py --out gpu                                   # at most 9 minutes on an H100
    python tests/perf/gpu.py --out gpu --data-root data                  # and HF2-VAD on Ped2, if time is left
    python tests/perf/gpu.py --out gpu --device cpu --quick              # the same parts at toy size

golden   every golden case on the device, in float32 without TF32
agree    every method trained on the device and on the CPU from one seed: loss of the first epoch; the device's
         checkpoint scored by both in float32, and in bf16
resume   a training that is killed and started again
rates    speed, share of the card's bf16 rate, peak memory, share of time spent waiting for data (gpu_rates.py)
ped2     HF2-VAD on Ped2 at the published schedule, as far as it comes

OUT/gpu.json and OUT/gpu.md are written after every step, OUT/gpu.log holds what the scripts print. Ends with 1 where
something fell short or did not run.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.pop(0)  # this folder, whose profile.py is not Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common.io import atomic_write, first_line, run_script, writable_folder, write_json

ROOT = Path(__file__).resolve().parents[2]
SCORES_AGREE = 0.01  # largest difference of two scores of a frame in float32, in deviations of all scores
LOSSES_AGREE = 0.05  # relative, of the first epoch: the devices draw other random numbers
AUC_AGREES = 0.005  # of bf16 and float32
WEIGHTS_AGREE = 1e-3  # of a resumed and an uninterrupted training on a GPU, relative to the largest weight
MARKS = {None: "", True: "✓", False: "✗"}
DEAD = 3  # exit code of a child whose device is lost: the next child goes on

# the smallest runs that use every part of a method; the second ones are toys
FLAGS = {
    "hf2vad": ("--size small --epochs 1,1,0", "--size small --epochs 1,1,0 --batch-size 16 --motion-area 60"),
    "spr_uvad": (
        "--size small --epochs 2 --warmup 1 --flow",
        "--size small --epochs 2 --warmup 1 --flow --batch-size 16",
    ),
    "sdmae": ("--size small --epochs 2", "--size small --epochs 2 --image-size 32x64 --patch 8 --batch-size 8"),
    "scene_aware_ae": (
        "--encoder stand-in:autoencoder --stand-in-steps 200 --iterations 400",
        "--encoder stand-in:autoencoder --stand-in-steps 20 --iterations 40 --segments-per-scene 4 --mode 0",
    ),
    "frd_uvad": ("--epochs 3 --batch-size 64", "--epochs 2 --batch-size 8 --num-blocks 2 --cross-clip 2"),
}
CHECKPOINTS = {
    "hf2vad": "cvae.pt",
    "spr_uvad": "spr.pt",
    "sdmae": "sdmae.pt",
    "scene_aware_ae": "scene_aware_ae.pt",
    "frd_uvad": "frd.pt",
}
SVMAE = "--preset tiny --size 32 --frames 4 --stride 1 --batch-size 6 --epochs 2"


@dataclass
class Line:
    """One result. ok: None where there is nothing to reach."""

    part: str
    what: str
    value: float | str
    unit: str = ""
    aim: str = ""
    ok: bool | None = None
    note: str = ""


class Bench:
    """What the parts need of this run; lines are appended to a file that the parent reads."""

    def __init__(self, out: Path, device: str, quick: bool, data_root: Path | None, deadline: float):
        self.out, self.work = out, out / "work"
        self.device, self.quick = device, quick
        self.data_root, self.deadline = data_root, deadline
        self.part = ""

    def left(self) -> float:
        """Seconds until the end."""
        return self.deadline - time.time()

    def add(self, what: str, value, unit="", *, aim="", ok=None, note="") -> None:
        value = float(value) if isinstance(value, (np.generic, float)) else value
        ok = None if ok is None else bool(ok)
        self.write(asdict(Line(self.part, what, value, unit, aim, ok, note)))

    def write(self, entry: dict) -> None:
        with open(self.out / "lines.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def folder(self, name: str) -> Path:
        """A new, empty folder."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def dataset(self, bags: bool = False) -> list[str]:
        """Flags of a small dataset with labels: the demo, or a few moving blocks. bags: with lists of abnormal and
        normal training videos."""
        if not self.quick and not bags:
            return ["--dataset", "demo", "--data-root", str(self.work / "data")]
        from tests.helpers import tiny_folder

        root = self.work / "blocks"
        if not root.exists():
            tiny_folder(root, train=4, test=2, frames=40 if self.quick else 160)
            (root / "normal.txt").write_text("a0\na1\n")
            (root / "abnormal.txt").write_text("a2\na3\n")
        return ["--dataset", "folder", "--data-root", str(root)]

    def script(self, module: str, *argv) -> None:
        """Run a script's main() in this process."""
        print(f"\n$ {module} {' '.join(map(str, argv))}", flush=True)
        importlib.import_module(module).main([*map(str, argv), *self.workers()])

    def workers(self) -> list[str]:
        return ["--workers", "1"] if self.quick else []


@contextmanager
def exact_float32():
    """No TF32, whatever a Run asks for."""
    import torch

    wanted = torch.set_float32_matmul_precision
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    wanted("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision = lambda precision: None
    try:
        yield
    finally:
        torch.set_float32_matmul_precision = wanted
        wanted(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --------------------------------------------------------------------------------------------------------- the parts


def golden(bench: Bench) -> None:
    from tests.test_golden import CASES, wrong_outputs

    folder = bench.folder("golden")
    with exact_float32():
        for path in CASES[:: 4 if bench.quick else 1]:
            wrong = wrong_outputs(path, folder, bench.device)
            note = "times its tolerance: " + ", ".join(f"{k} {v:.1f}" for k, v in wrong.items()) if wrong else ""
            bench.add(path.stem, "off" if wrong else "agrees", ok=not wrong, note=note)


def first_loss(out: Path) -> float:
    """The loss of the first line of a run's log."""
    line = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    return next(line[k] for k in ("total", "loss", "teacher") if k in line)


def frame_scores(out: Path) -> np.ndarray:
    with np.load(out / "strict" / "scores.npz") as arrays:
        return np.concatenate([arrays[k] for k in sorted(arrays.files)])


def micro_auc(out: Path) -> float:
    return json.loads((out / "strict" / "metrics.json").read_text())["micro_auc"]


def agree(method: str, bench: Bench) -> None:
    """Train on the device and on the CPU from one seed; score the device's checkpoint on both."""
    flags = FLAGS[method][bench.quick].split()
    data, folder = [*bench.dataset(), "--cache", str(bench.work / "cache")], bench.folder(method)
    with exact_float32():
        for device in dict.fromkeys((bench.device, "cpu")):
            out = folder / f"train-{device}"
            bench.script(f"{method}.train", *data, *flags, "--device", device, "--precision", "fp32", "--out", out)
        checkpoint = folder / f"train-{bench.device}" / CHECKPOINTS[method]
        again = [*data, "--checkpoint", checkpoint]
        ways = {"cpu": ("cpu", "fp32"), "fp32": (bench.device, "fp32"), "bf16": (bench.device, "bf16")}
        for name, (device, precision) in ways.items():
            out = folder / name
            bench.script(f"{method}.eval", *again, "--device", device, "--precision", precision, "--out", out)
    compare(bench, method, folder, f"train-{bench.device}", "train-cpu")


def agree_svmae(bench: Bench) -> None:
    """Pre-training, features and detector, as agree()."""
    data, folder = [*bench.dataset(bags=True), "--cache", str(bench.work / "cache")], bench.folder("svmae")
    with exact_float32():
        for device in dict.fromkeys((bench.device, "cpu")):
            on = ["--device", device, "--precision", "fp32"]
            out = folder / f"pretrain-{device}"
            bench.script("frd_uvad.svmae.pretrain", *data, *SVMAE.split(), *on, "--out", out)
            encoder, features = folder / f"pretrain-{bench.device}" / "pretrain.pt", folder / f"features-{device}"
            bench.script("frd_uvad.svmae.preprocess", *data, "--checkpoint", encoder, *on, "--out", features)
        features = folder / f"features-{bench.device}"
        flags = ["--features", features, "--iterations", "40", "--batch-size", "4"]
        for device in dict.fromkeys((bench.device, "cpu")):
            on = ["--device", device, "--precision", "fp32"]
            bench.script("frd_uvad.svmae.train", *flags, *on, "--out", folder / f"train-{device}")
        checkpoint = folder / f"train-{bench.device}" / "detector.pt"
        ways = {"cpu": ("cpu", "fp32"), "fp32": (bench.device, "fp32"), "bf16": (bench.device, "bf16")}
        for name, (device, precision) in ways.items():
            on = ["--device", device, "--precision", precision]
            again = ["--features", features, "--checkpoint", checkpoint]
            bench.script("frd_uvad.svmae.eval", *again, *on, "--out", folder / name)
    a, b = (
        np.concatenate([np.load(path).reshape(-1) for path in sorted((folder / f"features-{device}").rglob("*.npy"))])
        for device in (bench.device, "cpu")
    )
    worst = np.abs(a.astype(np.float64) - b).max() / b.std()
    bench.add("svmae: features of both, fp32", worst, "deviations", aim=f"≤ {SCORES_AGREE}", ok=worst <= SCORES_AGREE)
    losses = [first_loss(folder / f"pretrain-{device}") for device in (bench.device, "cpu")]
    add_losses(bench, "svmae pre-training", *losses)
    compare(bench, "svmae", folder, f"train-{bench.device}", "train-cpu")


def add_losses(bench: Bench, name: str, on_device: float, on_cpu: float) -> None:
    off = abs(on_device / on_cpu - 1)
    note = f"{on_device:.5g} and {on_cpu:.5g} on the CPU"
    bench.add(
        f"{name}: loss of the first epoch", 100 * off, "% apart", aim=f"≤ {100 * LOSSES_AGREE:.0f}",
        ok=off <= LOSSES_AGREE, note=note,
    )  # fmt: skip


def compare(bench: Bench, name: str, folder: Path, on_device: str, on_cpu: str) -> None:
    add_losses(bench, name, first_loss(folder / on_device), first_loss(folder / on_cpu))
    a, b = frame_scores(folder / "fp32"), frame_scores(folder / "cpu")
    worst = np.abs(a - b).max() / max(b.std(), 1e-12)
    aim = f"≤ {SCORES_AGREE}"
    bench.add(f"{name}: one checkpoint's scores, fp32", worst, "deviations", aim=aim, ok=worst <= SCORES_AGREE)
    exact, half = micro_auc(folder / "cpu"), micro_auc(folder / "bf16")
    # a toy's test set has a few hundred frames, and its network was trained for seconds
    limit = AUC_AGREES * (20 if bench.quick else 1)
    note = f"{100 * half:.2f} and {100 * exact:.2f} in float32 on the CPU"
    bench.add(
        f"{name}: its AUC in bf16", 100 * abs(half - exact), "points apart", aim=f"≤ {100 * limit:.1f}",
        ok=abs(half - exact) <= limit, note=note,
    )  # fmt: skip
    trained = 100 * (micro_auc(folder / on_device) - micro_auc(folder / on_cpu))
    bench.add(f"{name}: AUC trained here, less that trained on the CPU", trained, "points")


def resume(bench: Bench) -> None:
    """HF2-VAD's first stage is killed by the system once its checkpoint was written twice, and started again."""
    import torch

    folder = bench.folder("resume")
    where = [*bench.dataset(bags=True), "--cache", str(bench.work / "cache"), "--device", bench.device]
    flags = "--size small --epochs 3,0,0 --batch-size 16 --motion-area 60 --precision fp32 --save-minutes 0".split()
    bench.script("hf2vad.train", *where, *flags, "--out", folder / "whole")
    still, script = ROOT / "tests" / "tools" / "still.py", ROOT / "hf2vad" / "train.py"
    command = [still, "--kill-after", "*/memae.pt:2", script, *where, *flags, *bench.workers(), "--out", folder / "cut"]
    killed = subprocess.run([sys.executable, *map(str, command)]).returncode
    bench.script("hf2vad.train", *where, *flags, "--out", folder / "cut")
    whole, cut = (
        torch.load(folder / name / "memae.pt", map_location="cpu", weights_only=True)["model_state_dict"]
        for name in ("whole", "cut")
    )
    # biases before a batch norm follow rounding alone: weights that stay below 0.05 are compared with that
    off = {k: (x.double() - cut[k].double()).abs().max() / x.abs().max().clamp(min=0.05) for k, x in whole.items()}
    worst = float(max(off.values()))
    limit = WEIGHTS_AGREE if bench.device.startswith("cuda") else 0.0
    ok = killed == -signal.SIGKILL and worst <= limit
    note = "" if killed == -signal.SIGKILL else f"it was not killed, but ended with {killed}"
    bench.add("weights of a killed and resumed training", worst, "relative", aim=f"≤ {limit:g}", ok=ok, note=note)


def ped2(bench: Bench) -> None:
    """Train as long as there is time, then score the newest checkpoint."""
    if bench.data_root is None or not any((bench.data_root / name).exists() for name in ("ped2", "UCSDped2")):
        bench.add("HF2-VAD on Ped2", "not run", note="no Ped2 under --data-root")
        return
    need = 90
    if bench.left() < 2 * need:
        bench.add("HF2-VAD on Ped2", "not run", note=f"{bench.left():.0f} s were left")
        return
    out = bench.folder("ped2")
    where = ["--dataset", "ped2", "--data-root", bench.data_root]
    where += ["--cache", bench.work / "cache", "--device", bench.device]
    boxes = bench.data_root / "ped2" / "boxes_yolov3.npz"
    where += ["--boxes", f"file:{boxes}"] if boxes.exists() else []
    schedule = ["--epochs", "1,1,1"] if bench.quick else []
    command = [sys.executable, ROOT / "hf2vad" / "train.py", *where, *schedule, "--protocol", "official", "--out", out]
    process = subprocess.Popen([*map(str, command), "--save-minutes", "0.5"])
    try:
        process.wait(bench.left() - need)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    reached = {x["stage"]: x["epoch"] for x in lines}
    newest = next((out / f"{s}.pt" for s in ("finetune", "cvae", "memae") if (out / f"{s}.pt").exists()), None)
    rate = {x["stage"]: x["cubes_per_second"] for x in lines}
    note = ", ".join(f"{k} {v} epochs at {rate[k]:.0f} cubes/s" for k, v in reached.items())
    metrics = out / "official" / "metrics.json"
    if not metrics.exists() and newest is not None:
        argv = [ROOT / "hf2vad" / "eval.py", *where, "--checkpoint", newest, "--protocol", "official", "--out", out]
        subprocess.run([sys.executable, *map(str, argv)], timeout=max(1, bench.left()))
    auc = 100 * json.loads(metrics.read_text())["micro_auc"] if metrics.exists() else "no score"
    bench.add("HF2-VAD on Ped2, official micro AUC", auc, "%" if metrics.exists() else "", note=note)


def parts() -> dict:
    """{name: function(bench)}, most valuable first."""
    from tests.perf import gpu_rates

    return {
        "golden": golden,
        **{f"agree:{method}": lambda bench, method=method: agree(method, bench) for method in FLAGS},
        "agree:svmae": agree_svmae,
        "resume": resume,
        **{f"rates:{name}": function for name, function in gpu_rates.RATES.items()},
        "ped2": ped2,
    }


# -------------------------------------------------------------------------------------------------- parent and child


def work(bench: Bench, names: list[str]) -> None:
    """The child: run the parts one after another. What fails in one does not stop the others, unless the device is
    lost with it."""
    import torch

    functions = parts()
    for name in names:
        bench.part, began = name, time.time()
        print(f"\n==== {name}", flush=True)
        try:
            functions[name](bench)
        except (Exception, SystemExit) as e:
            traceback.print_exc()
            bench.add(name, "failed", ok=False, note=f"{type(e).__name__}: {first_line(e)}")
            lost = isinstance(e, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(e)
            bench.write({"done": name, "seconds": time.time() - began})
            if lost:
                os._exit(DEAD)
            continue
        bench.write({"done": name, "seconds": time.time() - began})


def machine(device: str) -> dict:
    import torch

    name = platform.processor() or platform.machine()
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name(torch.device(device))
    return {
        "device": device,
        "name": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def table(about: dict, lines: list[dict], seconds: dict, waiting: list[str]) -> str:
    """The results as Markdown."""
    short = [x for x in lines if x["ok"] is False]
    head = f"{about['name']} ({about['device']}), torch {about['torch']}, {about['cores']} cores"
    head += ", toy sizes" if about["quick"] else ""
    out = [f"{head}. {len(lines)} results, {len(short)} short of their aim, {sum(seconds.values()):.0f} s.", ""]
    out += ["| part | what | result | aim | | note |", "|---|---|---|---|---|---|"]
    for x in lines:
        cells = [x["part"], x["what"], text_of(x), x["aim"], MARKS[x["ok"]], x["note"].replace("|", "/")]
        out.append(f"| {' | '.join(cells)} |")
    out += [f"\nNot run: {', '.join(waiting)}."] if waiting else []
    return "\n".join(out) + "\n"


def collect(out: Path) -> tuple[list[dict], dict]:
    """What the children have written -> (lines, {part that is done: seconds})."""
    path = out / "lines.jsonl"
    entries = [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")] if path.exists() else []
    return [x for x in entries if "what" in x], {x["done"]: x["seconds"] for x in entries if "done" in x}


def text_of(line: dict) -> str:
    """A result's value and unit."""
    value = line["value"] if isinstance(line["value"], str) else f"{line['value']:.4g}"
    return f"{value} {line['unit']}".strip()


def show(report, out: Path, shown: int) -> int:
    """Write the report where there are more than `shown` lines, and print the new ones. -> their number"""
    if len(collect(out)[0]) <= shown:
        return shown
    lines, _, _ = report()
    for x in lines[shown:]:
        text = f"{x['part']:<20} {x['what']}: {text_of(x)} {x['aim']} {x['note']}"
        print(f"{MARKS[x['ok']] or ' '} {text}".rstrip(), flush=True)
    return len(lines)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; one from before is replaced")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, two minutes on a CPU")
    parser.add_argument("--data-root", type=Path, help="folder that holds Ped2")
    parser.add_argument("--minutes", type=float, default=9.0, help="what takes longer is left out (default: 9)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="golden, agree, agree:hf2vad, resume, rates, ped2, …")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    from common.distributed import Run

    if args.child:
        bench = Bench(args.out, args.device, args.quick, args.data_root, args.deadline)
        return work(bench, args.child)
    Run(args.device)  # a device that cannot be used is refused in a sentence
    names = [x for x in parts() if not args.only or x in args.only or x.split(":")[0] in args.only]
    out = writable_folder(args.out.resolve())
    for path in ("work", "lines.jsonl", "gpu.json", "gpu.md", "gpu.log"):
        shutil.rmtree(out / path) if (out / path).is_dir() else (out / path).unlink(missing_ok=True)
    (out / "work").mkdir()
    about = {**machine(args.device), "quick": args.quick}
    deadline = time.time() + 60 * args.minutes

    def report():
        lines, seconds = collect(out)
        waiting = [x for x in names if x not in seconds]
        write_json(out / "gpu.json", {**about, "seconds": seconds, "not_run": waiting, "lines": lines})
        with atomic_write(out / "gpu.md") as tmp:
            tmp.write_text(table(about, lines, seconds, waiting))
        return lines, seconds, waiting

    command = [sys.executable, Path(__file__).resolve(), "--out", out, "--device", args.device]
    command += ["--quick"] * args.quick + (["--data-root", args.data_root.resolve()] if args.data_root else [])
    shown, waiting = 0, names
    while waiting and time.time() < deadline:
        with open(out / "gpu.log", "a") as log:
            argv = [*command, "--deadline", deadline, "--child", *waiting]
            child = subprocess.Popen([*map(str, argv)], stdout=log, stderr=log, start_new_session=True)
        while child.poll() is None and time.time() < deadline:
            time.sleep(0.2)
            shown = show(report, out, shown)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        shown = show(report, out, shown)
        before, (_, _, waiting) = waiting, report()
        if child.returncode not in (0, DEAD) and waiting == before:  # it died without a word: leave that part out
            note = f"its process ended with {child.returncode}"
            failed = asdict(Line(waiting[0], waiting[0], "failed", ok=False, note=note))
            with open(out / "lines.jsonl", "a") as file:
                file.write(json.dumps(failed) + "\n" + json.dumps({"done": waiting[0], "seconds": 0.0}) + "\n")
            _, _, waiting = report()
    lines, _, waiting = report()
    shutil.rmtree(out / "work", ignore_errors=True)
    (out / "lines.jsonl").unlink(missing_ok=True)
    short = [x for x in lines if x["ok"] is False]
    print(f"\n{len(lines)} results, {len(short)} short of their aim")
    if waiting:
        print(f"not run: {', '.join(waiting)}")
    print(f"next: read {out / 'gpu.md'}; {out / 'gpu.log'} holds what the scripts printed")
    return 1 if short or any(not x.startswith(("rates", "ped2")) for x in waiting) else 0


if __name__ == "__main__":
    run_script(main)
