"""Score frames as they arrive: a file, a folder of frames, a camera or a network stream; memory stays bounded.

Frame t is scored when t+3 is there. Scores are smoothed over the past alone; an event begins where they pass a threshold that
normal training frames pass a stated number of times per hour, and ends a second after the last frame above it.
"""

import array
import base64
import collections
import contextlib
import csv
import datetime
import http.client
import math
import queue
import signal
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from common import old_training as training
from common.container import Clock, claimed_frames, open_capture, rate_of
from common.evaluation import report_folder
from common.io import UserError, atomic_write, safe_filename, writable_folder
from common.late import torch
from common.pictures import as_channels, resize
from common.video import Decoder, decoded, open_video, print_warnings, without_secrets
from sdmae import scoring
from sdmae.frames import SEEN

AHEAD = SEEN[-1]  # frames that a score waits for
TAIL = 0.95  # scores above this quantile of the training scores are taken for an exponential tail
HISTORY = 300  # scores that the overlay's curve shows
KEPT = 10**6  # frames that the report at the end shows, and whose latency is counted
GAP = 1.0  # seconds without a score above the threshold, or without a frame, after which an event has ended


def add_live_flags(parser):
    g = parser.add_argument_group("--video")
    g.add_argument(
        "--false-alarms-per-hour",
        type=float,
        default=1.0,
        metavar="N",
        help="events per hour that normal footage may cause; sets the threshold (default: %(default)s)",
    )
    g.add_argument("--threshold", type=float, default=None, help="smoothed score from which an event begins, instead")
    g.add_argument(
        "--window", type=float, default=0.5, help="past seconds that a score is averaged over (default: %(default)s)"
    )
    g.add_argument(
        "--fps", type=float, default=None, help="frames per second where the source does not say (default: 25)"
    )
    g.add_argument(
        "--reconnect",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="wait between attempts to find a lost stream again (default: %(default)s)",
    )
    g.add_argument("--max-seconds", type=float, default=None, help="stop after this much footage (default: never)")


# ------------------------------------------------------------------------------------------------------------ sources


class Recorded:
    """A video file, a folder of frames or a recording at an address: every frame, as fast as it can be scored.

    fps: where the source does not say (None: 25), or instead of what it says.
    """

    live, dropped = False, 0

    def __init__(self, path, fps=None):
        self.video = open_video(path)
        self.name, self.clock = self.video.name, Clock(fps) if fps else self.video.clock()
        if not self.clock.fps:
            self.clock = Clock(25.0)

    def frames(self, stop):
        """Yield (segment number, seconds, time of arrival, frame uint8 [H, W, C]) until the event `stop` is set."""
        decoder = Decoder(self.video)
        for t, frame in enumerate(decoder):
            if stop.is_set():
                return
            yield 0, self.clock.seconds(t), "", frame
        print_warnings(self.video, decoder.warnings)


class Stream:
    """A camera's number or a stream's address.

    A thread reads; when scoring is too slow the oldest waiting frames are dropped, and when the stream is lost it is opened
    again. After a gap a new segment begins: its frames have no neighbours before it. A frame's seconds are those since the first one
    came, gaps included. User and password of the address are shown nowhere.
    """

    live = True

    def __init__(self, address, reconnect, say=print, fps=None, capture=None):
        self.address, self.shown, self.wait, self.say = address, without_secrets(address), reconnect, say
        self.name, self.dropped = f"camera{address}" if address.isdigit() else self.shown.split("://")[-1], 0
        self.capture = capture or self.open()
        if self.capture is None:
            raise UserError(
                f"--video {self.shown}: this camera or stream cannot be opened; is it on, and the address right?"
            )
        self.clock = Clock(fps or rate_of(self.capture) or 25.0)
        self.waiting, self.stopped = queue.Queue(maxsize=32), threading.Event()

    def open(self):
        if not self.address.isdigit():
            return open_capture(self.address)
        capture = cv2.VideoCapture(int(self.address))
        return capture if capture.isOpened() else None

    def read(self):
        segment, first = 0, None
        while not self.stopped.is_set():
            ok, frame = self.capture.read() if self.capture is not None else (False, None)
            if ok:
                now, arrival = (
                    time.perf_counter(),
                    datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
                )
                first = now if first is None else first
                if self.waiting.full():
                    try:
                        self.waiting.get_nowait()
                        self.dropped += 1
                        segment += 1  # what follows is no neighbour of what went before
                    except queue.Empty:
                        pass
                self.waiting.put((segment, now - first, arrival, frame))
                continue
            if self.capture is not None:
                self.capture.release()
                self.say(f"stream {self.shown} lost; trying again every {self.wait:g} s (Ctrl-C ends)")
            segment += 1
            self.stopped.wait(self.wait)
            self.capture = self.open()
            if self.capture is not None:
                self.say(f"stream {self.shown} is back")
        if self.capture is not None:
            self.capture.release()

    def frames(self, stop):
        thread = threading.Thread(target=self.read, daemon=True)
        thread.start()
        try:
            while not stop.is_set():
                try:
                    yield self.waiting.get(timeout=0.5)
                except queue.Empty:
                    continue
        finally:
            self.stopped.set()
            thread.join(timeout=5)


def has_length(address):
    """Whether a web server says how long what it serves is, which it does of a file in a format without a duration (.ts, .h264)."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return False
    request = urllib.request.Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), method="HEAD")
    if parts.username:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(secret.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.headers.get("Content-Length") or 0) > 0
    except (OSError, ValueError, http.client.HTTPException):  # a camera may know no HEAD
        return False


def source_of(video, reconnect, fps=None):
    """What --video names. An address with an end, such as a file behind http, is a recording."""
    if str(video).isdigit() and not Path(video).exists():
        return Stream(str(video), reconnect, fps=fps)
    if "://" in str(video):
        capture = open_capture(video)
        if capture is None or not (claimed_frames(capture) or has_length(str(video))):
            return Stream(
                str(video), reconnect, fps=fps, capture=capture
            )  # as it is open: some cameras serve one reader alone
    return Recorded(video, fps)


# ---------------------------------------------------------------------------------------------------------- threshold


def moving_mean(x, width):
    """Mean over the last `width` values, over fewer at the start. [T] -> [T]"""
    total = np.cumsum(np.concatenate([[0.0], np.asarray(x, np.float64)]))
    end = np.arange(1, len(x) + 1)
    start = np.maximum(0, end - width)
    return (total[end] - total[start]) / (end - start)


def calibrate(scores, per_hour, fps, width):
    """The smoothed score that normal footage passes `per_hour` times an hour.

    scores: of normal frames in order. Their hours are too few to count rare events, so the part above the TAIL quantile is taken
    for exponential: P(score > x) = (1 - TAIL) · exp(-(x - q) / mean excess); there are 3600 · fps / width independent scores in
    an hour.
    """
    smooth = moving_mean(scores, width)
    q = np.quantile(smooth, TAIL)
    above = smooth[smooth > q]
    excess = float((above - q).mean()) if len(above) else 0.0
    return float(q + excess * max(0.0, math.log((1 - TAIL) * 3600 * fps / width / per_hour)))


class PastMean:
    """Mean of the scores of the last `window` seconds; at the even rate of a Clock, of the nearest whole number of frames."""

    def __init__(self, window, clock):
        self.width = max(1, round(window * clock.fps))
        self.span = window if clock.times is not None else (self.width - 0.5) / clock.fps
        self.rate, self.past = clock.fps, collections.deque()
        if clock.times is not None:  # as many means an hour that share no frame, and the usual number of frames in one
            inside = np.arange(len(clock.times)) - np.searchsorted(clock.times, clock.times - window, "right") + 1
            self.width = max(1, round(float(np.median(inside))))
            self.rate = self.width * float((1 / inside).sum()) / clock.times[-1]

    def add(self, seconds, score):
        self.past.append((seconds, score))
        while self.past[0][0] <= seconds - self.span:
            self.past.popleft()
        return sum(s for _, s in self.past) / len(self.past)


@dataclass
class Moment:
    """A scored frame: its number, seconds from the start, the clock's time when it arrived ("" of a recording), its smoothed score."""

    frame: int
    seconds: float
    arrival: str
    score: float


class Events:
    """Runs of scores above a threshold, joined over gaps of less than a second; printed and written as they end."""

    def __init__(self, threshold, fps, file, say):
        self.threshold, self.say, self.table, self.file = threshold, say, csv.writer(file), file
        self.longest = max(GAP, 2 / fps)  # seconds between two frames; after more of them something was missed
        self.first, self.last, self.peak, self.count = None, None, None, 0
        self.table.writerow(
            [
                "event",
                "start_frame",
                "end_frame",
                "start_seconds",
                "end_seconds",
                "peak_frame",
                "peak_seconds",
                "peak_score",
                "start_arrival",
                "end_arrival",
                "peak_arrival",
            ]
        )

    def add(self, now):
        """The next Moment."""
        gap = now.seconds - self.last.seconds if self.first is not None else 0.0
        if gap > (self.longest + 1e-6 if now.score > self.threshold else GAP - 1e-6):
            self.end()
        if now.score <= self.threshold:
            return
        if self.first is None:
            self.count += 1
            self.first = self.peak = now
            self.say(f"event {self.count} begins at {when(now)} (frame {now.frame})")
        self.last = now
        if now.score > self.peak.score:
            self.peak = now

    def end(self):
        if self.first is None:
            return
        first, last, peak = self.first, self.last, self.peak
        self.table.writerow(
            [
                self.count,
                first.frame,
                last.frame,
                f"{first.seconds:.2f}",
                f"{last.seconds:.2f}",
                peak.frame,
                f"{peak.seconds:.2f}",
                f"{peak.score:.6g}",
                first.arrival,
                last.arrival,
                peak.arrival,
            ]
        )
        self.file.flush()
        self.say(
            f"event {self.count}: {when(first)} to {when(last)}, peak {peak.score / self.threshold:.2f} × threshold at {when(peak)} "
            f"(frame {peak.frame})"
        )
        self.first = None


def when(moment):
    return clock(moment.seconds) + (f", {moment.arrival}" if moment.arrival else "")


def clock(seconds):
    return f"{int(seconds) // 3600:d}:{int(seconds) // 60 % 60:02d}:{seconds % 60:04.1f}"


# ------------------------------------------------------------------------------------------------------------ watching


class Window:
    """Turns arriving frames into samples: small frames t-3, t, t+3 once the last is there, or its segment has ended."""

    def __init__(self, size):
        self.size, self.channels = size, None  # grey or colour as the first frame is
        self.kept, self.segment, self.number = collections.deque(), None, 0  # [(t, small, what is known of the frame)]
        self.next = 0  # t of the next sample

    def small(self, frame):
        self.channels = self.channels or frame.shape[2]
        return as_channels(resize(frame, self.size), self.channels)

    def add(self, segment, frame, *known):
        """-> samples [(t, seen [3, H, W, C], (frame, *known))] that are complete now."""
        done = self.flush() if segment != self.segment else []
        self.segment = segment
        self.kept.append((self.number, self.small(frame), (frame, *known)))
        self.number += 1
        if self.next <= self.number - 1 - AHEAD:
            done.append(self.sample())
        return done

    def sample(self):
        by_number, t = {n: (s, f) for n, s, f in self.kept}, self.next
        own, frame = by_number[t]
        seen = np.stack([by_number.get(t + d, (own, None))[0] for d in SEEN])
        self.next += 1
        while self.kept and self.kept[0][0] < self.next - AHEAD:
            self.kept.popleft()
        return t, seen, frame

    def flush(self):
        """The rest of a segment, whose last frames miss their successors."""
        done = [self.sample() for _ in range(self.number - self.next)]
        self.kept.clear()
        return done


def token_errors(scorer, samples):
    """Samples of a Window -> the rule's error of every token, float32 [n, rows, columns]."""
    seen = torch.from_numpy(np.stack([x for _, x, _ in samples])).to(scorer.run.device).permute(0, 1, 4, 2, 3)
    errors = scoring.picked(scorer.errors(seen, [t for t, _, _ in samples]), scorer.rule)
    return errors.view(-1, *scorer.grid).float().cpu().numpy()


class Overlay:
    """An mp4 written frame by frame: heat map over the picture, the last scores under it."""

    def __init__(self, path, tmp, fps, threshold, map_range, plots):
        self.path, self.tmp, self.fps, self.plots = path, tmp, fps, plots
        self.threshold, self.map_range = threshold, map_range
        self.writer, self.scores = None, collections.deque(maxlen=HISTORY)

    def add(self, now, frame, errors):
        if self.writer is None:
            h, w = frame.shape[:2]
            scale = min(2.0, max(480 / w, min(1.0, 960 / w)))
            self.size = round(w * scale) // 2 * 2, round(h * scale) // 2 * 2
            self.strip = max(60, self.size[1] // 4) // 2 * 2
            self.writer = self.plots.open_mp4(self.tmp, self.path, self.fps, (self.size[0], self.size[1] + self.strip))
        self.scores.append(now.score)
        image = cv2.resize(as_channels(frame, 3), self.size)
        image = self.plots.blend_map(image, errors, self.map_range)
        if now.score > self.threshold:
            cv2.rectangle(image, (0, 0), (self.size[0] - 1, self.size[1] - 1), (61, 69, 214), 4)
        text = f"{clock(now.seconds)} {now.arrival[:19]}  {now.score / self.threshold:.2f} x threshold"
        cv2.putText(image, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
        below = np.full((self.strip, self.size[0], 3), 250, np.uint8)
        level = lambda s: self.strip - 4 - (self.strip - 8) * np.clip(np.asarray(s) / (2 * self.threshold), 0, 1)
        y = int(level(self.threshold))
        cv2.line(below, (0, y), (self.size[0], y), (61, 69, 214), 1)
        x = np.linspace(0, self.size[0] - 1, HISTORY)[: len(self.scores)]
        points = np.stack([x, level(list(self.scores))], axis=1).round().astype(np.int32)
        cv2.polylines(below, [points.reshape(-1, 1, 2)], False, (168, 95, 31), 2, cv2.LINE_AA)
        self.writer.write(np.vstack([image, below]))

    def close(self):
        if self.writer is not None:
            self.writer.release()


def watch(args, model, r):
    """Score args.video until it ends or Ctrl-C: scores.csv, events.csv, overlay.mp4, curve.png."""
    if args.false_alarms_per_hour <= 0:
        raise UserError("--false-alarms-per-hour must be above 0")
    if args.threshold is not None and args.threshold <= 0:
        raise UserError("--threshold must be above 0")
    stats = model.statistics(args, r)
    if stats is None and args.threshold is None:
        raise UserError(
            f"{args.checkpoint} has no scores of normal frames to set a threshold by: give --threshold, or "
            "--dataset and --data-root of its training videos"
        )
    source = source_of(args.video, args.reconnect, args.fps)
    out = writable_folder((args.out or Path(args.checkpoint).parent / "video") / safe_filename(source.name))
    stop = threading.Event()
    frames = source.frames(stop)
    with stopping(stop):
        _watch(args, model, r, source, frames, stop, stats, out)


@contextlib.contextmanager
def stopping(stop):
    """Ctrl-C sets the event `stop`, so that no batch is left half scored; a second one ends at once."""

    def once(*_):
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _watch(args, model, r, source, frames, stop, stats, out):
    first = next(frames, None)
    if first is None:
        raise UserError(f"--video {without_secrets(args.video)} has no frames")
    fps, mean = source.clock.fps, PastMean(args.window, source.clock)
    threshold = args.threshold
    if threshold is None:
        threshold = calibrate(stats["frame_scores"], args.false_alarms_per_hour, mean.rate, mean.width)
    tokens = stats["token_quantiles"][str(scoring.QUANTILE)] if stats else None
    source_height, source_width = first[-1].shape[:2]
    why = (
        "(--threshold)"
        if args.threshold
        else (f"(about {args.false_alarms_per_hour:g} false alarms per hour on footage like the training videos)")
    )
    uneven = "" if source.clock.times is None else " in the mean (uneven)"
    print(
        f"{source.name}: {source_width}×{source_height} at {fps:g} frames/s{uneven}, scored at {model.size[1]}×{model.size[0]}; an event "
        f"begins at {threshold:.4g} {why}",
        flush=True,
    )
    window, batch, size = Window(model.size), [], 1 if source.live else 16
    raw, smoothed, latency, times = array.array("f"), array.array("f"), array.array("f"), array.array("d")
    began, done = time.perf_counter(), 0
    report = report_folder()
    with (
        atomic_write(out / "scores.csv") as s,
        atomic_write(out / "events.csv") as e,
        atomic_write(out / "overlay.mp4") if report else contextlib.nullcontext() as video,
        open(s, "w", newline="") as sf,
        open(e, "w", newline="") as ef,
    ):
        table, events = csv.writer(sf), Events(threshold, fps, ef, lambda x: print(x, flush=True))
        table.writerow(["frame", "seconds", "score", "smoothed", "event", "arrival"])
        map_range = (tokens / 2, 2 * tokens) if tokens else (0, 4 * threshold)
        overlay = Overlay(out / "overlay.mp4", video, fps, threshold, map_range, report.plots) if report else None

        def score():
            maps = token_errors(model.scorer, batch)
            for (t, _, (frame, seconds, arrival)), m in zip(batch, maps):
                own = float(m.mean())
                moment = Moment(t, seconds, arrival, mean.add(seconds, own))
                events.add(moment)
                table.writerow(
                    [t, f"{seconds:.3f}", f"{own:.6g}", f"{moment.score:.6g}", int(events.first is not None), arrival]
                )
                if overlay:
                    overlay.add(moment, frame, m)
                if len(raw) < KEPT:
                    raw.append(own)
                    smoothed.append(moment.score)
                    times.append(seconds)
            count, now = len(batch), time.perf_counter()
            if len(latency) < KEPT:
                latency.extend(now - came for came in arrived)
            batch.clear()
            arrived.clear()
            return count

        arriving, reported, arrived = first, time.perf_counter(), []
        while arriving is not None:
            came, waiting = time.perf_counter(), len(batch)
            segment, seconds, arrival, frame = arriving
            batch += window.add(segment, frame, seconds, arrival)
            arrived += [came] * (len(batch) - waiting)
            if len(batch) >= size:
                done += score()
            if args.max_seconds and seconds + 1 / fps >= args.max_seconds - 1e-6:
                break
            if time.perf_counter() - reported > 10:
                reported = time.perf_counter()
                print(
                    f"  {clock(seconds)} scored, {done / (reported - began):.0f} frames/s"
                    + (f", {source.dropped} frames dropped" if source.dropped else ""),
                    flush=True,
                )
            arriving = next(frames, None)
        stopped = "stopped by Ctrl-C; " if stop.is_set() else ""
        frames.close()
        batch += window.flush()
        arrived.clear()  # the last frames wait for nobody
        while batch:
            rest, batch[:] = batch[size:], batch[:size]
            done += score()
            batch += rest
        events.end()
        if overlay:
            overlay.close()
    seconds = time.perf_counter() - began
    if raw and report:
        raw, smooth = np.array(raw), np.array(smoothed)
        report.plots.curve(raw, smooth, None, f"AED-MAE · {source.name}", out / "curve.png", threshold)
        name, own_clock = source.name, Clock(fps, np.array(times)) if source.live else source.clock
        shown = lambda _: (None, own_clock) if source.live else (decoded(source.video)[0], own_clock)
        report.ranking.write_ranking({name: smooth}, out, pictures=shown)
        report.page.write(
            out / "report.html",
            f"AED-MAE on {name}",
            {name: raw},
            {name: smooth},
            threshold=threshold,
            pictures=shown,
            facts=[f"mean of {args.window:g} s", f"event from {threshold:.4g} on {why}"],
            overlays={name: "overlay.mp4"},
        )
    print(
        f"{stopped}{done} frames in {seconds:.1f} s ({done / seconds:.0f} frames/s with overlay), {events.count} events"
        + (f", {source.dropped} frames dropped" if source.dropped else "")
        + f", peak memory {training.peak_memory():.0f} MiB"
    )
    if latency:
        waits = np.percentile(latency, (50, 95, 99)) * 1000
        print(
            "latency, from the third frame after it to a frame's score and picture: half {:.0f}, 95 % {:.0f}, 99 % {:.0f} ms".format(
                *waits
            )
            + (f" ({size} frames of a file are scored at once)" if size > 1 else "")
        )
    print(
        f"wrote {out}/scores.csv, events.csv"
        + (
            ", report.html, overlay.mp4, curve.png"
            if report
            else "; there is no common/report here, which would write a page, a plot and an overlay"
        )
    )
