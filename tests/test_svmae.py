"""SVMAE's scripts in small: pre-training, features, detector; masks, losses and fusion against plain loops."""

import csv
import itertools
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from common import training
from common.distributed import Run
from common.io import UserError, load_arrays
from common.loader import Loader
from common.readers.video import open_video
from frd_uvad.features.data import FeatureVideo
from frd_uvad.features.folders import find_features
from frd_uvad.svmae import detector, model, train
from frd_uvad.svmae.clips import WHOLE_FRAME, Clips, Depth, crop_clips, random_crops
from frd_uvad.svmae.data import Bags, find_bags, pool_segments
from frd_uvad.svmae.eval import FUSIONS, GROUPS
from frd_uvad.svmae.preprocess import check_same_encoder
from frd_uvad.svmae.pretrain import first_shape, make_plan, parameter_groups
from frd_uvad.svmae.scoring import infer_args, load_model
from tests.helpers import (
    all_refused,
    killed_after,
    refused,
    same_losses,
    same_scores,
    save_frames,
    save_video,
    scored_by_shards,
    script,
    tiny_folder,
    torchrun,
    walkers,
)
from tests.tools import long_videos, sources

SMALL = (
    "--dataset",
    "folder",
    "--preset",
    "tiny",
    "--size",
    "32",
    "--frames",
    "4",
    "--stride",
    "1",
    "--batch-size",
    "6",
    "--workers",
    "1",
    "--device",
    "cpu",
)


def pretrain(root, out, *more, **kwargs):
    where = ("--data-root", root, "--cache", root.parent / "cache", "--out", out)
    return script("frd_uvad/svmae/pretrain.py", *SMALL, *where, *more, **kwargs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("vor training ß")
    root = tiny_folder(base / "data", train=4, frames=40)
    save_frames(root / "train" / "a9", walkers(3))  # shorter than a clip
    (root / "normal.txt").write_text("a0\na1\n")
    (root / "abnormal.txt").write_text("a2\na3\n")
    return base, root, pretrain(root, base / "run", "--epochs", "3")


@pytest.fixture(scope="module")
def features(trained):
    base, root, _ = trained
    done = script(
        "frd_uvad/svmae/preprocess.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--checkpoint",
        base / "run" / "pretrain.pt",
        "--out",
        base / "features",
        "--crops",
        "10",
        "--encode-batch",
        "2",
    )
    return base / "features", done


# -------------------------------------------------------------------------------------------------------- the commands


def test_pretraining_learns_and_draws(trained):
    base, _, done = trained
    for text in ("5 videos", "masking scene", "loss perspective", "preview.png", "next:"):
        assert text in done.stdout, done.stdout
    lines = [json.loads(x) for x in (base / "run" / "log.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines] == [1, 2, 3] and all(
        np.isfinite(x["loss"]) and x["tokens_per_second"] > 0 for x in lines
    )
    assert cv2.imread(str(base / "run" / "preview.png")).std() > 20


@pytest.mark.kernels
def test_killed_and_started_again_ends_with_the_same_weights(trained, tmp_path):
    base, root, _ = trained
    flags = (
        *SMALL,
        "--data-root",
        str(root),
        "--cache",
        str(base / "cache"),
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "3",
        "--save-minutes",
        "0",
    )
    killed_after("*/pretrain.pt:2", "frd_uvad/svmae/pretrain.py", *flags)
    path = tmp_path / "run" / "pretrain.pt"
    assert not training.load_checkpoint(path)["done"]
    assert "going on at epoch" in script("frd_uvad/svmae/pretrain.py", *flags).stdout
    a, b = (training.load_checkpoint(p)["model_state_dict"] for p in (path, base / "run" / "pretrain.pt"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    refused(script("frd_uvad/svmae/pretrain.py", *flags, "--masking", "tube", check=False), "masking", "--out")


def test_every_part_can_be_switched_off(trained, tmp_path):
    base, root, _ = trained
    maps = tmp_path / "maps"
    maps.mkdir()
    for v in ("a0", "a1", "a2", "a3"):
        np.save(maps / f"{v}.npy", np.linspace(3, 9, 20 * 30).reshape(20, 30))
    cv2.imwrite(str(maps / "a9.png"), np.arange(64, dtype=np.uint8).reshape(8, 8))
    for masking, loss, depth in (("random", "mse", "perspective"), ("tube", "perspective", maps)):
        done = pretrain(
            root,
            tmp_path / masking,
            "--epochs",
            "1",
            "--masking",
            masking,
            "--loss",
            loss,
            "--depth",
            depth,
            "--init",
            base / "run" / "pretrain.pt",
            "--layer-decay",
            "0.7",
        )
        assert f"masking {masking}" in done.stdout and "entries of the encoder are set" in done.stdout
    (maps / "a9.png").unlink()
    refused(pretrain(root, tmp_path / "x", "--depth", maps, check=False), "a9.npy")
    refused(pretrain(root, tmp_path / "x", "--mask-ratio", "1.5", check=False), "--mask-ratio")
    refused(pretrain(root, tmp_path / "x", "--size", "33", check=False), "multiple of 16")
    speed = script(
        "tests/perf/bench.py", "svmae", "--seconds", 0.2, *SMALL, "--data-root", root, "--cache", root.parent / "cache"
    )
    assert "tokens/s" in speed.stdout and "visible tokens" in speed.stdout and "% of a step" in speed.stdout


@pytest.mark.kernels
def test_torchrun_with_two_processes(trained, tmp_path):
    _, root, _ = trained
    torchrun(
        "frd_uvad/svmae/pretrain.py",
        *SMALL,
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "run",
        "--epochs",
        "1",
    )
    assert training.load_checkpoint(tmp_path / "run" / "pretrain.pt")["done"]
    same_losses(
        "frd_uvad/svmae/pretrain.py",
        (*SMALL, "--data-root", root, "--cache", tmp_path / "cache", "--epochs", "2"),
        tmp_path,
    )


def test_features_are_what_detector_and_frd_uvad_read(features, trained):
    folder, done = features
    data = find_features("features", folder)
    assert "10 crops of width 96" in done.stdout and (data.crops, data.width) == (10, 96)
    assert {v.name: len(v) for v in data.train} == {"a0": 3, "a1": 3, "a2": 3, "a3": 3, "a9": 1}
    assert len(data.labels(data.test[0])) == 40
    base, root, _ = trained
    again = script(
        "frd_uvad/svmae/preprocess.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--checkpoint",
        base / "run" / "pretrain.pt",
        "--out",
        folder,
        "--pool",
        "mean",
        check=False,
    )
    refused(again, "pool", "--out")
    random = script(
        "frd_uvad/svmae/preprocess.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--checkpoint",
        "random",
        "--preset",
        "tiny",
        "--size",
        "32",
        "--frames",
        "4",
        "--out",
        base / "random",
    )
    assert "1 crops of width 96" in random.stdout


@pytest.mark.kernels
def test_detector_trains_and_scores(features, trained, tmp_path):
    (folder, _), (_, root, _) = features, trained
    flags = ("--features", folder, "--iterations", "30", "--batch-size", "4", "--device", "cpu")
    done = script("frd_uvad/svmae/train.py", *flags, "--out", tmp_path / "run")
    for text in ("2 normal and 2 abnormal bags", "micro AUC", "FAR at 0.5", "next:"):
        assert text in done.stdout, done.stdout
    scores = load_arrays(tmp_path / "run" / "strict" / "scores.npz", "scores")
    assert {k: len(v) for k, v in scores.items()} == {"b0": 40, "b1": 40}
    # two processes share each batch of bags, and the scoring
    same_losses("frd_uvad/svmae/train.py", (*flags, "--iterations", "200"), tmp_path / "losses")
    scored_by_shards(
        "frd_uvad/svmae/eval.py",
        ("--features", folder, "--checkpoint", tmp_path / "run" / "detector.pt"),
        tmp_path / "run" / "strict" / "scores.npz",
        tmp_path,
    )
    torchrun("frd_uvad/svmae/train.py", *flags, "--out", tmp_path / "two")
    script(
        "frd_uvad/svmae/eval.py",
        "--features",
        folder,
        "--checkpoint",
        tmp_path / "two" / "detector.pt",
        "--out",
        tmp_path / "one",
    )
    same_scores(tmp_path / "two" / "strict" / "scores.npz", tmp_path / "one" / "strict" / "scores.npz")
    # one's own footage is encoded as the features were: a test video again has its scores again
    own = script(
        "frd_uvad/svmae/eval.py",
        "--video",
        root / "test" / "b1",
        "--checkpoint",
        tmp_path / "run" / "detector.pt",
        "--out",
        tmp_path / "own",
    )
    lines = list(csv.DictReader(open(tmp_path / "own" / "b1" / "scores.csv")))
    assert "report.html" in own.stdout and np.allclose([float(x["score"]) for x in lines], scores["b1"], atol=2e-3)
    # the authors' files are bare state-dicts
    weights = training.load_checkpoint(tmp_path / "run" / "detector.pt")["model_state_dict"]
    torch.save(weights, tmp_path / "authors.pkl")
    script(
        "frd_uvad/svmae/eval.py",
        "--features",
        folder,
        "--ckpt_path",
        tmp_path / "authors.pkl",
        "--out",
        tmp_path / "again",
    )
    again = load_arrays(tmp_path / "again" / "strict" / "scores.npz", "scores")
    assert all(np.allclose(scores[k], again[k]) for k in scores)
    # text: one row more or less than clips, tiled over crops
    (tmp_path / "text").mkdir()
    for v in find_features("features", folder).train + find_features("features", folder).test:
        np.save(
            tmp_path / "text" / f"{v.name}.npy",
            np.random.default_rng(0).normal(size=(len(v) + 1, 16)).astype(np.float32),
        )
    both = script(
        "frd_uvad/svmae/train.py", *flags, "--text", tmp_path / "text", "--fusion", "add", "--out", tmp_path / "add"
    )
    assert "text of width 16, add" in both.stdout
    all_refused(
        [
            (
                "frd_uvad/svmae/eval.py",
                ("--features", folder, "--checkpoint", tmp_path / "add" / "detector.pt"),
                ["--text"],
            ),
            (
                "frd_uvad/svmae/eval.py",
                ("--video", root / "test" / "b1", "--checkpoint", tmp_path / "authors.pkl"),
                ["--features"],
            ),
            ("frd_uvad/svmae/eval.py", ("--checkpoint", tmp_path / "run" / "detector.pt"), ["--video"]),
            ("frd_uvad/svmae/train.py", (*flags, "--out", tmp_path / "run", "--top-k", "99"), ["--top-k"]),
        ]
    )


@pytest.mark.kernels
def test_a_detector_goes_on_exactly(features, tmp_path):
    """Killed inside an interval of the log, and continued for more iterations."""
    folder, _ = features
    flags = ("--features", folder, "--batch-size", "4", "--device", "cpu")
    path = tmp_path / "run" / "detector.pt"
    first = (*flags, "--iterations", "100", "--out", tmp_path / "run", "--save-minutes", "0")
    killed_after("*/detector.pt:7", "frd_uvad/svmae/train.py", *first)
    assert training.load_checkpoint(path)["step"] == 7
    assert "going on at step 8" in script("frd_uvad/svmae/train.py", *first).stdout
    more = (*flags, "--iterations", "200", "--out", tmp_path / "run")
    assert "going on at step 101" in script("frd_uvad/svmae/train.py", *more).stdout
    assert "all steps were done before" in script("frd_uvad/svmae/train.py", *first).stdout
    script("frd_uvad/svmae/train.py", *flags, "--iterations", "200", "--out", tmp_path / "whole")
    states = [training.load_checkpoint(p) for p in (path, tmp_path / "whole" / "detector.pt")]
    a, b = (state["model_state_dict"] for state in states)
    assert all(state["done"] for state in states) and all(torch.equal(a[k], b[k]) for k in a)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("run", "whole")]
    logs = [[(x["epoch"], x["total"]) for x in map(json.loads, log)] for log in logs]
    assert logs[0] == logs[1] and [epoch for epoch, _ in logs[0]] == [100, 200]


def test_the_detector_encodes_what_is_missing(features, trained, tmp_path):
    (folder, _), (base, root, _) = features, trained
    videos = ("--dataset", "folder", "--data-root", root, "--encoder", base / "run" / "pretrain.pt", "--device", "cpu")
    flags = (*videos, "--batch-size", "4", "--features", tmp_path / "features", "--out", tmp_path / "run")
    done = script("frd_uvad/svmae/train.py", *flags, "--iterations", "10")
    for text in (
        "encoding: 7 of 7 videos",
        "1 crops of width 96",
        "2 normal and 2 abnormal bags",
        "micro AUC",
        "frame difference",
        "best trivial baseline",
    ):
        assert text in done.stdout, done.stdout
    assert (tmp_path / "run" / "strict" / "contact_sheet.png").exists()
    scores = load_arrays(tmp_path / "run" / "strict" / "scores.npz", "scores")
    (tmp_path / "features" / "train" / "a1.json").unlink()
    again = script("frd_uvad/svmae/train.py", *flags, "--iterations", "10")
    assert "encoding: 1 of 7 videos" in again.stdout and "all steps were done before" in again.stdout
    again = load_arrays(tmp_path / "run" / "strict" / "scores.npz", "scores")
    assert all(len(x) == 40 and (x == again[k]).all() for k, x in scores.items())
    for folder_of in ("test", "labels"):  # features that are left of a video that is gone
        files = tmp_path / "features" / folder_of
        (files / "gone.npy").write_bytes((files / "b1.npy").read_bytes())
    left = script("frd_uvad/svmae/train.py", *flags, "--iterations", "10")
    assert "micro AUC" in left.stdout and "trivial baseline" not in left.stdout
    all_refused(
        [
            # 10 steps are not whole intervals of the log: the run is complete
            ("frd_uvad/svmae/train.py", (*flags, "--iterations", "20"), ["iterations = 10", "--out"]),
            (
                "frd_uvad/svmae/train.py",
                (*videos, "--features", folder, "--out", tmp_path / "x"),
                ["crops", "--features"],
            ),
            ("frd_uvad/svmae/train.py", ("--device", "cpu"), ["--features", "--encoder"]),
        ]
    )


# ------------------------------------------------------------------------------------------------------ in small parts


def test_tokens_are_cubes_and_come_back():
    clips = torch.rand(2, 3, 4, 32, 48)
    tokens = model.tokenize(clips)
    assert tokens.shape == (2, 2 * 2 * 3, 3, 512) and torch.equal(model.untokenize(tokens, (2, 2, 3)), clips)
    assert torch.equal(tokens[1, 6 + 3 + 2, 1].view(2, 16, 16), clips[1, 1, 2:4, 16:32, 32:48])
    change = model.cube_difference(tokens, (2, 2, 3))
    wanted = (clips[:, :, 2:4] - clips[:, :, 0:2]).abs()
    assert torch.allclose(change[0, 0], wanted[0, :, :, :16, :16].mean()) and torch.equal(change[:, :6], change[:, 6:])
    near = model.pool(torch.linspace(0, 1, 32)[None, :, None].expand(2, 32, 48), (2, 2, 3))
    assert near.shape == (2, 12) and (near[0, 3:6] > near[0, :3]).all() and torch.equal(near[:, :6], near[:, 6:])


def test_masks_have_their_ratio_and_follow_the_probability():
    noise = torch.rand(4000, 20, generator=torch.Generator().manual_seed(0))
    p = torch.linspace(1, 8, 20).expand(4000, 20)
    p = p / p.sum(1, keepdim=True)
    mask = model.draw_mask(p, 0.25, noise)
    assert (mask.sum(1) == 5).all()
    drawn = mask.float().mean(0)
    assert (drawn[1:] > drawn[:-1] - 0.03).all() and drawn[-1] > 3 * drawn[0]
    # a single draw is by the probability itself
    one = model.draw_mask(p, 0.05, noise).float().mean(0)
    assert (one.sum() - 1).abs() < 1e-5 and (one - p[0]).abs().max() < 0.02
    assert (model.random_mask(0.9, noise).sum(1) == 18).all()
    tube = model.tube_mask(0.5, noise[:, :16], (2, 2, 4))
    assert torch.equal(tube[:, :8], tube[:, 8:]) and (tube.sum(1) == 8).all()
    still = model.mask_probability(torch.zeros(1, 8), torch.zeros(1, 8))
    assert torch.allclose(still, torch.full((1, 8), 1 / 8))
    known = model.mask_probability(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 1.5]]), 0.25, 0.5, 0.0)
    assert torch.allclose(known, torch.tensor([[0.25, 0.75]]))


def test_loss_by_hand():
    tokens, hidden = torch.rand(1, 4, 3, 512), torch.tensor([[1, 3]])
    wanted = (tokens - tokens.mean(3, keepdim=True)) / (tokens.std(3, keepdim=True) + 1e-6)
    off = wanted[:, [1, 3]].clone()
    off[:, 0] += 2.0
    assert abs(float(model.reconstruction_loss(off, tokens, hidden)) - 2.0) < 1e-4
    weights = model.perspective_weights(torch.tensor([[0.0, 0.3, 0.6, 1.0]]))
    assert weights.tolist() == pytest.approx([1.2, 1.0, 0.8, 0.6]) or torch.allclose(
        weights, torch.tensor([[1.2, 1.0, 0.8, 0.6]])
    )
    assert (
        abs(float(model.reconstruction_loss(off, tokens, hidden, weights)) - 2.0) < 1e-4
    )  # token 1 weighs 1.0, token 3 has no error


def test_fusion_equals_a_plain_loop():
    features, change = torch.randn(2, 6, 5), torch.rand(2, 6)
    near = torch.rand(2, 6)
    got = model.fuse_tokens(features, change, near, 0.5, 0.1)
    for n in range(2):
        kept = np.argsort(-change[n].numpy())[:3]
        far = 1 - near[n][kept]
        w = 1 + 0.1 * (far - far.min()) / (far.max() - far.min())
        assert torch.allclose(got[n], (features[n][kept] * w[:, None]).sum(0) / w.sum(), atol=1e-5)


def test_the_encoder_reads_videomae_files():
    net = model.SVMAE(**model.PRESETS["tiny"], frames=4, size=32)
    own, published = {k: v.clone() for k, v in net.encoder.state_dict().items()}, {}
    for k, v in own.items():
        if k.endswith("qkv.bias"):
            q, _, value = v.chunk(3)
            published["encoder." + k.replace("qkv.bias", "q_bias")] = q + 1
            published["encoder." + k.replace("qkv.bias", "v_bias")] = value + 2
        else:
            published["encoder." + k] = v + 1
    published["decoder.head.weight"] = torch.zeros(3)
    unexpected, missing = model.load_encoder(net.encoder, published)
    assert not unexpected and not missing and torch.equal(net.encoder.norm.weight, own["norm.weight"] + 1)
    q, key, value = net.encoder.blocks[0].attn.qkv.bias.chunk(3)
    assert (q == 1).all() and (key == 0).all() and (value == 2).all()
    tuned = {
        k.removeprefix("encoder.").replace("norm.", "fc_norm.")
        if k.startswith("encoder.norm")
        else k.removeprefix("encoder."): v
        for k, v in published.items()
        if k.startswith("encoder.")
    }
    tuned["head.weight"] = torch.zeros(400, 96)
    unexpected, missing = model.load_encoder(net.encoder, tuned)
    assert unexpected == ["head.weight"] and not missing


def test_the_learning_rate_rises_and_falls():
    plan = make_plan("folder", epochs=20, batch_size=128, warmup=4)
    assert plan.lr == 1.5e-4 * 128 / 256 and make_plan("folder", lr=1.0).lr == 1.0
    rates = [plan.lr_at(epoch) for epoch in (0, 1, 4, 12, 20)]
    assert rates == pytest.approx([0, plan.lr / 4, plan.lr, plan.lr / 2, 0], abs=1e-12)
    net = model.SVMAE(**model.PRESETS["tiny"], frames=4, size=32)
    groups = parameter_groups(net, 0.5)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    blocks = net.encoder.blocks
    parts = (net.encoder.patch_embed["proj"], blocks[0].norm1, blocks[1].norm1, net.decoder.norm)
    assert [scale[id(part.bias)] for part in parts] == [0.125, 0.25, 0.5, 1.0] and len(scale) == len(
        list(net.parameters())
    )


def test_clips_are_the_frames_of_their_video():
    arrays = [walkers(30, size=(48, 60), channels=1), walkers(5, size=(48, 60), seed=1, channels=3)]
    run = Run("cpu")
    clips = Clips(arrays, Depth("perspective", [], arrays, None, "cpu"), 4, 2, run)
    assert len(clips) == 3 + 1 and clips.channels == 3
    order = clips.epoch_samples(0, 1)
    assert sorted(order[:, 0].tolist()) == [0, 0, 0, 1]
    assert (clips.epoch_samples(0, 1) == order).all() and (clips.epoch_samples(0, 2) != order).any()
    batches = list(Loader(clips, 3, 0, run, order=lambda epoch: clips.epoch_samples(0, epoch)).batches(1))
    assert (np.concatenate([batch.rows for batch in batches]) == order).all()
    for batch in batches:
        frames, near = batch.data
        assert len(batch) == len(frames)
        for (v, first), x in zip(batch.rows, frames.numpy()):
            for k in range(4):
                assert (x[k] == arrays[v][min(first + 2 * k, len(arrays[v]) - 1)]).all()
        assert near.shape[1:] == (48, 60) and near[0, 0, 0] == 0 and near[0, -1, 5] == 255


def test_crops_show_what_they_say():
    frames = np.zeros((1, 2, 32, 64, 3), np.uint8)
    frames[:, :, :16, :32] = (10, 20, 30)  # BGR
    near = np.zeros((1, 32, 64), np.uint8)
    frames, near = torch.from_numpy(frames), torch.from_numpy(near)
    whole, depth = crop_clips(frames, near, torch.from_numpy(WHOLE_FRAME), 16)
    assert whole.shape == (1, 3, 2, 16, 16) and torch.allclose(
        whole[0, :, 0, 2, 2] * 255, torch.tensor([30.0, 20.0, 10.0])
    )
    assert whole[0, :, :, 12, 12].abs().sum() == 0 and depth.shape == (1, 16, 16)
    corner, _ = crop_clips(frames, near, torch.tensor([[-0.5, -0.5, 0.5, 0.5]]), 16)
    assert torch.allclose(corner[0, 0] * 255, torch.full((2, 16, 16), 30.0))
    mirrored, _ = crop_clips(frames, near, torch.tensor([[0.0, 0, -1, 1]]), 16)
    assert torch.allclose(mirrored.flip(4), whole, atol=1e-6)
    crops = random_crops(500, (40, 60), np.random.default_rng(0))
    area = np.abs(crops[:, 2] * crops[:, 3])
    assert (np.abs(crops[:, :2]) + np.abs(crops[:, 2:]) <= 1 + 1e-6).all() and area.min() > 0.4 and area.max() <= 1
    assert 0.4 < (crops[:, 2] < 0).mean() < 0.6


DETECTORS = list(itertools.product(FUSIONS, GROUPS, (True, False)))


@pytest.mark.kernels
@pytest.mark.parametrize("fusion,group,aggregate_text", DETECTORS, ids=lambda x: str(x))
def test_every_detector_loads_scores_and_learns(fusion, group, aggregate_text, tmp_path):
    """Shapes, the authors' bare file, gradients of what is applied and of nothing else."""
    torch.manual_seed(0)
    size, words = 24, 16
    b, crops = 4, 2
    length = 9
    args = dict(feature_size=size, text_dim=words, fusion=fusion, feature_group=group, aggregate_text=aggregate_text)
    net = detector.Detector(**args)
    visual, text = torch.randn(b, crops, length, size), torch.randn(b, crops, length - 1, words)
    out = net(visual, text)
    width = {"vis": size, "text": words}.get(group, words if fusion in ("add", "product") else size + words)
    assert out["scores"].shape == (b, length, 1) and out["magnitudes"].shape == (b, length)
    assert out["features"].shape == (crops, b, length, width) and ((out["scores"] > 0) & (out["scores"] < 1)).all()
    detector.losses(out)["total"].backward()
    applied = {"fc1", "fc2", "fc3"} | ({"Aggregate"} if group != "text" else set())
    applied |= {"Aggregate_text"} if aggregate_text and group != "vis" else set()
    applied |= (
        {"add": {"fc0"}, "product": {"fc0"}, "add_up": {"fc_vis", "fc_text"}}.get(fusion, set())
        if group == "both"
        else set()
    )
    learned = {k.split(".")[0] for k, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learned == applied

    # a published file: both networks are in it, whichever is applied, and it does not say its settings
    weights = net.eval().state_dict()
    assert {"Aggregate", "Aggregate_text"} <= {k.split(".")[0] for k in weights}
    torch.save(weights, tmp_path / "authors.pkl")
    again, state = load_model(tmp_path / "authors.pkl", fusion, group, aggregate_text)
    assert {k: v for k, v in state["model_args"].items() if k != "fusion" or group == "both"} == {
        k: v for k, v in args.items() if k != "fusion" or group == "both"
    }
    assert torch.equal(again.eval()(visual, text)["scores"], net(visual, text)["scores"])
    told = load_model(tmp_path / "authors.pkl", fusion)[1]["model_args"]  # what weights tell by themselves
    assert told["feature_group"] == group and told["aggregate_text"]
    told = infer_args({**weights, "fc1.weight": torch.zeros(512, 9)}, fusion)  # neither width: both
    assert told["feature_group"] == "both"
    # without the parameters that are not applied it loads too, and without others it does not
    detector.Detector(**args).load_state_dict({k: v for k, v in weights.items() if k.split(".")[0] in applied})
    torch.save({k: v for k, v in weights.items() if not k.startswith("fc2")}, tmp_path / "damaged.pkl")
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path / "damaged.pkl", fusion, group, aggregate_text)


def test_attention_over_time_in_either_order():
    """The product that avoids [T, T] for long videos is the same; and what ranks share lies in one piece."""
    torch.manual_seed(0)
    net = detector.NonLocal(8).eval()
    for parameter in net.W[1].parameters():
        torch.nn.init.normal_(parameter)
    for length in (5, 40):
        x = torch.randn(2, 8, length)
        attention = net.theta(x).transpose(1, 2) @ net.phi(x) / length
        expected = net.W((attention @ net.g(x).transpose(1, 2)).transpose(1, 2)) + x
        assert torch.allclose(net(x), expected, atol=1e-5)
    assert all(x.is_contiguous() for x in detector.fit_components(torch.randn(50, 12), 8))


def test_an_authors_detector_whose_widths_are_equal_reads_videos(tmp_path):
    weights = detector.Detector(feature_size=24, text_dim=24, feature_group="vis").state_dict()
    assert (
        infer_args(weights)["feature_group"] == "vis" and infer_args(weights, None, "text")["feature_group"] == "text"
    )


def test_features_of_another_encoder_are_refused(tmp_path):
    """Of the same width, where both say how they were made; where one does not, nothing can be compared."""
    alone = {"encoder": "hash", "preset": "tiny", "pool": "fusion", "checkpoint": "a.pt", "flag": "svmae:a.pt"}
    part = {"encoder": "timm:x", "weights": "1", "width": 8}
    joined = {"encoder": "svmae+timm:x", "weights": "hash+1", "parts": [{"weights": "hash"}, part], "flag": "…"}
    for trained in (alone, joined):
        (tmp_path / "settings.json").write_text(json.dumps({**trained, "checkpoint": "moved.pt", "flag": "svmae:b"}))
        check_same_encoder(trained, tmp_path)
        check_same_encoder(None, tmp_path)
        check_same_encoder(trained, tmp_path / "elsewhere")
    for other in ({**alone, "encoder": "other"}, {**alone, "pool": "mean"}, joined):
        (tmp_path / "settings.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="the checkpoint was trained on features of"):
            check_same_encoder(alone, tmp_path)


@pytest.mark.kernels
def test_bags_by_the_names_of_the_videos(tmp_path):
    names = ("Normal_Videos_3", "AbNormal_1", "x__label_A", "x__label_B1")
    data = SimpleNamespace(train=[FeatureVideo(n, "train", []) for n in names], root=tmp_path)
    assert [[v.name for v in videos] for videos in find_bags(data)] == [
        ["Normal_Videos_3", "x__label_A"],
        ["AbNormal_1", "x__label_B1"],
    ]


def test_a_damaged_first_video_does_not_stop_the_pre_training(tmp_path):
    (tmp_path / "a.avi").write_bytes(b"no video at all")
    good = open_video(save_frames(tmp_path / "b", walkers(4, size=(48, 60))))
    assert first_shape([open_video(tmp_path / "a.avi"), good]) == (48, 60)
    with pytest.raises(UserError, match="a.avi"):
        first_shape([open_video(tmp_path / "a.avi")])


def test_fusions_by_hand():
    """As published: ReLU after fc0, fc_vis and fc_text; raw text enters the fusion as it was read."""
    for fusion in ("concat", "add", "product", "add_up"):
        net = detector.Detector(feature_size=12, text_dim=8, fusion=fusion, aggregate_text=False).eval()
        x, words = torch.randn(1, 1, 5, 12), torch.randn(1, 1, 5, 8)
        v, t = net.Aggregate(x[0])[0].detach().numpy(), words[0, 0].numpy()

        def layer(name, rows):
            part = getattr(net, name)
            return np.maximum(rows @ part.weight.detach().numpy().T + part.bias.detach().numpy(), 0)

        wanted = {
            "concat": lambda: np.hstack([v, t]),
            "add": lambda: layer("fc0", v) + t,
            "product": lambda: layer("fc0", v) * t,
            "add_up": lambda: layer("fc_vis", v) + layer("fc_text", t),
        }[fusion]()
        assert np.allclose(net(x, words)["features"][0, 0].detach().numpy(), wanted, atol=1e-5), fusion


def test_components_of_few_bags():
    """Standardized, rotated to the axes of most variance, and of size 1; the margin shrinks with the width."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 12)) * 10.0 ** rng.integers(0, 2, 12) + 5
    mean, matrix = detector.fit_components(torch.from_numpy(x), 8)
    y = (x - mean.numpy()) @ matrix.numpy()
    z = (x - x.mean(0)) / x.std(0)
    assert y.shape == (400, 8) and abs((y**2).mean() - 1) < 1e-3 and abs((y[:, 3:] ** 2).mean()) < 1e-6
    wanted = (z**2).sum(1) / (z**2).sum() * 400 * 8  # three components hold all: lengths stay, but for the scale
    assert np.allclose((y**2).sum(1), wanted, rtol=5e-2)
    assert detector.margin_of(1536) == {"margin": 100.0, "alpha": 1e-4}
    small = detector.margin_of(384)
    assert small["margin"] == 50.0 and small["margin"] ** 2 * small["alpha"] == 1.0

    net = detector.Detector(feature_size=8, input_size=12, feature_group="vis").eval()
    plain = detector.Detector(feature_size=8, feature_group="vis").eval()
    net.mean, net.components = mean, matrix
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k not in ("mean", "components")})
    x = torch.from_numpy(x[:40]).float().view(2, 1, 20, 12)
    assert torch.equal(net(x)["scores"], plain((x - mean) @ matrix)["scores"])


def test_published_settings_need_enough_bags():
    few, many = train.make_plan([12, 11], 2560), train.make_plan([800, 810], 2560)
    assert (few.batch_size, few.components, few.iterations) == (22, 128, 100)
    assert train.make_plan([12, 11], 2560, epochs=3).iterations == 3
    assert (many.batch_size, many.components, many.iterations) == (64, 0, 1000)
    assert train.make_plan([1, 1], 30).components == 28 and train.make_plan([1, 1], 30).batch_size == 4
    assert train.make_plan([2, 2], 2560, components=0, batch_size=8).batch_size == 8
    for components in (10, 4, 64):
        with pytest.raises(UserError, match="--components"):
            train.make_plan([2, 2], 32, components=components)


def test_an_authors_file_of_add_or_product_must_be_named(tmp_path):
    torch.save(detector.Detector(feature_size=12, text_dim=8, fusion="add").state_dict(), tmp_path / "x.pkl")
    with pytest.raises(UserError, match="--fusion add or --fusion product"):
        load_model(tmp_path / "x.pkl")


def test_bags_and_segments(tmp_path):
    x = np.arange(5, dtype=np.float32)[:, None] * np.ones((1, 2))
    assert pool_segments(x, 5).tolist() == x.tolist() and pool_segments(x, 2)[:, 0].tolist() == [0.5, 3.0]
    assert pool_segments(x[:1], 32).shape == (32, 2) and (pool_segments(x, 32)[-1] == 4).all()
    for i, name in enumerate(("Normal_1", "Normal_2", "Abuse_1")):
        (tmp_path / "train").mkdir(exist_ok=True)
        np.save(tmp_path / "train" / f"{name}.npy", np.full((4, 1, 256), i, np.float32))
    data = find_features("features", tmp_path)
    normal, abnormal = find_bags(data)
    assert [v.name for v in normal] == ["Normal_1", "Normal_2"] and [v.name for v in abnormal] == ["Abuse_1"]
    bags = Bags(normal, abnormal, None, Run("cpu"))
    visual, text = bags.to_device(bags.read(bags.draw(np.random.default_rng(0), 2)))
    assert sorted(visual[:, 0, 0, 0].tolist()) == [0.0, 1.0, 2.0, 2.0] and text is None
    for p in (tmp_path / "train").glob("Normal*"):
        p.rename(p.with_name(p.name.replace("Normal", "Calm")))
    with pytest.raises(UserError, match="normal.txt"):
        find_bags(find_features("features", tmp_path))
    with pytest.raises(UserError, match="none.txt"):  # a list that was given is never passed over
        find_bags(data, tmp_path / "none.txt", tmp_path / "none.txt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not of this method"):
        load_model(tmp_path / "x.pt")


def test_long_videos_with_a_training_split(tmp_path):
    for kind, n in (("fight", 6), ("noFight", 24)):
        for i in range(n):
            save_video(tmp_path / "clips" / kind / f"{kind}{i}.avi", walkers(3, seed=i))
    script(
        "tests/tools/long_videos.py",
        "--clips",
        tmp_path / "clips",
        "--out",
        tmp_path / "long",
        "--videos",
        2,
        "--train",
        4,
        "--size",
        32,
        48,
    )
    normal, abnormal = ((tmp_path / "long" / f"{k}.txt").read_text().split() for k in ("normal", "abnormal"))
    assert (
        sorted(normal + abnormal) == [f"train{i:02d}" for i in range(4)]
        and "train00" in abnormal
        and "train01" in normal
    )
    assert {p.stem for p in (tmp_path / "long" / "labels").iterdir()} == {"long00", "long01"}


def test_no_source_is_on_both_sides():
    names = {kind: [f"{kind}{i}" for i in range(30)] for kind in ("fight", "noFight")}
    source_of = {f"{kind}/{name}": str(i // 4) for kind in names for i, name in enumerate(names[kind])}
    sides = long_videos.split_sources(source_of, names, np.random.default_rng(0))
    sources = [{source_of[f"{k}/{names[k][i]}"] for k in names for i in sides[k][side]} for side in (0, 1)]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 8
    for kind in names:
        assert sorted(sides[kind][0] + sides[kind][1]) == list(range(30)) and 12 <= len(sides[kind][0]) <= 18


def test_sources_by_the_likeness_of_frames():
    rng = np.random.default_rng(0)
    places = rng.normal(size=(3, 1, 64))
    of = np.array([0, 1, 0, 2, 1, 2])
    features = 5 + places[of] + 0.1 * rng.normal(size=(6, 4, 64))
    features[3, 0] = features[0, 0]  # one frame alike is enough
    found = sources.sources_of(features, 0.5)
    assert found[0] == found[2] == found[3] == found[5] and found[1] == found[4] != found[0]


def test_sources_that_lack_a_clip_are_refused(tmp_path):
    (tmp_path / "sources.csv").write_text("fight/a,0\n")
    with pytest.raises(UserError, match="no line for noFight/b"):
        long_videos.read_sources(tmp_path / "sources.csv", ["fight/a", "noFight/b"])
    with pytest.raises(UserError, match="--train"):
        long_videos.main(["--clips", str(tmp_path), "--sources", str(tmp_path / "sources.csv")])
