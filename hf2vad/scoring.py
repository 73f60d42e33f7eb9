"""Cubes -> scores: the inference path, the statistics of the training cubes, and what a checkpoint must say for
both."""

import copy

import numpy as np
import torch
from tqdm import tqdm

from common import training
from common.io import UserError
from common.objects.cube_dataset import CubeDataset
from hf2vad import model

SCORES_VERSION = 2  # raise it when raw scores change: cached ones are then computed again
BATCH_SIZE = {"cuda": 256, "cpu": 64}  # cubes; more do not fit a CPU's cache and are 10 to 20 % slower
FIELDS = {"appearance": slice(None), "flow": slice(None)}


def to_input(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, F, C, S, S] and float16 [N, K, 2, S, S] -> float32 [N, 3F, S, S] in [0, 1] and [N, 2K, S, S]."""
    frames = batch["appearance"]
    frames = frames.expand(-1, -1, 3, -1, -1) if frames.shape[2] == 1 else frames
    return frames.flatten(1, 2).float() / 255, batch["flow"].flatten(1, 2).float()


class Scorer:
    """A network ready for inference: folded, channels_last, no prior samples. score(batch)

    -> flow and frame errors [n].
    """

    def __init__(self, net, run, *, optimised: bool = True):
        self.run, self.optimised = run, optimised
        self.net = (model.fold(copy.deepcopy(net)) if optimised else net.eval()).to(run.device)
        if optimised:  # weights are cast once, instead of in every batch
            self.net.to(torch.bfloat16 if run.precision == "bf16" else torch.float32, memory_format=torch.channels_last)
        self.predicts_frames = isinstance(net, model.HF2VAD)

    @torch.inference_mode()
    def score(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        frames, flows = to_input(batch)
        if self.optimised:
            frames, flows = (x.contiguous(memory_format=torch.channels_last) for x in (frames, flows))
        with self.run.autocast():
            if not self.predicts_frames:  # stage memae only
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

    def score_cubes(self, data: CubeDataset, rows: np.ndarray, batch_size: int | None = None, tick=None) -> np.ndarray:
        """Errors of the cubes `rows`: float32 [n, 2] (flow, frame). tick(n) is called after every n cubes."""
        errors, done = torch.zeros(len(rows), 2, device=self.run.device), 0
        for part, batch in data.batches(rows, batch_size or BATCH_SIZE[self.run.device.type]):
            errors[done : done + len(part)] = torch.stack(self.score(batch), 1)
            done += len(part)
            if tick:
                tick(len(part))
        return errors.cpu().numpy()

    def score_training_cubes(self, data: CubeDataset) -> np.ndarray:
        """float32 [N, 2] of all cubes; every rank computes a part."""
        share = self.run.contiguous_share(len(data))
        show = self.run.is_main
        with tqdm(total=len(share), desc="training statistics", unit="cube", disable=not show, mininterval=2) as bar:
            errors = self.score_cubes(data, np.arange(share.start, share.stop), tick=bar.update)
        return self.run.all_gather_array(errors)


def score_video(scorer: Scorer, records: np.ndarray, batch_size: int | None = None, tick=None) -> dict:
    """Records [n] of one video's cubes -> {"errors": float32 [n, 2]} (flow, frame)."""
    data = CubeDataset([records], FIELDS, scorer.run, once=True)
    return {"errors": scorer.score_cubes(data, np.arange(len(records)), batch_size, tick)}


def statistics(errors: np.ndarray) -> dict:
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


def combine(errors: np.ndarray, stats: dict, w_flow: float, w_frame: float) -> np.ndarray:
    """Normality score of cubes: w_r · z(flow) + w_p · z(frame) (section 3.4). [N, 2] -> float32 [N]."""
    flow = (errors[:, 0] - stats["flow_mean"]) / stats["flow_std"]
    frame = (errors[:, 1] - stats["frame_mean"]) / stats["frame_std"]
    return (w_flow * flow + w_frame * frame).astype(np.float32)


def empty_score(stats: dict, w_flow: float, w_frame: float) -> float:
    """A frame without cubes scores as a cube without error."""
    return float(combine(np.zeros((1, 2)), stats, w_flow, w_frame)[0])


def build_model(model_args: dict, stage: str) -> torch.nn.Module:
    """stage memae: the flow autoencoder only; else the whole HF2-VAD."""
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in model_args.items()}
    if stage == "memae":
        keep = ("features_root", "num_slots", "shrink_threshold", "mem_usage", "skip_ops", "spatial_size")
        return model.MLMemAE(**{k: v for k, v in args.items() if k in keep})
    return model.HF2VAD(**args)


def load_model(path, model_args: dict | None = None) -> tuple[torch.nn.Module, dict]:
    """-> (network, checkpoint dict). Ours, or the authors' files: {"model_state_dict": …} with the same keys.

    Sizes come from `model_args`, else from the file, else from its tensors. Raises UserError for any other file.
    """
    state = training.load_checkpoint(path, "hf2vad")
    weights = state.get("model_state_dict")
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"checkpoint {path} has no model_state_dict; it is not one of HF2-VAD's")
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    stage = "memae" if "in_conv.conv.conv.0.weight" in weights else "finetune"
    if stage != "memae" and not {"memAE.in_conv.conv.conv.0.weight", "vunet.f_phi.in_op.beta"} <= set(weights):
        raise UserError(f"checkpoint {path} is not one of HF2-VAD's: its first keys are {', '.join(list(weights)[:3])}")

    def make_net():
        return build_model(model_args or state.get("model_args") or infer_args(weights), stage)

    return training.load_weights(make_net, weights, path), state


def infer_args(weights: dict) -> dict:
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
