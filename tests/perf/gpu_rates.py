"""Speed of every method on random data of its published size, for tests/perf/gpu.py.

RATES holds one function(bench) per method. A result comes with the share of the device's bf16 matrix rate that it
reaches, the peak of the device's memory, and where data is read the share of time spent waiting for it.
"""

import gc
import os
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import training
from common.distributed import Run, seed_everything
from common.draw_loader import DrawLoader
from common.io import UserError, first_line
from common.loader import Loader, tensors_ahead
from common.objects.cube_dataset import CubeDataset
from common.objects.cubes import Settings, cube_dtype
from tests.perf.rates import matrix_rate, rate, synchronize

UCF_CRIME_CLIPS = 375_000  # about as many clips of 16 frames as its training videos make
EPOCHS_OF_FRD, STEPS_OF_SCENES = 5, 5000  # published schedules


class Measure:
    """Rates of one method: run, sizes and what is written to the report."""

    def __init__(self, bench):
        gc.collect()
        self.bench, self.quick = bench, bench.quick
        self.run = Run(bench.device, "bf16")
        self.device = self.run.device
        self.is_gpu = self.device.type == "cuda"
        self.seconds = 0.2 if self.quick else 2.0
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        seed_everything(0)

    def size(self, full, toy):
        return toy if self.quick else full

    def peak(self) -> float:
        """FLOP/s of a large bf16 matrix product on this device."""
        if not hasattr(self.bench, "matrix_rate"):
            self.bench.matrix_rate = matrix_rate(self.device, bf16=True, n=self.size(8192, 512))
        return self.bench.matrix_rate

    def memory(self) -> str:
        if not self.is_gpu:
            return f"peak {training.peak_memory() / 1024:.1f} GiB"
        return f"peak {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB"

    def add(self, what, value, unit, *, flops=None, waited=None, aim=None, note=""):
        """flops: of one item; waited: share of the time; aim: the rate to reach on a large GPU."""
        notes = [note] if note else []
        if flops:
            notes.append(f"{100 * value * flops / self.peak():.1f} % of the bf16 rate")
        if waited is not None:
            notes.append(f"waits for data {100 * waited:.1f} %")
        judged = aim is not None and not self.quick and self.is_gpu
        aim_text = f"≥ {aim}" if aim is not None and not self.quick else ""
        ok = value >= aim if judged else None
        self.bench.add(what, value, unit, aim=aim_text, ok=ok, note=", ".join([*notes, self.memory()]))

    def rate(self, function, items: int) -> float:
        """Items per second of a function, after warming up."""
        for _ in range(1 if self.quick else 3):
            function()
        synchronize(self.device)
        return rate(function, items, self.device, self.seconds)

    def streamed(self, dataset, rows: np.ndarray, batch: int, function) -> tuple[float, float]:
        """A function of a dataset's batches, read and copied meanwhile -> rows per second, share of time waited."""
        waited, began = 0.0, time.perf_counter()
        for part, data, seconds in tensors_ahead(dataset, np.split(rows, range(batch, len(rows), batch)), self.run):
            function(part, data)
            waited += seconds
        synchronize(self.device)
        duration = time.perf_counter() - began
        return len(rows) / duration, waited / duration

    def epochs(self, loader, train_epoch, log_steps=None) -> tuple[float, float]:
        """train_epoch(epoch, meter) of a method, twice; the first time warms up. -> samples per second, share of time
        waited."""
        quiet = {"log": training.Log(os.devnull), "save": lambda: None, "print_epochs": False, "log_steps": log_steps}
        meter = training.EpochMeter(self.run, "train", 3, **quiet)
        for epoch in range(2):
            synchronize(self.device)
            began = time.perf_counter()
            train_epoch(epoch, meter)
            synchronize(self.device)
            duration = time.perf_counter() - began
            if meter.epoch == epoch:  # not every method's loop ends the epoch itself
                meter.end_epoch(loader)
        meter.bar.close()
        return loader.steps(1) * loader.batch_size / duration, loader.waited / duration


def flops_of(function) -> int:
    """Floating-point operations of one call, in matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def random_records(n: int) -> np.ndarray:
    """Cubes of hf2vad's and spr_uvad's size in memory: structured [n]."""
    records = np.zeros(n, cube_dtype(Settings(frames=(-4, -3, -2, -1, 0), flows=(-3, -2, -1, 0)), 1))
    rng = np.random.default_rng(0)
    records["appearance"] = rng.integers(0, 256, records["appearance"].shape, np.uint8)
    records["flow"] = rng.normal(size=(256, *records["flow"].shape[1:])).astype(np.float16)[np.arange(n) % 256]
    return records


def sdmae(bench) -> None:
    """Scoring at 320×640 in batches of 32, eager, compiled and captured; training."""
    from sdmae import data, model, scoring, train
    from tests.perf.bench_sdmae import graphed

    m = Measure(bench)
    size, batch = m.size((320, 640), (32, 64)), m.size(32, 4)
    sizes = {**train.SIZES[m.size("full", "small")], "patch_size": 16 if not m.quick else 8, "image_size": size}
    net = scoring.build_model(sizes).eval()
    scorer, compiled = (
        scoring.Scorer(net, scoring.score_config("avenue"), m.run, compiled=compiled) for compiled in (False, True)
    )
    seen = torch.randint(0, 256, (batch, 3, 3, *size), dtype=torch.uint8, device=m.device)
    noise = torch.rand(batch, net.tokens, device=m.device)

    def errors(seen, noise, scorer=scorer):
        out = scorer.net(seen, noise, student=True)
        return torch.stack(model.pixel_errors(out, seen[:, 1], scorer.patch, "L2"), 1)

    ways = {"eager": errors}
    if m.is_gpu:
        try:
            with torch.inference_mode():
                ways["captured as a CUDA graph"] = graphed(errors, seen, noise)
        except RuntimeError as e:
            bench.add("sdmae scoring, captured as a CUDA graph", "failed", ok=False, note=first_line(e))
    if not m.quick:
        ways["compiled, as by --compile"] = lambda seen, noise: errors(seen, noise, compiled)
    ways = {name: torch.inference_mode()(lambda way=way: way(seen, noise)) for name, way in ways.items()}
    work, exact, rates = flops_of(ways["eager"]) / batch, ways["eager"](), {}
    for name, function in ways.items():
        try:
            off = float((function() - exact).abs().max() / exact.abs().max())
            rates[name] = m.rate(function, batch)
        except RuntimeError as e:  # a compiler may be missing: the other ways are measured all the same
            bench.add(f"sdmae scoring, {name}", "failed", ok=False, note=first_line(e))
            continue
        m.add(f"sdmae scoring, {name}", rates[name], "frames/s", flops=work, note=f"errors differ by {off:.1e}")
    best = max(rates, key=rates.get)
    m.add(f"sdmae scoring, the best ({best})", rates[best], "frames/s", aim=8000)
    frames = np.random.default_rng(0).integers(0, 256, (m.size(600, 8), *size, 3), np.uint8)
    speed = m.rate(lambda: scoring.score_video(scorer, frames), len(frames))
    m.add("sdmae, a video in memory to scores", speed, "frames/s")

    dataset = data.FrameDataset([frames], m.run, data.SAMPLE_OFFSETS)
    plan = train.make_plan("folder", epochs=1, batch_size=m.size(64, 4), pseudo="none")
    net = scoring.build_model(sizes).to(m.device)
    loader = Loader(dataset, plan.batch_size, 0, m.run)
    optimizer = train.start_phase(net, train.TEACHER, plan.lr)

    def epoch(number, meter):
        net.train()
        for batch, _ in meter.batches(loader, number):
            inputs = train.random_input(batch, None, plan, net.tokens, m.run)
            loss = train.losses(net, train.TEACHER, *inputs, plan, m.run)
            optimizer.zero_grad(set_to_none=True)
            loss[train.TEACHER].backward()
            optimizer.step()
            meter.update(loss)

    speed, waited = m.epochs(loader, epoch)
    m.add("sdmae training, teacher", speed, "frames/s", waited=waited)


def hf2vad(bench) -> None:
    """Scoring and the three stages of training at the published size."""
    from hf2vad import scoring, train
    from tests.perf.bench_hf2vad import RandomFlows

    m = Measure(bench)
    records, sizes = [random_records(m.size(16384, 64))], train.SIZES[m.size("full", "small")]
    batch = m.size(scoring.BATCH_SIZE[m.device.type], 16)
    scorer = scoring.Scorer(scoring.build_model(sizes, "finetune"), m.run)
    cubes = CubeDataset(records, scoring.FIELDS, m.run, once=True)
    one = cubes.to_device(cubes.read(np.arange(batch)))
    work = flops_of(lambda: scorer.score(one)) / batch
    m.add("hf2vad scoring, one batch again", m.rate(lambda: scorer.score(one), batch), "cubes/s", flops=work)
    m.streamed(cubes, np.arange(batch), batch, lambda _, data: scorer.score(data))
    speed, waited = m.streamed(cubes, np.arange(len(cubes)), batch, lambda _, data: scorer.score(data))
    m.add("hf2vad scoring, cubes from memory to scores", speed, "cubes/s", waited=waited, aim=20000)
    plan = train.make_plan("ped2", epochs=None, batch_size=m.size(None, "16"), lr=None, decay=None)
    for name, stage in plan.items():
        net = scoring.build_model(sizes, name).to(m.device).to(memory_format=torch.channels_last)
        if name == "cvae":
            net.memAE.requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=stage.lr, fused=True)
        fields = {"flow": slice(-1, None)} if name == "memae" else scoring.FIELDS
        data = (RandomFlows if name == "cvae" else CubeDataset)(records, fields, m.run)
        loader = Loader(data, stage.batch_size, 0, m.run)

        def epoch(number, meter, net=net, loader=loader, optimizer=optimizer, stage=stage):
            train.train_one_epoch(net, loader, optimizer, stage, number, m.run, meter)

        speed, waited = m.epochs(loader, epoch)
        m.add(f"hf2vad training, {name}, batch {stage.batch_size}", speed, "cubes/s", waited=waited)


def spr_uvad(bench) -> None:
    """Training with motion and refinement at the published size, and scoring."""
    from spr_uvad import scoring, train

    m = Measure(bench)
    records = random_records(m.size(16384, 64))
    plan = train.make_plan("ped2", warmup=0, batch_size=m.size(256, 16))
    frames = records.dtype["appearance"].shape[0]
    dtype = cube_dtype(Settings(frames=tuple(range(frames)), flows=tuple(range(frames))), 1)
    cubes = np.zeros(len(records), dtype)
    cubes["appearance"] = records["appearance"]
    cubes["flow"][:, : records["flow"].shape[1]] = records["flow"]
    data = CubeDataset([cubes], scoring.fields(True), m.run)
    sizes = {**train.SIZES[m.size("full", "small")], "num_frames": frames, "use_flow": True}
    net = scoring.build_model(sizes).to(m.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=plan.lr, fused=True)
    loader, errors = Loader(data, plan.batch_size, 0, m.run), torch.zeros(len(data), device=m.device)

    def epoch(number, meter):
        train.train_one_epoch(net, loader, optimizer, plan, number, m.run, meter, errors)

    speed, waited = m.epochs(loader, epoch)
    m.add("spr_uvad training with motion and refinement", speed, "cubes/s", waited=waited)
    net.eval()
    block = np.zeros(len(data), np.int64)
    speed = m.rate(lambda: scoring.score_cubes({0: net}, data, block, m.run), len(data))
    m.add("spr_uvad scoring with motion", speed, "cubes/s")


def scene_aware_ae(bench) -> None:
    """The published 5000 iterations on features of CLIP ViT-L/14, four scenes."""
    from scene_aware_ae import scoring, train
    from scene_aware_ae.data import Segments

    m = Measure(bench)
    width, scenes = m.size(768, 64), m.size(4, 2)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(m.size(20000, 100), width)).astype(np.float16) for _ in range(scenes)]
    videos = [SimpleNamespace(scene=str(i), name=str(i)) for i in range(scenes)]
    segments = Segments(SimpleNamespace(train=videos, arrays=lambda _: arrays), m.run)
    plan = train.make_plan(scenes, segments.frames)
    n, steps = plan.segments_per_scene, m.size(200, 4)
    net = scoring.build_model({"input_dim": width, **train.MODEL, "num_scenes": scenes}).to(m.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=plan.lr, fused=True)
    loader = DrawLoader(segments, scenes * n, 0, m.run, lambda rng: segments.draw(rng, n), 2 * steps)
    loader.LOG_STEPS, labels = steps, segments.scene_labels(n)

    def epoch(number, meter):
        train.train_one_epoch(net, loader, optimizer, plan, labels, number, m.run, meter)

    speed, waited = m.epochs(loader, epoch, log_steps=steps)
    seconds = STEPS_OF_SCENES * scenes * n / speed
    note = f"{STEPS_OF_SCENES} steps in {seconds:.0f} s, of {scenes * n} segments"
    aim = STEPS_OF_SCENES / 30
    m.add("scene_aware_ae training", speed / (scenes * n), "steps/s", waited=waited, aim=round(aim), note=note)
    video = arrays[0][: m.size(8192, 64)]
    speed = m.rate(lambda: scoring.score_video(net.eval(), video, m.run), len(video))
    m.add("scene_aware_ae scoring", speed, "frames/s")


class RandomFeatures:
    """Clip features of one video in memory, as FRD-UVAD's windows read them."""

    name = path = "random"

    def __init__(self, clips: int, crops: int, width: int):
        self.parts = [np.random.default_rng(0).normal(size=(clips, crops, width)).astype(np.float16)]
        self.shape = crops, width

    def __len__(self):
        return len(self.parts[0])

    def clips(self, rows):
        return self.parts[0][rows]


def frd_uvad(bench) -> None:
    """Training on I3D's shape, 10 crops of width 2048, in the published batches of 320 windows."""
    from frd_uvad import scoring, train
    from frd_uvad.data import AnomalyBank, Windows

    m = Measure(bench)
    plan = train.make_plan(batch_size=m.size(320, 8))
    crops, width = m.size((10, 2048), (2, 256))
    windows = Windows([RandomFeatures(m.size(9600, 32), crops, width)], plan.cross_clip, m.run)
    sizes = {"feature_size": width, "num_blocks": m.size(8, 2), "heads": train.HEADS}
    net = scoring.build_model(sizes).to(m.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.lr, betas=train.BETAS, fused=True)
    loader, bank = Loader(windows, plan.batch_size, 0, m.run), AnomalyBank(max(1, int(plan.beta * plan.batch_size)))
    labels = torch.zeros(len(windows), device=m.device)

    def epoch(number, meter):
        train.train_one_epoch(net, loader, optimizer, plan, number, m.run, meter, bank, None, labels)

    speed, waited = m.epochs(loader, epoch)
    seconds = EPOCHS_OF_FRD * UCF_CRIME_CLIPS / speed
    note = f"{EPOCHS_OF_FRD} epochs of {UCF_CRIME_CLIPS} clips in {seconds:.0f} s, features on the device"
    aim = EPOCHS_OF_FRD * UCF_CRIME_CLIPS / 60
    m.add("frd_uvad training", speed, "windows/s", waited=waited, aim=round(aim), note=note)
    video = RandomFeatures(m.size(2048, 16), crops, width)
    m.add("frd_uvad scoring", m.rate(lambda: scoring.score_video(net.eval(), video, m.run), len(video)), "clips/s")


def encoders(bench) -> None:
    """Frames in memory to features: CLIP ViT-L/14 and EfficientNet-Lite0, random weights."""
    from common.features.encoders import RANDOM, EncoderSpec
    from common.features.image import ImageEncoder

    m = Measure(bench)
    specs = m.size([("clip", "ViT-L-14", 256), ("timm", "tf_efficientnet_lite0", 256)], [("timm", "test_vit", 4)])
    for kind, name, batch in specs:
        try:
            encoder = ImageEncoder(EncoderSpec(kind, name, RANDOM), m.run)
        except (ImportError, UserError) as e:  # open_clip may be missing: the others are measured all the same
            bench.add(f"{kind}:{name} encoding", "not run", note=first_line(e))
            continue
        frames = np.random.default_rng(0).integers(0, 256, (batch, *encoder.size, 3), np.uint8)
        work = flops_of(lambda encoder=encoder, frames=frames: encoder.encode(frames)) / batch
        speed = m.rate(lambda encoder=encoder, frames=frames: encoder.encode(frames), batch)
        m.add(f"{kind}:{name} encoding", speed, "frames/s", flops=work, aim=3000 if kind == "clip" else None)


def raft(bench) -> None:
    """Flow of frames of Ped2's size, enlarged as by default, random weights."""
    from torchvision.models import get_model

    from common.flow.cache import PAIRS
    from common.flow.raft import video_flow
    from common.flow.sources import flow_scale

    m = Measure(bench)
    batch, size = PAIRS if m.device.type == "cuda" else 1, m.size((240, 360), (48, 64))
    frames = np.random.default_rng(0).integers(0, 256, (4 * batch + 1, *size, 1), np.uint8)
    for name in m.size(("raft-small", "raft-large"), ("raft-small",)):
        scale = m.size(flow_scale(name, 0, *size), 2)
        net = get_model(name.replace("-", "_")).to(m.device, memory_format=torch.channels_last).eval()

        def flows(net=net):
            return sum(1 for _ in video_flow(net, frames, scale=scale, updates=m.size(12, 2), batch=batch, bf16=True))

        m.add(f"{name}, {size[1]}×{size[0]} enlarged {scale:.3g} times", m.rate(flows, len(frames) - 1), "pairs/s")


def svmae(bench) -> None:
    """Pre-training of ViT-B on 16 frames of 224 px, clips from memory."""
    from frd_uvad.svmae import model, pretrain
    from frd_uvad.svmae.clips import Clips, Depth

    m = Measure(bench)
    side, n = m.size(224, 32), m.size(32, 2)
    plan = pretrain.make_plan("folder", batch_size=n, size=side, frames=m.size(16, 4), stride=1)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (m.size(320, 8), side * 8 // 7, side * 8 // 7, 3), np.uint8) for _ in range(4)]
    clips = Clips(arrays, Depth("perspective", arrays, arrays, bench.work, m.device), plan.frames, 1, m.run)
    net = model.SVMAE(**model.PRESETS[m.size("vit_b", "tiny")], frames=plan.frames, size=side).to(m.device)
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(net, 1.0), lr=plan.lr, betas=pretrain.BETAS, fused=True)
    loader = Loader(clips, n, 0, m.run, order=lambda epoch: np.tile(clips.epoch_samples(0, epoch), (m.size(4, 1), 1)))

    def epoch(number, meter):
        pretrain.train_one_epoch(net, loader, optimizer, plan, number, m.run, meter)

    speed, waited = m.epochs(loader, epoch)
    what = f"svmae pre-training, {m.size('vit_b', 'tiny')}"
    m.add(what, speed * net.tokens, "tokens/s", waited=waited, note=f"{speed:.0f} clips/s")


RATES = {
    "sdmae": sdmae,
    "hf2vad": hf2vad,
    "spr_uvad": spr_uvad,
    "scene_aware_ae": scene_aware_ae,
    "frd_uvad": frd_uvad,
    "encoders": encoders,
    "raft": raft,
    "svmae": svmae,
}
