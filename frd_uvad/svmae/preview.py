"""A picture of what pre-training sees, hides and paints."""

from pathlib import Path

import numpy as np
import torch

from common.io import optional_module
from frd_uvad.svmae import model
from frd_uvad.svmae.clips import WHOLE_FRAME, Clips, crop_clips

TILE = 224  # px


@torch.inference_mode()
def draw_preview(net: model.SVMAE, clips: Clips, plan, run, path: Path, seed: int = 0, count: int = 4) -> None:
    """For `count` clips the middle frame, its depth, cube difference, mask probability, mask and reconstruction.

    plan: pretrain.Plan.
    """
    report = optional_module("common.report")
    if report is None:
        return print("note: the preview needs common/report, which is not here")
    training, grid = net.training, net.grid
    net.eval()
    frames, near = clips.to_device(clips.read(clips.epoch_samples(seed, 0)[:count]))
    pixels, near = crop_clips(frames, near, run.to_device(np.repeat(WHOLE_FRAME, len(frames), axis=0)), plan.size)
    tokens, nearness = model.tokenize(pixels), model.pool(near, grid)
    noise = run.to_device(np.random.default_rng(seed).random(tokens.shape[:2], np.float32))
    difference = model.cube_difference(tokens, grid)
    probability = model.mask_probability(difference, nearness, plan.space, plan.time)
    mask = model.make_mask(
        plan.masking, tokens, nearness, grid, noise, plan.mask_ratio, space=plan.space, time=plan.time
    )
    with run.autocast():
        prediction, hidden = net(tokens, mask)
    _, mean, std = model.target(tokens)
    painted = prediction.float() * model.take_tokens(std, hidden) + model.take_tokens(mean, hidden)
    whole = tokens.scatter(1, hidden[:, :, None, None].expand_as(painted), painted.clamp(0, 1))
    visible = torch.where(mask[..., None, None], torch.full_like(tokens, 0.5), tokens)
    middle = plan.frames // 2

    def picture(x):
        """RGB [n, 3, T, S, S] in [0, 1] -> uint8 BGR [n, S, S, 3] of the middle frame."""
        return (255 * x[:, :, middle].flip(1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def grey(x):
        """[n, S, S] in [0, 1] -> uint8 [n, S, S, 3]"""
        return (255 * x).round().byte()[..., None].expand(-1, -1, -1, 3).cpu().numpy()

    def token_map(values):
        """[n, L] -> uint8 [n, S, S, 3], each clip's largest value white."""
        x = (values / values.amax(1, keepdim=True).clamp(min=1e-9)).unflatten(1, grid)[:, middle // model.TUBELET]
        return grey(x.repeat_interleave(model.PATCH, 1).repeat_interleave(model.PATCH, 2))

    columns = {
        "input": picture(pixels),
        "nearness": grey(near),
        "cube difference": token_map(difference),
        "mask probability": token_map(probability),
        f"masked {100 * plan.mask_ratio:.0f} %": picture(model.untokenize(visible, grid)),
        "reconstruction": picture(model.untokenize(whole, grid)),
    }
    tiles = [(report.plots.enlarged(x[i], TILE), name) for i in range(len(frames)) for name, x in columns.items()]
    report.plots.contact_sheet(path, tiles, len(columns))
    net.train(training)
    print(f"wrote {path}: {', '.join(columns)} of {len(frames)} clips")
