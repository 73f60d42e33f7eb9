"""FRD-UVAD through its own scripts, in small; readers of clip features, windows, bank and stand-in features against
plain loops."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common import training
from common.distributed import Run
from common.features.encoders import RANDOM, EncoderSpec
from common.io import UserError, load_arrays
from common.loader import Batch, Loader
from common.readers import datasets
from common.readers.video import open_video
from frd_uvad import encoders, scoring
from frd_uvad.data import AnomalyBank, Windows
from frd_uvad.eval import published_measures
from frd_uvad.features.data import FeatureVideo, frames_of_clips
from frd_uvad.features.folders import find_features
from frd_uvad.model import FRD, Attention, cumulative, losses, positions, select_for_bank
from frd_uvad.stand_in import handcrafted_features
from frd_uvad.train import draw_bank, make_plan, parse
from tests.helpers import (
    PATIENCE,
    ROOT,
    all_refused,
    killed_after,
    python,
    refused,
    same_losses,
    save_frames,
    save_video,
    scored_by_shards,
    script,
    tiny_folder,
    torchrun,
    trained_by_two,
    walkers,
)
from tests.tools import long_videos

SMALL = (
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--num-blocks",
    "2",
    "--cross-clip",
    "2",
    "--workers",
    "1",
    "--device",
    "cpu",
)


def per_video_features(root, train=3, test=2, clips=12, crops=2, width=256, seed=0):
    """Features on disk: abnormal clips are shifted; frame labels by annotation."""
    rng, lines = np.random.default_rng(seed), []
    for split, n in (("train", train), ("test", test)):
        (root / split).mkdir(parents=True)
        for i in range(n):
            x = rng.normal(size=(clips + i, crops, width)).astype(np.float32) * 0.3
            x[4:7] += rng.normal(size=width) * 2
            np.save(root / split / f"Abuse{i:03d}_{split}.npy", x)
            if split == "test":
                lines.append(f"Abuse{i:03d}_{split}.mp4  Abuse  64  111  -1  -1")
    (root / "Temporal_Anomaly_Annotation.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("merkmale ü")
    root = per_video_features(base / "features")
    done = script(
        "frd_uvad/train.py",
        "--dataset",
        "features",
        "--features",
        root,
        "--out",
        base / "run",
        *SMALL,
        "--auxiliary",
        "self",
    )
    return base, root, done


def test_one_command_trains_two_rounds_and_scores(trained):
    base, _, done = trained
    for text in (
        "round 1",
        "round 2",
        "auxiliary frd:",
        "micro AUC",
        "reconstruction error",
        "AUC, abnormal videos",
        "next:",
    ):
        assert text in done.stdout, done.stdout
    assert re.search("points (above|BELOW) the reconstruction error\n", done.stdout)  # which is no trivial baseline
    lines = [json.loads(x) for x in (base / "run" / "round1" / "log.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines] == [1, 2] and all(
        0 <= x["pseudo_precision"] <= 1 and x["windows_per_second"] > 0 for x in lines
    )
    scores = load_arrays(base / "run" / "strict" / "scores.npz", "scores")
    assert {k: len(v) for k, v in scores.items()} == {"Abuse000_test": 192, "Abuse001_test": 208}
    for name in ("strict/roc.png", "strict/curves/Abuse000_test.png", "pseudo_labels.png"):
        assert (base / "run" / name).stat().st_size > 1000, name


def test_an_auxiliary_scorer_that_agrees_with_nothing_is_named(trained, tmp_path):
    base, root, done = trained
    clips = {p.stem: len(np.load(p)) for p in root.glob("*/*.npy")}
    np.savez(tmp_path / "low.npz", **{name: np.full(n, 0.4) for name, n in clips.items()})
    flags = ("--dataset", "features", "--features", root, *SMALL, "--auxiliary", f"labels:{tmp_path / 'low.npz'}")
    low = script("frd_uvad/train.py", *flags, "--out", tmp_path / "run")
    note = "note: no clip has a pseudo label (the auxiliary scorer must give a clip 0.5 or more)"
    assert (low.stdout + low.stderr).count(note) == 1 and note not in done.stdout + done.stderr


def test_training_videos_alone(trained, tmp_path):
    base, root, done = trained
    assert "5 videos" in done.stdout
    flags = ("--dataset", "features", "--features", root, *SMALL, "--videos", "train", "--out", tmp_path / "run")
    alone = script("frd_uvad/train.py", *flags)
    assert "3 videos, 39 windows" in alone.stdout and "micro AUC" in alone.stdout
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "pseudo_precision" not in lines[0] and not (tmp_path / "run" / "pseudo_labels.png").exists()
    shutil.copytree(root / "test", tmp_path / "features" / "test")
    where = ("--features", tmp_path / "features", *SMALL, "--videos", "train", "--out", tmp_path / "other")
    refused(script("frd_uvad/train.py", "--dataset", "features", *where, check=False), "--videos train")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_more_files_than_the_usual_limit(tmp_path):
    """A memory map for each video keeps its file open; at first 64 files may be open."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    root = per_video_features(tmp_path / "features", train=90, clips=8, crops=1)
    flags = ("--dataset", "features", "--features", root, *SMALL, "--epochs", 1, "--out", tmp_path / "run")
    done = script(
        "frd_uvad/train.py", *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
    )
    assert "92 videos" in done.stdout


def test_few_clips_are_trained_for_as_many_steps_as_it_takes():
    plans = [make_plan(304), make_plan(63999), make_plan(64000), make_plan(), make_plan(304, epochs=3)]
    assert [(p.epochs, p.batch_size) for p in plans] == [(264, 16), (5, 16), (5, 320), (5, 320), (3, 320)]


def test_published_command_line_is_understood(tmp_path):
    words = (
        "--dataset_name ucfcrime --feature_pretrain_model i3d --feature_modal rgb --cross_clip 4 --lab False "
        "--lab_type wlab --beta 0.1 --delta 0.5 --Vitblock_num 8 --max_seqlen 320 --max_epoch 5 --Lambda 1_1_1"
    )
    args = parse(words.split())
    assert (
        args.dataset,
        args.cross_clip,
        args.bank,
        args.num_blocks,
        args.batch_size,
        args.epochs,
    ) == ("ucfcrime", 4, "none", 8, 320, 5)
    ours = [parse(["--bank", x]) for x in ("slab:0.2:-1", "wlab:2")] + [parse(["--beta", "3", "--delta", "1"])]
    assert [(x.bank, x.beta, x.delta) for x in ours[1:]] == [("wlab", 2, None), ("wlab", 3, 1)]
    assert (ours[0].bank, ours[0].beta, ours[0].delta) == ("slab", 0.2, -1)
    # the same on files of that layout, and the authors' evaluation-only file
    root, rng = tmp_path / "data" / "ucfcrime", np.random.default_rng(0)
    root.mkdir(parents=True)
    np.save(root / "concat_UCF.npy", rng.normal(size=(20, 2, 256)).astype(np.float32))
    np.save(root / "Concat_test_10.npy", rng.normal(size=(9, 2, 256)).astype(np.float32))
    np.save(root / "nalist.npy", np.array([[0, 4], [5, 8]]))
    np.save(root / "gt-ucf-RTFM.npy", np.repeat([0, 1, 1, 0, 0, 0, 0, 0, 0], 16))
    done = script(
        "frd_uvad/train.py",
        *words.replace("--max_epoch 5", "--max_epoch 1").replace("num 8", "num 0").split(),
        "--data-root",
        tmp_path / "data",
        "--out",
        tmp_path / "run",
    )
    assert "may cross videos" in done.stdout and "micro AUC" in done.stdout
    weights = training.load_checkpoint(tmp_path / "run" / "frd.pt")["model_state_dict"]
    torch.save({k: v for k, v in weights.items() if k.startswith("scorer.")}, tmp_path / "scorer.pkl")
    again = script(
        "frd_uvad/eval.py",
        "--dataset_name",
        "ucfcrime",
        "--data-root",
        tmp_path / "data",
        "--ckpt_path",
        tmp_path / "scorer.pkl",
        "--protocol",
        "official",
        "--out",
        tmp_path / "out",
    )
    a, b = (
        load_arrays(p, "scores")
        for p in (tmp_path / "run" / "strict" / "scores.npz", tmp_path / "out" / "official" / "scores.npz")
    )
    assert (
        all(np.allclose(a[k], b[k]) for k in a)
        and "batches of 128" in again.stdout
        and "reconstruction error" not in again.stdout
    )


def test_killed_and_started_again_ends_with_the_same_weights(trained, tmp_path):
    _, root, _ = trained
    flags = ("--dataset", "features", "--features", str(root), *SMALL, "--epochs", "30", "--save-minutes", "0")
    script("frd_uvad/train.py", *flags, "--out", tmp_path / "whole")
    killed_after("*/frd.pt:2", "frd_uvad/train.py", *flags, "--out", tmp_path / "run")
    assert not training.load_checkpoint(tmp_path / "run" / "frd.pt")["done"]
    done = script("frd_uvad/train.py", *flags, "--out", tmp_path / "run")
    assert "going on at epoch" in done.stdout
    a, b = (training.load_checkpoint(p / "frd.pt") for p in (tmp_path / "run", tmp_path / "whole"))
    assert all(torch.equal(a["model_state_dict"][k], b["model_state_dict"][k]) for k in a["model_state_dict"])
    refused(
        script("frd_uvad/train.py", *flags, "--out", tmp_path / "run", "--delta", "1", check=False),
        "delta",
        "--no-resume",
    )


def test_videos_to_features_to_scores(tmp_path):
    root = tiny_folder(tmp_path / "data", frames=40)
    save_frames(root / "test" / "b9", walkers(5))  # one clip, shorter than 16 frames
    np.save(root / "labels" / "b9.npy", np.zeros(5, np.uint8))
    done = script(
        "frd_uvad/train.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "run",
        *SMALL,
        "--batch-size",
        "320",
    )  # fewer windows than a batch
    assert "width 1024" in done.stdout
    table = "reconstruction error +frame difference +fastest box +flow energy\n(.*\n)+micro AUC is .* best trivial"
    assert re.search(table, done.stdout), done.stdout
    scores = load_arrays(tmp_path / "run" / "strict" / "scores.npz", "scores")
    assert {k: len(v) for k, v in scores.items()} == {"b0": 40, "b1": 40, "b9": 5}
    script(
        "frd_uvad/preprocess.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache2",
        "--workers",
        "2",
    )
    made = sorted(p.relative_to(tmp_path / "cache") for p in (tmp_path / "cache").rglob("clips-*/*/*.npy"))
    assert len(made) == 5 and all(
        (tmp_path / "cache" / p).read_bytes() == (tmp_path / "cache2" / p).read_bytes() for p in made
    )
    own = script(
        "frd_uvad/eval.py",
        "--video",
        root / "test" / "b9",
        "--checkpoint",
        tmp_path / "run" / "frd.pt",
        "--out",
        tmp_path / "own",
    )
    assert "b9: 5 frames" in own.stdout and (tmp_path / "own" / "b9" / "overlay.mp4").stat().st_size > 500
    table = (tmp_path / "own" / "b9" / "scores.csv").read_text().splitlines()
    assert len(table) == 6 and abs(float(table[1].split(",")[2]) - scores["b9"][0]) < 1e-4
    state = training.load_checkpoint(tmp_path / "run" / "frd.pt")
    assert state["bank"] is None or (tmp_path / "run" / "bank.png").stat().st_size > 1000
    speed = script(
        "tests/perf/bench.py",
        "frd_uvad",
        "--seconds",
        0.2,
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        *SMALL,
    )
    assert "on the device" in speed.stdout and "read from disk" in speed.stdout


def test_ugly_features_are_one_sentence(tmp_path):
    nan, width = per_video_features(tmp_path / "nan"), per_video_features(tmp_path / "width")
    x = np.load(nan / "train" / "Abuse001_train.npy")
    x[3, 0, 5] = np.nan
    np.save(nan / "train" / "Abuse001_train.npy", x)
    np.save(width / "test" / "Abuse001_test.npy", np.zeros((4, 2, 512), np.float32))
    odd, absent = per_video_features(tmp_path / "odd", width=100), per_video_features(tmp_path / "absent")
    np.save(absent / "test" / "Arson009.npy", np.zeros((4, 2, 256), np.float32))
    videos = tiny_folder(tmp_path / "v")
    cases = [
        ((nan,), ("Abuse001_train", "clip 3")),
        ((width,), ("differ", "512")),
        ((odd,), ("width 100",)),
        ((absent,), ("Arson009", "annotation")),
        ((absent, "--auxiliary", "nonsense"), ("--auxiliary",)),
        ((tmp_path / "nowhere",), ("nowhere",)),
        ((absent, "--Lambda", "1_1"), ("1_1",)),
    ]
    all_refused(
        [
            *(
                (
                    "frd_uvad/train.py",
                    ("--dataset", "features", *SMALL, "--out", tmp_path / f"run{i}", "--features", *flags),
                    words,
                )
                for i, (flags, words) in enumerate(cases)
            ),
            *(
                ("frd_uvad/preprocess.py", ("--dataset", "folder", "--data-root", videos, *flags), words)
                for flags, words in [
                    (("--encoder", "r4d"), ("r4d", "stand-in:statistics")),
                    (("--backbone", "r4d"), ("torchvision:r4d", "list_models")),
                    (("--encoder", "timm:resnet81"), ("timm:resnet81", "similar", "resnet")),
                    (("--encoder", f"files:{tmp_path}+timm:resnet18"), ("files", "joined")),
                    (("--encoder", "timm:resnet18:gone.pth"), ("gone.pth",)),
                    (("--encoder", "svmae:gone.pt+timm:resnet18"), ("gone.pt",)),
                    (("--encoder", "timm:resnet18:random"), ("random",)),
                    (("--crops", "10"), ("--crops 10", "whole frames")),
                ]
            ),
            ("frd_uvad/eval.py", ("--dataset", "UCSDped2"), ("runs/frd_uvad/ped2/frd.pt",)),
        ]
    )


# ---------------------------------------------------------------------------------------------------------- small parts


def test_annotations_and_layouts(tmp_path, capsys, listing):
    data = find_features("features", per_video_features(tmp_path / "a"))
    assert (data.crops, data.width) == (2, 256) and [len(v) for v in data.test] == [12, 13]
    labels = data.labels(data.test[0])
    assert len(labels) == 192 and labels.sum() == 48 and labels[64] == 1 and labels[112] == 0
    (tmp_path / "a" / "Temporal_Anomaly_Annotation.txt").write_text(
        "Abuse000_test.mp4 Abuse 0 5 20 25\nAbuse001_test.mp4 Normal -1 -1 -1 -1\nGone.mp4 Abuse 1 2 -1 -1\n"
    )
    data = find_features("features", tmp_path / "a")
    assert (
        data.labels(data.test[0]).sum() == 12
        and data.labels(data.test[1]).sum() == 0
        and "Gone" in capsys.readouterr().out
    )
    root = tmp_path / "crops" / "test"
    root.mkdir(parents=True)
    for i in range(5):
        np.save(root / f"film_label_A__{i}.npy", np.full((7, 256), i, np.float32))
    (tmp_path / "crops" / "annotations.txt").write_text("other_label_B1 3 9\n")
    data = find_features("xdviolence", tmp_path / "crops")
    assert (
        data.crops == 5
        and data.test[0].clips([3])[0, :, 0].tolist() == [0, 1, 2, 3, 4]
        and data.labels(data.test[0]).sum() == 0
    )
    flat = tmp_path / "flat"
    flat.mkdir()
    np.save(
        flat / "Concat_test_10.npy", np.arange(10, dtype=np.float32)[:, None, None] * np.ones((1, 1, 256), np.float32)
    )
    np.save(flat / "nalist.npy", np.array([[0, 4], [4, 10]]))  # half-open
    data = find_features("ucfcrime", flat)
    assert [v.clips(range(len(v)))[:, 0, 0].tolist() for v in data.test] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7, 8, 9],
    ] and not data.has_labels
    np.save(flat / "gt-x.npy", np.zeros(7))
    with pytest.raises(UserError, match="7 entries for 10 test clips"):
        find_features("ucfcrime", flat)


@pytest.mark.parametrize("streamed", [False, True])
def test_windows_never_cross_videos(streamed):
    videos = [
        FeatureVideo(
            f"v{i}", "train", [np.arange(n, dtype=np.float32)[:, None, None] + 100 * i * np.ones((1, 2, 4), np.float32)]
        )
        for i, n in enumerate((5, 1, 3))
    ]
    windows = Windows(videos, 3, Run("cpu", "fp32"))
    if streamed:
        windows.features = None
    got = windows.get(np.arange(9))
    assert got.shape == (9, 2, 3, 4)
    assert got[:, 0, :, 0].tolist() == [
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 4],
        [4, 4, 4],
        [100, 100, 100],
        [200, 201, 202],
        [201, 202, 202],
        [202, 202, 202],
    ]
    order = np.array([4, 8, 0, 5])
    batches = list(Loader(windows, 3, 0, windows.run, order=lambda epoch: order).batches(0))
    assert [b.rows.tolist() for b in batches] == [[4, 8, 0], [5]]
    assert torch.equal(torch.cat([b.data for b in batches]), got[order])


def test_what_the_bank_holds_is_shown(tmp_path):
    video = open_video(save_video(tmp_path / "a.avi", walkers(40)))
    windows = Windows([FeatureVideo("a", "test", [np.zeros((3, 1, 256), np.float32)])], 2, Run("cpu", "fp32"))
    data, bank = type("Data", (), {"videos": {("test", "a"): video}}), AnomalyBank(4)
    bank.add(torch.zeros(3, 1, 2, 256), np.array([0, 2, 2]), np.random.default_rng(0))
    draw_bank(bank, windows, data, tmp_path / "bank.png")
    image = cv2.imread(str(tmp_path / "bank.png"))
    assert image.shape[1] == 2 * 328 and image.std() > 5  # clips 0 and 2, the last of which has no middle frame


def test_streamed_features_leave_memory_flat(tmp_path):
    """More than a gigabyte of clips on disk (sparse): the process must not grow by what it reads."""
    code = """
import resource, sys
import numpy as np
from common.distributed import Run
from frd_uvad.features.folders import find_features
from common.loader import Loader
from frd_uvad.data import Windows
data = find_features("features", sys.argv[1])
windows = Windows(data.train, 4, Run("cpu", "fp32"))
assert windows.features is None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = sum(len(batch.data) for batch in Loader(windows, 64, 0, windows.run).batches(0))
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    (tmp_path / "train").mkdir()
    big = np.lib.format.open_memmap(tmp_path / "train" / "v.npy", "w+", np.float32, (40000, 8, 1024))
    del big
    n, grown = map(int, python(code, tmp_path).split())
    assert n == 40000 and grown < 200


def test_the_bank_keeps_its_size():
    bank, rng = AnomalyBank(4), np.random.default_rng(0)
    bank.add(torch.zeros(0, 1, 1, 2), np.zeros(0, int), rng)
    assert bank.windows is None
    bank.add(torch.zeros(3, 1, 1, 2), np.zeros(3, int), rng)
    bank.add(torch.ones(9, 1, 1, 2), np.arange(1, 10), rng)
    assert len(bank.windows) == 4 and ((bank.windows.flatten() > 0).view(4, 2)[:, 0].numpy() == (bank.first > 0)).all()
    windows = Windows([FeatureVideo("a", "test", [np.arange(6.0)[:, None, None]])], 2, Run("cpu", "fp32"))
    bank, batch = AnomalyBank(4), Batch(np.array([3, 0, 5]), slice(None), None, rng)
    bank.choose(torch.tensor([True, False, True]), batch, windows)
    assert len(bank) == 0 and bank.state_dict()["bank_first"] == [3, 5]  # a checkpoint holds what was chosen
    assert len(bank) == 2 and bank.windows[:, 0, :, 0].tolist() == [[3, 4], [5, 5]]
    pseudo, scores = (
        torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),
        torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.1, 0.1]]),
    )
    assert select_for_bank(pseudo, scores, "wlab", 0.0).tolist() == [True, True, False]
    assert select_for_bank(pseudo, scores, "slab", 0.0).tolist() == [True, False, False]


def test_attention_across_clips_asks_with_the_clip_before():
    torch.manual_seed(0)
    layer, x = Attention(32, 4), torch.randn(2, 3, 16, 32)
    qkv = layer.qkv(x).view(2, 3, 16, 3, 4, 8)
    for n in range(2):
        for k in range(3):
            q, key = qkv[n, max(0, k - 1), :, 0], qkv[n, k, :, 1]
            value = qkv[n, k, :, 2]
            w = torch.einsum("ihd,jhd->hij", q, key).div(8**0.5).softmax(-1)
            wanted = layer.proj(torch.einsum("hij,jhd->ihd", w, value).reshape(16, 32))
            assert torch.allclose(layer(x, True)[n, k], wanted, atol=1e-5)
    table = positions(16, 8)
    assert (
        abs(float(table[3, 2]) - np.sin(3 / 10000**0.25)) < 1e-6
        and abs(float(table[3, 3]) - np.cos(3 / 10000**0.25)) < 1e-6
    )


def test_probabilities_are_not_rounded_to_bf16():
    """A mistake of which the scorer is sure must still have a gradient, and close scores must not be ties."""
    torch.manual_seed(0)
    scorer = FRD(feature_size=256, num_blocks=0).scorer.eval()
    with torch.no_grad():
        scorer.classifier.bias += 9
    with torch.autocast("cpu", torch.bfloat16):
        scores = scorer(torch.randn(64, 1, 4, 256))
    assert scores.dtype == torch.float32 and scores.max() < 1 and len(scores.unique()) > 200
    torch.nn.functional.binary_cross_entropy(scores, torch.zeros_like(scores)).backward()
    assert scorer.classifier.bias.grad > 0.9


def test_losses_by_hand():
    error, score = torch.tensor([[1.0, 2.0], [3.0, 10.0]]), torch.tensor([[[0.2], [0.4]], [[0.6], [0.8]]])
    parts = losses({"error": error, "score": score}, bank_error=torch.tensor([[0.5]]), weights=(1, 2, 3))
    known = torch.tensor([1.0, 2, 3, 10, 0.5])
    threshold = float(known.mean() + known.std())
    assert parts["pseudo"].tolist() == [[0, 0], [0, 1]] and abs(float(parts["threshold"]) - threshold) < 1e-5
    assert torch.allclose(cumulative(score)[..., 0], torch.tensor([[0.2, 0.3], [0.6, 0.7]]))
    bce = -np.mean(np.log([0.8, 0.7, 0.4, 0.7]))
    assert abs(float(parts["total"]) - (4 + 2 * (threshold - 0.5) + 3 * bce)) < 1e-4
    none = losses({"error": error, "score": score}, auxiliary=torch.zeros(2, 2))
    assert none["pseudo"].sum() == 0 and float(none["disruption"]) == 0


def test_auxiliary_labels_and_scorers(tmp_path):
    net = FRD(feature_size=256, num_blocks=0)
    torch.save(net.state_dict(), tmp_path / "net.pkl")
    auxiliary = scoring.load_auxiliary(f"frd:{tmp_path / 'net.pkl'}")
    x = torch.randn(3, 2, 1, 256)
    assert torch.allclose(auxiliary.net(x), net.eval().scorer(x)) and scoring.load_auxiliary("none") is None
    np.savez(tmp_path / "l.npz", v0=np.ones(5), v1=np.zeros(2))
    videos = [
        FeatureVideo("v0", "train", [np.zeros((5, 1, 256), np.float32)]),
        FeatureVideo("v1", "train", [np.zeros((3, 1, 256))]),
    ]
    from frd_uvad.train import labels_of_clips

    labels = scoring.load_auxiliary(f"labels:{tmp_path / 'l.npz'}")
    assert len({auxiliary.content(), labels.content()}) == 2 and labels.content() == labels.content()
    with pytest.raises(UserError, match="3 clips"):
        labels_of_clips(labels, videos)
    torch.save({"scorer.fc1.weight": torch.zeros(3)}, tmp_path / "odd.pkl")
    with pytest.raises(UserError):
        scoring.load_model(tmp_path / "odd.pkl")


def test_stand_in_features_and_stretching():
    clip = walkers(16, channels=1)
    a, still = handcrafted_features(clip), handcrafted_features(np.repeat(clip[:1], 16, 0))
    assert a.shape == (1, 1024) and np.isfinite(a).all()
    assert still[0, 256:].max() < 1e-5 and a[0, 512:].max() > 0.1
    assert (
        frames_of_clips(np.array([1.0, 2.0]), 20).tolist() == [1.0] * 16 + [2.0] * 4
        and len(frames_of_clips(np.array([1.0]), 20)) == 20
    )
    scores = {"a": np.zeros(16 * 128), "b": np.r_[np.zeros(800), np.ones(800)]}
    labels = {"a": np.zeros(16 * 128, int), "b": np.r_[np.zeros(800, int), np.ones(800, int)]}
    assert published_measures(scores, labels)["auc_abnormal_batches"] == 1.0


def test_views_and_width_of_a_video_network():
    net = encoders.VideoClips(EncoderSpec("torchvision", "r3d_18", RANDOM), 10, Run("cpu", "fp32"))
    clip = np.stack([net.preprocess_frame(frame) for frame in walkers(16, size=(60, 90))])
    assert clip.shape == (16, 256, 384, 3)
    views = net.views(clip)
    assert views.shape == (10, 3, 16, 224, 224) and torch.equal(views[5], views[0].flip(3))
    net.crops = 1
    assert net.encode([clip]).shape == (1, 1, 512) and net.width == 512


def test_long_videos_out_of_clips(tmp_path):
    for kind, n in (("fight", 3), ("noFight", 12)):
        for i in range(n):
            save_video(tmp_path / "clips" / kind / f"{kind}{i}.avi", walkers(4, seed=i))
    done = script(
        "tests/tools/long_videos.py",
        "--clips",
        tmp_path / "clips",
        "--out",
        tmp_path / "long",
        "--videos",
        3,
        "--size",
        32,
        48,
    )
    assert "3 videos" in done.stdout
    labels = [np.load(tmp_path / "long" / "labels" / f"long0{i}.npy") for i in range(3)]
    assert labels[0].sum() in (4, 8, 12) and labels[1].sum() == 0 and all(40 <= len(y) <= 80 for y in labels)
    data = datasets.find("folder", tmp_path / "long")
    assert [len(data.labels(v, v.expected_frames())) for v in data.test] == [len(y) for y in labels]


def test_long_videos_use_a_calm_clip_once_or_in_several_videos():
    repeated, once = (long_videos.plan(9, 40, 8, np.random.default_rng(0), once=once) for once in (False, True))
    calm = [sorted(k for clips in videos for k, fight in clips if not fight) for videos in (repeated, once)]
    assert len(calm[0]) > len(set(calm[0])) and calm[1] == list(range(40))
    assert all(any(fight for _, fight in clips) == (i % 2 == 0) for i, clips in enumerate(once))


@pytest.mark.kernels
def test_torchrun_with_two_processes(trained, tmp_path):
    where = ("--dataset", "features", "--features", trained[1])
    assert "round 2" in trained_by_two("frd_uvad", "frd.pt", (*SMALL, "--auxiliary", "self"), where, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process of a rank in /proc")
def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(trained, tmp_path):
    flags = (
        "--dataset",
        "features",
        "--features",
        str(trained[1]),
        *SMALL,
        "--epochs",
        "60",
        "--save-minutes",
        "0",
        "--out",
        str(tmp_path / "run"),
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "frd_uvad" / "train.py"),
        *flags,
    ]
    job = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    path, deadline = tmp_path / "run" / "frd.pt", time.monotonic() + PATIENCE
    while time.monotonic() < deadline and job.poll() is None and not path.exists():
        time.sleep(0.01)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = (
                str(tmp_path).encode() in (process / "cmdline").read_bytes()
                and b"\0RANK=1\0" in (process / "environ").read_bytes()
            )
        except OSError:
            continue
        if mine:
            os.kill(int(process.name), signal.SIGKILL)
    said = job.communicate(timeout=PATIENCE)[1]
    assert job.returncode != 0 and "SIGKILL" in said, said[-2000:]
    assert not training.load_checkpoint(path)["done"]
    said = torchrun("frd_uvad/train.py", *flags)
    assert "going on at epoch" in said and training.load_checkpoint(path)["done"]


@pytest.mark.kernels
def test_two_processes_have_the_losses_of_one(trained, tmp_path):
    same_losses(
        "frd_uvad/train.py", ("--dataset", "features", "--features", trained[1], *SMALL, "--epochs", "3"), tmp_path
    )


def test_shards_score_what_one_job_scores(trained, tmp_path):
    base, root, _ = trained
    scored_by_shards(
        "frd_uvad/eval.py",
        ("--dataset", "features", "--features", root, "--checkpoint", base / "run" / "frd.pt"),
        base / "run" / "strict" / "scores.npz",
        tmp_path,
    )
