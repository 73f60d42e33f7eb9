"""SVMAE: pre-training steps, and what masking takes."""

import time

import numpy as np
import torch

from common import training
from common.cli import DataSource, dataset_name, given
from common.distributed import seed_everything
from common.loader import Batch, Loader
from frd_uvad.svmae import model
from frd_uvad.svmae.pretrain import BETAS, losses, make_clips, make_plan, parameter_groups, prepare, random_input
from tests.perf.rates import line, rates, synchronize, where

PLAN_FLAGS = ("batch_size", "size", "frames", "stride", "masking", "mask_ratio", "space", "time", "loss")


def measure_pretrain(args, seconds, run):
    """Clips/s of a step, from disk and on data on the device, of masking, of encoding visible and all tokens."""
    name = dataset_name(args)
    plan = make_plan(name, **given(args, PLAN_FLAGS))
    dataset, cache = prepare(DataSource.from_args(args), plan.size, run, with_test=args.videos == "all")
    clips = make_clips(dataset, cache, plan, args.depth, run)
    preset = args.preset or ("tiny" if name == "demo" else "vit_b")
    seed_everything(args.seed)
    net = model.SVMAE(**model.PRESETS[preset], frames=plan.frames, size=plan.size).to(run.device).train()
    optimizer = torch.optim.AdamW(parameter_groups(net, 1.0), lr=plan.lr, betas=BETAS, fused=True)
    n, order = plan.batch_size, clips.epoch_samples(0, 0)
    rows = order[np.arange(n) % len(order)]
    data = clips.to_device(clips.read(rows))

    def resident_batch():
        return Batch(rows, slice(None), data, np.random.default_rng(0))

    def step(batch):
        loss = losses(net, *random_input(batch, net.grid, plan, run), plan, run)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    tokens, near, mask = random_input(resident_batch(), net.grid, plan, run)
    noise = torch.rand(n, net.tokens, device=run.device)
    visible = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : net.tokens - int(mask[0].sum())]

    def draw_mask():
        model.make_mask(plan.masking, tokens, near, net.grid, noise, plan.mask_ratio, plan.space, plan.time)

    def encode(places):
        with torch.inference_mode(), run.autocast():
            net.encoder(tokens if places is None else model.take_tokens(tokens, places), places)

    measured = [lambda: step(resident_batch()), draw_mask, lambda: encode(visible), lambda: encode(None)]
    resident, masking, seen, everything = rates(measured, n, run.device, seconds)
    loader, done = Loader(clips, n, 0, run, order=lambda epoch: np.tile(rows, (1000, 1))), 0
    began = None
    for batch in loader.batches(0):
        step(batch)
        synchronize(run.device)
        if began is None:
            began, loader.waited = time.perf_counter(), 0.0
            continue
        done += n
        if time.perf_counter() - began > 3 * seconds:
            break
    duration = time.perf_counter() - began
    streamed, waited = done / duration, loader.waited / duration
    print(f"\nSVMAE pre-training on {where(run)}, batch {n}")
    line("steps on clips that lie on the device", resident, "clips/s", f"{resident * net.tokens:.0f} tokens/s")
    of_resident = f"{100 * streamed / resident:.0f} % of that, waits {100 * waited:.1f} %"
    line("steps on clips read from the frame cache", streamed, "clips/s", of_resident)
    line(f"masking ({plan.masking})", masking, "clips/s", f"{100 * resident / masking:.2f} % of a step")
    line("encoder on visible tokens", seen, "clips/s", f"{seen / everything:.1f}× the encoder on all tokens")
    print(f"  peak memory {training.peak_memory():.0f} MiB")
