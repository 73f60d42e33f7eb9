"""Small videos and runs of the real scripts, shared by the tests."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from common.cache import FrameCache
from common.readers.video import open_video

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
        out[t, 20:44, x : x + 14] = block
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
        x[frames // 2 :] = walkers(frames, speed=6, seed=10 + i)[frames // 2 :]
        save_frames(root / "test" / f"b{i}", x)
        (root / "labels").mkdir(exist_ok=True)
        np.save(root / "labels" / f"b{i}.npy", (np.arange(frames) >= frames // 2).astype(np.uint8))
    return root


PATIENCE = 1200  # seconds that a test waits for a process that has hung; none takes a tenth of it on a busy machine


def warm_processes():
    """The socket of tests/warm.py, which is started once; None where processes cannot be forked."""
    if not hasattr(warm_processes, "address"):
        warm_processes.address = None
        if hasattr(os, "fork") and sys.platform == "linux":
            folder = tempfile.mkdtemp(prefix="warm")
            atexit.register(shutil.rmtree, folder, True)
            address = os.path.join(folder, "socket")
            warm_processes.server = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "warm.py"), address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            atexit.register(warm_processes.server.stdin.close)
            if warm_processes.server.stdout.readline() == "ready\n":
                warm_processes.address = address
    return warm_processes.address


class Forked:
    """A script that runs in a process forked by tests/warm.py, with what subprocess.Popen offers of it."""

    def __init__(self, argv, cwd, env):
        self.argv, self.returncode = [str(x) for x in argv], None
        self.folder = Path(tempfile.mkdtemp(prefix="script"))
        self.files = {name: self.folder / name for name in ("stdout", "stderr")}
        for path in self.files.values():
            path.touch()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(warm_processes())
        request = {"argv": self.argv, "cwd": str(cwd), "env": env, **{k: str(v) for k, v in self.files.items()}}
        self.socket.sendall((json.dumps(request) + "\n").encode())
        self.lines = self.socket.makefile()
        self.pid = int(self.lines.readline())

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self):
        try:
            self.returncode = int(self.lines.readline())
        except TimeoutError:
            self.kill()
            self.returncode = int(self.lines.readline())
        said = [path.read_text(errors="surrogateescape") for path in self.files.values()]
        self.lines.close()
        self.socket.close()
        shutil.rmtree(self.folder)
        return said


def script(path, *args, cwd=None, check=True, env=None, threads=1, preexec_fn=None):
    """Run a script of the repository as a user does. -> CompletedProcess with text output."""
    argv = [str(ROOT / path), *map(str, args)]
    whole = {**os.environ, "OMP_NUM_THREADS": str(threads), **(env or {})}
    if env is None and threads == 1 and preexec_fn is None and warm_processes():
        process = Forked(argv, cwd or ROOT, whole)
        stdout, stderr = process.communicate()
        done = subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)
    else:
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=cwd or ROOT,
            text=True,
            capture_output=True,
            timeout=PATIENCE,
            env=whole,
            preexec_fn=preexec_fn,
        )
    return ended_well(done) if check else done


def python(code, *args):
    """Run a few lines of code in a new process. -> its standard output; what it printed is shown where it fails."""
    return ended_well(
        subprocess.run(
            [sys.executable, "-c", code, *map(str, args)], text=True, capture_output=True, timeout=PATIENCE, cwd=ROOT
        )
    ).stdout


def ended_well(done):
    """-> the process, which ended with 0; else what it printed is shown."""
    if done.returncode != 0:
        raise AssertionError(
            f"{' '.join(map(str, done.args))} ended with {done.returncode}\n--- stdout\n{done.stdout[-6000:]}\n"
            f"--- stderr\n{done.stderr[-6000:]}"
        )
    return done


def under_torchrun(*argv, processes=2):
    """Processes with the environment that torchrun gives them; one that fails ends the others. -> the job, whose
    output is shown where it failed. torchrun itself starts those of test_a_killed_rank… of frd_uvad."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    if not warm_processes():
        return ended_well(
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    str(processes),
                    *map(str, argv),
                ],
                text=True,
                capture_output=True,
                timeout=PATIENCE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    ranks = [
        Forked(argv, ROOT, {**os.environ, **{k: str(v) for k, v in {**job, "RANK": i, "LOCAL_RANK": i}.items()}})
        for i in range(processes)
    ]

    def wait(rank):
        said = rank.communicate()
        if rank.returncode:
            for other in ranks:
                other.kill()
        return said

    with ThreadPoolExecutor(processes) as pool:
        said = list(pool.map(wait, ranks))
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return ended_well(
        subprocess.CompletedProcess(argv, code, "".join(out for out, _ in said), "".join(err for _, err in said))
    )


def torchrun(path, *args, processes=2):
    """The script under torchrun: it ends well, and one process alone speaks. -> its standard output."""
    done = under_torchrun(ROOT / path, *args, processes=processes)
    assert done.stdout.count("next:") == 1, done.stdout
    return done.stdout


def killed_after(written, path, *args):
    """Run a script that the system kills once it has written a file so many times ("*/cvae.pt:2"), however fast or
    slow the machine is."""
    done = script("tests/tools/still.py", "--kill-after", written, ROOT / path, *args, check=False)
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])


def trained_by_two(method, checkpoint, small, where, tmp_path):
    """Train under torchrun with two processes, and score its checkpoint again with one: both score alike.

    -> what the run said
    """
    said = torchrun(f"{method}/train.py", *small, *where, "--out", tmp_path / "run")
    assert "micro AUC" in said
    script(f"{method}/eval.py", *where, "--checkpoint", tmp_path / "run" / checkpoint, "--out", tmp_path / "one")
    same_scores(tmp_path / "run" / "strict" / "scores.npz", tmp_path / "one" / "strict" / "scores.npz")
    return said


def same_losses(script_name, flags, where):
    """One process and two have the same losses and the same averaged gradients in every step, to 1e-4 and 1e-3.

    Each step begins at the same weights (tests/tools/still.py leaves them as they are) with batch norms and dropout at
    rest: after steps of training, rounding decides what is picked, and other kernels decide otherwise.
    """
    logs, steps = [], []
    for processes in (1, 2):
        out, gradients = where / str(processes), where / f"gradients{processes}"
        argv = (
            ROOT / "tests" / "tools" / "still.py",
            "--gradients",
            gradients,
            ROOT / script_name,
            *flags,
            "--out",
            out,
        )
        if processes == 1:
            script(*argv)
        else:
            under_torchrun(*argv)
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
        steps.append([np.array(line.split(), float) for line in gradients.read_text().splitlines()])
    compared = 0
    assert len(logs[0]) == len(logs[1]) > 0
    for one, two in zip(*logs):
        for k in one:
            if k in ("total", "loss", "teacher", "student", "rtfm") or k.startswith("loss_"):
                assert abs(one[k] - two[k]) <= 1e-4 * abs(one[k]), (k, one, two)
                compared += 1
    assert compared >= 2
    assert len(steps[0]) == len(steps[1]) > 0
    for number, (one, two) in enumerate(zip(*steps)):
        assert one.shape == two.shape and one.max() > 0
        assert np.abs(one - two).max() <= 1e-3 * one.max(), (number, one, two)


def scored_by_shards(script_name, flags, scores, tmp_path):
    """Two jobs of an array score at once, then the same command shows the results without scoring again: the scores
    of one job."""
    out = tmp_path / "shards"
    with ThreadPoolExecutor(2) as pool:
        said = [
            x.stdout for x in pool.map(lambda i: script(script_name, *flags, "--out", out, "--shard", f"{i}/2"), (0, 1))
        ]
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
