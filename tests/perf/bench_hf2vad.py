"""HF2-VAD: speed of every step, agreement of the fast path, memory."""

import time

import numpy as np
import torch

from common import old_training as training
from common.batches import Batches
from common.objects.cubes import cubes_of_video, flow_of_video, motion_boxes, object_boxes
from common.objects.flow import PairFlow
from common.pool import cores
from common.video import Decoder
from hf2vad import preprocess, scoring
from hf2vad.train import STAGES, Stage, plan_of
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
    training.seed_everything(args.seed)
    return scoring.build(scoring.SIZES["full"], "finetune"), "published size, random weights"


def measure_eval(args, seconds, r):
    ready = preprocess.prepare(args, r, splits=("test",))
    net, what = model_of(args)
    records = ready.records(ready.test)
    data = Batches(records, scoring.FIELDS, r.device)
    n = min(args.batch_size or scoring.BATCH[r.device.type], len(data))
    rows = np.linspace(0, len(data) - 1, n).astype(int)
    batch = data.get(rows)
    plain, fast = scoring.Scorer(net, r, optimised=False), scoring.Scorer(net, r)

    def one_by_one():
        """As published: the flows of a cube one after another, prior drawn and thrown away."""
        frames, flows = scoring.to_input(batch)
        with torch.inference_mode(), r.autocast():
            recon = torch.cat([plain.net.memAE(f)["recon"] for f in flows.split(2, 1)], 1)
            out = plain.net.vunet(frames[:, : plain.net.past_channels], recon, prior=True)
        return float(out["frame_pred"].sum())

    whole = plain.whole
    eager = one_by_one if whole else lambda: float(plain.score(batch)[0].sum())
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
        f"  largest relative difference of their scores: {worst:.1e} ({'agree' if worst < 1e-3 else 'DO NOT AGREE'} to 1e-3)"
    )
    data.waited, start = 0.0, time.perf_counter()
    order = np.arange(min(len(data), max(8 * n, 1024)))
    for _, part in data.iterate(order, n):
        fast.score(part)
    synchronize(r.device)
    share = 100 * data.waited / (time.perf_counter() - start)
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
    flow_into = flow_of_video(pictures, video, s)
    line("optical flow", rate(lambda: flow_into(range(n)), n, CPU, seconds), "frames/s")
    grey = [np.ascontiguousarray(p[:, :, 0]) for p in picked]
    none = np.zeros((0, 4), np.float32)

    def boxes():
        for t in range(n):
            known = object_boxes(found[t], s) if found else none
            motion_boxes(grey[max(0, t - 1)], grey[t], grey[min(n - 1, t + 1)], known, s)

    line("boxes (filter and motion)", rate(boxes, n, CPU, seconds), "frames/s")
    zero = np.zeros((*picked.shape[1:3], 2), np.float32)
    still = PairFlow(picked, lambda pairs: [zero] * len(pairs))
    cubes = sum(len(x) for x in cubes_of_video(picked, found, s, still))

    def cut():
        for _ in cubes_of_video(picked, found, s, still):
            pass

    line("boxes and cubes without flow", rate(cut, n, CPU, seconds), "frames/s", f"{cubes / n:.1f} cubes a frame")

    def all_of_it():
        for _ in cubes_of_video(picked, found, s, flow_into):
            pass

    line("flow, boxes, cubes together", rate(all_of_it, n, CPU, seconds), "frames/s")


def measure_train(args, _seconds, r):
    ready = preprocess.prepare(args, r)
    plan, size = plan_of(args, ready.data.name), args.size or ("small" if ready.data.name == "demo" else "full")
    records = ready.records(ready.train)
    fields = {"memae": {"flow": slice(-1, None)}, "cvae": scoring.FIELDS, "finetune": scoring.FIELDS}
    print(f"\ntraining HF2-VAD ({size}) on {where(r)}")
    for name in STAGES:
        training.seed_everything(args.seed)
        net = scoring.build(scoring.SIZES[size], name)
        stage = Stage(name, plan[name], net, r, None, {}, {})
        stage.mode()
        data = Batches(records, fields[name], r.device)
        n = min(plan[name]["batch_size"], len(data))
        order, done = training.epoch_order(len(data), 0, 0), 0
        for i, (rows, batch) in enumerate(data.iterate(order[: 4 * n], n)):
            if name == "cvae":
                batch["recon"] = batch["flow"].flatten(1, 2)
            if i == 1:
                data.waited, start = 0.0, time.perf_counter()
            loss = stage.train_step(batch)["total"]
            if i:
                float(loss.detach())
                done += len(rows)
        seconds = time.perf_counter() - start
        line(
            f"stage {name}, batch {n}",
            done / seconds,
            "cubes/s",
            f"waiting for data {100 * data.waited / seconds:.2f} %, one epoch {len(data) * seconds / done / 60:.1f} min",
        )
    line("peak memory of this process", training.peak_memory(), "MiB")
