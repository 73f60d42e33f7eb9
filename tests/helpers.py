"""Small videos and runs of the real scripts, shared by the tests."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from common.video import FrameCache, open_video

ROOT = Path(__file__).resolve().parents[1]


def walkers(frames=24, size=(64, 96), speed=2, seed=0, channels=3):
    """uint8 [T, H, W, C]: textured blocks that move over a fixed background."""
    rng = np.random.default_rng(seed)
    h, w = size
    back = cv2.GaussianBlur(rng.integers(60, 120, (h, w, channels), dtype=np.uint8), (5, 5), 0).reshape(h, w, channels)
    block = rng.integers(120, 255, (24, 14, channels), dtype=np.uint8)
    out = np.repeat(back[None], frames, 0)
    for t in range(frames):
        x = (5 + speed * t) % (w - 16)
        out[t, 20:44, x:x + 14] = block
    return out


def save_frames(folder, frames, suffix=".png", digits=3):
    folder.mkdir(parents=True)
    for t, f in enumerate(frames):
        ok, data = cv2.imencode(suffix, f)
        assert ok
        (folder / f"{t:0{digits}d}{suffix}").write_bytes(data.tobytes())
    return folder


def save_video(path, frames, fps=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, frames.shape[2:0:-1])
    assert writer.isOpened()
    for f in frames:
        writer.write(f)
    writer.release()
    return path


def cached(tmp_path, *videos, size=(32, 64)):
    """Videos written as frames and decoded again at one size: [uint8 [T, H, W, C] memory map]."""
    cache, out = FrameCache(tmp_path / "frames", size), []
    for i, x in enumerate(videos):
        out.append(open_video(save_frames(tmp_path / "source" / f"v{i}", x)))
    cache.build(out, 1)
    return [cache.frames(v) for v in out]


def tiny_folder(root, train=2, test=2, frames=24):
    """A `folder` dataset with labels: in test videos the block jumps to another speed in the second half."""
    for i in range(train):
        save_frames(root / "train" / f"a{i}", walkers(frames, seed=i))
    for i in range(test):
        x = walkers(frames, seed=10 + i)
        x[frames // 2:] = walkers(frames, speed=6, seed=10 + i)[frames // 2:]
        save_frames(root / "test" / f"b{i}", x)
        (root / "labels").mkdir(exist_ok=True)
        np.save(root / "labels" / f"b{i}.npy", (np.arange(frames) >= frames // 2).astype(np.uint8))
    return root


def script(path, *args, cwd=None, check=True, env=None, threads=1, timeout=600, **kwargs):
    """Run a script of the repository as a user does. -> CompletedProcess with text output."""
    done = subprocess.run([sys.executable, str(ROOT / path), *map(str, args)], cwd=cwd or ROOT, text=True,
                          capture_output=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads), **(env or {})}, **kwargs)
    if check and done.returncode != 0:
        raise AssertionError(f"{path} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def torchrun(path, *args, processes=2):
    """The script under torchrun: it ends well, and one process alone speaks. -> its standard output."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                           str(ROOT / path), *map(str, args)], text=True, capture_output=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert done.stdout.count("next:") == 1, done.stdout
    return done.stdout


def trained_by_two(method, checkpoint, small, where, tmp_path):
    """Train under torchrun with two processes, and score its checkpoint again with one: both score alike. -> what the run said"""
    said = torchrun(f"{method}/train.py", *small, *where, "--out", tmp_path / "run")
    assert "micro AUC" in said
    script(f"{method}/eval.py", *where, "--checkpoint", tmp_path / "run" / checkpoint, "--out", tmp_path / "one")
    same_scores(tmp_path / "run" / "strict" / "scores.npz", tmp_path / "one" / "strict" / "scores.npz")
    return said


def same_losses(script_name, flags, where):
    """One process and two log the same losses of the same batches, to 1e-4, batch norms and dropout being at rest."""
    logs = []
    for processes in (1, 2):
        out = where / str(processes)
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                        str(ROOT / "tests" / "still.py"), str(ROOT / script_name), *map(str, flags), "--out", str(out)],
                       text=True, capture_output=True, timeout=400, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    compared = 0
    assert len(logs[0]) == len(logs[1]) > 0
    for one, two in zip(*logs):
        for k in one:
            if k in ("total", "loss", "teacher", "student", "rtfm") or k.startswith("loss_"):
                assert abs(one[k] - two[k]) <= 1e-4 * abs(one[k]), (k, one, two)
                compared += 1
    assert compared >= 2


def scored_by_shards(script_name, flags, scores, tmp_path):
    """Two jobs of an array score at once, then the same command shows the results without scoring again: the scores of one job."""
    out = tmp_path / "shards"
    with ThreadPoolExecutor(2) as pool:
        said = [x.stdout for x in pool.map(lambda i: script(script_name, *flags, "--out", out, "--shard", f"{i}/2"), (0, 1))]
    assert all("without --shard" in x and "micro AUC" not in x for x in said), said
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("scored-*/**/*.npz")}
    assert len(kept) == len(np.load(scores).files) and not list(out.rglob("*.part*"))
    assert "micro AUC" in script(script_name, *flags, "--out", out).stdout
    assert kept == {p: p.stat().st_mtime_ns for p in out.rglob("scored-*/**/*.npz")}
    same_scores(scores, out / "strict" / "scores.npz")


def same_scores(a, b):
    """Two scores.npz agree to what another order of summation changes."""
    a, b = (np.load(x) for x in (a, b))
    assert set(a) == set(b)
    for k in a:
        assert np.abs(a[k] - b[k]).max() < 1e-3 * max(1, np.abs(a[k]).max()), k


def refused(done, *words):
    """The run ended with code 2 and one sentence that holds all `words`; no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout[-1500:], done.stderr[-1500:])
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    last = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert len(last) == 1, done.stderr[-1500:]
    for word in words:
        assert str(word) in last[0], (word, last[0])
    return last[0]


def all_refused(cases):
    """Several such runs, two at a time: [(script, arguments, words)]."""
    with ThreadPoolExecutor(2) as pool:
        ended = pool.map(lambda case: script(case[0], *case[1], check=False), cases)
        for done, (_, _, words) in zip(ended, cases):
            refused(done, *words)
