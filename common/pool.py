"""One function over many videos in several processes, with one progress bar that counts frames."""

import concurrent.futures as cf
import errno
import multiprocessing as mp
import os
import sys

from tqdm import tqdm

from common.io import UserError, first_line

_counter = None  # in a worker: frames done by all workers; in a single process: the bar's update function


def tick(n=1):
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
    try:
        return function(job), None
    except UserError as e:
        return None, str(e)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise
        return None, first_line(e)


def map_videos(function, jobs, *, workers, total, label, unit="frame", show=True):
    """[function(job) for job in jobs], in order, None where a job raised a UserError.

    function and jobs must be picklable; function calls tick() per frame. A damaged video does not stop the rest:
    returns (results, [(job index, message), …]). A full disk does, and so does a fault of ours. show: the bar.
    """
    global _counter
    jobs = list(jobs)
    workers = min(workers, len(jobs))
    rare = not sys.stderr.isatty() and not os.environ.get("VAD_PROGRESS")
    bar = tqdm(
        total=total, desc=label, unit=unit, mininterval=10 if rare else 0.2, dynamic_ncols=True, disable=not show
    )
    outcomes = []
    with bar:
        if workers <= 1:
            _counter = bar.update
            try:
                outcomes = [_call(function, job) for job in jobs]
            finally:
                _counter = None
        else:
            context = mp.get_context("spawn")  # forking a process that has used OpenCV's or torch's threads can hang
            counter = context.Value("q", 0)
            pool = cf.ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(counter,))
            try:
                futures = [pool.submit(_call, function, job) for job in jobs]
                pending, shown = set(futures), 0
                while pending:
                    done, pending = cf.wait(pending, timeout=0.2, return_when=cf.FIRST_EXCEPTION)
                    now = counter.value
                    bar.update(now - shown)
                    shown = now
                    for f in done:
                        f.result()
                outcomes = [f.result() for f in futures]
            except cf.process.BrokenProcessPool:
                raise UserError(
                    f"a worker process died during {label} (killed, or out of memory): "
                    "run the same command again, with fewer --workers if memory was short"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    return [r for r, _ in outcomes], [(i, e) for i, (_, e) in enumerate(outcomes) if e]


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_videos(files, videos, build, args, r, among=None):
    """Let every process build its share of `videos`, or a job of an array (--shard) its own.

    files: common.cache.VideoFiles that build(videos, workers, show) fills -> (…, {video key: why} of those that failed); among: the list
    whose order says whose a video is, where `videos` are what is left of it (jobs of an array do not see the same left).
    -> (videos that are there, {video key: why} of all that failed).
    """
    sharded = getattr(args, "shard", None)
    first, step = shard_of(sharded, r)
    mine = {v.key for v in (among or videos)[first::step]}
    _, failed = build([v for v in videos if v.key in mine], args.workers or max(1, cores() // r.world_size), r.is_main)
    videos, failed = files.collect(videos, failed, sharded, r)
    return [v for v in videos if v.key not in failed], failed


def add_shard_flag(group, scoring=False):
    group.add_argument(
        "--shard",
        default=None,
        metavar="I/N",
        help="only every N-th video, from number I (array jobs)"
        + ("; the same command without it then shows the results" if scoring else ""),
    )


def shard_of(text, r):
    """--shard I/N, shared out once more among torchrun's processes -> (first, step) of this one's share of the videos."""
    try:
        first, count = (int(x) for x in (text or "0/1").split("/"))
    except ValueError:
        first, count = 0, 0
    if not 0 <= first < count:
        raise UserError(f"--shard {text}: expected I/N with 0 <= I < N")
    return first + count * r.rank, count * r.world_size
