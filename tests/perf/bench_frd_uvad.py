"""FRD-UVAD: training steps on features that lie on the device and that are read from disk."""

import time

import numpy as np
import torch

from common import old_training as training
from common.batches import parts_of
from frd_uvad import preprocess
from frd_uvad.train import Trainer, model_args_of, plan_of
from frd_uvad.windows import Windows
from tests.perf.rates import line, rates, synchronize, where


def measure_train(args, measured_seconds, r):
    """Windows/s of training steps with features on the device and read from disk, and what the steps wait for."""
    plan, data = plan_of(args), preprocess.prepare(args, r)
    windows = Windows(data.train + data.test, plan["cross_clip"], r)
    trainer = Trainer(plan, model_args_of(args, data), windows, None, r, None, {}, args.seed)
    trainer.net.train()
    order, whole = training.epoch_order(len(windows), args.seed, 0), windows.whole
    print(
        f"\nFRD-UVAD on {where(r)}: {len(windows)} windows of {plan['cross_clip']} clips, {data.crops} crops of width "
        f"{data.width}, batch {plan['batch_size']}"
    )
    for name, features in (("features on the device", whole), ("features read from disk", None)):
        if name.endswith("device") and whole is None:
            print(f"  {name}: they do not fit")
            continue
        windows.whole, windows.waited, n, began = features, 0.0, 0, None
        for i, (first, batch) in enumerate(windows.iterate(parts_of(order, plan["batch_size"]) * 1000)):
            trainer.step(first, batch, np.random.default_rng(i))
            if began is None:  # the first step does not count
                synchronize(r.device)
                began, windows.waited = time.perf_counter(), 0.0
                continue
            n += len(first)
            synchronize(r.device)
            if time.perf_counter() - began > measured_seconds:
                break
        seconds = time.perf_counter() - began
        line(name, n / seconds, "windows/s", f"waits for data {100 * windows.waited / seconds:.1f} %")
    rows = order[: plan["batch_size"]]

    def reading(features, size):
        def read():
            windows.whole = features
            return torch.cat([windows.get(rows[i : i + size]) for i in range(0, len(rows), size)])

        return read

    ways = {"one window at a time": reading(None, 1), "a batch at once": reading(None, len(rows))}
    if whole is not None:
        ways["a batch at once, on the device"] = reading(whole, len(rows))
    found = rates(list(ways.values()), len(rows), r.device, measured_seconds)
    for name, value in zip(ways, found):
        line(f"reading alone, {name}", value, "windows/s", f"{value / found[0]:.1f}×")
    print(f"  peak memory {training.peak_memory():.0f} MiB")
