"""Steps on a pretended GPU: torch's FakeTensorMode has tensors on "cuda" without one. It checks the devices and types
of every operation, and refuses what needs a value on the host, which is what would make the host wait for the device.
NeverWaits refuses the copies that wait too.

backward() needs a real device: the same epochs are trained on "meta", which has shapes alone.
"""

import contextlib
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from common import loader
from common.distributed import Run
from common.draw_loader import DrawLoader
from common.features import image
from common.features.encoders import EncoderSpec
from common.flow import raft
from common.loader import Loader
from common.objects import cube_dataset
from common.objects.cube_dataset import CubeDataset
from frd_uvad.features.data import FeatureVideo
from sdmae import data as sdmae_data


class PretendedRun(Run):
    """A Run on a device that is not there. keeps: whether data stay on the device."""

    def __init__(self, device, precision, keeps=True):
        self.rank, self.world_size = 0, 1
        self.is_main = True
        self.device, self.precision = torch.device(device), precision
        self.keeps = keeps

    def pin(self, array):
        x = torch.from_numpy(array)
        x.pinned = True
        return x

    def copy_to_host(self, x):
        """It brings ones."""
        return lambda: np.ones(x.shape, bool if x.dtype == torch.bool else np.float32)

    def fits_device(self, size, cpu_limit=0):
        return self.keeps

    def autocast(self):
        return super().autocast() if self.device.type == "cuda" else contextlib.nullcontext()


class NeverWaits(TorchDispatchMode):
    """Between host and device nothing is copied but from pinned memory, without waiting."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # whole operations come here then, such as x.to(): their parts are looked at
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if name in ("_to_copy", "copy_"):
            source = args[name == "copy_"]
            target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            if source.device.type != target.type:
                waits = not (kwargs.get("non_blocking") or args[2:3] == (True,)) or not hasattr(source, "pinned")
                assert target.type == "cuda" and not waits, f"{name} of {source} to {target} waits"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            fills = name != "index" and args[2].numel() == 1  # which masks do without counting
            for index in filter(lambda x: x is not None, args[1]):
                assert index.device == args[0].device, f"{name} by {index} waits for its copy"
                assert fills or index.dtype != torch.bool, f"{name} by a mask waits"
        return func(*args, **kwargs)


class Meter:
    """What an EpochMeter does in a step, but for the looks at the loss; and the losses of the last one."""

    step, steps, first_step, progress, began = 0, 1, 0, 0.0, 0.0

    def __init__(self, run):
        self.run = run

    def batches(self, loader, epoch):
        for batch in loader.batches(epoch):
            yield batch, self.run.batch_slice(len(batch))[1]

    def set_lr(self, optimizer, lr):
        pass

    def update(self, losses, weight=1.0):
        self.losses = {k: v * weight for k, v in losses.items()}

    def end_epoch(self, loader, **_):
        pass


def in_turn(dataset, parts, run):
    """loader.tensors_ahead() without the thread, where there are no pretended tensors; its streams are tested in
    test_training.py."""
    for rows in parts:
        yield rows, dataset.to_device(dataset.read(rows)), 0.0


def cubes(count, flows):
    """Records as preprocessing writes them."""
    parts = [("box", "f4", 4), ("appearance", "u1", (5, 1, 32, 32)), ("flow", "f2", (flows, 2, 32, 32))]
    return np.zeros(count, parts)


def clip_features(clips=8, crops=1, width=256, dtype=np.float32):
    return FeatureVideo("v", "train", [np.zeros((clips, crops, width), dtype)])


# ----------------------------------------------------------------------------------------------------------- trainings


def hf2vad_epoch(stage, run):
    from hf2vad import data, scoring, train

    with run.device:
        net = scoring.build_model(train.SIZES["small"], stage)
    records = cubes(4, 4)
    if stage == "cvae":
        net.memAE.requires_grad_(False)
        samples = data.CubesWithFlows([records], np.zeros((4, 8, 32, 32), np.float16), run)
    else:
        fields = {"flow": slice(-1, None)} if stage == "memae" else scoring.FIELDS
        samples = CubeDataset([records], fields, run)
    return train, net, Loader(samples, 4, 0, run), dict(stage=train.make_plan("ped2")[stage])


def spr_uvad_epoch(with_flow, run):
    from spr_uvad import scoring, train

    plan = train.make_plan("ped2")
    with run.device:
        net = scoring.build_model({**train.SIZES["small"], "use_flow": with_flow})
        errors = torch.zeros(4)
    samples = CubeDataset([cubes(4, 5)], scoring.fields(with_flow), run)
    return train, net, Loader(samples, 4, 0, run), dict(plan=plan, errors=errors, epoch=plan.warmup)


def sdmae_epoch(phase, run):
    from sdmae import data, pseudo, scoring, train

    with run.device:
        net = small_sdmae(scoring)
    train.start_phase(net, phase, 1e-4)
    with unset_fake_temporarily():
        step = np.zeros((3, 64, 64), np.uint8), np.zeros((1, 64, 64), np.uint8), (8, 6), (9.0, 9.0)
        bank = pseudo.make_bank([[step] * pseudo.LENGTH], "self")
    frames = data.FrameDataset([np.zeros((4, 32, 64, 3), np.uint8)], run, data.SAMPLE_OFFSETS)
    plan = train.make_plan("ped2", epochs=2, student_from=1, pseudo_share=1.0)
    epoch = 0 if phase == train.TEACHER else 1
    return train, net, Loader(frames, 4, 0, run), dict(plan=plan, bank=bank.to(run.device), epoch=epoch)


def scene_aware_ae_epoch(mode, run):
    from scene_aware_ae import data, scoring, train

    with run.device:
        net = scoring.build_model({"input_dim": 64, **train.MODEL, "num_scenes": 2, "variational": mode == 2})
    net.classifier.requires_grad_(mode == 2)
    videos = [SimpleNamespace(scene=scene) for scene in "ab"]
    arrays = [np.zeros((20, 64), np.float16)] * 2
    segments = data.Segments(SimpleNamespace(train=videos, arrays=lambda _: arrays), run)
    loader = DrawLoader(segments, 8, 0, run, lambda rng: segments.draw(rng, 4), 1)
    return train, net, loader, dict(plan=train.Plan(1, 4, mode=mode), scene_labels=segments.scene_labels(4))


def frd_uvad_epoch(kind, run):
    """Two steps: in the second one the bank is in use."""
    from frd_uvad import data, scoring, train

    with run.device:
        net = scoring.build_model({"feature_size": 256, "num_blocks": 2, "heads": 16})
        auxiliary = scoring.Auxiliary("c2fpl:file", scoring.model.C2FPLScorer(256)) if kind == "slab" else None
        pseudo_labels = torch.zeros(8)
    where, run.keeps = run.keeps, False  # looking at all features at the start waits
    windows = data.Windows([clip_features(dtype=np.float16)], 4, run)
    windows.check = lambda features, clips: None  # of a batch it looks at tensors of the host
    if where:
        windows.features = run.to_device(windows.read_clips(np.arange(8)))
    rest = {"bank": data.AnomalyBank(2), "score_auxiliary": train.make_auxiliary_scorer(auxiliary, windows, 256, run)}
    return train, net, Loader(windows, 4, 0, run), dict(plan=train.Plan(bank=kind), pseudo_labels=pseudo_labels, **rest)


def svmae_epoch(loss, run):
    from frd_uvad.svmae import clips, model, pretrain

    with run.device:
        net = model.SVMAE(**model.PRESETS["tiny"], size=32, frames=16)
    arrays = [np.zeros((20, 40, 40, 3), np.uint8)] * 2
    depth = clips.Depth("perspective", [], arrays, "", run.device)
    samples = clips.Clips(arrays, depth, 16, 1, run)
    loader = Loader(samples, 2, 0, run, lambda epoch: samples.epoch_samples(0, epoch))
    masking = "scene" if loss == "perspective" else "tube"
    return pretrain, net, loader, dict(plan=pretrain.Plan(1, 2, 1e-3, 1, size=32, loss=loss, masking=masking))


def detector_epoch(group, run):
    from frd_uvad.svmae import data, detector, train

    with run.device:
        net = detector.Detector(feature_size=64, text_dim=32, feature_group=group)
        words = torch.zeros(4, 1, data.SEGMENTS, 32)
    bags = data.Bags([clip_features(width=64)] * 2, [clip_features(width=64)] * 2, None, run)
    bags.text = words if group == "both" else None
    loader = DrawLoader(bags, 4, 0, run, lambda rng: bags.draw(rng, 2), 1)
    return train, net, loader, dict(plan=train.Plan(1, 4, 1e-3))


EPOCHS = [
    *((hf2vad_epoch, stage) for stage in ("memae", "cvae", "finetune")),
    *((spr_uvad_epoch, with_flow) for with_flow in (False, True)),
    *((sdmae_epoch, phase) for phase in ("teacher", "student")),
    *((scene_aware_ae_epoch, mode) for mode in (0, 1, 2)),
    *((frd_uvad_epoch, bank) for bank in ("none", "wlab", "slab")),
    *((svmae_epoch, loss) for loss in ("perspective", "mse")),
    *((detector_epoch, group) for group in ("both", "vis")),
]


def put_tensors(net, to, recurse=True):
    """nn.Module._apply() with new tensors, where torch would swap them, which pretended ones do not stand."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(to(p.detach()), p.requires_grad)
        module._buffers.update({name: to(x) for name, x in module._buffers.items() if x is not None})
    return net


@pytest.fixture
def pretended_cuda(monkeypatch):
    """autocast() is off where there is no GPU."""
    monkeypatch.setattr(torch.nn.Module, "_apply", put_tensors)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    for module in (loader, cube_dataset, sdmae_data):
        monkeypatch.setattr(module, "tensors_ahead", in_turn)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(2, 2, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert (x @ x).dtype == torch.bfloat16
        yield


@pytest.mark.parametrize("precision, keeps", [("bf16", True), ("fp32", False)])
@pytest.mark.parametrize("make, choice", EPOCHS)
def test_a_training_step_stays_on_the_gpu_and_never_waits(make, choice, precision, keeps, pretended_cuda, monkeypatch):
    """Data kept on the device with bf16, and read from files with float32."""
    run = PretendedRun("cuda", precision, keeps)
    train, net, loader, rest = make(choice, run)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    optimizer, meter = SimpleNamespace(zero_grad=lambda **_: None, step=lambda: None), Meter(run)
    with NeverWaits():
        train.train_one_epoch(net, loader, optimizer, run=run, meter=meter, **{"epoch": 0, **rest})
    for loss in meter.losses.values():
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.ndim == 0
    assert all(p.device.type == "cuda" and p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("make, choice", EPOCHS)
def test_backward_and_step_of_the_optimizer_fit(make, choice):
    """DistributedDataParallel waits for a gradient of every parameter that requires one."""
    run = PretendedRun("meta", "fp32")
    train, net, loader, rest = make(choice, run)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    train.train_one_epoch(net, loader, optimizer, run=run, meter=Meter(run), **{"epoch": 0, **rest})
    without = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("inference", [False, True])
def test_what_waits_is_refused(inference, pretended_cuda):
    on_device, run = torch.zeros(4, 3, device="cuda"), PretendedRun("cuda", "fp32")
    rows = np.arange(2)
    waits = [
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.from_numpy(rows).to("cuda", non_blocking=True),
        lambda: run.pin(rows).to("cuda"),
        lambda: on_device[rows],
        lambda: on_device[torch.from_numpy(rows)],
        lambda: on_device.cpu(),
        lambda: on_device[:2].copy_(torch.zeros(2, 3)),
        lambda: on_device.__setitem__(on_device[:, 0] > 0, on_device),
    ]
    with NeverWaits(), torch.inference_mode(inference):
        for wait in waits:
            with pytest.raises(AssertionError, match="waits"):
                wait()
        on_device[run.to_device(rows)] = on_device[:2] + 1
        on_device[on_device > 0] = 1.0


def test_what_is_copied_to_the_host_comes_one_behind():
    from sdmae.scoring import to_host

    made = []
    tensors = (made.append(i) or torch.tensor([i]) for i in range(3))
    arrays = [(x.tolist(), len(made)) for x in to_host(tensors, Run("cpu", "fp32"))]
    assert arrays == [([0], 2), ([1], 3), ([2], 3)]


# ------------------------------------------------------------------------------------------------------------- scoring


def hf2vad_scores(stage, run):
    from hf2vad import scoring, train

    with run.device:
        scorer = scoring.Scorer(scoring.build_model(train.SIZES["small"], stage), run)
    data = CubeDataset([cubes(6, 4)], scoring.FIELDS, run)
    return lambda: torch.stack([torch.stack(scorer.score(batch)) for _, batch in data.batches(np.arange(6), 3)])


def spr_uvad_scores(with_flow, run):
    from spr_uvad import scoring, train

    with run.device:
        net = scoring.build_model({**train.SIZES["small"], "use_flow": with_flow}).eval()
    data = CubeDataset([cubes(6, 5)], scoring.fields(with_flow), run)
    return lambda: torch.stack([scoring.score_batch(net, batch, run) for _, batch in data.batches(np.arange(6), 3)])


def small_sdmae(scoring):
    return scoring.build_model(
        dict(embed_dim=64, decoder_dim=32, depth=2, decoder_depth=2, patch_size=8, image_size=(32, 64))
    )


def sdmae_scores(dataset, run):
    """All of a video's batches too, but for what their copies to the host bring."""
    from sdmae import data, scoring

    with run.device:
        scorer = scoring.Scorer(small_sdmae(scoring), scoring.score_config(dataset), run, draws=2)
    frames, rows = data.FrameDataset([np.zeros((7, 32, 64, 1), np.uint8)], run), np.arange(7)

    def score():
        assert scorer.score_frames(frames, rows, 3).shape == (7, 2, 32)
        return scorer.errors(frames.to_device(frames.read(rows)), rows)

    return score


def scene_aware_ae_scores(variational, run):
    from scene_aware_ae import scoring, train

    with run.device:
        net = scoring.build_model({"input_dim": 64, **train.MODEL, "num_scenes": 2, "variational": variational}).eval()
    segments = np.zeros((3, 16, 64), np.float32)
    return lambda: torch.cat([x.flatten() for x in scoring.score_batch(net, run.to_device(segments), run)])


def frd_uvad_scores(blocks, run):
    from frd_uvad import scoring

    with run.device:
        net = scoring.build_model({"feature_size": 256, "num_blocks": blocks, "heads": 16}).eval()

    def score():
        out = scoring.score_batch(net, run.to_device(np.zeros((6, 2, 256), np.float16)), run)
        assert out.pop("finite").dtype == torch.bool
        return torch.stack(list(out.values()))

    return score


def detector_scores(group, run):
    from frd_uvad.svmae import scoring

    with run.device:
        net = scoring.build_model(dict(feature_size=64, text_dim=32, feature_group=group)).eval()
    visual, words = np.zeros((1, 2, 9, 64), np.float32), np.zeros((1, 2, 8, 32), np.float32)
    return lambda: scoring.score_batch(net, run.to_device(visual), run.to_device(words), run)


SCORES = [
    *((hf2vad_scores, stage) for stage in ("memae", "finetune")),
    *((spr_uvad_scores, with_flow) for with_flow in (False, True)),
    *((sdmae_scores, dataset) for dataset in ("avenue", "shanghaitech")),
    *((scene_aware_ae_scores, variational) for variational in (False, True)),
    *((frd_uvad_scores, blocks) for blocks in (0, 2)),
    *((detector_scores, group) for group in ("both", "vis")),
]


@pytest.mark.parametrize("precision, keeps", [("bf16", True), ("fp32", False)])
@pytest.mark.parametrize("make, choice", SCORES)
def test_scores_of_a_batch_stay_on_the_gpu_and_never_wait(make, choice, precision, keeps, pretended_cuda, monkeypatch):
    """The networks as they score, folded and cast."""
    monkeypatch.setattr(copy, "deepcopy", lambda net: net)  # which pretended tensors do not survive
    score = make(choice, PretendedRun("cuda", precision, keeps))
    with NeverWaits():
        scores = score()
    assert scores.device.type == "cuda" and scores.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["raft-small", "raft-large"])
def test_flow_of_a_pair_never_waits(method, precision, pretended_cuda):
    from torchvision.models import get_model

    no_cudnn = torch.backends.cudnn.flags(enabled=False)  # its grid_sample has no pretended kind
    with torch.no_grad(), no_cudnn:
        with torch.device("cuda"):
            net = get_model(method.replace("-", "_")).eval()
            x = raft.to_input(np.zeros((3, 128, 160, 1), np.uint8), (128, 160), "cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            features, context = net.feature_encoder(x).float(), net.context_encoder(x).float()
        with NeverWaits():
            flow = raft.pair_flow(net, features[:-1], features[1:], context[:-1], 2, precision == "bf16")
    assert flow.shape == (2, 2, 128, 160) and flow.device.type == "cuda" and flow.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("encoder", ["clip:ViT-B-32-quickgelu", "clip:RN50", "timm:resnet18", "torchvision:resnet18"])
def test_encoding_of_images_never_waits(encoder, precision, pretended_cuda, monkeypatch):
    monkeypatch.setattr(image, "weights_hash", lambda net: "none")  # it reads them
    run = PretendedRun("cuda", precision)
    with run.device:
        made = image.ImageEncoder(EncoderSpec(*encoder.split(":"), "random"), run)
    frames = np.zeros((3, *made.size, 1), np.uint8)
    with NeverWaits():
        features = made.encode(frames)
    assert features.shape == (3, made.width) and features.device.type == "cuda" and features.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("pool, crops", [("fusion", 10), ("mean", 1)])
def test_encoding_of_clips_by_svmae_never_waits(pool, crops, precision, pretended_cuda):
    from frd_uvad.svmae import encoder
    from frd_uvad.svmae.options import EncoderOptions

    run, options = PretendedRun("cuda", precision), EncoderOptions(preset="tiny", size=32, pool=pool, crops=crops)
    with run.device:
        made = encoder.Encoder(encoder.build_model(options), "none", options, run)
    clips, near = np.zeros((2, 16, 40, 50, 3), np.uint8), np.zeros((2, 40, 50), np.uint8)
    with NeverWaits():
        features = made.encode_clips(clips, near)
    assert features.shape == (2, crops, 96) and features.device.type == "cuda" and features.dtype == torch.float32
