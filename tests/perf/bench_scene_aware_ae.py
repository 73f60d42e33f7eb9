"""Scene-aware autoencoder: encoding, training and scoring rates, waiting, memory."""

import itertools
import os
import time

import numpy as np
import torch

from common import training
from common.cli import DataSource
from common.draw_loader import DrawLoader
from common.features.encoders import RANDOM
from common.features.prefetch import decode_ahead
from common.io import UserError
from common.pool import cores
from common.readers import datasets
from common.readers.video import Decoder
from scene_aware_ae import preprocess, scoring
from scene_aware_ae.data import Segments
from scene_aware_ae.encoder import EncoderOptions, make_encoder
from scene_aware_ae.train import MODEL, make_plan, train_one_epoch
from tests.perf.rates import line, rate, synchronize, where


def measure_eval(args, seconds, run):
    source, options = DataSource.from_args(args), EncoderOptions.from_args(args)
    data = datasets.find(source.dataset, source.data_root, source.labels)
    encoder = make_encoder(options, data, source.cache, run, measuring=True)
    videos = (data.train or data.test)[:4]
    print(f"\n{encoder.flag} and the scene-aware autoencoder on {where(run)}")
    size = options.batch_size
    batch = np.stack([encoder.preprocess_frame(f) for f in itertools.islice(Decoder(videos[0]), size)])
    only_encoder = rate(lambda: encoder.encode(batch).cpu(), len(batch), run.device, seconds)
    line("only the encoder, the same batch again", only_encoder, "frames/s")
    read = rate(
        lambda: [encoder.preprocess_frame(f) for f, _ in zip(Decoder(videos[0]), range(64))], 64, run.device, seconds
    )
    line("decoding and resizing, one thread", read, "frames/s")
    start, n = time.perf_counter(), 0
    for _, frames in decode_ahead(videos, encoder.preprocess_frame, args.workers or cores()):
        n += sum(map(len, preprocess.encode_in_batches(frames, encoder, size)))
    whole = n / (time.perf_counter() - start)
    line("videos to features", whole, "frames/s", f"{100 * (1 - whole / only_encoder):.0f} % below only the encoder")

    net = scoring.build_model({"input_dim": encoder.width}).eval().to(run.device)
    many, length = np.random.default_rng(0).normal(size=(8192, encoder.width)).astype(np.float16), scoring.LENGTH
    slow = rate(lambda: scoring.score_video(net, many[:64], run, batch_size=1), 64 // length, run.device, seconds)
    fast = rate(lambda: scoring.score_video(net, many, run), len(many) // length, run.device, seconds)
    line("scoring, one segment at a time", slow, "segments/s")
    line("scoring, 512 at a time", fast, "segments/s", f"{fast / slow:.1f}×")
    if not encoder.flag.endswith(f":{RANDOM}"):
        training_rate(preprocess.prepare(source, run, options, data=data, encoder=encoder), run)
    print(f"  peak memory {training.peak_memory():.0f} MiB")


def training_rate(dataset, run):
    try:
        segments = Segments(dataset, run)
    except UserError as e:
        print(f"  no training rate: {e}")
        return
    scenes = len(segments.scenes)
    plan = make_plan(scenes, segments.frames)
    n, steps = plan.segments_per_scene, 10
    net = scoring.build_model({"input_dim": dataset.encoder.width, **MODEL, "num_scenes": max(2, scenes)})
    net.to(run.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=plan.lr, fused=True)
    loader = DrawLoader(segments, scenes * n, 0, run, lambda rng: segments.draw(rng, n), 2 * steps)
    loader.LOG_STEPS, log = steps, training.Log(os.devnull)
    meter = training.EpochMeter(run, "train", 3, log=log, save=lambda: None, print_epochs=False, log_steps=steps)
    for epoch in range(2):  # the first one warms up
        start = time.perf_counter()
        train_one_epoch(net, loader, optimizer, plan, segments.scene_labels(n), epoch, run, meter)
        synchronize(run.device)
        seconds = time.perf_counter() - start
    minutes = plan.iterations * seconds / steps / 60
    line(
        f"training, mode {plan.mode}, {scenes * n} segments a step",
        steps / seconds,
        "steps/s",
        f"waits for data {100 * loader.waited / seconds:.1f} %; {plan.iterations} steps in {minutes:.1f} min",
    )


measure_train = measure_eval
