"""AED-MAE: frames/s of the model and end to end, agreement, memory."""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import training
from common.cli import DataSource, dataset_name
from common.distributed import seed_everything
from common.io import UserError
from common.loader import Batch, tensors_ahead
from common.readers.pictures import as_channels
from common.readers.video import Decoder, open_video
from common.report import plots
from sdmae import live, preprocess, scoring
from sdmae.data import SAMPLE_OFFSETS, FrameDataset, network_input
from sdmae.model import SDMAE, error_maps
from sdmae.train import STUDENT, TEACHER, losses, make_plan, random_input, start_phase
from tests.perf.rates import line, rate, rates, where


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


def measure_eval(args, seconds, run):
    prepared(args, seconds, run, ("test",))


def measure_train(args, seconds, run):
    prepared(args, seconds, run, ("train", "test"))


def prepared(args, seconds, run, splits):
    size, patch = preprocess.input_size(dataset_name(args), args.image_size, args.patch)
    dataset = preprocess.prepare(DataSource.from_args(args), size, run, splits=splits)
    measure(args, dataset, size, patch, seconds, run)


def measure(args, ready, size, patch, seconds, r):
    batch, device = args.batch_size or 32, r.device
    seed_everything(args.seed)
    if getattr(args, "checkpoint", None) and Path(args.checkpoint).exists():
        net, what = scoring.load_model(args.checkpoint, args.student, size)[0], str(args.checkpoint)
        patch, size = net.patch_size, (net.grid[0] * net.patch_size, net.grid[1] * net.patch_size)
    else:
        net, what = SDMAE(patch_size=patch, image_size=size), "published size, random weights"
    net = net.eval().to(device)
    videos = ready.test or ready.train
    if not videos:
        raise UserError("there is no video to read")
    noise = torch.rand(batch, net.tokens, device=device)
    pixels = torch.randint(0, 256, (batch, 3, *size, 3), dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    image = network_input(pixels)
    print(f"\nAED-MAE ({what}), {size[0]}×{size[1]}, {net.tokens} tokens, batch {batch}, {where(r)}")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(image[:1], noise[:1])
    print(f"  {counter.get_total_flops() / 1e9:.2f} GFLOP per frame")
    ways, own = ways_of(net, image, pixels, noise, args, r)
    found = dict(zip(ways, rates(list(ways.values()), batch, device, seconds)))
    target = torch.cat([image[:, 3:6], torch.full_like(image[:, :1], -1)], dim=1)
    reference, norm = None, scoring.score_config(ready.data.name).norm
    for name, function in ways.items():
        scores = torch.stack(error_maps(function(), target, patch, norm)).float().mean(2)
        reference = scores if reference is None else reference
        difference = float(((scores - reference).abs() / reference.abs()).max())
        line(
            name, found[name], "frames/s", f"{found[name] / found[EAGER]:.2f}× eager, scores differ by {difference:.1e}"
        )
    from_uint8(net, ready, videos, size, batch, found[own], seconds, r)
    training_rates(ready, size, patch, seconds, r)
    print(
        f"  best of the model: {max(found.values()):.0f} frames/s; peak memory {training.peak_memory():.0f} MiB"
        + (
            f", {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the device"
            if device.type == "cuda"
            else ""
        )
    )


EAGER = "eager: norms apart, attention in three steps, fp32"


def ways_of(net, image, pixels, noise, args, r):
    """{name: function -> the network's outputs}, and the name of the one that scoring uses here."""

    def eager():
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            return net(image, noise)

    ways = {EAGER: eager}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        fast = scoring.fold(net, dtype)
        ways[f"optimised: folded norms, fused attention, {name}"] = torch.inference_mode()(
            lambda fast=fast: fast(pixels, noise)
        )
        if r.device.type == "cuda":
            with torch.inference_mode():
                replay = graphed(fast, pixels, noise)
            ways[f"the same as a CUDA graph, {name}"] = torch.inference_mode()(
                lambda replay=replay: replay(pixels, noise)
            )
        if args.compile:
            compiled = torch.compile(fast)
            ways[f"the same compiled, {name}"] = torch.inference_mode()(
                lambda compiled=compiled: compiled(pixels, noise)
            )
    return ways, f"optimised: folded norms, fused attention, {r.precision}"


def from_uint8(net, ready, videos, size, batch, model, seconds, r):
    """End to end: from the frame cache, and from a video file."""
    scorer = scoring.Scorer(net, scoring.score_config(ready.data.name), r)
    frames = FrameDataset(ready.arrays(videos[:4]), r)
    rows = np.arange(min(len(frames), 512))
    colour = frames.channels == 3
    cached = rate(lambda: scorer.score_frames(frames, rows, batch), len(rows), r.device, seconds)
    waited, began = 0.0, time.perf_counter()
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    for part, seen, seconds_waited in tensors_ahead(frames, parts, r):
        waited += seconds_waited
        scorer.errors(seen, frames.number[part])
    waited /= time.perf_counter() - began
    line(
        "from the frame cache to scores",
        cached,
        "frames/s",
        f"{100 * (1 - cached / model):.0f} % below the model alone "
        f"({r.precision}, {'colour' if colour else 'grey'}); waited for data {100 * waited:.0f} %",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(itertools.islice(Decoder(videos[0]), 300), Path(folder) / "video.mp4")
        from_file(scorer, path, size, batch)
        began = time.perf_counter()
        n = from_file(scorer, path, size, batch)
        line(
            "from an mp4 file to scores",
            n / (time.perf_counter() - began),
            "frames/s",
            f"{n} frames, decoding and resizing included",
        )


def write_video(frames, path):
    writer = None
    for frame in frames:
        writer = writer or plots.open_mp4(path, path, 25.0, frame.shape[1::-1])
        writer.write(as_channels(frame, 3))
    writer.release()
    return path


def from_file(scorer, path, size, batch):
    """Decode, shrink and score a video file as eval.py --video does, without writing anything. -> frames."""
    window, waiting = live.Window(size), []
    n = 0
    for frame in Decoder(open_video(path)):
        waiting += window.add(0, frame)
        if len(waiting) >= batch:
            n += len(live.token_errors(scorer, waiting))
            waiting = []
    waiting += window.flush()
    return n + (len(live.token_errors(scorer, waiting)) if waiting else 0)


def training_rates(dataset, size, patch, seconds, run):
    """Frames/s of training steps of both phases."""
    plan = make_plan("folder", epochs=1, batch_size=8, pseudo="none")
    frames = FrameDataset(dataset.arrays((dataset.train or dataset.test)[:4]), run, SAMPLE_OFFSETS)
    net = scoring.build_model({"patch_size": patch, "image_size": list(size)}).to(run.device)
    rows = np.arange(min(len(frames), 8 if run.device.type == "cpu" else 100))
    batch = Batch(rows, slice(None), frames.to_device(frames.read(rows)), np.random.default_rng(0))
    for phase, name in ((TEACHER, "teacher"), (STUDENT, "student only")):
        optimizer = start_phase(net, phase, plan.lr)

        def step(phase=phase, optimizer=optimizer):
            inputs = random_input(batch, None, plan, net.tokens, run)
            loss = losses(net, phase, *inputs, plan, run)[phase]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        measured = rate(step, len(rows), run.device, seconds)
        line(f"training, {name} ({run.precision}, batch {len(rows)})", measured, "frames/s")
