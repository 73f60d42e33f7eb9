"""AED-MAE through its own scripts, in small; its input, pasting, threshold and live mode against plain loops."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from common import training
from common.cli import ScoreOptions
from common.distributed import Run
from common.io import UserError, load_arrays
from common.loader import Loader
from sdmae import scoring
from sdmae.data import SAMPLE_OFFSETS, FrameDataset, motion_gradient, network_input, network_target, noise_table
from sdmae.eval import load, make_protocol
from sdmae.model import SDMAE, error_maps, pixel_errors, teacher_loss, token_weights
from sdmae.preprocess import input_size
from sdmae.train import SIZES, check_mask_ratio, make_plan
from tests.helpers import (
    PATIENCE,
    ROOT,
    cached,
    killed_after,
    python,
    refused,
    same_losses,
    save_frames,
    save_video,
    scored_by_shards,
    script,
    tiny_folder,
    trained_by_two,
    walkers,
)

SMALL = (
    "--dataset",
    "folder",
    "--size",
    "small",
    "--image-size",
    "64x96",
    "--patch",
    "8",
    "--epochs",
    "4",
    "--batch-size",
    "8",
    "--workers",
    "1",
    "--device",
    "cpu",
)


def train(root, out, *more, **kwargs):
    where = ("--data-root", root, "--cache", root.parent / "cache", "--out", out)
    return script("sdmae/train.py", *SMALL, *where, *more, **kwargs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("ein ordner für sdmae")
    root = tiny_folder(base / "data")
    np.save(root / "masks_b0.npy", 0)  # a stray file is nobody's business
    (root / "masks").mkdir()
    for i in range(2):
        mask = np.zeros((24, 64, 96), bool)
        mask[12:, 20:44, 40:54] = True
        np.save(root / "masks" / f"b{i}.npy", mask)
    done = train(root, base / "run")
    where = ("--dataset", "folder", "--data-root", root, "--cache", base / "cache", "--device", "cpu")
    script("sdmae/eval.py", *where, "--checkpoint", base / "run" / "sdmae.pt", "--overlay")
    return base, root, done


def small_net(**more):
    torch.manual_seed(0)
    return SDMAE(**{**SIZES["small"], "patch_size": 8, "image_size": (32, 64), **more}).eval()


# -------------------------------------------------------------------------------------------------------- the commands


def test_one_command_goes_from_videos_to_scores(trained):
    base, root, done = trained
    for text in ("pseudo anomalies", "micro AUC", "frame difference", "fastest box", "RBDC", "next:"):
        assert text in done.stdout, done.stdout
    report = json.loads((base / "run" / "strict" / "metrics.json").read_text())
    assert 0 <= report["micro_auc"] <= 1 and report["patch"] == 8 and report["token_threshold"] > 0
    lines = [json.loads(x) for x in (base / "run" / "log.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["epoch"]) for x in lines] == [("teacher", 1), ("teacher", 2), ("student", 3), ("student", 4)]
    assert all(x["frames_per_second"] > 0 for x in lines)
    for name in ("scores.npz", "roc.png", "curves/b0.png", "overlay/b1.mp4"):
        assert (base / "run" / "strict" / name).stat().st_size > 500, name


def test_official_filters_and_names_its_liberties(trained):
    base, root, _ = trained
    done = script(
        "sdmae/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--checkpoint",
        base / "run" / "sdmae.pt",
        "--protocol",
        "official",
    )
    assert "aedmae:38:11" in done.stdout and "the filter is the authors' for Avenue, not for folder" in done.stdout
    assert "not summed as published" not in done.stdout
    a, b = (load_arrays(base / "run" / p / "scores.npz", "scores") for p in ("strict", "official"))
    assert all((a[k] == b[k]).all() for k in a)


def test_the_student_phase_leaves_the_teacher_alone(trained, tmp_path):
    base, root, _ = trained
    train(root, tmp_path / "run", "--epochs", "2", "--student-from", "2")
    half = training.load_checkpoint(tmp_path / "run" / "sdmae.pt")["model_state_dict"]
    done = training.load_checkpoint(base / "run" / "sdmae.pt")["model_state_dict"]
    for k in done:
        same = torch.equal(half[k], done[k])
        assert same != ("student" in k) or k.endswith("num_batches_tracked"), k


def test_killed_and_started_again_ends_with_the_same_weights(trained, tmp_path):
    base, root, _ = trained
    flags = (
        "--data-root",
        str(root),
        "--cache",
        str(base / "cache"),
        "--out",
        str(tmp_path / "run"),
        "--save-minutes",
        "0",
    )
    killed_after("*/sdmae.pt:13", "sdmae/train.py", *SMALL, *flags)
    path = tmp_path / "run" / "sdmae.pt"
    state = training.load_checkpoint(path)
    assert not state["done"] and state["epoch"] >= 2 and state["step"] >= 1
    done = script("sdmae/train.py", *SMALL, *flags)
    assert "going on at epoch" in done.stdout
    a, b = (training.load_checkpoint(p)["model_state_dict"] for p in (path, base / "run" / "sdmae.pt"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    refused(script("sdmae/train.py", *SMALL, *flags, "--lr", "0.5", check=False), "lr", "--out")


def test_authors_two_files(trained, tmp_path):
    base, root, _ = trained
    weights = training.load_checkpoint(base / "run" / "sdmae.pt")["model_state_dict"]
    teacher = {k: v * 0 if "student" in k else v for k, v in weights.items()}
    torch.save(
        {"model": {**teacher, "erosion.weight": torch.zeros(1), "dilation.weight": torch.zeros(1)}},
        tmp_path / "teacher.pth",
    )
    torch.save({"model": {k: v if "student" in k else v * 0 for k, v in weights.items()}}, tmp_path / "student.pth")
    with pytest.raises(UserError, match="does not fit"):  # this small network is not the published one
        scoring.load_model(tmp_path / "teacher.pth", tmp_path / "student.pth", (32, 64))
    full = SDMAE(patch_size=8, image_size=(32, 64))
    state = full.state_dict()
    torch.save(
        {"model": {**{k: v * 0 if "student" in k else v for k, v in state.items()}, "erosion.weight": torch.zeros(1)}},
        tmp_path / "t.pth",
    )
    torch.save({"model": {k: v if "student" in k else v * 0 for k, v in state.items()}}, tmp_path / "s.pth")
    net, _ = scoring.load_model(tmp_path / "t.pth", tmp_path / "s.pth", (32, 64))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    done = script(
        "sdmae/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--checkpoint",
        tmp_path / "t.pth",
        "--student",
        tmp_path / "s.pth",
        "--image-size",
        "32x64",
        "--out",
        tmp_path / "out",
    )
    assert "scoring training frames" in done.stdout and "micro AUC" in done.stdout
    refused(
        script(
            "sdmae/eval.py",
            "--dataset",
            "folder",
            "--data-root",
            root,
            "--checkpoint",
            base / "run" / "sdmae.pt",
            "--student",
            tmp_path / "s.pth",
            check=False,
        ),
        "--student",
    )


def test_benchmark(trained):
    base, root, _ = trained
    done = script(
        "tests/perf/bench.py",
        "sdmae",
        "--seconds",
        0.2,
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--image-size",
        "32x64",
        "--patch",
        "8",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    )
    for text in ("eager", "optimised", "bf16", "frame cache", "mp4", "peak memory", "GFLOP"):
        assert text in done.stdout, done.stdout
    differ = [float(x.split("differ by")[1]) for x in done.stdout.splitlines() if "differ by" in x and "fp32" in x]
    assert len(differ) == 2 and max(differ) < 1e-3


def test_preview_writes_a_contact_sheet(trained, tmp_path):
    base, root, _ = trained
    done = script(
        "sdmae/preprocess.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--image-size",
        "64x96",
        "--patch",
        "8",
        "--preview",
        "--out",
        tmp_path,
    )
    assert "next:" in done.stdout
    image = cv2.imread(str(tmp_path / "pseudo_anomalies.png"))
    assert image is not None and image.std() > 5


# ---------------------------------------------------------------------------------------------------------- ugly input


def test_ugly_input_is_refused_or_survived(trained, tmp_path):
    base, root, _ = trained
    common = ("--dataset", "folder", "--data-root", root, "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    refused(script("sdmae/train.py", *common, "--image-size", "big", check=False), "--image-size")
    refused(script("sdmae/train.py", *common, "--student-from", "500", check=False), "--student-from")
    refused(script("sdmae/train.py", *common, "--pseudo", "ubnormal", check=False), "ubnormal")
    refused(script("sdmae/eval.py", *common[:6], "--checkpoint", tmp_path / "none.pt", check=False), "none.pt")
    refused(
        script(
            "sdmae/eval.py", "--video", "rtsp://127.0.0.1:9/x", "--checkpoint", base / "run" / "sdmae.pt", check=False
        ),
        "rtsp://127.0.0.1:9/x",
    )
    ours = ("--checkpoint", base / "run" / "sdmae.pt", "--device", "cpu")
    refused(script("sdmae/eval.py", *common[:6], *ours, "--patch", "16", check=False), "--patch", "64x96")
    own = ("--video", root / "test" / "b0", "--student-on", "removed")  # statistics of other errors are asked for
    refused(script("sdmae/eval.py", *ours, *own, check=False), "no scores of normal frames", "--data-root")
    (tmp_path / "only" / "test").mkdir(parents=True)
    shutil.copytree(root / "test" / "b0", tmp_path / "only" / "test" / "b0")
    where = ("--dataset", "folder", "--data-root", tmp_path / "only", *common[4:], "--image-size", "64x96")
    refused(script("sdmae/preprocess.py", *where, "--patch", "8", "--preview", check=False), "no training videos")


def test_constant_videos_smaller_than_a_patch_and_of_one_frame(tmp_path):
    root = tmp_path / "data"
    save_frames(root / "train" / "grey", np.full((6, 5, 7, 1), 90, np.uint8))
    save_frames(root / "test" / "grey", np.full((5, 5, 7, 1), 90, np.uint8))
    save_frames(root / "test" / "one", np.full((1, 31, 33, 3), 90, np.uint8))
    (root / "test" / "damaged").mkdir()
    (root / "test" / "damaged" / "000.png").write_bytes(b"no image at all, but long enough")
    done = train(root, tmp_path / "run", "--epochs", "2")
    assert "nothing moves" in done.stdout and "no labels" in done.stdout and "damaged" in done.stdout
    scores = load_arrays(tmp_path / "run" / "strict" / "scores.npz", "scores")
    assert {k: len(v) for k, v in scores.items()} == {"grey": 5, "one": 1}
    assert all(np.isfinite(v).all() for v in scores.values())


# ------------------------------------------------------------------------------------------------------ input and model


def test_samples_equal_a_plain_loop(tmp_path):
    arrays = cached(tmp_path, walkers(9, channels=3), walkers(2, channels=1), walkers(1, channels=1, seed=2))
    frames = FrameDataset(arrays, Run("cpu", "fp32"), SAMPLE_OFFSETS)
    assert len(frames) == 12 and frames.channels == 3
    five = frames.to_device(frames.read(np.arange(12)))
    n = 0
    for a in arrays:
        assert a.shape[1:3] == (32, 64)
        for t in range(len(a)):
            at = lambda d: (
                torch.from_numpy(np.repeat(a[t + d] if 0 <= t + d < len(a) else a[t], 3 // a.shape[3], axis=2))
                .float()
                .permute(2, 0, 1)
            )
            image = torch.cat([at(-3), at(0), at(3)]) / 127.5 - 1
            assert torch.allclose(network_input(five[n : n + 1, ::2])[0], image, atol=1e-6)
            assert torch.equal(motion_gradient(five[n : n + 1])[0], (at(-1) - at(1)).abs())
            target = network_target(five[n : n + 1, 2], torch.zeros(1, 1, 32, 64, dtype=torch.uint8))[0]
            assert torch.allclose(target[:3], at(0) / 127.5 - 1, atol=1e-6) and (target[3] == -1).all()
            n += 1
    order = np.array([3, 0, 11, 9, 5])
    parts = [b for _, b in frames.batches(order, 2)]
    assert torch.equal(torch.cat(parts), five[order])
    (_, seen), *_ = FrameDataset(arrays, Run("cpu", "fp32")).batches(order, 12)
    assert torch.equal(seen, five[order][:, ::2])


def test_processes_share_every_batch():
    order = np.arange(100, 123)
    for world in (1, 2, 3, 5):
        shares = []
        for rank in range(world):
            share = partial(Run.batch_slice, SimpleNamespace(rank=rank, world_size=world))
            run = SimpleNamespace(batch_slice=share, device=torch.device("cpu"))
            data = SimpleNamespace(read=lambda rows: rows, to_device=lambda rows: rows)
            loader = Loader(data, 5, 0, run, order=lambda epoch: order)
            shares.append(list(loader.batches(0, start=1)))
        assert {len(x) for x in shares} == {4} and loader.steps(0) == 5  # the same number of steps in all of them
        for i, whole in enumerate(np.split(order[5:], [5, 10, 15])):
            assert all((x[i].rows == whole).all() and (x[i].rows[x[i].part] == x[i].data).all() for x in shares)
            assert len({x[i].rng.random() for x in shares}) == 1
            own = [x[i].data.tolist() for x in shares]
            if len(whole) >= world:
                assert sorted(sum(own, [])) == whole.tolist() and all(own)
            else:
                assert all(x == whole.tolist() for x in own)  # too few to share: all take them


def test_scores_do_not_depend_on_the_batch(tmp_path):
    arrays = cached(tmp_path, walkers(11, channels=1))
    run = Run("cpu", "fp32")
    frames = FrameDataset(arrays, run)
    for draws in (1, 3):
        scorer = scoring.Scorer(small_net(), scoring.score_config("avenue"), run, draws=draws)
        a = scorer.score_frames(frames, np.arange(11), batch_size=11)
        b = scorer.score_frames(frames, np.arange(11)[::-1].copy(), batch_size=3)[::-1]
        assert np.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert torch.equal(noise_table(32), noise_table(32)) and not torch.equal(noise_table(32), noise_table(32, draw=2))


def test_the_students_error_can_count_on_removed_tokens_alone(tmp_path):
    arrays = cached(tmp_path, walkers(6, channels=1))
    run, rows = Run("cpu", "fp32"), np.arange(6)
    frames = FrameDataset(arrays, run)
    net = small_net()
    removed = torch.stack(
        [net(torch.zeros(6, 9, 32, 64), noise_table(net.tokens, draw=i)[:6])["mask"] for i in (0, 1)]
    ).numpy()

    def errors(tokens, draws):
        scorer = scoring.Scorer(net, scoring.score_config("avenue", tokens=tokens), run, draws=draws)
        return scorer.score_frames(frames, rows)

    one, both = errors("removed", 1), errors("removed", 2)
    every = errors("all", 1)
    assert np.allclose(one[:, 0], every[:, 0] * removed[0], rtol=1e-5) and np.allclose(
        one[:, 1], every[:, 1], rtol=1e-5
    )
    assert np.allclose(both[:, 0] * removed[0], one[:, 0], rtol=1e-5) and (both[:, 0] > 0).all()


def test_two_masks_remove_every_token_once():
    net = small_net()
    seen = torch.randint(0, 256, (3, 3, 3, 32, 64), dtype=torch.uint8)
    for pair in (0, 2):
        masks = [net(network_input(seen), noise_table(net.tokens, draw=pair + i)[5:8])["mask"] for i in (0, 1)]
        assert (masks[0] + masks[1] == 1).all() and masks[0].any()


def test_folded_network_equals_the_trained_one():
    net = small_net()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            (
                m.running_mean.normal_(),
                m.running_var.uniform_(0.5, 2),
                m.weight.data.uniform_(0.5, 2),
                m.bias.data.normal_(),
            )
    for channels in (3, 1):
        seen, noise = torch.randint(0, 256, (3, 3, channels, 32, 64), dtype=torch.uint8), torch.rand(3, net.tokens)
        target = network_target(seen[:, 1], torch.zeros(3, 1, 32, 64, dtype=torch.uint8))
        with torch.inference_mode():
            a = net(network_input(seen), noise)
            b, c = (scoring.fold(net, dtype)(seen, noise) for dtype in (torch.float32, torch.bfloat16))
        for k in ("teacher", "student"):
            assert torch.allclose(a[k], b[k], atol=1e-4), k
            assert (a[k] - c[k].float()).abs().mean() < 0.05 * a[k].abs().mean(), k
        for norm in ("L1", "L2"):
            for fast, plain in zip(pixel_errors(a, seen[:, 1], 8, norm), error_maps(a, target, 8, norm)):
                assert torch.allclose(fast, plain, rtol=1e-5)
        assert (pixel_errors({"teacher": a["teacher"]}, seen[:, 1], 8)[0] == 0).all()


def test_weights_of_a_still_image_are_even():
    target, gradient = torch.full((2, 4, 32, 64), -1.0), torch.zeros(2, 3, 32, 64)
    assert torch.allclose(token_weights(gradient, target, 8), torch.full((2, 32), 1 / 32))
    loss = teacher_loss(torch.zeros(2, 32, 256), target, gradient, 8)
    assert abs(float(loss) - 2.0) < 1e-5  # squared error 1 everywhere, summed over two images


# ----------------------------------------------------------------------------------------------------------------- live


def watch(base, root, *more, **kwargs):
    return script(
        "sdmae/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--checkpoint",
        base / "run" / "sdmae.pt",
        *more,
        **kwargs,
    )


def test_own_video_scores_equal_those_of_the_dataset(trained, tmp_path):
    base, root, _ = trained
    done = watch(base, root, "--video", root / "test" / "b0", "--out", tmp_path, "--window", "0.001")
    assert "wrote" in done.stdout and "latency" in done.stdout
    table = list(csv.DictReader(open(tmp_path / "b0" / "scores.csv")))
    wanted = load_arrays(base / "run" / "strict" / "scores.npz", "scores")["b0"]
    assert np.allclose([float(x["score"]) for x in table], wanted, rtol=1e-3)
    for name in ("events.csv", "overlay.mp4", "curve.png", "report.html", "ranking.csv", "contact_sheet.png"):
        assert (tmp_path / "b0" / name).stat().st_size > 50
    capture, n = cv2.VideoCapture(str(tmp_path / "b0" / "overlay.mp4")), 0
    while capture.read()[0]:
        n += 1
    assert n == 24


def test_a_dataset_that_was_copied_anew_is_not_scored_again(trained):
    base, root, _ = trained
    scored = next((base / "run").glob("scored-*/test/b0.npz"))
    before, (picture, *_) = scored.stat().st_mtime_ns, (root / "test" / "b0").iterdir()
    os.utime(picture, (1e9, 1e9))
    where = ("--dataset", "folder", "--data-root", root, "--cache", base / "cache", "--workers", 1, "--device", "cpu")
    script("sdmae/eval.py", *where, "--checkpoint", base / "run" / "sdmae.pt")
    assert scored.stat().st_mtime_ns == before and len(list(scored.parents[2].glob("scored-*"))) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_watch_that_is_stopped_keeps_what_it_has_seen(trained, tmp_path, how):
    """Ctrl-C and SIGTERM end it with everything written; a kill leaves the tables."""
    base, root, _ = trained
    path = save_video(tmp_path / "long.avi", np.concatenate([walkers(24, seed=i) for i in range(400)]))
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "sdmae" / "eval.py"),
            "--video",
            str(path),
            "--checkpoint",
            str(base / "run" / "sdmae.pt"),
            "--out",
            str(tmp_path / "out"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    process.stdout.readline()
    scores, deadline = tmp_path / "out" / "long" / "scores.csv", time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if scores.exists() and scores.stat().st_size > 4000:
            break
        time.sleep(0.01)
    process.send_signal(how)
    text = process.communicate(timeout=PATIENCE)[0]
    with open(scores) as file:
        table = list(csv.DictReader(file))
    table = table[: -1 if how == signal.SIGKILL else None]  # its last line may be half a one
    assert 0 < len(table) < 9600 and [int(x["frame"]) for x in table] == list(range(len(table)))
    if how != signal.SIGKILL:
        assert process.returncode == 0 and "stopped; " in text, text
        assert (scores.parent / "overlay.mp4").stat().st_size > 1000 and not list(scores.parent.glob(".*"))


def test_the_tool_that_watches_for_long(trained):
    """Its table and events fit each other; how memory grows cannot be told in seconds."""
    base, root, _ = trained
    flags = ("--video", root / "test" / "b0", "--minutes", "0.1", "--threshold", "0.02", "--precision", "fp32")
    done = script("tests/tools/soak.py", *flags, "--checkpoint", base / "run" / "sdmae.pt", check=False)
    assert "150 frames, " in done.stdout and "0 lost, 0 wrong" in done.stdout, done.stderr


def test_the_tool_that_counts_false_alarms(trained):
    base, root, _ = trained
    where = ("--data-root", root, "--cache", base / "cache", "--checkpoint", base / "run" / "sdmae.pt")
    done = script("tests/tools/false_alarms.py", *where, "--fps", "10", "--splits", "20", "--per-hour", "1", "1e5")
    rare, often = (line.strip("| ").split(" | ") for line in done.stdout.splitlines()[-2:])
    assert [rare[0], often[0]] == ["1", "100000"]
    assert 0 <= float(rare[1]) < float(often[1])
    refused(script("tests/tools/false_alarms.py", *where, check=False), "give --fps")


def test_boxes_of_maps_are_in_the_sources_pixels():
    maps = np.zeros((2, 4, 8), np.float32)
    maps[1, 1:3, 2:4] = 5
    maps[1, 2, 3] = 7
    assert scoring.boxes_of_maps(maps, 1.0, (40, 160)).tolist() == [[1, 40, 10, 79, 29, 7]]
    net = small_net()
    out = net(torch.rand(1, 9, 32, 64), torch.rand(1, 32))
    a, b = error_maps(out, torch.rand(1, 4, 32, 64), 8)
    assert a.shape == b.shape == (1, 32)


@pytest.mark.kernels
def test_torchrun_with_two_processes(trained, tmp_path):
    where = ("--dataset", "folder", "--data-root", trained[1], "--cache", tmp_path / "cache")
    trained_by_two("sdmae", "sdmae.pt", SMALL, where, tmp_path)
    same_losses("sdmae/train.py", (*SMALL, *where, "--batch-size", "7"), tmp_path)  # shares of 4 and 3


def test_liberties_say_what_is_not_as_published():
    official = ScoreOptions("official")
    avenue, shanghaitech = scoring.score_config("avenue"), scoring.score_config("shanghaitech-sd")
    assert shanghaitech == scoring.SHANGHAITECH and input_size("shanghaitech-sd") == ((160, 320), 8)
    for dataset, config, draws, words in (
        ("avenue", avenue, 1, ("the authors' for this dataset",)),
        ("shanghaitech-sd", shanghaitech, 1, ("the authors' for this dataset", "[0, 1]")),
        ("shanghaitech", avenue, 1, ("the authors' for Avenue, not for shanghaitech",)),
        ("avenue", avenue, 2, ("the authors' for this dataset", "student on all tokens, 2 masks")),
        ("avenue", scoring.score_config("avenue", "L1"), 1, ("the authors' for this dataset", "reconstruction, L1,")),
    ):
        liberties = make_protocol(official, dataset, config, draws).liberties
        assert len(liberties) == len(words) and all(w in x for w, x in zip(words, liberties)), liberties


def test_a_student_that_was_not_trained_does_not_count(tmp_path, capsys):
    """Of an unfinished training, or of the authors' teacher alone; unless the user asks for it."""
    net, run = small_net(), Run("cpu")
    model_args = {**SIZES["small"], "patch_size": 8, "image_size": [32, 64]}
    whole = SDMAE(patch_size=8, image_size=(32, 64)).state_dict()
    torch.save({"model": whole}, tmp_path / "teacher.pth")
    ours = {"method": "sdmae", "model_args": model_args, "model_state_dict": net.state_dict()}
    for phase in ("teacher", "student"):
        torch.save({**ours, "phase": phase}, tmp_path / f"{phase}.pt")
    for file, how, parts, words in (
        ("teacher.pt", {}, 1, "has not begun to train its student"),
        ("teacher.pt", {"parts": "both"}, 2, ""),
        ("student.pt", {}, 2, ""),
        ("teacher.pth", {"image_size": (32, 64)}, 1, "comes without --student"),
        ("teacher.pth", {"image_size": (32, 64), "student": tmp_path / "teacher.pth"}, 2, ""),
    ):
        assert len(load(tmp_path / file, "avenue", run, **how).config.parts) == parts
        said = capsys.readouterr().out
        assert words in said if words else not said


def test_tokens_that_stay_fill_the_rows():
    assert make_plan("avenue", epochs=1).student_from == 1
    for ratio in (0.5, 0.75, 0.9, 0.8):  # of 12 × 20
        check_mask_ratio(ratio, 12, 20)
        out = small_net(image_size=(96, 160), mask_ratio=ratio)(torch.zeros(1, 9, 96, 160), torch.rand(1, 240))
        assert int((out["mask"] == 0).sum()) == round(240 * (1 - ratio))
    for ratio, nearest in ((0.52, "0.5"), (0.99, "0.95"), (0.001, "0.05"), (1.5, "0.95")):
        with pytest.raises(UserError, match=f"12 rows; the nearest that fits is {nearest}$"):
            check_mask_ratio(ratio, 12, 20)


def test_the_rate_falls_over_the_last_third_of_either_phase():
    plan = make_plan("ped2", epochs=9, student_from=6, lr=2.0)
    for epoch, lr in ((0, 2.0), (4, 2.0), (5, 1.0), (5.5, 0.5), (6, 2.0), (8.5, 1.0)):
        assert abs(plan.lr_at(epoch) - lr) < 1e-9, epoch
    assert plan.lr_schedule and make_plan("avenue").lr_at(199) == 1e-4


def test_the_readmes_python_example_runs(trained):
    base, _, _ = trained
    example = (ROOT / "README.md").read_text().split("<!-- python example -->\n```python\n")[1].split("```")[0]
    assert len(example.splitlines()) <= 12
    example = example.replace("runs/sdmae/demo/sdmae.pt", str(base / "run" / "sdmae.pt"))
    scores = eval(python(example + "print(scores.tolist())"))
    assert len(scores) == 50 and np.isfinite(scores).all() and min(scores) >= 0


def test_shards_score_what_one_job_scores(trained, tmp_path):
    base, root, _ = trained
    flags = (
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--workers",
        1,
        "--checkpoint",
        base / "run" / "sdmae.pt",
    )
    scored_by_shards("sdmae/eval.py", flags, base / "run" / "strict" / "scores.npz", tmp_path)
