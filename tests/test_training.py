"""Checkpoints, resuming and the loop's safeguards."""

import contextlib
import io as stdlib_io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from common import cli, io, pool, training
from common.distributed import Run
from common.io import UserError, atomic_write, load_array, lock_dir
from common.loader import epoch_order, tensors_ahead
from common.objects.cube_dataset import CubeDataset
from common.score_cache import ScoreCache, total_seconds
from tests.helpers import ROOT


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capfd):
    for name, write in (
        ("plain.pt", lambda p: p.write_bytes(pickle.dumps({"model_state_dict": Evil()}))),
        ("torch.pt", lambda p: torch.save({"model_state_dict": {"a": Evil()}}, p)),
        ("old.pt", lambda p: torch.save({"a": Evil()}, p, _use_new_zipfile_serialization=False)),
    ):
        path = tmp_path / name
        write(path)
        with pytest.raises(UserError, match=f"{name}.*refused"):
            training.load_checkpoint(path)
    assert "must never run" not in capfd.readouterr().out


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match="missing"):
        training.load_checkpoint(path)
    training.save_checkpoint(path, {"method": "sdmae", "x": torch.zeros(1000)})
    with pytest.raises(UserError, match="belongs to the method sdmae"):
        training.load_checkpoint(path, "hf2vad")
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.pt"):
            training.load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list"):
        training.load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x", "y")
    with pytest.raises(UserError, match="a.pt"):
        training.load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    training.save_checkpoint(path, {"x": 1})
    with pytest.raises(Exception, match="lambda"):
        training.save_checkpoint(path, {"x": lambda: 0})
    assert training.load_checkpoint(path) == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    path = tmp_path / ("ü" * 120 + ".npy")
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    with atomic_write(tmp_path / "x" / path.name) as tmp:
        assert len(tmp.name.encode()) < 120
        tmp.write_bytes(b"x")
        left = {
            who: tmp.name.replace(f"-{os.getpid()}.", f"-{pid}.")
            for who, pid in (("dead", dead.pid), ("alive", os.getppid()))
        }
    left["elsewhere"] = left["dead"].replace(f".{io._HOST}-", ".elsewhere-")
    for name in left.values():
        (tmp_path / name).write_bytes(b"x")
    with atomic_write(path) as tmp:
        tmp.write_bytes(b"y")
    assert {p.name for p in tmp_path.iterdir()} == {"x", path.name, left["alive"], left["elsewhere"]}


def test_the_machine_of_a_process(monkeypatch):
    """Its name may be long and its containers many; each has processes of its own."""
    hosts = {io._host()}
    for name in ("n" * 60, "n" * 59 + "m"):
        monkeypatch.setattr(io.socket, "gethostname", lambda name=name: name)
        hosts.add(io._host())
        monkeypatch.setattr(io.os, "readlink", lambda _: "pid:[1]")
        hosts.add(io._host())
        monkeypatch.undo()
    assert len(hosts) == 5 and all(len(h) == 10 for h in hosts)


def test_a_folder_that_cannot_be_read(tmp_path):
    said = io.user_text(PermissionError(13, "Permission denied", "data/ped2"))
    assert said.startswith("data/ped2 cannot be read or written (Permission denied): ") and "--data-root" in said


def test_epoch_order_depends_on_seed_and_epoch_alone():
    a, b, c = (epoch_order(100, s, e) for s, e in ((0, 0), (0, 0), (0, 1)))
    assert (a == b).all() and (a != c).any() and sorted(c) == list(range(100))


def test_non_finite_loss_stops_with_a_way_out():
    meter = training.EpochMeter(Run("cpu", "fp32"), "memae", 3, log=None, save=None)
    meter.epoch, meter.step = 1, 12
    meter.update({"recon": torch.tensor(1.0), "total": torch.tensor(float("nan"))})
    with pytest.raises(UserError, match="loss became nan in memae, epoch 2, step 12.*--lr"):
        meter.check_finite()
    meter.sums = {"total": torch.tensor(1.0)}
    meter.check_finite()


def full_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.empty(2**50),
        lambda: torch.empty(2**50),
        full_gpu,
        lambda: cv2.copyMakeBorder(np.zeros((4, 4), np.uint8), 0, 2**30, 0, 2**30, cv2.BORDER_CONSTANT),
    ],
)
def test_out_of_memory_says_which_flag_to_lower(allocate, capsys):
    with pytest.raises(SystemExit) as end:
        io.run_script(allocate)
    assert end.value.code == 2 and "--batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, said", [("io.UserError('bad flag')", 2, "error: bad flag"), ("ValueError('fault')", 1, "Traceback")]
)
def test_a_rank_that_fails_says_why_and_ends_at_once(error, code, said):
    """Without the end of an interpreter, in which NCCL may wait for the other ranks."""
    lines = ["import atexit", "from common import io", "atexit.register(print, 'late')", "def main():"]
    program = "\n".join([*lines, f"    raise {error}", "io.run_script(main)"])
    for processes, late in ((1, True), (2, False)):
        environment = {**os.environ, "WORLD_SIZE": str(processes)}
        run = [sys.executable, "-c", program]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == code and ("late" in done.stdout) == late
        assert done.stderr.startswith(said)


def test_log_is_one_json_line_per_epoch_and_forgets_what_is_redone(tmp_path):
    log = training.Log(tmp_path / "log.jsonl")
    for e in (1, 2, 3):
        log.write(stage="memae", epoch=e, loss=0.5)
    log.write(stage="cvae", epoch=1, loss=np.float64(0.25).item())
    log.drop_after("memae", 1)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["epoch"]) for x in lines] == [("memae", 1), ("cvae", 1)]


FLUSHED = """
import torch
from common.distributed import Run

def left(denormal=torch.full((10**6,), 1e-39)):
    return [int((part.view(torch.int32) != 0).sum()) for part in (denormal * 1).chunk(2)]

torch.set_num_threads(2)
with Run("cpu"):
    inside = left()
print(inside, torch.tensor(1e-39).mul(1).view(torch.int32).item() != 0)
"""


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="not of this kind of CPU")
def test_denormal_numbers_do_not_slow_a_run_down():
    """They are zero in all its threads, and afterwards numbers again."""
    answer = subprocess.run([sys.executable, "-c", FLUSHED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split("\n")[0] == "[0, 0] True", answer.stdout


def test_unknown_device():
    with pytest.raises(UserError, match="--device"):
        Run("cuda:77")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read from /proc")
def test_batches_read_long_memory_maps_in_little_memory(tmp_path):
    """A gigabyte of records is read in random order: what stays in the process is bounded, and the rows are right."""
    record = np.dtype([("x", "u1", (65536,)), ("number", "<i4", (1,))])
    array = np.lib.format.open_memmap(tmp_path / "long.npy", "w+", record, (16000,))  # sparse: takes no disk
    array["number"][:, 0] = np.arange(16000)
    del array

    def mapped():
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))
        return int(line.split()[1]) / 1024

    array = load_array(tmp_path / "long.npy", "x", mmap=True)
    data = CubeDataset([array], {"x": slice(None), "number": slice(None)}, Run("cpu", "fp32"))
    before, worst = mapped(), 0
    order = np.random.default_rng(0).permutation(16000)[:6000]
    for rows, batch in data.batches(order, 64):
        assert (batch["number"][:, 0].numpy() == rows).all()
        worst = max(worst, mapped() - before)
    assert worst < 350


def test_a_second_run_in_one_folder_is_refused_until_the_first_ends(tmp_path):
    code = (
        "import sys, time; from common.io import lock_dir; lock_dir(sys.argv[1]); lock_dir(sys.argv[1])\n"
        "print('mine', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert first.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"process {first.pid} on .*another --out"):
            lock_dir(tmp_path)
    finally:
        first.kill()
        first.wait()
    assert lock_dir(tmp_path) == tmp_path


def test_kept_scores_are_made_again_when_anything_they_stand_for_changes(tmp_path):
    new, done = {"a": 1, "b": 1}, []
    videos = [SimpleNamespace(name=n, split="test", key=f"test/{n}") for n in "ab"]

    def make(settings=None, **how):
        def score(v, tick):
            done.append(v.name)
            tick(3)
            return {"scores": np.full(3, new[v.name], np.float32)}

        done.clear()
        cache = ScoreCache(tmp_path, settings or {"weights": "w"}, lambda v: new[v.name])
        return cache, cache.compute(videos, score, Run("cpu"), size=lambda v: 3, unit="frame", **how)

    cache, scores = make()
    assert done == ["a", "b"] and scores["test/b"]["scores"].tolist() == [1, 1, 1] and total_seconds(scores) > 0
    assert make()[1].keys() == {"test/a", "test/b"} and done == []
    new["b"] = 2
    assert make()[1]["test/b"]["scores"].tolist() == [2, 2, 2] and done == ["b"]
    cache.path(videos[0]).write_bytes(b"PK half a file")
    make()
    assert done == ["a"]
    make({"weights": "v"})
    assert done == ["a", "b"]
    read = make({"weights": "v"}, on_disk=["scores"])[1]["test/b"]["scores"]  # large arrays are read when asked for
    assert read().tolist() == [2, 2, 2] and done == []
    newer = {"weights": "w", "version": 2}
    assert make(newer, shard="1/2")[1] is None and done == ["b"]
    assert make(newer, shard="0/2", all_videos=videos)[1] is None and done == ["a"]
    with pytest.raises(UserError, match="--shard 2/2"):
        make(shard="2/2")


def test_a_training_of_an_older_version_is_refused_in_one_sentence(tmp_path):
    """The layout before the second edition: the position was under "at"; such files can still be scored."""
    training.save_checkpoint(
        tmp_path / "a.pt", {"method": "sdmae", "done": True, "at": {"epoch": 3}, "identity": {"x": 1}}
    )
    with pytest.raises(UserError, match="older version.*--no-resume"):
        training.previous_run(tmp_path / "a.pt", "sdmae", {"x": 1})
    assert training.previous_run(tmp_path / "a.pt", "sdmae", {"x": 1}, resumed=False) is None
    assert training.previous_run(tmp_path / "none.pt", "sdmae", {}) is None


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_flags_take_numbers_that_make_sense(text, capsys):
    parser = cli.make_parser("")
    parser.add_argument("--lr", type=cli.positive_float)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--lr", text])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: argument --lr: ")
    assert parser.parse_args(["--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize("given, used", [("auto", "cuda:2"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_a_rank_has_its_own_gpu(given, used, monkeypatch):
    """torch.cuda.set_device() takes no device without an index."""
    devices, ones = [], torch.ones
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append(torch.device(device).index))
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **more: ones(*size, **more))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    run = Run(given)
    assert str(run.device) == used and run.precision == "fp32" and None not in devices


@pytest.mark.parametrize("parts", [[5000, 3], [1], [0, 2, 4096]])
def test_what_stays_on_the_device_is_copied_in_pieces(parts):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (n, 3, 2), dtype=np.uint8) for n in parts]
    kept = Run("cpu", "fp32").keep_on_device((np.broadcast_to(x, x.shape) for x in arrays), sum(parts))
    assert kept.dtype == torch.uint8 and (kept.numpy() == np.concatenate(arrays)).all()


def test_the_next_command_keeps_what_decides_the_data():
    argv = ["--dataset", "ped2", "--shard", "0/4", "--data-root", "my data", "--boxes=file:a.npz", "--preview"]
    command = cli.next_command("hf2vad/train.py", argv, "--shard", "--preview")
    assert command == "python hf2vad/train.py --dataset ped2 --data-root 'my data' --boxes=file:a.npz"


def test_the_next_command_is_quoted_for_windows_there(monkeypatch):
    monkeypatch.setattr(cli.os, "name", "nt")
    command = cli.next_command("sdmae/eval.py", ["--data-root", r"C:\my data", "--out", r"runs\a"])
    assert command == r'python sdmae/eval.py --data-root "C:\my data" --out runs\a'


@pytest.mark.parametrize(
    "limit,expected", [("max 100000\n", 4), ("250000 100000\n", 2), ("50000 100000\n", 1), (None, 4)]
)
def test_cores_of_a_container(limit, expected, monkeypatch):
    """The limit of docker's --cpus, which the list of cores does not show."""

    def opened(path):
        assert path == "/sys/fs/cgroup/cpu.max"
        if limit is None:
            raise FileNotFoundError(path)
        return stdlib_io.StringIO(limit)

    monkeypatch.setattr(pool, "open", opened, raising=False)
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert pool.cores() == expected


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:99", "nonsense"])
def test_a_device_that_cannot_be_used_is_refused_at_once(device):
    with pytest.raises(UserError, match=f"--device {device} cannot be used here .*try --device cpu"):
        Run(device)


@pytest.mark.parametrize(
    "trained_on,dataset,is_refused",
    [(None, "demo", True), ("ped2", "demo", True), ("demo", "demo", False), ("ped2", "folder", False)],
)
def test_own_videos_are_not_compared_with_the_demo(trained_on, dataset, is_refused):
    state = {"identity": {"dataset": trained_on}} if trained_on else {}
    with pytest.raises(UserError, match="a.pt needs normal videos") if is_refused else contextlib.nullcontext():
        cli.need_training_set("a.pt", state, dataset)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "tensor and None"])
def test_a_gpus_batches_are_copied_beside_the_computation(kind, monkeypatch):
    """On pretended streams: a copy begins after what the device holds was written, a batch is used after its copy, and
    its memory is kept until it was read."""
    happened = []

    class Stream:
        def __init__(self, name="copies"):
            self.name = name

        def wait_stream(self, other):
            happened.append((self.name, "waits for", other.name))

        def record_event(self):
            return len([x for x in happened if x[0] == "copied"])

        def wait_event(self, event):
            happened.append((self.name, "waits for copy", event))

    class OnDevice:
        def record_stream(self, stream):
            happened.append(("kept for", stream.name))

    class Dataset:
        def read(self, rows):
            return rows

        def to_device(self, rows):
            happened.append(("copied", used[-1]))
            tensors = {"tensor": OnDevice(), "tuple": (OnDevice(), OnDevice()), "dict": {"a": OnDevice()}}
            return tensors.get(kind, (OnDevice(), None))

    main, used = Stream("main"), ["main"]

    @contextlib.contextmanager
    def use(stream):
        used.append(stream.name)
        yield
        used.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: happened.insert(0, ("thread on", device)))
    parts = [np.arange(3), np.arange(2)]
    run = SimpleNamespace(device=torch.device("cuda:1"), copy_stream=Stream())
    for i, (rows, _, waited) in enumerate(tensors_ahead(Dataset(), parts, run)):
        assert rows is parts[i] and waited >= 0
        before = happened[:]  # the thread goes on
        assert before[:2] == [("thread on", run.device), ("copies", "waits for", "main")]
        assert before.count(("copied", "copies")) > i and ("copied", "main") not in before
        assert before.count(("main", "waits for copy", i + 1)) == 1
        tensors = 2 if kind == "tuple" else 1
        assert before.count(("kept for", "main")) == tensors * (i + 1)
