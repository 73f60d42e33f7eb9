"""Rates: several ways measured in turn, after one call of each that does not count."""

import statistics
import time

import torch


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(functions, items, device, seconds, rounds=3):
    """Median items per second of several functions, in turn, so that a busy machine slows all of them alike."""
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


def matrix_rate(device, bf16=False, n=2048):
    """FLOP/s of a matrix product here: the rate that networks are measured against."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return rate(lambda: a @ b, 2 * n**3, device, 1.0)


def bandwidth(device, size=2**28):
    """Bytes/s, read and written, of a large copy."""
    a, b = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return rate(lambda: b.copy_(a), 2 * size, device, 1.0)


def rate(function, items, device, seconds):
    return rates([function], items, device, seconds, 1)[0]


def line(name, value, unit, note=""):
    print(f"  {name:<58}{value:>10.1f} {unit:<10} {note}".rstrip(), flush=True)


def where(r):
    """The machine in words."""
    name = (
        f" {torch.cuda.get_device_name(r.device)}"
        if r.device.type == "cuda"
        else f", {torch.get_num_threads()} threads"
    )
    return f"{r.device}{name}, {r.precision}"
