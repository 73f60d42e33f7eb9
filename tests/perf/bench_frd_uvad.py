"""FRD-UVAD: training steps on features that lie on the device and that are read from disk."""

import os
import time
from dataclasses import fields

import torch

from common import training
from common.cli import DataSource, given
from common.distributed import seed_everything
from common.loader import Loader, epoch_order
from frd_uvad import preprocess, scoring
from frd_uvad.data import AnomalyBank, Windows
from frd_uvad.train import HEADS, Plan, make_plan, train_one_epoch
from tests.perf.rates import line, rates, synchronize, where


def measure_train(args, seconds, run):
    """Windows/s of training steps with features on the device and read from disk, and what the steps wait for."""
    plan = make_plan(**given(args, [field.name for field in fields(Plan)]))
    data = preprocess.prepare(DataSource.from_args(args), run, preprocess.FeatureOptions.from_args(args))
    windows = Windows(data.train + data.test, plan.cross_clip, run)
    on_device, n = windows.features, min(plan.batch_size, len(windows))
    print(
        f"\nFRD-UVAD on {where(run)}: {len(windows)} windows of {plan.cross_clip} clips, {data.crops} crops of width "
        f"{data.width}, batch {n}"
    )
    for name, features in (("features on the device", on_device), ("features read from disk", None)):
        if name.endswith("device") and on_device is None:
            print(f"  {name}: they do not fit")
            continue
        windows.features = features
        measure_steps(name, windows, plan, data.width, args, run)
    rows = epoch_order(len(windows), args.seed, 0)[:n]

    def reading(features, size):
        def read():
            windows.features = features
            return torch.cat([windows.get(rows[i : i + size]) for i in range(0, n, size)])

        return read

    ways = {"one window at a time": reading(None, 1), "a batch at once": reading(None, n)}
    if on_device is not None:
        ways["a batch at once, on the device"] = reading(on_device, n)
    values = rates(list(ways.values()), n, run.device, seconds)
    for name, value in zip(ways, values):
        line(f"only reading, {name}", value, "windows/s", f"{value / values[0]:.1f}×")
    print(f"  peak memory {training.peak_memory():.0f} MiB")


def measure_steps(name, windows, plan, width, args, run):
    seed_everything(args.seed)
    net = scoring.build_model({"feature_size": width, "num_blocks": args.num_blocks, "heads": HEADS}).to(run.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.lr, fused=True)
    loader = Loader(windows, plan.batch_size, args.seed, run)
    log = training.Log(os.devnull)
    meter = training.EpochMeter(run, "train", 3, log=log, save=lambda: None, unit="window", print_epochs=False)
    bank = AnomalyBank(max(1, int(plan.beta * plan.batch_size)))
    pseudo_labels = torch.zeros(len(windows), device=run.device)
    for epoch in range(2):  # the first one warms up
        start = time.perf_counter()
        train_one_epoch(net, loader, optimizer, plan, epoch, run, meter, bank, None, pseudo_labels)
        synchronize(run.device)
        seconds = time.perf_counter() - start
        meter.end_epoch(loader)
    waiting = f"waits for data {100 * loader.waited / seconds:.1f} %"
    line(name, len(windows) / seconds, "windows/s", waiting)
