"""Cubes -> scores: the inference path, the statistics of the training cubes, and what a checkpoint must say for both."""

import copy

import numpy as np
from tqdm import tqdm

from common import old_training as training
from common.batches import Batches
from common.io import UserError
from common.late import Late, torch

model = Late("hf2vad.model")

SIZES = {"full": {}, "small": dict(features_root=8, num_slots=100, shrink_threshold=0.01, nf_start=16, nf_max=32)}
BATCH = {
    "cuda": 256,
    "cpu": 64,
}  # cubes at once: a CPU's cache holds their feature maps, and more are 10 to 20 % slower
FIELDS = {"appearance": slice(None), "flow": slice(None)}


def to_input(batch):
    """uint8 [N, F, C, S, S] and float16 [N, K, 2, S, S] -> float32 [N, 3F, S, S] in [0, 1] and [N, 2K, S, S]."""
    frames = batch["appearance"]
    frames = frames.expand(-1, -1, 3, -1, -1) if frames.shape[2] == 1 else frames
    return frames.flatten(1, 2).float() / 255, batch["flow"].flatten(1, 2).float()


class Scorer:
    """A network ready for inference: folded, channels_last, no prior samples. score(batch) -> flow and frame errors [n]."""

    def __init__(self, net, run, *, optimised=True):
        self.run, self.optimised = run, optimised
        self.net = (model.fold(copy.deepcopy(net)) if optimised else net.eval()).to(run.device)
        if optimised:  # weights are cast once, instead of in every batch
            self.net.to(torch.bfloat16 if run.precision == "bf16" else torch.float32, memory_format=torch.channels_last)
        self.whole = isinstance(net, model.HF2VAD)

    @training.inference
    def score(self, batch):
        frames, flows = to_input(batch)
        if self.optimised:
            frames, flows = (x.contiguous(memory_format=torch.channels_last) for x in (frames, flows))
        with self.run.autocast():
            if not self.whole:  # stage one alone: there is no prediction yet
                n, c, h, w = flows.shape
                recon = self.net(flows.reshape(n * c // 2, 2, h, w))["recon"].reshape(n, c, h, w)
                flow = (recon.float() - flows).pow(2).flatten(1).sum(1)
                return flow, torch.zeros_like(flow)
            if "recon" in batch:  # reconstructed before, with the same weights
                recon = batch["recon"].float()
                out = {"of_recon": recon, **self.net.vunet(frames[:, : self.net.past_channels], recon, prior=False)}
            else:
                out = self.net(frames, flows, prior=not self.optimised)
        return model.cube_scores(out, frames, flows)

    def errors(self, data, rows, batch_size=None, tick=lambda n: None):
        """Errors of the cubes `rows` of a Batches: float32 [n, 2] (flow, frame). tick(n) after every n cubes."""
        out, done = torch.zeros(len(rows), 2, device=self.run.device), 0
        for part, batch in data.iterate(rows, batch_size or BATCH[self.run.device.type]):
            out[done : done + len(part)] = torch.stack(self.score(batch), 1)
            done += len(part)
            tick(len(part))
        return out.cpu().numpy()

    def errors_of(self, records, batch_size=None, tick=lambda n: None):
        """Of all cubes of one video."""
        return self.errors(
            Batches([records], FIELDS, self.run.device, once=True), np.arange(len(records)), batch_size, tick
        )

    def shared_errors(self, data, rows, label):
        """errors() of which torchrun's processes compute a part each."""
        share = self.run.contiguous_share(len(rows))
        with tqdm(
            total=len(share), desc=label, unit="cube", disable=not self.run.is_main, dynamic_ncols=True, mininterval=2
        ) as bar:
            return self.run.gather(self.errors(data, rows[share.start : share.stop], tick=bar.update))


def statistics(errors):
    """Mean and deviation of the training cubes' errors [N, 2], as the score's normalisation needs them."""
    if not len(errors):
        raise UserError(
            "there are no training cubes to normalise the scores with: no boxes were found in the training "
            "videos; lower --motion-threshold or --motion-area, or choose another --boxes"
        )
    mean, std = errors.astype(np.float64).mean(0), errors.astype(np.float64).std(0)
    std = np.where(std > 0, std, 1.0)
    return {
        "flow_mean": float(mean[0]),
        "flow_std": float(std[0]),
        "frame_mean": float(mean[1]),
        "frame_std": float(std[1]),
        "cubes": len(errors),
    }


def combine(errors, stats, w_flow, w_frame):
    """Normality score of cubes: w_r · z(flow) + w_p · z(frame) (section 3.4). [N, 2] -> float32 [N]."""
    flow = (errors[:, 0] - stats["flow_mean"]) / stats["flow_std"]
    frame = (errors[:, 1] - stats["frame_mean"]) / stats["frame_std"]
    return (w_flow * flow + w_frame * frame).astype(np.float32)


def empty_score(stats, w_flow, w_frame):
    """A frame without cubes scores as a cube without error."""
    return float(combine(np.zeros((1, 2)), stats, w_flow, w_frame)[0])


def build(model_args, stage):
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in model_args.items()}
    if stage == "memae":
        keep = ("features_root", "num_slots", "shrink_threshold", "mem_usage", "skip_ops", "spatial_size")
        return model.MLMemAE(**{k: v for k, v in args.items() if k in keep})
    return model.HF2VAD(**args)


def load_model(path, model_args=None):
    """-> (network, checkpoint dict). Ours, or the authors' files: {"model_state_dict": …} with the same keys.

    Sizes come from `model_args`, else from the file, else from its tensors.
    """
    state = training.load_checkpoint(path, "hf2vad")
    weights = state.get("model_state_dict")
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"checkpoint {path} has no model_state_dict; it is not one of HF2-VAD's")
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    stage = "memae" if "in_conv.conv.conv.0.weight" in weights else "finetune"
    if stage != "memae" and not {"memAE.in_conv.conv.conv.0.weight", "vunet.f_phi.in_op.beta"} <= set(weights):
        raise UserError(f"checkpoint {path} is not one of HF2-VAD's: its first keys are {', '.join(list(weights)[:3])}")
    try:
        net = build(model_args or state.get("model_args") or infer_args(weights), stage)
        net.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, KeyError) as e:
        raise UserError(
            f"checkpoint {path} does not fit the model: {str(e).splitlines()[0]} "
            f"{' '.join(str(e).splitlines()[1:3]).strip()}"
        ) from None
    if not all(torch.isfinite(p).all() for p in net.parameters()):
        raise UserError(f"checkpoint {path} holds NaN or infinite weights")
    return net, state


def infer_args(weights):
    """The sizes of a model whose file does not say them, read off its tensors."""
    p = "memAE." if "memAE.in_conv.conv.conv.0.weight" in weights else ""
    root = weights[f"{p}in_conv.conv.conv.0.weight"].shape[0]
    args = {"features_root": root, "mem_usage": [False] + [f"{p}mem{i}.memMatrix" in weights for i in (1, 2, 3)]}
    for level in (1, 2, 3):
        if f"{p}mem{level}.memMatrix" in weights:
            slots, dim = weights[f"{p}mem{level}.memMatrix"].shape
            args.update(num_slots=slots, spatial_size=int(round((dim / (root * 2**level)) ** 0.5)) * 2**level)
    args["skip_ops"] = [
        "concat"
        if weights[f"{p}up_{i}.conv.conv.0.weight"].shape[1] > weights[f"{p}up_{i}.up.weight"].shape[1]
        else "none"
        for i in (1, 2, 3)
    ]
    if p:
        f_phi, e_theta = (weights[f"vunet.{k}.in_op.conv.weight_v"].shape for k in ("f_phi", "e_theta"))
        args.update(
            nf_start=f_phi[0],
            clip_hist=e_theta[1] // 2,
            nf_max=max(v.shape[0] for k, v in weights.items() if k.endswith("_2.conv2d.conv.weight_v")),
        )
    return args
