"""HF2-VAD: speed of every step, agreement of the fast path, memory."""

import os
import time

import numpy as np
import torch

from common import training
from common.cli import DataSource, given
from common.distributed import seed_everything
from common.flow.sources import PairFlow, make_dis
from common.loader import Loader, epoch_order, tensors_ahead
from common.objects.cube_dataset import CubeDataset
from common.objects.cubes import cubes_of_video, motion_boxes, object_boxes
from common.objects.pipeline import FLAGS
from common.pool import cores
from common.readers.video import Decoder
from hf2vad import preprocess, scoring
from hf2vad.data import stage_data
from hf2vad.train import SIZES, make_plan, train_one_epoch
from tests.perf.rates import line, matrix_rate, rate, rates, synchronize, where

CPU = torch.device("cpu")


def flops(function):
    """Floating-point operations of one call (convolutions and matrix products)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def model_of(args):
    """The checkpoint that was named, else the published size with random weights: speed does not depend on them."""
    if getattr(args, "checkpoint", None):
        return scoring.load_model(args.checkpoint)[0], str(args.checkpoint)
    seed_everything(args.seed)
    return scoring.build_model(SIZES["full"], "finetune"), "published size, random weights"


def measure_eval(args, seconds, r):
    ready = preprocess.prepare(DataSource.from_args(args), r, splits=("test",), foreground=given(args, FLAGS))
    net, what = model_of(args)
    records = ready.records(ready.test)
    data = CubeDataset(records, scoring.FIELDS, r)
    n = min(args.batch_size or scoring.BATCH_SIZE[r.device.type], len(data))
    rows = np.linspace(0, len(data) - 1, n).astype(int)
    batch = data.to_device(data.read(rows))
    plain, fast = scoring.Scorer(net, r, optimised=False), scoring.Scorer(net, r)

    def one_by_one():
        """As published: the flows of a cube one after another, prior drawn and thrown away."""
        frames, flows = scoring.to_input(batch)
        with torch.inference_mode(), r.autocast():
            recon = torch.cat([plain.net.memAE(f)["recon"] for f in flows.split(2, 1)], 1)
            out = plain.net.vunet(frames[:, : plain.net.past_channels], recon, prior=True)
        return float(out["frame_pred"].sum())

    eager = one_by_one if plain.predicts_frames else lambda: float(plain.score(batch)[0].sum())
    slow, quick = rates([eager, lambda: float(fast.score(batch)[0].sum())], n, r.device, seconds)
    print(f"\nHF2-VAD on {where(r)}; model: {what}; {n} cubes a batch")
    line("plain eager model", slow, "cubes/s", "flows in turn, prior drawn, no folding")
    line(
        "optimised path", quick, "cubes/s", f"{quick / slow:.2f}×; folded norms, batched flows, no prior, channels_last"
    )
    work, peak = flops(lambda: fast.score(batch)) / n, matrix_rate(r.device, r.precision == "bf16") / 1e9
    line(
        "share of this machine's matrix rate",
        100 * quick * work / 1e9 / peak,
        "%",
        f"{work / 1e9:.2f} GFLOP a cube, {peak:.0f} GFLOP/s in a matrix product",
    )
    a, b = plain.score(batch), fast.score(batch)
    worst = max(float(((x - y).abs() / (1e-6 + y.abs())).max()) for x, y in zip(a, b))
    print(
        f"  largest relative difference of their scores: {worst:.1e} ({'agree' if worst < 1e-3 else 'DO NOT AGREE'} to "
        "1e-3)"
    )
    waited, start = 0.0, time.perf_counter()
    order = np.arange(min(len(data), max(8 * n, 1024)))
    parts = [order[i : i + n] for i in range(0, len(order), n)]
    for _, batch, seconds_waited in tensors_ahead(data, parts, r):
        waited += seconds_waited
        fast.score(batch)
    synchronize(r.device)
    share = 100 * waited / (time.perf_counter() - start)
    line("waiting for data", share, "%", f"over {len(order)} cubes from the memory map")
    steps_of_preprocessing(ready, seconds)
    line("peak memory of this process", training.peak_memory(), "MiB")


def steps_of_preprocessing(ready, seconds, frames=60):
    """Frames per second of every step, on one core."""
    video, s = ready.test[0], ready.store.s
    pictures = ready.cache.frames(video)
    n = min(frames, len(pictures))
    picked = pictures[:n]
    found = ready.store.detections(video, len(pictures)) if s.boxes != "motion" else None
    print(
        f"preprocessing, one process ({cores()} run side by side), {pictures.shape[2]}×{pictures.shape[1]}, "
        f"{s.boxes.split(':')[0]} boxes, flow {s.flow}"
    )

    def decode():
        for i, _ in enumerate(Decoder(video)):
            if i + 1 >= n:
                break

    line("decode", rate(decode, n, CPU, seconds), "frames/s")
    flow_into = PairFlow(pictures, make_dis())
    line("optical flow", rate(lambda: flow_into(range(n)), n, CPU, seconds), "frames/s")
    grey = [np.ascontiguousarray(p[:, :, 0]) for p in picked]
    none = np.zeros((0, 4), np.float32)

    def boxes():
        for t in range(n):
            known = object_boxes(found[t], s) if found else none
            motion_boxes(grey[max(0, t - 1)], grey[t], grey[min(n - 1, t + 1)], known, s)

    line("boxes (filter and motion)", rate(boxes, n, CPU, seconds), "frames/s")
    zero = np.zeros((*picked.shape[1:3], 2), np.float32)
    still = PairFlow(picked, lambda previous, following: zero)
    cubes = sum(len(x) for x in cubes_of_video(picked, found, s, still))

    def cut():
        for _ in cubes_of_video(picked, found, s, still):
            pass

    line("boxes and cubes without flow", rate(cut, n, CPU, seconds), "frames/s", f"{cubes / n:.1f} cubes a frame")

    def all_of_it():
        for _ in cubes_of_video(picked, found, s, flow_into):
            pass

    line("flow, boxes, cubes together", rate(all_of_it, n, CPU, seconds), "frames/s")


def measure_train(args, _seconds, run):
    dataset = preprocess.prepare(DataSource.from_args(args), run, foreground=given(args, FLAGS))
    name = dataset.data.name
    plan = make_plan(name, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, decay=args.decay)
    size = args.size or ("small" if name == "demo" else "full")
    records = dataset.records(dataset.train)
    print(f"\ntraining HF2-VAD ({size}) on {where(run)}")
    for stage in plan.values():
        seed_everything(args.seed)
        net = scoring.build_model(SIZES[size], stage.name).to(run.device).to(memory_format=torch.channels_last)
        if stage.name == "cvae":
            net.memAE.requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=stage.lr, fused=True)
        data = (
            RandomFlows(records, scoring.FIELDS, run)
            if stage.name == "cvae"
            else stage_data(stage.name, net, records, run, None)
        )
        n = min(stage.batch_size, len(data))
        rows = epoch_order(len(data), 0, 0)[: 4 * n]
        loader = Loader(data, n, args.seed, run, order=lambda epoch, rows=rows: rows[: n if epoch == 0 else 4 * n])
        meter = training.EpochMeter(
            run, stage.name, 2, log=training.Log(os.devnull), save=lambda: None, unit="cube", print_epochs=False
        )
        for epoch in range(2):  # the first one warms up
            start = time.perf_counter()
            train_one_epoch(net, loader, optimizer, stage, epoch, run, meter)
            synchronize(run.device)
            seconds = time.perf_counter() - start
        waiting = 100 * loader.waited / seconds
        line(
            f"stage {stage.name}, batch {n}",
            len(rows) / seconds,
            "cubes/s",
            f"waiting for data {waiting:.2f} %, one epoch {len(data) * seconds / len(rows) / 60:.1f} min",
        )
    line("peak memory of this process", training.peak_memory(), "MiB")


class RandomFlows(CubeDataset):
    """Stage cvae's input without its first stage: the true flows stand for the reconstructed ones."""

    def to_device(self, arrays):
        batch = super().to_device(arrays)
        return {**batch, "recon": batch["flow"].flatten(1, 2)}
