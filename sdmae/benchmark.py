"""What train.py --benchmark and eval.py --benchmark print: frames/s of the model and end to end, agreement, memory."""
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import training
from common.files import UserError
from common.video import Decoder, open_video
from sdmae import scoring
from sdmae.frames import Frames
from sdmae.model import SDMAE, error_maps


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def rates(functions, items, device, rounds=3, seconds=2.0):
    """Median items per second of several functions measured in turn, so that a busy machine slows all of them alike."""
    found = [[] for _ in functions]
    for f in functions:
        f()
    for _ in range(rounds):
        for f, out in zip(functions, found):
            synchronize(device)
            n, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                f()
                n += items
                synchronize(device)
            out.append(n / (time.perf_counter() - start))
    return [statistics.median(x) for x in found]


def graphed(function, *inputs):
    """The function captured as a CUDA graph: the same kernels without launching them one by one."""
    static = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*static)

    def run(*new):
        for a, b in zip(static, new):
            a.copy_(b)
        graph.replay()
        return out
    return run


def line(name, value, note=""):
    print(f"  {name:<58}{value:>10.1f} frames/s  {note}", flush=True)


def benchmark(args, ready, size, patch, r):
    batch, device = args.batch_size or 32, r.device
    training.seed_everything(args.seed)
    if getattr(args, "checkpoint", None) and Path(args.checkpoint).exists():
        net, _ = scoring.load_model(args.checkpoint, args.student, size)
        size, patch = net.grid[0] * net.patch_size, net.grid[1] * net.patch_size
        size, patch, what = (size, patch), net.patch_size, str(args.checkpoint)
    else:
        net, what = SDMAE(patch_size=patch, image_size=size), "published size, random weights"
    net = net.eval().to(device)
    videos = ready.test or ready.train
    if not videos:
        raise UserError("--benchmark needs a video to read")
    rule = scoring.rule_of(ready.data.name)
    noise = torch.rand(batch, net.tokens, device=device)
    image = torch.rand(batch, 9, *size, device=device) * 2 - 1
    print(f"\nAED-MAE ({what}), {size[0]}×{size[1]}, {net.tokens} tokens, batch {batch}, {device}"
          + (f" {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f", {torch.get_num_threads()} threads"))
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(image[:1], noise[:1])
    print(f"  {counter.get_total_flops() / 1e9:.2f} GFLOP per frame")

    def eager():
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            return net(image, noise)
    ways = {"eager: norms apart, attention in three steps, fp32": eager}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        fast = net.folded(dtype)

        def optimised(fast=fast):
            with torch.inference_mode():
                return fast(image, noise)
        ways[f"optimised: folded norms, fused attention, {name}"] = optimised
        if device.type == "cuda":
            with torch.inference_mode():
                replay = graphed(fast, image, noise)
            ways[f"the same as a CUDA graph, {name}"] = lambda replay=replay: replay(image, noise)
        if args.compile:
            compiled = torch.compile(fast)

            def compiled_run(compiled=compiled):
                with torch.inference_mode():
                    return compiled(image, noise)
            ways[f"the same compiled, {name}"] = compiled_run
    found = dict(zip(ways, rates(list(ways.values()), batch, device)))
    target = torch.cat([image[:, 3:6], torch.full_like(image[:, :1], -1)], dim=1)
    reference = None
    for name, function in ways.items():
        maps = torch.stack(error_maps({k: v for k, v in function().items()}, target, patch, rule["norm"])).float()
        scores = maps.mean(2)
        reference = scores if reference is None else reference
        difference = float(((scores - reference).abs() / reference.abs()).max())
        line(name, found[name], f"{found[name] / next(iter(found.values())):.2f}× eager, scores differ by {difference:.1e}")
    best = max(found.values())

    # end to end: from the uint8 cache, and from a video file
    scorer = scoring.Scorer(net, rule, r)
    frames = Frames(ready.arrays(videos[:4]), device)
    rows = np.arange(min(len(frames), 512))

    def from_cache():
        scoring.score(scorer, frames, rows, "", batch, quiet=True)
    model = rates([from_cache], len(rows), device, rounds=2)[0]
    own = found[f"optimised: folded norms, fused attention, {'bf16' if r.precision == 'bf16' else 'fp32'}"]
    line("from the frame cache to scores", model, f"{100 * (1 - model / own):.0f} % below the model alone ({r.precision}); "
         f"waited for data {100 * frames.waited / max(1e-9, len(rows) / model):.0f} %")
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Decoder(videos[0]), Path(folder) / "video.mp4")
        from_file(scorer, path, size, batch)
        began = time.perf_counter()
        n = from_file(scorer, path, size, batch)
        line("from an mp4 file to scores", n / (time.perf_counter() - began), f"{n} frames, decoding and resizing included")
    train_rate(args, net, size, patch, ready, r)
    print(f"  best of the model: {best:.0f} frames/s; peak memory {training.peak_memory():.0f} MiB"
          + (f", {torch.cuda.max_memory_allocated(device) / 2 ** 20:.0f} MiB on the device" if device.type == "cuda" else ""))


def write_video(frames, path):
    writer = None
    for i, frame in enumerate(frames):
        if writer is None:
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25.0, frame.shape[1::-1])
        writer.write(frame if frame.shape[2] == 3 else np.repeat(frame, 3, axis=2))
        if i == 299:
            break
    writer.release()
    return path


def from_file(scorer, path, size, batch):
    """Decode, shrink and score a video file as eval.py --video does, without writing anything. -> frames."""
    from sdmae.live import Window
    window, waiting, n = Window(size), [], 0

    def score(part):
        five = torch.from_numpy(np.stack([s[1] for s in part])).to(scorer.run.device).permute(0, 1, 4, 2, 3)
        scorer.maps(five, [s[0] for s in part]).mean(2).cpu()
        return len(part)
    for frame in Decoder(open_video(path)):
        waiting += window.add(0, frame)
        if len(waiting) >= batch:
            n += score(waiting[:batch])
            waiting = waiting[batch:]
    waiting += window.flush()
    return n + (score(waiting) if waiting else 0)


def train_rate(args, net, size, patch, ready, r):
    """Frames/s of training steps of both phases."""
    from sdmae.train import Trainer
    plan = dict(epochs=1, batch_size=8, lr=1e-4, student_from=0, pseudo="none", pseudo_share=0.0, gradient_weights=True)
    frames = Frames(ready.arrays((ready.train or ready.test)[:4]), r.device)
    trainer = Trainer(plan, {"patch_size": patch, "image_size": list(size)}, frames, None, r, None, {}, 0, {"parts": []})
    n = min(len(frames), 8 if r.device.type == "cpu" else 100)
    five = frames.get(np.arange(n))
    noise = torch.rand(n, trainer.net.tokens)
    for phase, name in ((1, "teacher"), (2, "student alone")):
        trainer.enter(phase)
        rate = rates([lambda: trainer.step(five, np.random.default_rng(0), noise)], n, r.device, rounds=1)[0]
        line(f"training, {name} ({r.precision}, batch {n})", rate)
