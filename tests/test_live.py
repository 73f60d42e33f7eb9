"""Live scoring of AED-MAE without a network: events, thresholds, lost streams, and which frames make a sample."""

import csv
import datetime
import functools
import http.server
import queue
import shutil
import subprocess
import threading

import numpy as np
import pytest

from common.readers.container import Clock
from common.readers.video import without_secrets
from sdmae import live
from sdmae.data import INPUT_OFFSETS
from tests.helpers import PATIENCE, save_video, walkers


def test_events_and_threshold(tmp_path):
    said = []
    with open(tmp_path / "e.csv", "w", newline="") as f:
        events = live.Events(1.0, 4.0, f, said.append)
        for t, s in enumerate([0, 2, 3, 0, 0, 2, 0, 0, 0, 0, 0, 5]):
            events.add(live.Moment(t, t / 4, "", s))
        events.end()
    table = list(csv.DictReader(open(tmp_path / "e.csv")))
    assert [(x["start_frame"], x["end_frame"], x["peak_frame"]) for x in table] == [("1", "5", "2"), ("11", "11", "11")]
    assert live.count_events(np.array([0, 2, 3, 0, 0, 2, 0, 0, 0, 0, 0, 5]), 1.0, 4.0) == len(table)
    scores = np.random.default_rng(0).exponential(1.0, 200000)
    level = live.calibrate(scores, 1.0, 25.0, 1)
    assert abs(level - np.log(3600 * 25)) < 0.5  # exponential scores: P(x > level) is once in an hour of frames
    assert live.calibrate(scores, 0.1, 25.0, 1) > level
    assert np.allclose(live.moving_mean([1, 2, 3, 4], 2), [1, 1.5, 2.5, 3.5])
    assert [live.clock(x) for x in (59.94, 59.97, 3599.99)] == ["0:00:59.9", "0:01:00.0", "1:00:00.0"]


@pytest.mark.parametrize("asked", [1.0, 10.0])
def test_a_threshold_from_minutes_keeps_its_promise_for_an_hour(asked):
    """Exponential scores, one a second: the rate at which new ones pass the level, over many calibrations."""
    rng = np.random.default_rng(0)
    levels = [live.calibrate(rng.exponential(1.0, 200), asked, 1.0, 1) for _ in range(3000)]
    assert asked / 1.5 < 3600 * np.exp(-np.array(levels)).mean() < asked * 1.5
    assert live.calibrate(np.ones(9), asked, 1.0, 1) == 1.0


def test_camera_finds_the_same_threshold():
    pytest.importorskip("onnxruntime")
    from sdmae import camera

    rng = np.random.default_rng(0)
    for scores in (rng.gamma(2.0, 1.0, 300), np.ones(50), [1.0]):
        levels = [m.calibrate(scores, 1.0, 10.0, 5) for m in (live, camera)]
        assert abs(levels[0] - levels[1]) < 1e-9


class FakeCapture:
    """A camera of ten frames at a time that is lost twice."""

    opened = 0

    def __init__(self, address):
        FakeCapture.opened += 1
        self.left, self.ok = 10, FakeCapture.opened != 2  # the first attempt to reconnect fails

    def isOpened(self):
        return self.ok

    def get(self, key):
        return 25.0

    def read(self):
        self.left -= 1
        return (True, np.full((32, 64, 3), FakeCapture.opened, np.uint8)) if self.left >= 0 else (False, None)

    def release(self):
        pass


def test_a_lost_stream_is_opened_again(monkeypatch):
    FakeCapture.opened, said = 0, []
    monkeypatch.setattr(live.cv2, "VideoCapture", FakeCapture)
    stream, stop = live.Stream("rtsp://user:secret@x/y", 0.01, said.append), threading.Event()
    got, came = [], []
    for segment, seconds, arrival, frame in stream.frames(stop):
        got.append((segment, int(frame[0, 0, 0])))
        came.append((seconds, datetime.datetime.fromisoformat(arrival)))
        if len(got) == 25:
            stop.set()
    assert sum("lost" in x for x in said) >= 2 and sum("back" in x for x in said) >= 2
    assert came == sorted(came) and came[0][0] == 0 and all(arrival.tzinfo for _, arrival in came)
    assert stream.name == "x/y" and not any("secret" in x or "user" in x for x in said)
    assert [s for s, v in got if v == 1] == [0] * 10 and all(s > 0 for s, v in got if v > 1)


class Burst:
    """A camera of 50 frames filled with their number; those from the tenth on come when `go` is set."""

    def __init__(self):
        self.go, self.over = threading.Event(), threading.Event()
        self.count = 0

    def get(self, key):
        return 25.0

    def read(self):
        if self.count == 10:
            self.go.wait()
        if self.count == 50:
            self.over.set()
            threading.Event().wait(PATIENCE)
        self.count += 1
        return True, np.full((4, 8, 3), self.count - 1, np.uint8)


@pytest.mark.parametrize("taken", [4, 5])
def test_dropped_frames_tear_no_neighbours_apart(taken):
    """32 frames wait: those between the first that were taken and frame 18 are dropped."""
    stream = live.Stream("rtsp://x/y", 0.01, lambda _: None, capture=Burst())
    window, got = live.Window((4, 8)), []
    for i, (segment, *details, frame) in enumerate(stream.frames(threading.Event()), 1):
        got += window.add(segment, frame, *details)
        if i == taken:
            stream.capture.go.set()
            stream.capture.over.wait(PATIENCE)
        if i == taken + 32:
            break
    check_neighbours([seen for _, seen, _ in got + window.flush()], taken)
    assert stream.dropped == 18 - taken


def test_the_script_tears_no_neighbours_apart():
    pytest.importorskip("onnxruntime")
    from sdmae import camera

    burst, frames = Burst(), queue.Queue(32)
    threading.Thread(target=camera.read, args=(burst, "x", "x", True, 25.0, frames), daemon=True).start()
    samples = camera.samples(frames, (4, 8))
    got = [next(samples)]  # which takes four frames
    burst.go.set()
    burst.over.wait(PATIENCE)
    threading.Thread(target=frames.put, args=(None,), daemon=True).start()
    check_neighbours([seen for *_, seen in got + list(samples)], 4)


def check_neighbours(samples, taken):
    numbers = [*range(taken), *range(18, 50)]
    for t, seen in zip(numbers, samples, strict=True):
        first, last = (0, taken - 1) if t < taken else (18, 49)
        assert seen[:, 0, 0, 0].tolist() == [t + d if first <= t + d <= last else t for d in INPUT_OFFSETS]


def test_no_neighbours_across_a_gap():
    window, got = live.Window((4, 8)), []
    window, got = live.Window((4, 8)), []
    for t in range(5):
        got += window.add(0, np.full((4, 8, 3), t, np.uint8))
    for t in range(5, 14):
        got += window.add(1, np.full((4, 8, 3), t, np.uint8))
        assert len(window.waiting) <= 7
    got += window.flush()
    assert [t for t, _, _ in got] == list(range(14))
    for t, seen, (frame,) in got:
        first, last = (0, 4) if t < 5 else (5, 13)
        assert (
            seen[:, 0, 0, 0].tolist() == [t + d if first <= t + d <= last else t for d in INPUT_OFFSETS]
            and frame[0, 0, 0] == t
        )


def test_an_event_ends_at_a_gap_and_says_when_it_came(tmp_path):
    with open(tmp_path / "e.csv", "w", newline="") as f:
        events = live.Events(1.0, 25.0, f, lambda _: None)
        for t in range(20):
            seconds = t / 25 + (30 if t >= 10 else 0)  # the camera was away for half a minute
            events.add(live.Moment(t, seconds, f"at {t}", 2.0 + (t == 13)))
        events.end()
    first, second = csv.DictReader(open(tmp_path / "e.csv"))
    assert (first["start_frame"], first["end_frame"], first["end_arrival"]) == ("0", "9", "at 9")
    assert (second["start_frame"], second["start_seconds"], second["peak_arrival"]) == ("10", "30.40", "at 13")


def test_a_window_is_seconds_and_at_an_even_rate_frames():
    scores, even = np.random.default_rng(0).random(100), live.PastMean(0.5, Clock(25.0))
    assert (
        np.allclose([even.add(t / 25, s) for t, s in enumerate(scores)], live.moving_mean(scores, 12))
        and even.rate == 25
    )
    times = np.r_[np.arange(20.0), 20 + np.arange(80) / 25]  # one frame a second, then 25
    uneven = live.PastMean(0.5, Clock(99 / times[-1], times))
    means = [uneven.add(x, s) for x, s in zip(times, scores)]
    assert np.allclose(means[:20], scores[:20]) and np.isclose(means[60], scores[48:61].mean()) and uneven.width == 13
    assert 24 < uneven.rate / uneven.width * times[-1] < 30  # means that share no frame: 20, and 2 a second


@pytest.mark.parametrize("name", ["a.avi", "a.ts"])
def test_a_file_behind_http_is_a_recording(tmp_path, name):
    save_video(tmp_path / "a.avi", walkers(40))
    if name == "a.ts":  # which says nothing of its length
        if not shutil.which("ffmpeg"):
            pytest.skip("ffmpeg, which makes the video, is not on this machine")
        subprocess.run(
            ["ffmpeg", "-v", "error", "-r", "25", "-i", tmp_path / "a.avi", "-c:v", "mpeg2video", tmp_path / name],
            check=True,
        )

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = live.source_of(f"http://user:secret@127.0.0.1:{server.server_port}/{name}", 1.0)
        got = list(source.frames(threading.Event()))
    finally:
        server.shutdown()
    assert not source.live and len(got) == 40 and got[10][1] == pytest.approx(1.0 if name == "a.avi" else 0.4)
    assert "secret" not in source.name


def test_no_user_and_no_password():
    hidden = {
        "rtsp://admin:p@ss/w@10.0.0.1:554/live": "rtsp://10.0.0.1:554/live",
        "rtsp://10.0.0.1/live": "rtsp://10.0.0.1/live",
        "http://cam/v?user=joe&password=xyz&channel=1": "http://cam/v?user=…&password=…&channel=1",
    }
    for address, shown in hidden.items():
        assert without_secrets(address) == shown
