"""The exported AED-MAE: scores of onnxruntime are those of torch, in eval.py and in the stand-alone script."""

import ast
import csv
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import onnx
import pytest
import torch

from common.distributed import Run
from sdmae import scoring
from sdmae.export import OPSET, export
from sdmae.model import SDMAE
from sdmae.runtime import OnnxScorer
from sdmae.train import SIZES
from tests.helpers import PATIENCE, ROOT, refused, save_video, script, tiny_folder, walkers


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A trained checkpoint, and its file for onnxruntime."""
    base = tmp_path_factory.mktemp("ein ordner für export")
    root, checkpoint, file = tiny_folder(base / "data"), base / "run" / "sdmae.pt", base / "sdmae é.onnx"
    flags = "--dataset folder --size small --image-size 64x96 --patch 8 --epochs 2 --batch-size 8 --workers 1".split()
    where = ("--data-root", root, "--cache", base / "cache", "--device", "cpu")
    script("sdmae/train.py", *flags, *where, "--out", base / "run")
    done = script("sdmae/eval.py", "--checkpoint", checkpoint, "--export", file, "--mask-draws", "2")
    assert f"wrote {file}" in done.stdout and "next: python sdmae/camera.py" in done.stdout
    video = np.concatenate([walkers(40), walkers(30, speed=9), walkers(60)])
    return checkpoint, file, save_video(base / "a film.avi", video, fps=10)


@pytest.mark.parametrize("dataset, more", [("avenue", {"tokens": "removed"}), ("shanghaitech", {}), ("ped2", {})])
def test_onnxruntime_scores_as_torch(dataset, more, tmp_path):
    """Random weights; both norms, parts and ways of counting; any batch, grey and colour."""
    torch.manual_seed(0)
    net = SDMAE(**{**SIZES["small"], "patch_size": 8, "image_size": (32, 64)}).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    config, draws = scoring.score_config(dataset, **more), 3 if more else 1
    export(net, config, {"frame_scores": [1.0]}, tmp_path / "net.onnx", draws=draws)
    ours = scoring.Scorer(net, config, Run("cpu", "fp32"), draws=draws)
    theirs = OnnxScorer(tmp_path / "net.onnx")
    assert (
        theirs.config == config and theirs.size == (32, 64) and theirs.state == {"statistics": {"frame_scores": [1.0]}}
    )
    for n, channels in ((1, 1), (1, 3), (7, 3), (33, 1)):
        frames = np.random.default_rng(n).integers(0, 256, (n, 3, 32, 64, channels), np.uint8)
        numbers = np.arange(250, 250 + n)
        a, b = ours.token_errors(frames, numbers), theirs.token_errors(frames, numbers)
        assert a.shape == b.shape == (n, 4, 8) and np.abs(a - b).max() <= 1e-4 * np.abs(a).max()
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == OPSET
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]  # one file, weights and all


def test_a_video_is_watched_alike_by_torch_onnxruntime_and_the_script(exported, tmp_path):
    checkpoint, file, video = exported
    flags = ("--video", video, "--false-alarms-per-hour", "3000")
    script("sdmae/eval.py", *flags, "--checkpoint", checkpoint, "--mask-draws", "2", "--out", tmp_path / "torch")
    done = script("sdmae/eval.py", *flags, "--checkpoint", file, "--runtime", "onnx", "--out", tmp_path / "onnx")
    assert "events" in done.stdout
    alone = shutil.copy(ROOT / "sdmae" / "camera.py", tmp_path)  # away from everything else
    command = [sys.executable, alone, *flags, "--model", file, "--out", tmp_path / "alone"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted, events = (rows(tmp_path / "torch" / "a film" / name) for name in ("scores.csv", "events.csv"))
    assert len(wanted) == 130 and len(events) > 0 and f"event {len(events)}:" in done.stdout
    for folder in (tmp_path / "onnx" / "a film", tmp_path / "alone"):
        got = rows(folder / "scores.csv")
        assert list(got[0]) == list(wanted[0]) and len(got) == len(wanted)
        for name in ("frame", "seconds", "event", "arrival"):
            assert [x[name] for x in got] == [x[name] for x in wanted], name
        for name in ("score", "smoothed"):
            a, b = (np.array([float(x[name]) for x in table]) for table in (got, wanted))
            assert np.abs(a - b).max() <= 1e-4 * b.max(), name
        others = rows(folder / "events.csv")
        assert [list(x) for x in others] == [list(x) for x in events]
        for one, other in zip(others, events):
            assert all(one[k] == other[k] for k in one if k != "peak_score")
            assert float(one["peak_score"]) == pytest.approx(float(other["peak_score"]), rel=1e-4)


def test_the_script_needs_three_packages_alone():
    tree = ast.parse((ROOT / "sdmae" / "camera.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"numpy", "cv2", "onnxruntime"}
    assert len((ROOT / "sdmae" / "camera.py").read_text().splitlines()) <= 120


def test_what_is_no_exported_network_is_refused(exported, tmp_path):
    checkpoint, file, video = exported
    runtime = ("--runtime", "onnx", "--checkpoint")
    refused(script("sdmae/eval.py", *runtime, file, check=False), "--runtime onnx scores a --video")
    refused(
        script("sdmae/eval.py", "--video", video, *runtime, tmp_path / "no.onnx", check=False), "no.onnx", "missing"
    )
    refused(script("sdmae/eval.py", "--video", video, *runtime, checkpoint, check=False), "sdmae.pt", "--export")


def test_the_script_ends_with_a_file_behind_http(exported, tmp_path):
    _, file, video = exported

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=video.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{urllib.parse.quote(video.name)}"
    command = [sys.executable, ROOT / "sdmae" / "camera.py", "--video", address, "--model", file, "--out", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "scores.csv")) == 130 and rows(tmp_path / "scores.csv")[10]["seconds"] == "1.000"


def test_the_script_refuses_other_files(exported, tmp_path):
    checkpoint, file, video = exported
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    other = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    onnx.save(
        onnx.helper.make_model(other, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 18)]),
        tmp_path / "other.onnx",
    )
    (tmp_path / "text.avi").write_text("no video")
    uncalibrated = onnx.load(file)  # exported without scores of normal frames
    entry = next(x for x in uncalibrated.metadata_props if x.key == "sdmae")
    entry.value = json.dumps({**json.loads(entry.value), "statistics": None})
    onnx.save(uncalibrated, tmp_path / "none.onnx")
    for flags, code, words in (
        (("--video", video, "--model", tmp_path / "other.onnx"), 2, "other.onnx holds no scores of"),
        (("--video", video, "--model", tmp_path / "none.onnx"), 2, "none.onnx holds no scores of"),
        (("--video", tmp_path / "text.avi", "--model", file), 2, "text.avi cannot be opened"),
        (
            ("--video", "rtsp://joe:secret@127.0.0.1:9/x?pwd=y", "--model", file),
            2,
            "--video rtsp://127.0.0.1:9/x? cannot",
        ),
        (("--video", video, "--model", checkpoint), 1, "sdmae.pt"),  # in onnxruntime's words
    ):
        command = [sys.executable, ROOT / "sdmae" / "camera.py", *flags, "--out", tmp_path / "out"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == code and words in done.stderr.splitlines()[-1], done.stderr
        assert "secret" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
