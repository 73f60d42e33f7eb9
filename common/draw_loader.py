"""Batches for trainings that count steps instead of epochs: scene_aware_ae and svmae."""

import numpy as np

from common.loader import Loader


class DrawLoader(Loader):
    """Each step draws its samples at random.

    draw(rng) -> int [batch_size]: the samples of one step. An "epoch" is the LOG_STEPS steps between two lines of the
    log. Steps draw from a generator seeded by their number, so a resumed run is identical and all ranks draw the same.
    """

    LOG_STEPS = 100

    def __init__(self, dataset, batch_size, seed, run, draw, iterations):
        self.iterations, self.epochs = iterations, -(-iterations // self.LOG_STEPS)

        def order(epoch):
            first = epoch * self.LOG_STEPS
            return np.concatenate([draw(np.random.default_rng([seed, first + i, 0])) for i in range(self.steps(epoch))])

        super().__init__(dataset, batch_size, seed, run, order)

    def steps(self, epoch: int) -> int:
        return min(self.LOG_STEPS, self.iterations - epoch * self.LOG_STEPS)
