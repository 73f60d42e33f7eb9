"""Batches as the trainings share them that do not use common.loader.Loader yet; goes with the last of them."""


def own_part(n, rank, world):
    """A process's part of a batch of n rows: a slice; all of them where there are fewer rows than processes."""
    return slice(rank, None, world) if n >= world else slice(None)


def parts_of(order, size, start=0, rank=0, world=1):
    """Batches of `size` rows, from number `start` on, as far as they are this process's."""
    parts = [order[i : i + size] for i in range(start * size, len(order), size)]
    return [p[own_part(len(p), rank, world)] for p in parts]
