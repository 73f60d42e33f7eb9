"""One function over many videos in several processes, with one progress bar that counts frames."""

import concurrent.futures as cf
import contextlib
import multiprocessing as mp
import os
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from common.io import NOT_WRITABLE, UserError, first_line

_counter = None  # in a worker: frames done by all workers; in a single process: the bar's update function


def tick(n: int = 1) -> None:
    """Called by a job for every n frames it has finished."""
    if callable(_counter):
        _counter(n)
    elif _counter is not None:
        with _counter.get_lock():
            _counter.value += n


def _start_worker(counter):
    global _counter
    _counter = counter
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "threads;1"
    import cv2

    cv2.setNumThreads(1)  # one process per core already


def _call(function, job):
    """-> (result, None) or (None, why it failed)"""
    try:
        return function(job), None
    except UserError as e:
        return None, str(e)
    except OSError as e:
        if e.errno in NOT_WRITABLE:
            raise
        return None, first_line(e)


def map_videos(
    function: Callable, jobs: Iterable, *, workers: int | None, total: int, label: str, show: bool = True
) -> tuple[list, list]:
    """Call function(job) for every job; both must be picklable; function calls tick() per frame. show: a progress bar.

    A damaged video does not stop the rest. -> (results in order, None where a job failed; [(job index, why), …]).
    Raises UserError if a worker died, OSError if nothing can be written, and what else function raises.
    """
    global _counter
    jobs = list(jobs)
    workers = min(workers or cores(), len(jobs), 61 if os.name == "nt" else len(jobs))  # Windows waits for 61
    is_log = not sys.stderr.isatty()
    interval = 10 if is_log else 0.2
    with tqdm(total=total, desc=label, unit="frame", mininterval=interval, dynamic_ncols=True, disable=not show) as bar:
        if workers > 1:
            outcomes = _call_in_processes(function, jobs, workers, label, bar)
        else:
            _counter = bar.update
            try:
                outcomes = [_call(function, job) for job in jobs]
            finally:
                _counter = None
    return [result for result, _ in outcomes], [(i, why) for i, (_, why) in enumerate(outcomes) if why]


def _call_in_processes(function, jobs, workers, label, bar):
    context = mp.get_context("spawn")  # forking a process that has used OpenCV's or torch's threads can hang
    counter = context.Value("q", 0)
    pool = cf.ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(counter,))
    try:
        futures = [pool.submit(_call, function, job) for job in jobs]
        pending = set(futures)
        while pending:
            done, pending = cf.wait(pending, timeout=0.2, return_when=cf.FIRST_EXCEPTION)
            bar.update(counter.value - bar.n)
            for future in done:
                future.result()  # raises what the job raised
        return [future.result() for future in futures]
    except cf.process.BrokenProcessPool:
        raise UserError(
            f"a worker process died during {label} (killed, or out of memory): "
            "run the same command again, with fewer --workers if memory was short"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Number of processor cores that this process, or its container, may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as file:
        quota, period = file.read().split()  # in microseconds; "max" where there is no limit
        count = min(count, max(1, int(quota) // int(period)))
    return count


def shard_of(videos: list, text: str | None, run) -> set[str]:
    """Keys of the videos of --shard I/N that this rank does: they are shared out among the ranks. Raises UserError."""
    try:
        first, count = (int(x) for x in (text or "0/1").split("/"))
    except ValueError:
        first, count = 0, 0
    if not 0 <= first < count:
        raise UserError(f"--shard {text}: expected I/N with 0 <= I < N")
    return {v.key for v in videos[first + count * run.rank :: count * run.world_size]}
