"""Steps on a pretended GPU: torch's FakeTensorMode has tensors on "cuda" without one. It checks the devices and types
of every operation, and refuses what needs a value on the host, which is what would make the host wait for the device.

backward() needs a real device: the same losses are differentiated on "meta", which has shapes alone.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.distributed import Run
from common.flow import raft
from common.loader import Batch


class PretendedRun(Run):
    """A Run on a device that is not there; nothing is pinned."""

    def __init__(self, device, precision):
        self.rank, self.world_size = 0, 1
        self.device, self.precision = torch.device(device), precision

    def pin(self, array):
        return torch.from_numpy(array)

    def autocast(self):
        return super().autocast() if self.device.type == "cuda" else contextlib.nullcontext()


def batch_of(data, size):
    return Batch(np.arange(size), slice(None), data, np.random.default_rng(0))


def raw(shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


def hf2vad_step(stage, run):
    from hf2vad import scoring, train

    net = scoring.build_model(train.SIZES["small"], stage)
    batch = {"appearance": raw((4, 5, 1, 32, 32)), "flow": raw((4, 4, 2, 32, 32), torch.float16)}
    if stage == "memae":
        batch["flow"] = batch["flow"][:, -1:]
    if stage == "cvae":
        net.memAE.requires_grad_(False)
        batch["recon"] = raw((4, 8, 32, 32), torch.float16)
    return net, train.losses(net.train(), batch, train.make_plan("ped2")[stage], run)["total"]


def spr_uvad_step(with_flow, run):
    from spr_uvad import scoring, train

    net = scoring.build_model({**train.SIZES["small"], "use_flow": with_flow}).train()
    data = {"appearance": raw((4, 5, 1, 32, 32)), "flow": raw((4, 5, 2, 32, 32), torch.float16)}
    target = scoring.to_input(data if with_flow else {"appearance": data["appearance"]})
    weights = train.self_paced_weights(net, target["raw"], batch_of(data, 4), 3, train.make_plan("ped2"), run)
    return net, train.losses(net, target, weights, run)[0]["loss"]


def sdmae_step(phase, run):
    from sdmae import data, scoring, train

    net = scoring.build_model({**train.SIZES["small"], "patch_size": 8, "image_size": (32, 64), "in_channels": 9})
    train.start_phase(net, phase, 1e-4)
    seen = raw((4, 5, 1, 32, 64))
    noise = run.to_device(np.zeros((4, net.tokens), np.float32))
    target = data.network_target(seen[:, 2], raw((4, 1, 32, 64)))
    image, gradient = data.network_input(seen[:, ::2]), data.motion_gradient(seen)
    return net, train.losses(net, phase, image, target, gradient, noise, train.make_plan("ped2"), run)[phase]


def scene_aware_ae_step(mode, run):
    from scene_aware_ae import scoring, train

    net = scoring.build_model({"input_dim": 64, **train.MODEL, "num_scenes": 2, "variational": False})
    batch = batch_of(raw((8, 16, 64), torch.float32), 8)
    scenes = run.to_device(np.arange(8) // 4)
    return net, train.losses(net.train(), batch, scenes, mode, run)["total"]


def frd_uvad_step(bank_size, run):
    from frd_uvad import model, scoring, train

    net = scoring.build_model({"feature_size": 256, "num_blocks": 2, "heads": 16}).train()
    batch = batch_of(raw((6, 4, 1, 256), torch.float32), 6)

    class Bank:
        windows = batch.data[:bank_size]

        def __len__(self):
            return bank_size

    loss_parts, pseudo, scores = train.losses(net, batch, train.make_plan(), Bank(), None, run)
    model.select_for_bank(pseudo, scores, "wlab", 0.5)
    return net, loss_parts["total"]


def svmae_step(loss, run):
    from frd_uvad.svmae import model, pretrain

    plan = pretrain.Plan(1, 2, 1e-3, 1, size=32, loss=loss)
    net = model.SVMAE(**model.PRESETS["tiny"], size=32, frames=16)
    batch = batch_of((raw((2, 16, 40, 40, 3)), raw((2, 40, 40))), 2)
    return net, pretrain.losses(net, *pretrain.random_input(batch, net.grid, plan, run), plan, run)["loss"]


def detector_step(group, run):
    from frd_uvad.svmae import detector, train

    net = detector.Detector(feature_size=64, text_dim=32, feature_group=group).train()
    batch = batch_of((raw((4, 1, 32, 64), torch.float32), raw((4, 1, 32, 32), torch.float32)), 4)
    return net, train.losses(net, batch, train.Plan(1, 4, 1e-3), run)["total"]


STEPS = [
    *((hf2vad_step, stage) for stage in ("memae", "cvae", "finetune")),
    *((spr_uvad_step, with_flow) for with_flow in (False, True)),
    *((sdmae_step, phase) for phase in ("teacher", "student")),
    *((scene_aware_ae_step, mode) for mode in (0, 1)),
    *((frd_uvad_step, size) for size in (0, 3)),
    *((svmae_step, loss) for loss in ("perspective", "mse")),
    *((detector_step, group) for group in ("both", "vis")),
]


@pytest.fixture
def pretended_cuda(monkeypatch):
    """autocast() is off where there is no GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        x = torch.zeros(2, 2)
        with torch.autocast("cuda", torch.bfloat16):
            assert (x @ x).dtype == torch.bfloat16
        yield


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("step, choice", STEPS)
def test_a_training_step_stays_on_the_gpu_and_never_waits(step, choice, precision, pretended_cuda):
    net, loss = step(choice, PretendedRun("cuda", precision))
    assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.ndim == 0
    assert all(p.device.type == "cuda" and p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("step, choice", STEPS)
def test_backward_and_step_of_the_optimizer_fit(step, choice):
    with torch.device("meta"):
        net, loss = step(choice, PretendedRun("meta", "fp32"))
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        loss.backward()
        optimizer.step()
    assert any(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["raft-small", "raft-large"])
def test_flow_of_a_pair_never_waits(method, precision, pretended_cuda):
    from torchvision.models import get_model

    no_cudnn = torch.backends.cudnn.flags(enabled=False)  # its grid_sample has no pretended kind
    with torch.no_grad(), no_cudnn:
        net = get_model(method.replace("-", "_")).eval()
        x = raft.to_input(np.zeros((3, 128, 160, 1), np.uint8), (128, 160), "cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            features, context = net.feature_encoder(x).float(), net.context_encoder(x).float()
        flow = raft.pair_flow(net, features[:-1], features[1:], context[:-1], 2, precision == "bf16")
    assert flow.shape == (2, 2, 128, 160) and flow.device.type == "cuda" and flow.dtype == torch.float32
