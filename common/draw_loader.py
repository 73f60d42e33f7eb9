"""Batches for trainings that count steps instead of epochs: scene_aware_ae and svmae."""

from collections.abc import Iterator

import numpy as np

from common.loader import Batch, Loader


class DrawLoader(Loader):
    """Each step draws its samples at random.

    draw(rng) -> int [batch_size]: the samples of one step. An "epoch" is the LOG_STEPS steps between two lines of the
    log. Steps draw from a generator seeded by their number, so a resumed run is identical and all ranks draw the same.
    """

    LOG_STEPS = 100

    def __init__(self, dataset, batch_size, seed, run, draw, iterations):
        super().__init__(dataset, batch_size, seed, run, order=lambda epoch: [])
        self.draw, self.iterations = draw, iterations
        self.samples = self.LOG_STEPS * batch_size

    @property
    def epochs(self) -> int:
        return -(-self.iterations // self.LOG_STEPS)

    def steps(self, epoch: int) -> int:
        return min(self.LOG_STEPS, self.iterations - epoch * self.LOG_STEPS)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        first = epoch * self.LOG_STEPS
        rngs = [np.random.default_rng([self.seed, first + i, 0]) for i in range(start, self.steps(epoch))]
        return self.read_ahead([self.draw(rng) for rng in rngs], rngs)
