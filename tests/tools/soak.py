"""Live scoring of a video that begins again and again, at full speed: memory must stay flat, and no event may be lost.

Not part of the suite:

    python tests/tools/soak.py --video my.mp4 --checkpoint runs/sdmae/folder/sdmae.pt --minutes 60
"""

import argparse
import csv
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.distributed import Run
from common.io import UserError, run_script
from sdmae import eval as evaluation
from sdmae import live

PAGE = os.sysconf("SC_PAGE_SIZE")


class Looped(live.Recorded):
    """A recorded video whose last frame is followed by its first, a new segment each time; at an even rate."""

    ended = threading.Event()

    def frames(self, stop):
        segment = t = 0
        try:
            while not stop.is_set():
                for *_, arrival, frame in super().frames(stop):
                    yield segment, t / self.clock.fps, arrival, frame
                    t += 1
                segment += 1
        finally:
            self.ended.set()  # what follows is the report, drawn once


def resident():
    """Memory that this process holds now, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def observe(seen, every):
    began = time.perf_counter()
    while True:
        seen.append((time.perf_counter() - began, resident()))
        print(f"  {seen[-1][0]:6.0f} s: {seen[-1][1]:.0f} MiB", flush=True)
        if Looped.ended.wait(every):
            return


def expected_events(scores, threshold, gap):
    """Runs of scores above the threshold, joined over gaps of less than `gap` frames: [(first, last)], counted anew."""
    above, out = [t for t, s in enumerate(scores) if s > threshold], []
    for t in above:
        if out and t - out[-1][1] < gap + 1:
            out[-1][1] = t
        else:
            out.append([t, t])
    return [tuple(x) for x in out]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="of footage; allocators settle in the first few (default: %(default)s)",
    )
    parser.add_argument("--threshold", type=float, default=None)
    parser.add_argument("--precision", default="auto")
    own = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--video", own.video, "--checkpoint", own.checkpoint, "--out", folder, "--precision", own.precision]
        flags += ["--threshold", str(own.threshold)] if own.threshold else []
        args = evaluation.parse([*flags, "--max-seconds", str(own.minutes * 60)])
        args.checkpoint = Path(args.checkpoint)
        thresholds = []

        class Noted(live.Events):
            def __init__(self, threshold, *more):
                thresholds.append(threshold)
                super().__init__(threshold, *more)

        live.source_of, live.Events = (lambda video, reconnect, fps: Looped(video, fps)), Noted
        loaded, seen = evaluation.load(args.checkpoint, "folder", Run(args.device, args.precision)), []
        threading.Thread(target=observe, args=(seen, 30), daemon=True).start()
        options = live.LiveOptions(threshold=args.threshold, max_seconds=args.max_seconds)
        live.watch(args.video, loaded, options, out=folder, checkpoint=args.checkpoint)
        table = list(csv.DictReader(open(next(Path(folder).glob("*/scores.csv")))))
        events = list(csv.DictReader(open(next(Path(folder).glob("*/events.csv")))))
    check(table, events, thresholds[0], seen)


def check(table, events, threshold, seen):
    if [int(x["frame"]) for x in table] != list(range(len(table))):
        raise UserError("scores.csv lacks frames")
    fps = (len(table) - 1) / float(table[-1]["seconds"])
    found = [(int(e["start_frame"]), int(e["end_frame"])) for e in events]
    expected = expected_events([float(x["smoothed"]) for x in table], threshold, max(1, round(fps)))
    begin = seen[len(seen) // 4][1]
    growth = (seen[-1][1] - begin) / begin
    lost, wrong = set(expected) - set(found), set(found) - set(expected)
    print(
        f"{len(table)} frames, {len(found)} events above {threshold:.4g}, {len(lost)} lost, {len(wrong)} wrong; "
        f"resident memory from {begin:.0f} MiB after a quarter of the time to {seen[-1][1]:.0f} MiB at the end "
        f"({100 * growth:+.1f} %)"
    )
    if found != expected or growth > 0.02:
        raise UserError("an event was lost, or memory grew by more than 2 %")


if __name__ == "__main__":
    run_script(main)
