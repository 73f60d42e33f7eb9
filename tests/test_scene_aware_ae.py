"""The scene-aware autoencoder through its own scripts, in small; segments, losses and features against plain loops."""

import csv
import json
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import training
from common.distributed import Run
from common.features import image
from common.features.encoders import RANDOM, EncoderSpec
from common.io import UserError, load_arrays
from common.readers import datasets
from common.readers.video import open_video
from scene_aware_ae import encoder as encoders
from scene_aware_ae import eval as evaluation
from scene_aware_ae import preprocess, scoring
from scene_aware_ae.eval import best_sigma
from scene_aware_ae.model import SceneAwareAE, losses, supcon
from scene_aware_ae.stand_in import StandIn
from tests.helpers import (
    killed_after,
    refused,
    same_losses,
    save_frames,
    save_video,
    scored_by_shards,
    script,
    trained_by_two,
    walkers,
)

STAND_IN = ("--encoder", encoders.STAND_IN, "--stand-in-steps", "30")
SMALL = ("--dataset", "folder", "--iterations", "40", "--segments-per-scene", "4", "--workers", "1", "--device", "cpu")


def two_scenes(root):
    """Two scenes, of one of which fast blocks are normal."""
    for scene, speed in (("a", 1), ("b", 5)):
        for i in range(2):
            save_frames(root / "train" / f"{scene}_{i}", walkers(40, seed=3 + (scene == "b"), speed=speed))
        x = walkers(39, seed=3 + (scene == "b"), speed=speed)
        if scene == "a":
            x[16:] = walkers(39, seed=3, speed=5)[16:]
        save_frames(root / "test" / f"{scene}_9", x)
        (root / "labels").mkdir(exist_ok=True)
        np.save(root / "labels" / f"{scene}_9.npy", ((np.arange(39) >= 16) & (scene == "a")).astype(np.uint8))
    return root


def train(root, out, *more, **kwargs):
    where = ("--data-root", root, "--cache", root.parent / "cache", "--out", out)
    return script("scene_aware_ae/train.py", *SMALL, *STAND_IN, *where, *more, **kwargs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("szenen ä")
    root = two_scenes(base / "data")
    done = train(root, base / "run")
    where = ("--dataset", "folder", "--data-root", root, "--cache", base / "cache", "--device", "cpu")
    script("scene_aware_ae/eval.py", *where, "--checkpoint", base / "run" / "scene_aware_ae.pt", "--tsne", "--overlay")
    return base, root, done


def test_the_stand_in_leaves_out_damaged_videos(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "000.png").write_bytes(b"no image at all, but long enough")
    good, bad = open_video(save_frames(tmp_path / "good", walkers(20))), open_video(tmp_path / "bad")
    run = Run("cpu", "fp32")
    with_bad, without = (
        StandIn(tmp_path / "a", run, [bad, good], steps=2),
        StandIn(tmp_path / "b", run, [good], steps=2),
    )
    assert with_bad.hash == without.hash
    with pytest.raises(UserError, match="no training video can be read"):
        StandIn(tmp_path / "c", run, [bad], steps=2)


def test_one_command_goes_from_videos_to_scores(trained):
    base, root, done = trained
    for text in ("stand-in", "2 scenes", "mode 1", "micro AUC", "frame difference", "next:", "--overlay, with"):
        assert text in done.stdout, done.stdout
    lines = [json.loads(x) for x in (base / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == 40 and lines[-1]["supcon"] > 0 and "ce" not in lines[-1]
    scores = load_arrays(base / "run" / "strict" / "scores.npz", "scores")
    assert all(np.isfinite(s).all() and len(s) == 39 for s in scores.values())
    for name in ("tsne.png", "roc.png", "curves/a_9.png", "overlay/b_9.mp4"):
        assert (base / "run" / "strict" / name).stat().st_size > 1000, name


def test_benchmark(trained):
    base, root, _ = trained
    where = (
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        *STAND_IN,
        "--device",
        "cpu",
        "--seconds",
        0.05,
    )
    done = script("tests/perf/bench.py", "scene_aware_ae", *where)
    for text in ("only the encoder", "videos to features", "one segment at a time", "training, mode 1", "peak memory"):
        assert text in done.stdout, done.stdout


def test_official_drops_tails_and_says_what_it_chose(trained):
    base, root, _ = trained
    done = script(
        "scene_aware_ae/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--checkpoint",
        base / "run" / "scene_aware_ae.pt",
        "--protocol",
        "official",
    )
    assert "14 frames after the last whole segments" in done.stdout and "best of 0..19" in done.stdout
    assert "every frame scored" not in done.stdout
    report = json.loads((base / "run" / "official" / "metrics.json").read_text())
    assert (
        report["encoder"]["encoder"] == "none:autoencoder"
        and report["frames"] == 64
        and report["abnormal_frames"] == 16
    )
    s, y = {"a": np.r_[np.zeros(30), 1, np.zeros(30)]}, {"a": (np.abs(np.arange(61) - 30) < 6).astype(int)}
    assert best_sigma(s, y) > 0


def test_killed_and_started_again_ends_with_the_same_weights(trained, tmp_path):
    base, root, _ = trained
    flags = (
        *SMALL,
        *STAND_IN,
        "--data-root",
        str(root),
        "--cache",
        str(base / "cache"),
        "--out",
        str(tmp_path / "run"),
        "--iterations",
        "200",
        "--save-minutes",
        "0",
    )
    whole = train(root, tmp_path / "whole", "--iterations", "200")
    assert "micro AUC" in whole.stdout
    killed_after("*/scene_aware_ae.pt:1", "scene_aware_ae/train.py", *flags)
    path = tmp_path / "run" / "scene_aware_ae.pt"
    assert not training.load_checkpoint(path)["done"]
    done = script("scene_aware_ae/train.py", *flags)
    assert "going on at step" in done.stdout
    a, b = (training.load_checkpoint(p)["model_state_dict"] for p in (path, tmp_path / "whole" / "scene_aware_ae.pt"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    refused(script("scene_aware_ae/train.py", *flags, "--mode", "0", check=False), "mode")


def test_modes_scenes_and_the_variational_variant(trained, tmp_path):
    base, root, _ = trained
    table = tmp_path / "scenes.csv"
    table.write_text("".join(f"{p.name},one\n" for s in ("train", "test") for p in (root / s).iterdir()))
    one = train(root, tmp_path / "one", "--scenes", table)
    assert "1 scenes" in one.stdout and "mode 0" in one.stdout
    refused(train(root, tmp_path / "x", "--scenes", table, "--mode", "1", check=False), "--mode 1", "--scenes")
    table.write_text("a_0,one\n")
    refused(train(root, tmp_path / "x", "--scenes", table, check=False), "no line for")
    both = train(root, tmp_path / "both", "--mode", "2", "--variational")
    line = json.loads((tmp_path / "both" / "log.jsonl").read_text().splitlines()[-1])
    assert "variational" in both.stdout and line["ce"] > 0 and line["kl"] >= 0
    video = script(
        "scene_aware_ae/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--checkpoint",
        tmp_path / "both" / "scene_aware_ae.pt",
        "--video",
        root / "test" / "a_9",
        "--scene",
        "a",
        "--out",
        tmp_path / "v",
    )
    assert "most similar scene" in video.stdout
    rows = list(csv.DictReader(open(tmp_path / "v" / "a_9" / "scores.csv")))
    wanted = load_arrays(tmp_path / "both" / "strict" / "scores.npz", "scores")["a_9"]
    assert np.allclose([float(x["score"]) for x in rows], wanted, rtol=1e-3)


def test_features_made_elsewhere(trained, tmp_path):
    base, root, _ = trained
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "given" / split).mkdir(parents=True)
        for p in (root / split).iterdir():
            np.save(
                tmp_path / "given" / split / f"{p.name}.npy", rng.normal(size=(3, 2, 64)).astype(np.float16)
            )  # clips of 16 frames
    given = encoders.GivenFeatures(tmp_path / "given")
    video = datasets.find("folder", root).test[0]
    x, own = given.load(video), np.load(tmp_path / "given" / "test" / f"{video.name}.npy")
    assert (
        x.shape == (39, 64)
        and np.allclose(x[15], own[0].mean(0), atol=1e-2)
        and np.allclose(x[38], own[2].mean(0), atol=1e-2)
    )
    done = train(root, tmp_path / "run", "--encoder", f"files:{tmp_path / 'given'}")
    assert "micro AUC" in done.stdout
    np.save(tmp_path / "given" / "test" / "a_9.npy", np.zeros((7, 64), np.float16))
    with pytest.raises(UserError, match="7 rows for a video of 39 frames"):
        given.load(video)
    refused(train(root, tmp_path / "x", "--encoder", f"files:{tmp_path}/nothing", check=False), "nothing")


def test_ugly_input(trained, tmp_path):
    base, root, _ = trained
    for encoder in ("clip:ViT-nonsense", "timm:resnet81", "torchvision:resnet81", "torchvision:s3d", "stand-in:x", "x"):
        refused(train(root, tmp_path / "x", "--encoder", encoder, check=False), f"--encoder {encoder}")
    refused(train(root, tmp_path / "x", "--encoder", "timm:resnet18:gone.pth", check=False), "gone.pth")
    refused(
        script(
            "scene_aware_ae/eval.py",
            "--dataset",
            "folder",
            "--data-root",
            root,
            "--cache",
            base / "cache",
            "--shard",
            "3/2",
            "--checkpoint",
            base / "run" / "scene_aware_ae.pt",
            check=False,
        ),
        "--shard",
    )
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
    }
    done = script(
        "scene_aware_ae/train.py",
        *SMALL,
        "--data-root",
        root,
        "--encoder",
        "clip:ViT-B-32:laion2b_s34b_b79k",
        "--cache",
        tmp_path / "c",
        "--out",
        tmp_path / "x",
        env=offline,
        check=False,
    )
    refused(done, "--save-weights", "--encoder clip:ViT-B-32:ViT-B-32.pt", str(encoders.STAND_IN))
    short = tmp_path / "short"
    for s in ("train", "test"):
        save_frames(short / s / "a_1", walkers(5))
    refused(train(short, tmp_path / "x", "--cache", tmp_path / "c", check=False), "at least 16 frames")
    wrong = tmp_path / "wrong.pt"
    torch.save({"method": "sdmae"}, wrong)
    refused(
        script(
            "scene_aware_ae/eval.py", "--dataset", "folder", "--data-root", root, "--checkpoint", wrong, check=False
        ),
        "sdmae",
    )


# ------------------------------------------------------------------------------------------------------- in small parts


def test_segments_cover_every_frame_once():
    for frames in (1, 5, 15, 16, 17, 31, 32, 39, 200):
        taken = np.zeros(frames, int)
        for first, end, own in scoring.segments(frames):
            assert 0 <= first <= own < end <= frames and (end - first == 16 or frames < 16)
            taken[own:end] += 1
        assert (taken == 1).all(), frames
        assert scoring.segments(frames)[: frames // 16] == [(t, t + 16, t) for t in range(0, frames // 16 * 16, 16)]


def test_scores_equal_a_plain_loop():
    torch.manual_seed(0)
    net = SceneAwareAE(input_dim=32, num_scenes=2, hidden_dim=16, latent_dim=8).eval()
    features, r = np.random.default_rng(0).normal(size=(39, 32)).astype(np.float16), Run("cpu", "fp32")
    result = scoring.score_video(net, features, r, batch_size=2)
    got, scenes = result["scores"], result["scene_features"]
    x = torch.from_numpy(features.astype(np.float32))
    with torch.no_grad():
        for first, end, own in ((0, 16, 0), (16, 32, 16), (23, 39, 32)):
            out = net(x[None, first:end])["recon"][0]
            assert np.allclose(got[own:end], float(((out - x[first:end]) ** 2).mean(1).max()), rtol=1e-5)
    assert scenes.shape == (3, 32)
    assert len(scoring.score_video(net, features[:3], r)["scores"]) == 3


def test_supcon_by_hand():
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    scenes, n = torch.tensor([0, 0, 1, 1, 1, 2]), F.normalize(z, dim=1)
    each = []
    for i in range(5):  # the last is alone in its scene
        rest = [j for j in range(6) if j != i]
        total = sum(torch.exp(n[i] @ n[j] / 0.07) for j in rest)
        own = [j for j in rest if scenes[j] == scenes[i]]
        each.append(-sum(torch.log(torch.exp(n[i] @ n[j] / 0.07) / total) for j in own) / len(own))
    assert torch.allclose(supcon(z, scenes), sum(each) / 5, rtol=1e-4)
    assert torch.isfinite(supcon(z, torch.arange(6))) and float(supcon(z, torch.arange(6))) == 0
    parts = losses({"recon": z[:, None], "scene_feature": z, "logits": z}, z[:, None] + 1, scenes, mode=0)
    assert abs(float(parts["total"]) - 2) < 1e-5 and set(parts) == {"total", "mse"}


def test_authors_checkpoint(tmp_path, monkeypatch):
    net = SceneAwareAE(input_dim=64, num_scenes=3)
    torch.save({"model": net.state_dict(), "optim": {}, "iter": 5000}, tmp_path / "a.pth")
    again, state = scoring.load_model(tmp_path / "a.pth")
    assert state["model_args"]["num_scenes"] == 3
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    options = []  # its frames are prepared as the authors do, unless the user says otherwise
    monkeypatch.setattr(evaluation.preprocess, "prepare", lambda source, run, encoder, **_: options.append(encoder))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: None)
    for flags in ([], ["--preprocess", "whole"]):
        evaluation.main(["--checkpoint", str(tmp_path / "a.pth"), "--device", "cpu", *flags])
    assert [x.preprocess for x in options] == ["paper", "whole"]
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="proj_to_latent"):
        scoring.load_model(tmp_path / "b.pth")


class Brightness:
    """An encoder whose features can be checked by hand."""

    name, size = "brightness", (8, 8)
    width, hash = 2, "0"
    batches = []

    def preprocess_frame(self, frame):
        return frame[:8, :8]

    def encode(self, frames):
        self.batches.append(len(frames))
        return torch.from_numpy(frames.reshape(len(frames), -1).astype(np.float32)[:, :2])

    def describe(self):
        return {"encoder": self.name, "weights": self.hash, "preprocess": "none", "width": 2}


def test_features_are_written_once_per_video_and_shards_share_them(tmp_path):
    videos = [open_video(save_frames(tmp_path / f"v{i}", walkers(10 + i, seed=i))) for i in range(5)]
    videos.append(open_video(save_video(tmp_path / "v5.avi", walkers(12))))
    (tmp_path / "bad.avi").write_bytes(b"this is no video" * 10)
    videos.append(open_video(tmp_path / "bad.avi"))
    encoder, r = Brightness(), Run("cpu", "fp32")
    features = preprocess.Features(tmp_path / "f", encoder.describe())
    how = dict(encoder=encoder, batch_size=4)
    there, failed = features.prepare(videos, r, workers=2, shard="0/2", **how)
    assert [v.name for v in there] == ["v0", "v2", "v4"] and list(failed) == [videos[6].key]
    done = [features.info(v) is not None for v in videos]
    assert done == [True, False, True, False, True, False, False]
    _, failed = features.build(videos, 2, **how)
    assert list(failed) == [videos[6].key] and max(encoder.batches) == 4
    for v, seed in zip(videos[:5], range(5)):
        wanted = walkers(10 + seed, seed=seed)[:, 0, 0, :2]
        assert (features.array(v) == wanted).all() and features.array(v).dtype == np.float16
    before = len(encoder.batches)
    features.build(videos[:6], 2, **how)
    # the other job finds its own done, and counts what is there
    there, failed = features.prepare(videos, r, workers=2, shard="1/2", **how)
    assert len(there) == 6 and not failed
    assert len(encoder.batches) == before
    other = preprocess.Features(tmp_path / "f", {**encoder.describe(), "weights": "1"})
    assert other.folder != features.folder
    other.build(videos[:6], 1, encoder=encoder, batch_size=3)  # any number of workers, any batch
    assert all(other.path(v).read_bytes() == features.path(v).read_bytes() for v in videos[:6])


def test_clip_of_open_clip_random_weights(tmp_path):
    """A real open_clip model: its own preprocessing equals PIL-free arithmetic, the width is the model's, files
    load."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("RN50", pretrained=None)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    r = Run("cpu", "fp32")
    frame = np.random.default_rng(0).integers(0, 255, (224, 300, 3), dtype=np.uint8)
    spec = EncoderSpec("clip", "RN50", str(tmp_path / "weights.pt"))
    a = image.ImageEncoder(spec, r)
    assert a.width == 1024 and a.size == (224, 224)
    with torch.no_grad():
        rgb = torch.from_numpy(frame[:, 38:262, ::-1].copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (image.MEAN, image.STD))
        wanted = model.eval().encode_image(((rgb - mean) / std)[None])
    assert torch.allclose(a.encode(a.preprocess_frame(frame)[None]), wanted, atol=1e-4)
    b = image.ImageEncoder(spec, r, "paper")
    square = frame[:, :224]
    with torch.no_grad():
        wanted = model.encode_image(torch.from_numpy(square.copy()).permute(2, 0, 1).float()[None] / 127.5 - 1)
    assert torch.allclose(b.encode(b.preprocess_frame(square)[None]), wanted, atol=1e-4) and a.hash == b.hash
    assert a.preprocess_frame(walkers(1, size=(50, 30))[0]).shape == (224, 224, 3)


def test_shanghaitech_sd_is_read_and_built(tmp_path):
    root = tmp_path / "shanghaitech"
    for split, names in (("training", ("01_001", "02_001")), ("testing", ("01_0014", "02_0003"))):
        for n in names:
            save_frames(root / split / "frames" / n, walkers(6), ".jpg")
    (root / "test_frame_mask").mkdir()
    for n in ("01_0014", "02_0003"):
        np.save(root / "test_frame_mask" / f"{n}.npy", np.zeros(6, np.uint8))
    listed = tmp_path / "list.txt"
    listed.write_text("training 01_001\ntraining 01_0014\ntesting 02_0003\n")
    out = script(
        "tests/tools/shanghaitech_sd.py", "--list", listed, "--source", root, "--out", tmp_path / "shanghaitech-sd"
    )
    assert "3 videos" in out.stdout
    data = datasets.find("ShanghaiTech-SD", tmp_path)
    assert [v.name for v in data.train] == ["01_001", "01_0014"] and [v.name for v in data.test] == ["02_0003"]
    assert data.labels(data.test[0], 6).sum() == 0 and data.train[0].scene == "01"
    listed.write_text("training 77_001\n")
    refused(
        script(
            "tests/tools/shanghaitech_sd.py", "--list", listed, "--source", root, "--out", tmp_path / "x", check=False
        ),
        "77_001",
    )


@pytest.mark.kernels
def test_torchrun_with_two_processes(trained, tmp_path):
    where = ("--dataset", "folder", "--data-root", trained[1], "--cache", tmp_path / "cache")
    trained_by_two("scene_aware_ae", "scene_aware_ae.pt", (*SMALL, *STAND_IN), where, tmp_path)
    same_losses(
        "scene_aware_ae/train.py",
        (*SMALL, *STAND_IN, *where, "--mode", "2", "--segments-per-scene", "3", "--iterations", "200"),
        tmp_path / "losses",
    )


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
        base / "run" / "scene_aware_ae.pt",
    )
    scored_by_shards("scene_aware_ae/eval.py", flags, base / "run" / "strict" / "scores.npz", tmp_path)


def test_clip_weights_run_with_the_activation_they_were_trained_with(tmp_path, capsys):
    import open_clip

    for name, tag in (
        ("ViT-B-16", "openai"),
        ("ViT-L-14", "openai"),
        ("RN50", "openai"),
        ("ViT-B-32", "metaclip_400m"),
    ):
        assert image.config_of(name, tag) == image.config_of(f"{name}-quickgelu", tag) == f"{name}-quickgelu"
    assert (
        image.config_of("ViT-B-32", "laion2b_s34b_b79k") == "ViT-B-32"
        and image.config_of("ViT-SO400M-14-SigLIP", "webli")[-1] == "P"
    )
    weights = open_clip.create_model("RN50").state_dict()
    archive = tmp_path / "RN50.pt"  # TorchScript, as OpenAI's files are
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("RN50/code/__torch__.py", "")
    torch.save({"state_dict": weights, "quick_gelu": True}, tmp_path / "quick.pt")
    torch.save({"state_dict": weights, "quick_gelu": False}, tmp_path / "plain.pt")
    assert not capsys.readouterr().out
    for path, config in (
        (archive, "RN50-quickgelu"),
        (tmp_path / "quick.pt", "RN50-quickgelu"),
        (tmp_path / "plain.pt", "RN50"),
    ):
        assert image.config_of("RN50", path) == image.config_of("RN50-quickgelu", path) == config
    torch.save(weights, tmp_path / "bare.pt")
    assert image.config_of("RN50-quickgelu", tmp_path / "bare.pt") == "RN50-quickgelu" and not capsys.readouterr().out
    assert (
        image.config_of("RN50", tmp_path / "bare.pt") == "RN50"
        and "need clip:RN50-quickgelu" in capsys.readouterr().out
    )
    for damaged in ((tmp_path / "quick.pt").read_bytes()[:5000], b"", b"PK\x03\x04" + bytes(99)):
        (tmp_path / "damaged.pt").write_bytes(damaged)
        assert image.uses_quick_gelu(tmp_path / "damaged.pt") is None
    run = Run("cpu", "fp32")
    quick = image.ImageEncoder(EncoderSpec("clip", "ViT-B-32", RANDOM), run).name
    assert quick == "ViT-B-32"
