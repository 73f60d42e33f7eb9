"""SVMAE: pre-training steps, and what masking takes."""

import time

import numpy as np
import torch

from common import old_training as training
from frd_uvad.svmae import model as m
from frd_uvad.svmae.pretrain import build
from tests.perf.rates import line, rates, synchronize, where


def measure_pretrain(args, seconds, r):
    """Seconds of a step from disk and on data that lie on the device; what masking takes; encoding visible against all tokens."""
    trainer, _ = build(args, r)
    plan, net, clips = trainer.plan, trainer.net, trainer.clips
    net.train()
    n, length = plan["batch_size"], int(np.prod(net.grid))
    order = clips.epoch(0, 0)
    part = order[np.arange(n) % len(order)]
    frames, near = clips.to_device(clips.read(part))
    tokens, nearness, mask = trainer.input(frames, near, np.random.default_rng(0))
    noise = torch.rand(n, length, device=r.device)
    visible = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : length - int(mask[0].sum())]

    def encode(places):
        with torch.inference_mode(), r.autocast():
            net.encoder(tokens if places is None else m.take(tokens, places), places)

    resident, masking, seen, everything = rates(
        [
            lambda: trainer.step(frames, near, np.random.default_rng(0)),
            lambda: trainer.mask(tokens, nearness, noise),
            lambda: encode(visible),
            lambda: encode(None),
        ],
        n,
        r.device,
        seconds,
    )
    clips.waited, done, began = 0.0, 0, None
    for _, frames, near in clips.iterate([part] * 1000):
        trainer.step(frames, near, np.random.default_rng(0))
        synchronize(r.device)
        if began is None:
            began, clips.waited = time.perf_counter(), 0.0
            continue
        done += n
        if time.perf_counter() - began > 3 * seconds:
            break
    streamed = done / (time.perf_counter() - began)
    print(f"\nSVMAE pre-training on {where(r)}, batch {n}")
    line("steps on clips that lie on the device", resident, "clips/s", f"{resident * length:.0f} tokens/s")
    line(
        "steps on clips read from the frame cache",
        streamed,
        "clips/s",
        f"{100 * streamed / resident:.0f} % of that, waits {100 * clips.waited / (time.perf_counter() - began):.1f} %",
    )
    line(f"masking ({plan['masking']})", masking, "clips/s", f"{100 * resident / masking:.2f} % of a step")
    line("encoder on visible tokens", seen, "clips/s", f"{seen / everything:.1f}× the encoder on all tokens")
    print(f"  peak memory {training.peak_memory():.0f} MiB")
