"""tests/perf/profile.py: its parts add up to the step, its FLOPs are right, and it stops any script. tests/perf/gpu.py:
every part runs, and what falls short is told."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, python, refused, script, tiny_folder

LOOP = """
import sys
sys.path.insert(0, {root!r})
import torch
from common.distributed import Run
from tests.perf.profile import StepProfiler
run = Run("cpu", "fp32")
StepProfiler(run, 3, training={training})
net = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
x = torch.randn(2048, 512)
for step in range(100):
    if {training}:
        loss = net(x * 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        with torch.inference_mode():
            net(x * 2)
raise SystemExit("it did not stop")
"""


def table(out):
    """Part -> milliseconds, and GFLOP by part."""
    rows = [
        [c.strip(" *") for c in line.split("|")[1:-1]]
        for line in out.splitlines()
        if line.startswith("| ") and "share" not in line
    ]
    return (
        {r[0]: float(r[1]) for r in rows},
        {r[0]: float(m[1]) for r in rows if (m := re.match(r"([\d.]+) GFLOP", r[-1]))},
    )


def measured(training):
    return table(python(LOOP.format(root=str(ROOT), training=training)))


def test_a_step_of_known_work():
    forward = 2 * 2048 * (512 * 1024 + 1024 * 256) / 1e9  # two matrix products
    ms, work = measured(True)
    parts = ["waiting for data, Python", "tensors outside the network", "forward", "backward", "optimizer"]
    assert list(ms) == [*parts, "whole step"] and abs(sum(ms[p] for p in parts) - ms["whole step"]) < 0.3
    assert all(ms[p] >= 0 for p in parts) and ms["forward"] > 0 and ms["backward"] > 0
    # the input needs no gradient, so the first layer has one product in the backward pass, the second one two
    backward = 2 * 2048 * (512 * 1024 + 2 * 1024 * 256) / 1e9
    assert abs(work["forward"] - forward) <= 0.051 and abs(work["backward"] - backward) <= 0.051
    ms, work = measured(False)
    assert list(ms) == [*parts[:3], "whole step"] and abs(work["forward"] - forward) <= 0.051


def test_scripts_profile_themselves(tmp_path):
    """Training ends after so many steps and leaves no finished checkpoint; scoring likewise."""
    root = tiny_folder(tmp_path)
    where = ("--dataset", "folder", "--data-root", root, "--cache", tmp_path / "cache", "--device", "cpu")
    small = ("--size", "small", "--image-size", "32x64", "--patch", "8", "--epochs", "2", "--batch-size", "4")
    done = script(
        "tests/perf/profile.py", "--steps", 2, ROOT / "sdmae/train.py", *where, *small, "--out", tmp_path / "a"
    )
    assert "one step of training, mean of 2" in done.stdout and table(done.stdout)[0]["optimizer"] > 0
    assert not (tmp_path / "a/sdmae.pt").exists()
    script("sdmae/train.py", *where, *small, "--out", tmp_path / "a")
    done = script(
        "tests/perf/profile.py",
        "--steps",
        50,
        ROOT / "sdmae/eval.py",
        *where,
        "--checkpoint",
        tmp_path / "a/sdmae.pt",
        "--out",
        tmp_path / "b",
    )
    assert "steps too early for a table" in done.stdout


def test_training_of_the_stand_in_encoder_is_not_what_is_profiled(tmp_path):
    root = tiny_folder(tmp_path)
    done = script(
        "tests/perf/profile.py",
        "--steps",
        2,
        ROOT / "scene_aware_ae/train.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--device",
        "cpu",
        "--mode",
        "0",
        "--stand-in-steps",
        "20",
        "--encoder",
        "stand-in:autoencoder",
        "--out",
        tmp_path / "a",
    )
    operators = next(line for line in done.stdout.splitlines() if line.startswith("operators by"))
    assert "mean of 2" in done.stdout and "convolution" not in operators, operators


def test_the_proof_on_a_gpu_runs_whole_at_toy_size(tmp_path):
    done = script("tests/perf/gpu.py", "--out", tmp_path, "--device", "cpu", "--quick", "--minutes", "30", check=False)
    log = (tmp_path / "gpu.log").read_text()
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:], log[-6000:])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["not_run"] == [] and result["device"] == "cpu" and len(result["seconds"]) == 17
    lines = result["lines"]
    assert all(x["ok"] is not False for x in lines)
    exact = [x for x in lines if "scores, fp32" in x["what"] or "killed and resumed" in x["what"]]
    assert len(exact) == 7 and all(x["value"] == 0 for x in exact)  # the device is the CPU itself
    rates = [x for x in lines if x["part"].startswith("rates")]
    assert {x["part"] for x in rates} == {x for x in result["seconds"] if x.startswith("rates")}
    assert all(x["value"] > 0 and "peak" in x["note"] for x in rates)
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("\n| ") == len(lines) + 1 and "0 short of their aim" in page
    assert not (tmp_path / "work").exists()


def test_the_proof_tells_what_falls_short(tmp_path):
    folder = tmp_path / "golden"
    folder.mkdir()
    for suffix in (".json", ".npz"):
        shutil.copy(ROOT / "tests" / "golden" / f"sdmae-patch8{suffix}", folder)
    with np.load(folder / "sdmae-patch8.npz") as arrays:
        wrong = {k: x + (k == "latent") for k, x in arrays.items()}
    np.savez(folder / "sdmae-patch8.npz", **wrong)
    env = {"GOLDEN_DIR": str(folder)}
    flags = ("--device", "cpu", "--quick", "--only", "golden")
    done = script("tests/perf/gpu.py", "--out", tmp_path / "a", *flags, check=False, env=env)
    assert done.returncode == 1 and "✗" in (tmp_path / "a" / "gpu.md").read_text() and "latent" in done.stdout
    late = script("tests/perf/gpu.py", "--out", tmp_path / "b", *flags, "--minutes", "0", check=False, env=env)
    assert late.returncode == 1 and "not run: golden" in late.stdout
    assert json.loads((tmp_path / "b" / "gpu.json").read_text())["not_run"] == ["golden"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_proof_needs_its_device(tmp_path):
    refused(script("tests/perf/gpu.py", "--out", tmp_path, check=False), "--device cuda")
    assert os.listdir(tmp_path) == []
