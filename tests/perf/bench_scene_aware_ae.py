"""Scene-aware autoencoder: encoding, training and scoring rates, waiting, memory."""

import itertools
import time

import numpy as np

from common import datasets
from common import old_training as training
from common.features.clip import RANDOM
from common.features.prefetch import VideoPrefetcher
from common.io import UserError
from common.pool import cores
from common.video import Decoder
from scene_aware_ae import preprocess, scoring
from scene_aware_ae.encoder import STAND_IN
from scene_aware_ae.model import SceneAwareAE
from scene_aware_ae.train import ITERATIONS, LR, PER_SCENE, Segments, Trainer
from tests.perf.rates import line, rate, where


def measure_eval(args, seconds, r):
    data = datasets.find(args.dataset, args.data_root, args.labels)
    encoder = preprocess.encoder_of(args, data, r, measuring=True)
    videos = (data.train or data.test)[:4]
    print(f"\n{encoder.name} and the scene-aware autoencoder on {where(r)}")
    batch = np.stack([encoder.preprocess_frame(f) for f in itertools.islice(Decoder(videos[0]), args.encode_batch)])
    alone = rate(lambda: encoder.encode(batch).cpu(), len(batch), r.device, seconds)
    line("the encoder alone, the same batch again", alone, "frames/s")
    read = rate(
        lambda: [encoder.preprocess_frame(f) for f, _ in zip(Decoder(videos[0]), range(64))], 64, r.device, seconds
    )
    line("decoding and resizing, one thread", read, "frames/s")
    began, n = time.perf_counter(), 0
    for _, one in VideoPrefetcher(videos, encoder.preprocess_frame, args.workers or cores()):
        for part in preprocess.Features._encoded(one, encoder, args.encode_batch, _Count()):
            n += len(part)
    whole = n / (time.perf_counter() - began)
    line("videos to features", whole, "frames/s", f"{100 * (1 - whole / alone):.0f} % below the encoder alone")

    net = SceneAwareAE(input_dim=encoder.width).eval().to(r.device)
    many = np.random.default_rng(0).normal(size=(8192, encoder.width)).astype(np.float16)
    one = rate(lambda: scoring.score_features(net, many[:64], r, batch_size=1), 64 // scoring.LENGTH, r.device, seconds)
    fast = rate(lambda: scoring.score_features(net, many, r), len(many) // scoring.LENGTH, r.device, seconds)
    line("scoring, one segment at a time", one, "segments/s")
    line("scoring, 512 at a time", fast, "segments/s", f"{fast / one:.1f}×")
    if args.pretrained != RANDOM or encoder.name == STAND_IN:
        training_rate(preprocess.prepare(args, r, data=data, encoder=encoder), encoder, seconds, r)
    print(f"  peak memory {training.peak_memory():.0f} MiB")


def training_rate(ready, encoder, seconds, r):
    try:
        segments = Segments(ready, r, PER_SCENE)
    except UserError as e:
        print(f"  no training rate: {e}")
        return
    mode = int(len(segments.scenes) > 1)
    model_args = dict(input_dim=encoder.width, num_scenes=max(2, len(segments.scenes)))
    trainer = Trainer({"mode": mode, "lr": LR, "seed": 0}, model_args, segments, r, None, {})
    trainer.net.train()
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    steps = rate(lambda: trainer.one(rng), 1, r.device, 2 * seconds)
    share = 100 * trainer.waited / (time.perf_counter() - began)
    line(
        f"training, mode {mode}, {len(segments.labels)} segments a step",
        steps,
        "steps/s",
        f"waits for data {share:.1f} %; {ITERATIONS} steps in {ITERATIONS / steps / 60:.1f} min",
    )


class _Count:
    def update(self, n):
        pass


measure_train = measure_eval
