"""The page that people look at: what it holds, how large it gets, and that it works in a browser, where there is
one."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from common.readers.container import Clock
from common.report import page as report
from common.report import plots
from common.report.page import key_frames, write
from tests.helpers import walkers

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
PROBE = """<script>addEventListener("load", () => {
  const out = {rows: document.querySelectorAll("#videos tbody tr").length, opened: performance.now()};
  const line = document.getElementById("timeline");
  const names = () => [...document.querySelectorAll("#videos tbody tr")].map(r => r.cells[0].textContent);
  document.querySelectorAll("#videos tbody tr")[0].click();
  const box = line.getBoundingClientRect();
  out.hover = [0, 0.5, 1].map(x => {
    line.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + x * box.width, bubbles: true}));
    return [document.getElementById("readout").textContent, document.getElementById("shot").title];
  });
  const heads = document.querySelectorAll("#videos th");
  heads[2].click(); out.byAuc = names(); heads[2].click(); out.byAucUp = names();
  heads[0].click(); out.byName = names();
  const slider = document.getElementById("threshold");
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  out.events = [...document.querySelectorAll("#events tbody tr")].map(r => [...r.cells].map(c => c.textContent));
  out.link = document.querySelector("#events a") && document.querySelector("#events a").getAttribute("href");
  out.errors = window.errors;
  const pre = document.createElement("pre"); pre.id = "probe";
  pre.textContent = JSON.stringify(out); document.body.appendChild(pre);
});</script></body>"""


def content(path):
    found = re.search(
        r'<script id="data" type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.S
    )
    return json.loads(found.group(1))


def in_browser(path):
    """What the probe saw in a headless browser."""
    page = path.read_text(encoding="utf-8")
    page = page.replace("<head>", "<head><script>window.errors = []; onerror = m => window.errors.push(m);</script>", 1)
    probe = path.with_name("probe.html")
    probe.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1300,1000",
            "--dump-dom",
            f"file://{probe}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


def small(path, name="b </script>", overlays=True):
    """Two videos, one of them with a hostile name and a frame left out."""
    scores = {"a": np.linspace(0, 1, 21), name: np.r_[np.zeros(10), np.full(11, 0.25)]}
    smoothed = {k: s.copy() for k, s in scores.items()}
    smoothed[name][0] = np.nan
    labels = {"a": (np.arange(21) >= 10).astype(np.uint8), name: (np.arange(21) < 5).astype(np.uint8)}
    boxes = {k: np.array([[0, 5, 5, 40, 40, 0.1], [20, 5, 5, 40, 40, 9.0]], np.float32) for k in scores}
    write(
        path,
        "method on <data>",
        scores,
        smoothed,
        facts=["two <videos>"],
        notes=[("warn", "a & b")],
        labels=labels,
        columns={"method": {"micro_auc": 0.75}, "baseline": {}},
        rows=[("micro_auc", "micro AUC"), ("ap", "AP")],
        curves={"method": smoothed},
        auc_per_video={"a": 1.0, name: 0.25},
        detections=boxes,
        pictures=lambda _: (walkers(21), Clock(10.0)),
        overlays={k: "overlay/x.mp4" for k in scores} if overlays else None,
    )
    return path


def test_an_overlay_of_any_frame_rate(tmp_path):
    for i, fps in enumerate((66.6667, 89.973, 0.001, 0, 25)):
        writer = plots.open_mp4(tmp_path / f"{i}.mp4", "a.mp4", fps, (64, 48))
        writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.release()


def test_what_a_page_holds(tmp_path):
    data = content(small(tmp_path / "report.html"))
    assert data["measures"] == [["micro AUC", [0.75, None]]] and data["notes"] == [["warn", "a & b"]]
    a, b = data["videos"]
    assert a["truth"] == [[10, 21]] and a["peak"] == 20 and b["score"][0] is None and b["name"] == "b </script>"
    assert [t for t, _ in a["shots"]] == list(range(21))
    # by hand over all pairs of frames that count
    y = np.r_[np.arange(21) >= 10, np.arange(1, 21) < 5]
    s = np.r_[np.linspace(0, 1, 21), np.zeros(9), np.full(11, 0.25)]
    pairs = (s[y][:, None] > s[~y]).mean() + (s[y][:, None] == s[~y]).mean() / 2
    assert data["roc"][0]["area"] == pytest.approx(pairs)
    everything = sorted(x for v in data["videos"] for x in v["score"] if x is not None)
    assert sum(x >= data["threshold"] for x in everything) == 3  # 5 % of 41 frames, rounded up
    text = (tmp_path / "report.html").read_text()
    assert (
        "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        and "https://" not in text
        and 'src="' not in text
    )


def test_curves_equal_scikit_learn(tmp_path):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    labels, scores = {"v": rng.integers(0, 2, 5000)}, {"v": rng.normal(size=5000)}
    (roc,), (pr,) = report.area_curves({"m": scores}, labels)
    assert roc["area"] == pytest.approx(roc_auc_score(labels["v"], scores["v"])) and len(roc["points"]) <= 200
    assert roc["points"][0] == [0, 0] and roc["points"][-1] == [1, 1] and pr["points"][-1][0] == 1


def test_key_frames_keep_the_peak_and_the_limit():
    frames = walkers(100)

    def boxes(t):
        return np.array([[t, 5, 5, 40, 40, 0.1]], np.float32)

    everything = key_frames(frames, 100, 38, boxes, (0, 1), 1e9)
    assert len(everything) == 61 and 38 in [t for t, _ in everything]
    assert everything == key_frames(iter(frames), 100, 38, boxes, (0, 1), 1e9)
    size = sum(len(p) for _, p in everything)
    few = key_frames(frames, 100, 38, boxes, (0, 1), size / 4)
    assert 38 in [t for t, _ in few] and sum(len(p) for _, p in few) <= size / 4 * 1.2


def test_unlabelled_and_empty(tmp_path):
    write(tmp_path / "r.html", "t", {"a": np.zeros(3), "b": np.zeros(0)}, {"a": np.full(3, np.nan), "b": np.zeros(0)})
    data = content(tmp_path / "r.html")
    assert (
        data["measures"] == []
        and data["roc"] == []
        and data["videos"][0]["truth"] is None
        and data["videos"][1]["shots"] == []
    )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_page_in_a_browser(tmp_path):
    saw = in_browser(small(tmp_path / "report.html"))
    assert saw["errors"] == [] and saw["rows"] == 2
    assert [x[0] for x in saw["hover"]] == [
        "frame 0 (0.00 s) · score 0 · raw 0 · labelled normal",
        "frame 10 (1.00 s) · score 0.5 · raw 0.5 · labelled abnormal",
        "frame 20 (2.00 s) · score 1 · raw 1 · labelled abnormal",
    ]
    assert [x[1] for x in saw["hover"]] == ["frame 0", "frame 10", "frame 20"]
    assert (
        saw["byAuc"] == ["a", "b </script>"]
        and saw["byAucUp"] == ["b </script>", "a"]
        and saw["byName"] == ["a", "b </script>"]
    )
    assert (
        saw["events"] == [["1", "0 (0.00 s)", "20 (2.00 s)", "20 (2.00 s)", "1", "video"]]
        and saw["link"] == "overlay/x.mp4#t=0.00"
    )
    write(tmp_path / "r.html", "t", {"a": np.zeros(3), "b": np.zeros(0)}, {"a": np.full(3, np.nan), "b": np.zeros(0)})
    saw = in_browser(tmp_path / "r.html")
    assert saw["errors"] == [] and saw["rows"] == 2


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_hundred_videos_open_quickly_and_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (8, 180, 240, 3), dtype=np.uint8)  # worse than any video to compress
    scores = {f"v{i:03d}": rng.random(1000) for i in range(100)}
    labels = {k: (np.arange(1000) % 300 > 200).astype(np.uint8) for k in scores}
    write(
        tmp_path / "r.html",
        "t",
        scores,
        scores,
        labels=labels,
        curves={"m": scores},
        auc_per_video={k: 0.5 for k in scores},
        pictures=lambda name: ((noise[t % 8] for t in range(1000)), Clock(25.0)),
    )
    assert (tmp_path / "r.html").stat().st_size < 20e6
    saw = in_browser(tmp_path / "r.html")
    assert saw["errors"] == [] and saw["rows"] == 100 and saw["opened"] < 2000, saw["opened"]
