"""Score frames as they arrive: a file, a folder of frames, a camera or a network stream; memory stays bounded.

Frame t is scored when t+3 is there. Scores are smoothed over past frames only; an event begins where they pass a
threshold that normal training frames pass a stated number of times per hour, and ends a second after the last frame
above it.
"""

import array
import base64
import collections
import contextlib
import csv
import datetime
import http.client
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

from common import training
from common.io import UserError, atomic_write, optional_module, safe_filename, writable_folder
from common.readers.container import Clock, claimed_frames, frame_rate, open_capture
from common.readers.pictures import as_channels, resize
from common.readers.video import Decoder, frames_and_clock, open_video, print_warnings, without_secrets
from sdmae import scoring
from sdmae.data import INPUT_OFFSETS

AHEAD = INPUT_OFFSETS[-1]  # frames that a score waits for
TAIL = 0.9  # scores above this quantile of the training scores are taken for an exponential tail
FEW = 5  # stretches of high scores that a tail is known from at least
HISTORY = 300  # scores that the overlay's curve shows
REPORTED = 10**6  # frames that the report at the end shows, and whose latency is counted
GAP = 1.0  # seconds without a score above the threshold, or without a frame, after which an event has ended


@dataclass
class LiveOptions:
    """How a video or camera is watched; fps and threshold may be None."""

    false_alarms_per_hour: float = 1.0  # sets the threshold
    threshold: float | None = None  # smoothed score from which an event begins, instead
    window: float = 0.5  # past seconds that a score is averaged over
    fps: float | None = None  # instead of what the source says (None: that, else 25)
    reconnect: float = 2.0  # seconds between attempts to open a lost stream again
    max_seconds: float | None = None  # stop after this much footage


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

    A thread reads; when scoring is too slow the oldest waiting frames are dropped, and when the stream is lost it is
    opened again. After a gap a new segment begins: its frames have no neighbours before it. A frame's seconds are those
    since the first one came, gaps included. User and password of the address are shown nowhere.
    """

    live = True

    def __init__(self, address, reconnect, log=print, fps=None, capture=None):
        self.address, self.shown = address, without_secrets(address)
        self.wait, self.log = reconnect, log
        self.name, self.dropped = f"camera{address}" if address.isdigit() else self.shown.split("://")[-1], 0
        self.capture = capture or self.open()
        if self.capture is None:
            raise UserError(
                f"--video {self.shown}: this camera or stream cannot be opened; is it on, and the address right?"
            )
        self.clock = Clock(fps or frame_rate(self.capture) or 25.0)
        self.waiting, self.stopped = queue.Queue(maxsize=32), threading.Event()

    def open(self):
        if not self.address.isdigit():
            return open_capture(self.address)
        capture = cv2.VideoCapture(int(self.address))
        return capture if capture.isOpened() else None

    def read(self):
        number, first = 0, None  # number: of the next frame; one is left out where the stream was lost
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
                    except queue.Empty:
                        pass
                self.waiting.put((number, now - first, arrival, frame))
                number += 1
                continue
            if self.capture is not None:
                self.capture.release()
                self.log(f"stream {self.shown} lost; trying again every {self.wait:g} s (Ctrl-C ends)")
            number += 1
            self.stopped.wait(self.wait)
            self.capture = self.open()
            if self.capture is not None:
                self.log(f"stream {self.shown} is back")
        if self.capture is not None:
            self.capture.release()

    def frames(self, stop):
        thread = threading.Thread(target=self.read, daemon=True)
        thread.start()
        taken = 0
        try:
            while not stop.is_set():
                try:
                    number, *rest = self.waiting.get(timeout=0.5)
                except queue.Empty:
                    continue
                yield number - taken, *rest  # grows where frames were lost or dropped
                taken += 1
        finally:
            self.stopped.set()
            thread.join(timeout=5)


def has_length(address):
    """Whether a web server says how long what it serves is, which it does of a file in a format without a duration
    (.ts, .h264)."""
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
            )  # as it is open: some cameras serve only one reader
    return Recorded(video, fps)


# ---------------------------------------------------------------------------------------------------------- threshold


def moving_mean(x, width):
    """Mean over the last `width` values, over fewer at the start. [T] -> [T]"""
    total = np.cumsum(np.concatenate([[0.0], np.asarray(x, np.float64)]))
    end = np.arange(1, len(x) + 1)
    start = np.maximum(0, end - width)
    return (total[end] - total[start]) / (end - start)


def count_events(smooth, level, fps):
    """How many events Events makes of smoothed scores [T] at an even rate."""
    above = np.flatnonzero(smooth > level)
    return 1 + int((np.diff(above) > max(GAP * fps, 2)).sum()) if len(above) else 0


def calibrate(scores, per_hour, fps, width):
    """The smoothed score that normal footage passes `per_hour` times an hour.

    scores: of normal frames in order. Their hours are too few to count rare events, so the part above the TAIL quantile
    q is taken for exponential; there are 3600 · fps / width independent scores in an hour. The tail's mean excess m is
    known from n stretches of high scores only, which leaves P(score > x) = (1 - TAIL) · (1 + (x - q) / (n · m))^-n: the
    predictive distribution of an exponential score, nearly exponential itself where n is large. n counts as at least
    FEW, as fewer stretches say nothing of a tail.
    """
    smooth = moving_mean(scores, width)
    q = np.quantile(smooth, TAIL)
    above = smooth[smooth > q]
    if not len(above):
        return float(q)
    stretches = max(FEW, count_events(smooth, q, fps))
    times = max(1.0, (1 - TAIL) * 3600 * fps / width / per_hour)
    return float(q + (above - q).mean() * stretches * (times ** (1 / stretches) - 1))


class PastMean:
    """Mean of the scores of the last `window` seconds; at the even rate of a Clock, of the nearest whole number of
    frames."""

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
    """A scored frame: its number, seconds from the start, the clock's time when it arrived ("" of a recording), its
    smoothed score."""

    frame: int
    seconds: float
    arrival: str
    score: float


class Events:
    """Runs of scores above a threshold, joined over gaps of less than a second; printed and written as they end."""

    def __init__(self, threshold, fps, file, log):
        self.threshold, self.log = threshold, log
        self.table, self.file = csv.writer(file), file
        self.longest = max(GAP, 2 / fps)  # seconds between two frames; after more of them something was missed
        self.first, self.last = None, None
        self.peak, self.count = None, 0
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
            self.log(f"event {self.count} begins at {when(now)} (frame {now.frame})")
        self.last = now
        if now.score > self.peak.score:
            self.peak = now

    def end(self):
        if self.first is None:
            return
        first, last = self.first, self.last
        peak = self.peak
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
        self.log(
            f"event {self.count}: {when(first)} to {when(last)}, peak {peak.score / self.threshold:.2f} × threshold at "
            f"{when(peak)} (frame {peak.frame})"
        )
        self.first = None


def when(moment):
    return clock(moment.seconds) + (f", {moment.arrival}" if moment.arrival else "")


def clock(seconds):
    tenths = round(10 * seconds)
    return f"{tenths // 36000:d}:{tenths // 600 % 60:02d}:{tenths % 600 / 10:04.1f}"


# ------------------------------------------------------------------------------------------------------------ watching


class Window:
    """Turns arriving frames into samples: small frames t-3, t, t+3 once the last is there, or its segment has ended."""

    def __init__(self, size):
        self.size, self.channels = size, None  # grey or colour as the first frame is
        self.waiting, self.segment = collections.deque(), None  # [(t, small frame, (frame, *details))]
        self.number = 0
        self.next = 0  # t of the next sample

    def small(self, frame):
        self.channels = self.channels or frame.shape[2]
        return as_channels(resize(frame, self.size), self.channels)

    def add(self, segment, frame, *details):
        """-> samples [(t, seen [3, H, W, C], (frame, *details))] that are complete now."""
        done = self.flush() if segment != self.segment else []
        self.segment = segment
        self.waiting.append((self.number, self.small(frame), (frame, *details)))
        self.number += 1
        if self.next <= self.number - 1 - AHEAD:
            done.append(self.sample())
        return done

    def sample(self):
        by_number, t = {n: (s, f) for n, s, f in self.waiting}, self.next
        small, frame = by_number[t]
        seen = np.stack([by_number.get(t + d, (small, None))[0] for d in INPUT_OFFSETS])
        self.next += 1
        while self.waiting and self.waiting[0][0] < self.next - AHEAD:
            self.waiting.popleft()
        return t, seen, frame

    def flush(self):
        """The rest of a segment, whose last frames miss their successors."""
        done = [self.sample() for _ in range(self.number - self.next)]
        self.waiting.clear()
        return done


def token_errors(scorer, samples):
    """Samples of a Window -> the configured error of every token, float32 [n, rows, columns]."""
    return scorer.token_errors(np.stack([x for _, x, _ in samples]), [t for t, _, _ in samples])


class Overlay:
    """An mp4 written frame by frame: heat map over the picture, the last scores under it."""

    def __init__(self, path, tmp, fps, threshold, map_range, plots):
        self.path, self.tmp = path, tmp
        self.fps, self.plots = fps, plots
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
        y = int(self.level(self.threshold))
        cv2.line(below, (0, y), (self.size[0], y), (61, 69, 214), 1)
        x = np.linspace(0, self.size[0] - 1, HISTORY)[: len(self.scores)]
        points = np.stack([x, self.level(list(self.scores))], axis=1).round().astype(np.int32)
        cv2.polylines(below, [points.reshape(-1, 1, 2)], False, (168, 95, 31), 2, cv2.LINE_AA)
        self.writer.write(np.vstack([image, below]))

    def level(self, scores):
        """Where scores stand in the strip under the picture: rows, from the top."""
        return self.strip - 4 - (self.strip - 8) * np.clip(np.asarray(scores) / (2 * self.threshold), 0, 1)

    def close(self):
        if self.writer is not None:
            self.writer.release()


def watch(address, loaded, options: LiveOptions, *, out, checkpoint, training_frames=None) -> None:
    """Score a video or camera until it ends, Ctrl-C or SIGTERM.

    Writes scores.csv, events.csv, overlay.mp4, curve.png and report.html.
    loaded: sdmae.eval.Loaded; out: the folder in which one of the video's name is made.
    """
    stats = loaded.statistics(training_frames)
    if stats is None and options.threshold is None:
        raise UserError(
            f"{checkpoint} has no scores of normal frames to set a threshold by: give --threshold, or --dataset and "
            "--data-root of its training videos"
        )
    source = source_of(address, options.reconnect, options.fps)
    out = writable_folder(Path(out) / safe_filename(source.name))
    stop = threading.Event()
    frames = source.frames(stop)
    with stopping(stop):
        first = next(frames, None)
        if first is None:
            raise UserError(f"--video {without_secrets(address)} has no frames")
        Watcher(loaded, options, source, stats, out).run(first, frames, stop)


@contextlib.contextmanager
def stopping(stop):
    """Ctrl-C and SIGTERM set the event `stop`, so that no batch is left half scored; a second one ends at once."""

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def once(*_):
        stop.set()
        restore()

    before = {number: signal.signal(number, once) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


class Watcher:
    """Scores the frames of a source in small batches, and writes tables, events and the overlay as it goes."""

    def __init__(self, loaded, options, source, stats, out):
        self.loaded, self.options = loaded, options
        self.source, self.out = source, out
        self.mean = PastMean(options.window, source.clock)
        self.threshold, self.why = options.threshold, "(--threshold)"
        if self.threshold is None:
            per_hour = options.false_alarms_per_hour
            self.threshold = calibrate(stats["frame_scores"], per_hour, self.mean.rate, self.mean.width)
            self.why = f"(about {per_hour:g} false alarms per hour on footage like the training videos)"
        tokens = stats["token_quantiles"][str(scoring.QUANTILE)] if stats else None
        self.map_range = (tokens / 2, 2 * tokens) if tokens else (0, 4 * self.threshold)
        self.window = Window(loaded.size)
        self.batch_size = 1 if source.live else 16  # frames of a file are scored 16 at a time
        self.batch, self.arrived = [], []  # samples that wait, and when the frames that completed them came
        self.raw, self.smoothed = array.array("f"), array.array("f")
        self.latency, self.times = array.array("f"), array.array("d")
        self.done, self.seconds = 0, 0.0
        self.report = optional_module("common.report")

    def run(self, first, frames, stop):
        height, width = first[-1].shape[:2]
        fps, (h, w) = self.source.clock.fps, self.loaded.size
        uneven = "" if self.source.clock.times is None else " in the mean (uneven)"
        print(
            f"{self.source.name}: {width}×{height} at {fps:g} frames/s{uneven}, scored at {w}×{h}; an event begins at "
            f"{self.threshold:.4g} {self.why}",
            flush=True,
        )
        began = time.perf_counter()
        with contextlib.ExitStack() as files:
            self.table = csv.writer(self.open_table(files, "scores.csv"))
            self.table.writerow(["frame", "seconds", "score", "smoothed", "event", "arrival"])
            self.events = Events(self.threshold, fps, self.open_table(files, "events.csv"), print_now)
            self.overlay = None
            if self.report:
                video = files.enter_context(atomic_write(self.out / "overlay.mp4"))
                path, plots = self.out / "overlay.mp4", self.report.plots
                self.overlay = Overlay(path, video, fps, self.threshold, self.map_range, plots)
            self.read(first, frames)
            frames.close()
            self.batch += self.window.flush()
            self.arrived.clear()  # no latency for the last frames: they did not wait for later ones
            self.score_batches(least=1)
            self.events.end()
            if self.overlay:
                self.overlay.close()
        self.seconds = time.perf_counter() - began
        if self.raw and self.report:
            self.write_report()
        self.print_summary("stopped; " if stop.is_set() else "")

    def open_table(self, files, name):
        """Written line by line under its own name: a watch that is killed keeps what it has seen."""
        text = dict(newline="", encoding="utf-8", errors="backslashreplace")
        return files.enter_context(open(self.out / name, "w", buffering=1, **text))

    def read(self, arriving, frames):
        """Take frames until the source ends or --max-seconds are over."""
        began = reported = time.perf_counter()
        limit = self.options.max_seconds
        while arriving is not None:
            came, waiting = time.perf_counter(), len(self.batch)
            segment, seconds, arrival, frame = arriving
            self.batch += self.window.add(segment, frame, seconds, arrival)
            self.arrived += [came] * (len(self.batch) - waiting)
            self.score_batches(least=self.batch_size)
            if limit and seconds + 1 / self.source.clock.fps >= limit - 1e-6:
                break
            if time.perf_counter() - reported > 10:
                reported = time.perf_counter()
                rate = self.done / (reported - began)
                print_now(f"  {clock(seconds)} scored, {rate:.0f} frames/s{self.dropped_frames()}")
            arriving = next(frames, None)

    def score_batches(self, least):
        """Score waiting samples as long as there are at least so many."""
        while len(self.batch) >= least:
            samples, self.batch = self.batch[: self.batch_size], self.batch[self.batch_size :]
            maps = token_errors(self.loaded.scorer, samples)
            for (t, _, (frame, seconds, arrival)), errors in zip(samples, maps):
                self.add_score(t, frame, seconds, arrival, errors)
            now = time.perf_counter()
            if len(self.latency) < REPORTED:
                self.latency.extend(now - came for came in self.arrived[: len(samples)])
            self.arrived = self.arrived[len(samples) :]
            self.done += len(samples)

    def add_score(self, t, frame, seconds, arrival, errors):
        score = float(errors.mean())
        moment = Moment(t, seconds, arrival, self.mean.add(seconds, score))
        self.events.add(moment)
        inside = int(self.events.first is not None)
        self.table.writerow([t, f"{seconds:.3f}", f"{score:.6g}", f"{moment.score:.6g}", inside, arrival])
        if self.overlay:
            self.overlay.add(moment, frame, errors)
        if len(self.raw) < REPORTED:
            self.raw.append(score)
            self.smoothed.append(moment.score)
            self.times.append(seconds)

    def dropped_frames(self):
        return f", {self.source.dropped} frames dropped" if self.source.dropped else ""

    def write_report(self):
        raw, smoothed = np.array(self.raw), np.array(self.smoothed)
        source = self.source
        name, report = source.name, self.report
        own_clock = Clock(source.clock.fps, np.array(self.times)) if source.live else source.clock

        def pictures(_):
            return (None if source.live else frames_and_clock(source.video)[0]), own_clock

        report.plots.curve(raw, smoothed, None, f"AED-MAE · {name}", self.out / "curve.png", self.threshold)
        report.ranking.write_ranking({name: smoothed}, self.out, pictures=pictures)
        report.page.write(
            self.out / "report.html",
            f"AED-MAE on {name}",
            {name: raw},
            {name: smoothed},
            threshold=self.threshold,
            pictures=pictures,
            facts=[f"mean of {self.options.window:g} s", f"event from {self.threshold:.4g} on {self.why}"],
            overlays={name: "overlay.mp4"},
        )

    def print_summary(self, stopped):
        rate = self.done / self.seconds
        print(
            f"{stopped}{self.done} frames in {self.seconds:.1f} s ({rate:.0f} frames/s with overlay), "
            f"{self.events.count} events{self.dropped_frames()}, peak memory {training.peak_memory():.0f} MiB"
        )
        if self.latency:
            half, most, nearly_all = np.percentile(self.latency, (50, 95, 99)) * 1000
            together = f" ({self.batch_size} frames of a file are scored at once)" if self.batch_size > 1 else ""
            print(
                "latency, from the third frame after it to a frame's score and picture: "
                f"half {half:.0f}, 95 % {most:.0f}, 99 % {nearly_all:.0f} ms{together}"
            )
        pictures = ", report.html, overlay.mp4, curve.png"
        missing = "; there is no common/report here, which would write a page, a plot and an overlay"
        print(f"wrote {self.out}/scores.csv, events.csv{pictures if self.report else missing}")


def print_now(text):
    print(text, flush=True)
