"""Score a camera, a stream or a video file with a network of `sdmae/eval.py --export`, without torch.

python camera.py --video 0 --model sdmae.onnx --out watched        # scores.csv and events.csv as of eval.py --video
"""

import argparse
import contextlib
import csv
import datetime
import json
import queue
import re
import threading
import time
from pathlib import Path

import cv2
import numpy as np
from onnxruntime import InferenceSession, get_available_providers

AHEAD, WINDOW = 3, 0.5  # frames that a score waits for, seconds that it is averaged over
GAP, TAIL = 1.0, 0.9  # seconds without a score above the limit that end an event; quantile where the tail begins
EVENTS = "event start_frame end_frame start_seconds end_seconds peak_frame peak_seconds peak_score".split()
EVENTS += "start_arrival end_arrival peak_arrival".split()


def read(capture, address, shown, live, fps, frames):
    """Put (number, seconds, arrival, frame) into the queue `frames`; numbers leave a gap where frames are lost."""
    lost, began = 0, time.perf_counter()
    for t in range(10**12):
        ok, frame = capture.read()
        while live and not ok:
            print(f"stream {shown} lost; trying again", flush=True), time.sleep(2.0)
            ok, frame = capture.read() if capture.open(address) else (False, None)
            lost += 1
        if not ok:
            return frames.put(None)
        live and frames.full() and frames.get()  # scoring is too slow
        arrival = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        frames.put((t + lost, time.perf_counter() - began, arrival, frame) if live else (t, t / fps, "", frame))


def samples(frames, size):
    """Yield (t, seconds, arrival, frames t-3, t, t+3 at the network's size) once t+3 is there or its segment ended."""
    kept, segment = {}, None  # kept: {frame: (seconds, arrival, picture)}
    t, following = -1, 0

    def sample(n):
        return n, *kept[n][:2], np.stack([kept.get(n + d, kept[n])[2] for d in (-AHEAD, 0, AHEAD)])

    for t, (number, seconds, arrival, frame) in enumerate(iter(frames.get, None)):
        if segment != number - t:  # it grows where frames were lost or dropped
            yield from map(sample, range(following, t))
            following, segment = t, number - t
            kept.clear()
        way = cv2.INTER_AREA if frame.shape[0] > size[0] else cv2.INTER_CUBIC
        kept[t] = seconds, arrival, cv2.resize(frame, size[::-1], interpolation=way)
        if t - following == AHEAD:
            yield sample(following)
            kept.pop(following - AHEAD, None)
            following += 1
    yield from map(sample, range(following, t + 1))


def calibrate(scores, per_hour, fps, width):
    """The smoothed score that normal footage passes `per_hour` times an hour; sdmae/live.py says how."""
    smooth = np.convolve(scores, np.ones(width))[: len(scores)] / np.minimum(np.arange(len(scores)) + 1, width)
    above = np.flatnonzero(smooth > (q := np.quantile(smooth, TAIL)))
    n = max(5, 1 + int((np.diff(above) > max(GAP * fps, 2)).sum()))  # stretches of high scores
    times = max(1.0, (1 - TAIL) * 3600 * fps / width / per_hour)
    return float(q + np.maximum(smooth - q, 0).sum() / max(1, len(above)) * n * (times ** (1 / n) - 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", required=True, help="a camera's number, a stream's address or a file")
    parser.add_argument("--model", required=True, help="written by sdmae/eval.py --export")
    parser.add_argument("--out", type=Path, default=Path("watched"), help="folder of the tables (default: watched)")
    parser.add_argument("--false-alarms-per-hour", type=float, default=1.0, help="sets the limit (default: 1)")
    args = parser.parse_args()
    usable = [x for x in get_available_providers() if not x.startswith(("Tensorrt", "CoreML"))]
    session = InferenceSession(args.model, providers=usable)
    meta = json.loads(session.get_modelmeta().custom_metadata_map.get("sdmae", "null"))
    meta and meta["statistics"] or parser.error(f"--model {args.model} holds no scores of sdmae/eval.py --export")
    shown = re.sub(r"(?i)(?<=://).*@|\w*(user|usr|login|pass|pwd|token|key|auth)\w*=[^&/;]*", "", args.video)
    capture = cv2.VideoCapture(address := int(args.video) if args.video.isdigit() else args.video)
    live = not Path(args.video).exists() and capture.get(cv2.CAP_PROP_FRAME_COUNT) <= 0  # no file behind http
    frames, past = queue.Queue(32), []
    capture.isOpened() or parser.error(f"--video {shown} cannot be opened")
    fps = rate if 0 < (rate := capture.get(cv2.CAP_PROP_FPS)) < 1000 else 25.0
    width = max(1, round(WINDOW * fps))
    limit = calibrate(meta["statistics"]["frame_scores"], args.false_alarms_per_hour, fps, width)
    threading.Thread(target=read, args=(capture, address, shown, live, fps, frames), daemon=True).start()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "scores.csv", "w", newline="") as a, open(args.out / "events.csv", "w", newline="") as b:
        scores, events = csv.writer(a), csv.writer(b)
        count, event = 0, None
        scores.writerow("frame seconds score smoothed event arrival".split()), events.writerow(EVENTS)

        def end(first, last, peak):
            row = [count, first[0], last[0], f"{first[1]:.2f}", f"{last[1]:.2f}", peak[0], f"{peak[1]:.2f}"]
            events.writerow([*row, f"{peak[3]:.6g}", first[2], last[2], peak[2]]), b.flush()
            print(f"event {count}: {first[1]:.1f} to {last[1]:.1f} s, peak {peak[3] / limit:.2f}", flush=True)

        with contextlib.suppress(KeyboardInterrupt):
            for t, seconds, arrival, seen in samples(frames, tuple(meta["size"])):
                score = float(session.run(None, {"frames": seen[None], "numbers": np.array([t], np.int64)})[0].mean())
                past = [x for x in (*past, (seconds, score)) if x[0] > seconds - (width - 0.5) / fps]
                now = t, seconds, arrival, sum(x for _, x in past) / len(past)
                if event and seconds - event[1][1] > (max(GAP, 2 / fps) + 1e-6 if now[3] > limit else GAP - 1e-6):
                    event = end(*event)
                if now[3] > limit:  # first, last and highest moment
                    count += event is None
                    event = [event[0], now, max(event[2], now, key=lambda m: m[3])] if event else [now] * 3
                scores.writerow([t, f"{seconds:.3f}", f"{score:.6g}", f"{now[3]:.6g}", int(bool(event)), arrival])
        event and end(*event)


if __name__ == "__main__":
    main()
