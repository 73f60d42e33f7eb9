"""HF2-VAD through its own scripts, in small."""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from common import training
from common.cli import DataSource, ScoreOptions
from common.distributed import Run, seed_everything
from common.io import load_arrays
from common.objects import pipeline
from common.objects.cube_dataset import CubeDataset
from hf2vad import preprocess, scoring
from hf2vad.data import stage_data
from hf2vad.eval import make_protocol
from hf2vad.model import HF2VAD, Residual, fold
from hf2vad.train import SIZES
from tests.helpers import (
    ROOT,
    all_refused,
    killed_after,
    python,
    refused,
    same_losses,
    save_frames,
    save_video,
    scored_by_shards,
    script,
    tiny_folder,
    trained_by_two,
    walkers,
)

SMALL = (
    "--dataset",
    "folder",
    "--size",
    "small",
    "--epochs",
    "2,1,1",
    "--batch-size",
    "16",
    "--motion-area",
    "60",
    "--device",
    "cpu",
    "--workers",
    "1",
)


def train(root, out, *more, **kwargs):
    return script(
        "hf2vad/train.py", *SMALL, "--data-root", root, "--cache", root.parent / "cache", "--out", out, *more, **kwargs
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dataset in a path with spaces and umlauts, trained on once."""
    base = tmp_path_factory.mktemp("übung mit leerzeichen")
    root = tiny_folder(base / "data")
    done = train(root, base / "run")
    return base, root, done


def test_one_command_goes_from_videos_to_results(trained):
    base, root, done = trained
    for text in ("micro AUC", "frame difference", "fastest box", "next:"):
        assert text in done.stdout, done.stdout
    out = base / "run" / "strict"
    report = json.loads((out / "metrics.json").read_text())
    assert report["protocol"] == "strict" and report["frames"] == 48 and report["label_source"] == "labels/"
    assert 0 <= report["micro_auc"] <= 1 and report["seed"] == 0 and report["statistics"]["cubes"] > 20
    scores = load_arrays(out / "scores.npz", "scores")
    assert sorted(scores) == ["b0", "b1"] and all(s.shape == (24,) and s.dtype == np.float32 for s in scores.values())
    assert (out / "roc.png").stat().st_size > 5000 and sorted(p.name for p in (out / "curves").iterdir()) == [
        "b0.png",
        "b1.png",
    ]
    lines = [json.loads(x) for x in (base / "run" / "log.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["epoch"]) for x in lines] == [("memae", 1), ("memae", 2), ("cvae", 1), ("finetune", 1)]
    assert all(x["cubes_per_second"] > 0 for x in lines)


def test_nothing_is_done_twice(trained):
    base, root, _ = trained
    before = {p.name: p.stat().st_mtime_ns for p in (base / "run").glob("*.pt")}
    again = train(root, base / "run")
    assert {p.name: p.stat().st_mtime_ns for p in (base / "run").glob("*.pt")} == before and len(before) == 3
    assert "decoding" not in again.stdout and "cutting" not in again.stdout and again.stdout.count("done before") == 3


def test_a_stage_left_over_from_another_run_does_not_count(trained, tmp_path):
    """The result is that of the last stage that is trained, though a later one lies there; where none is, of the last
    one."""
    base, root, _ = trained
    shutil.copytree(base / "run", tmp_path / "run", ignore=shutil.ignore_patterns("strict"))
    metrics = tmp_path / "run" / "strict" / "metrics.json"
    train(root, tmp_path / "run", "--epochs", "2,2,0")
    assert json.loads(metrics.read_text())["checkpoint"] == str(tmp_path / "run" / "cvae.pt")
    state = torch.load(tmp_path / "run" / "cvae.pt", weights_only=True)
    assert state["done"] and state["statistics"]["cubes"] > 20 and state["optimizer"]
    # finetune.pt was made from another cvae.pt
    refused(train(root, tmp_path / "run", "--stage", "finetune", check=False), "finetune.pt", "start", "--out")
    train(root, tmp_path / "run", "--stage", "memae")
    assert json.loads(metrics.read_text())["checkpoint"] == str(tmp_path / "run" / "memae.pt")


def test_official_protocol_names_its_liberties(trained):
    base, root, _ = trained
    done = script(
        "hf2vad/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--checkpoint",
        base / "run" / "finetune.pt",
        "--protocol",
        "official",
        "--overlay",
    )
    assert "the weights of the two errors, 1 (flow) and 1 (frame), are not known to be the authors'" in done.stdout
    ped2 = [make_protocol(ScoreOptions("official"), "ped2", w).liberties[1] for w in ((1.0, 0.1), (1.0, 1.0))]
    assert (
        "0.1 (frame), are the authors' for this dataset; how" in ped2[0]
        and "are not known to be the authors'" in ped2[1]
    )
    report = json.loads((base / "run" / "official" / "metrics.json").read_text())
    assert report["left_out_frames_per_video"] == 4 and report["frames"] == 40 and report["liberties"]
    assert (base / "run" / "official" / "overlay" / "b0.mp4").stat().st_size > 2000


@pytest.mark.kernels
def test_scores_depend_neither_on_batch_size_nor_on_workers(trained, tmp_path):
    base, root, _ = trained
    shutil.copy(base / "run" / "finetune.pt", tmp_path / "finetune.pt")
    script(
        "hf2vad/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--checkpoint",
        tmp_path / "finetune.pt",
        "--batch-size",
        7,
        "--workers",
        2,
        "--out",
        tmp_path / "out",
    )
    a = load_arrays(base / "run" / "strict" / "scores.npz", "scores")
    b = load_arrays(tmp_path / "out" / "strict" / "scores.npz", "scores")
    for k in a:
        assert np.abs(a[k] - b[k]).max() < 1e-3 * max(1, np.abs(a[k]).max())


def test_benchmark(trained):
    base, root, _ = trained
    where = (
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--motion-area",
        "60",
        "--device",
        "cpu",
        "--seconds",
        0.05,
    )
    done = script("tests/perf/bench.py", "hf2vad", *where, "--checkpoint", base / "run" / "finetune.pt")
    for text in (
        "plain eager model",
        "optimised path",
        "decode",
        "optical flow",
        "flow, boxes, cubes together",
        "peak memory",
    ):
        assert text in done.stdout, done.stdout
    done = script("tests/perf/bench.py", "hf2vad", "train", *where, "--size", "small", "--batch-size", "16")
    for text in ("memae", "cvae", "finetune", "waiting for data"):
        assert text in done.stdout, done.stdout


def test_own_video(trained, tmp_path):
    base, _, _ = trained
    path = save_video(tmp_path / "mein video.avi", walkers(30, size=(72, 110), seed=5), fps=10)
    done = script(
        "hf2vad/eval.py",
        "--video",
        path,
        "--checkpoint",
        base / "run" / "finetune.pt",
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
        cwd=tmp_path,
    )
    out = tmp_path / "out" / "mein video"
    rows = list(csv.DictReader(open(out / "scores.csv")))
    assert len(rows) == 30 and rows[10]["seconds"] == "1.000" and sum(int(r["boxes"]) for r in rows) > 10
    assert (out / "overlay.mp4").stat().st_size > 2000 and "most abnormal" in done.stdout
    assert all((out / x).exists() for x in ("curve.png", "report.html", "ranking.csv", "contact_sheet.png"))


def test_published_checkpoints_load_and_get_statistics(trained, tmp_path):
    """Only weights under the golden key names: sizes and training statistics have to be found anew."""
    base, root, _ = trained
    ours = training.load_checkpoint(base / "run" / "finetune.pt")
    torch.save({"model_state_dict": ours["model_state_dict"], "step": 7}, tmp_path / "best.pth")
    done = script(
        "hf2vad/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--motion-area",
        60,
        "--ckpt_path",
        tmp_path / "best.pth",
    )
    assert "no training statistics" in done.stdout
    a = load_arrays(base / "run" / "strict" / "scores.npz", "scores")
    b = load_arrays(tmp_path / "strict" / "scores.npz", "scores")
    for k in a:  # the published shrink threshold differs from the small model's
        assert a[k].shape == b[k].shape and np.isfinite(b[k]).all()


def weights(path):
    return training.load_checkpoint(path)["model_state_dict"]


@pytest.mark.kernels
@pytest.mark.parametrize(
    "script_name, stop_at",
    [("train.py", "memae.pt"), ("train.py", "cvae.pt"), ("train.py", "finetune.pt"), ("preprocess.py", None)],
)
def test_killed_and_started_again_ends_with_the_same_weights(trained, tmp_path, script_name, stop_at):
    base, root, _ = trained
    out = tmp_path / "run"
    train_flags = (*SMALL, "--save-minutes", "0") if script_name == "train.py" else SMALL[:2] + SMALL[-6:]
    common = ("--data-root", root, "--cache", tmp_path / "cache")
    if stop_at:
        killed_after(f"*/{stop_at}:2", f"hf2vad/{script_name}", *train_flags, *common, "--out", out)
        assert training.load_checkpoint(out / stop_at)["step"] >= 1
    else:
        killed_after("*/cubes-*/*/*.npy:1", f"hf2vad/{script_name}", *train_flags, *common)
    script("hf2vad/train.py", *SMALL, *common, "--out", out, "--save-minutes", "0")
    for stage in ("memae", "cvae", "finetune"):
        a, b = weights(base / "run" / f"{stage}.pt"), weights(out / f"{stage}.pt")
        assert all(torch.equal(a[k], b[k]) for k in a), stage
    a, b = (load_arrays(p / "strict" / "scores.npz", "scores") for p in (base / "run", out))
    assert all((a[k] == b[k]).all() for k in a)
    assert not [p for p in tmp_path.rglob("*.part*") if p.suffix == ".pt"]


def test_resuming_with_other_settings_is_refused(trained):
    base, root, _ = trained
    refused(train(root, base / "run", "--lr", "0.5", check=False), "memae.pt", "lr", "--no-resume")


def test_bad_input_is_one_sentence(trained, tmp_path):
    base, root, _ = trained
    checkpoint = base / "run" / "finetune.pt"
    cache = ("--cache", tmp_path / "cache")
    torch.save({"model_state_dict": {"encoder.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    (tmp_path / "fake.mp4").write_bytes(b"nonsense" * 99)
    empty = tmp_path / "empty"
    empty.mkdir()
    ours, home = ("--checkpoint", checkpoint), ("--dataset", "folder", "--data-root", root)
    learn = (*SMALL, *cache, "--out", tmp_path / "o")
    all_refused(
        [
            ("hf2vad/eval.py", (*flags, *cache), words)
            for flags, words in [
                (("--dataset", "ped2", "--data-root", empty, *ours), ("ped2", "--data-root")),
                (("--dataset", "nothing", *ours), ("nothing", "avenue")),
                ((*home, "--out", empty), ("--checkpoint",)),
                ((*home, "--checkpoint", tmp_path / "other.pth"), ("other.pth", "HF2-VAD")),
                (("--video", tmp_path / "no.mp4", *ours), ("no.mp4",)),
                (("--video", tmp_path / "fake.mp4", *ours), ("fake",)),
                ((*home, *ours, "--boxes", "guess"), ("--boxes",)),
                ((*home, *ours, "--device", "cuda:9"), ("--device",)),
                ((*home, *ours, "--flow", "files:nowhere"), ("--flow", "nowhere")),
                ((*home, *ours, "--smoothing", "fft"), ("--smoothing",)),
            ]
        ]
    )
    all_refused(
        [
            ("hf2vad/train.py", (*learn, "--data-root", empty), ("holds no videos",)),
            ("hf2vad/train.py", (*learn, "--data-root", root, "--epochs", "two"), ("--epochs",)),
        ]
    )
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


def test_no_boxes_anywhere(tmp_path):
    for split in ("train", "test"):
        save_frames(tmp_path / "data" / split / "still", np.full((8, 64, 96, 1), 80, np.uint8))
    refused(train(tmp_path / "data", tmp_path / "run", check=False), "no boxes", "--motion-threshold")


def test_labels_of_another_length_stop_the_evaluation(trained, tmp_path):
    base, root, _ = trained
    shutil.copytree(root, tmp_path / "data")
    np.save(tmp_path / "data" / "labels" / "b1.npy", np.zeros(20, np.uint8))
    done = script(
        "hf2vad/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        tmp_path / "data",
        "--cache",
        tmp_path / "cache",
        "--checkpoint",
        base / "run" / "finetune.pt",
        "--out",
        tmp_path / "out",
        "--motion-area",
        60,
        check=False,
    )
    refused(done, "b1", "20", "24")
    assert not (tmp_path / "out" / "strict" / "metrics.json").exists()


def test_damaged_videos_are_skipped_and_named(trained, tmp_path):
    base, root, _ = trained
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data" / "test" / "broken.avi").write_bytes(b"RIFF" + bytes(300))
    done = script(
        "hf2vad/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        tmp_path / "data",
        "--cache",
        tmp_path / "cache",
        "--checkpoint",
        base / "run" / "finetune.pt",
        "--out",
        tmp_path / "out",
        "--motion-area",
        60,
    )
    assert "skipped 1 videos" in done.stdout and "broken" in done.stdout
    assert json.loads((tmp_path / "out" / "strict" / "metrics.json").read_text())["videos"] == 2


def test_output_that_cannot_be_written(trained, tmp_path):
    base, root, _ = trained
    (tmp_path / "file").write_text("not a folder")
    refused(train(root, tmp_path / "file" / "run", check=False), "file", "--out")
    refused(
        script(
            "hf2vad/preprocess.py",
            "--dataset",
            "folder",
            "--data-root",
            root,
            "--cache",
            tmp_path / "file" / "c",
            check=False,
        ),
        "--cache",
    )


def test_a_full_disk(trained, tmp_path):
    """Files may not grow past 200 kB: the first cached video does. Clear error, nothing half-written."""
    base, root, _ = trained

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = script(
        "hf2vad/preprocess.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--workers",
        1,
        check=False,
        preexec_fn=limit,
    )
    refused(done, "no space left", "--cache")
    assert not list((tmp_path / "cache").rglob("*.npy")) and not list((tmp_path / "cache").rglob("*.part*"))


def test_memory_does_not_grow_with_the_number_of_videos(tmp_path):
    """Peak memory of preprocessing in one process, for 3 and for 12 videos."""
    peaks = []
    for n in (3, 12):
        root = tmp_path / f"data{n}"
        for i in range(n):
            save_frames(root / "train" / f"a{i}", walkers(60, size=(240, 320), seed=i, channels=1))
        code = (
            "import sys, resource; sys.path.insert(0, sys.argv[1]); from hf2vad import preprocess;"
            "preprocess.main(sys.argv[2:]); print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        said = python(
            code, ROOT, "--dataset", "folder", "--data-root", root, "--cache", tmp_path / "cache", "--workers", "1"
        )
        peaks.append(int(said.split("PEAK")[1]) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks


def test_folded_network_gives_the_same_scores():
    seed_everything(0)
    net = HF2VAD(**SIZES["small"])
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2)
            m.running_var.uniform_(0.5, 1.5)
    run = Run("cpu")
    batch = {
        "appearance": torch.randint(0, 255, (5, 5, 1, 32, 32), dtype=torch.uint8),
        "flow": torch.randn(5, 4, 2, 32, 32).half(),
    }
    plain, fast = (scoring.Scorer(net, run, optimised=o).score(batch) for o in (False, True))
    for a, b in zip(plain, fast):
        assert ((a - b).abs() / a.abs()).max() < 1e-3
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fold(net).modules())


def test_sizes_are_read_off_published_weights():
    other = dict(
        features_root=16, num_slots=50, mem_usage=(False, False, True, True), skip_ops=("none", "none", "concat")
    )
    for args in ({}, other):
        net = HF2VAD(**args)
        found = scoring.infer_args(net.state_dict())
        again = scoring.build_model(found, "finetune")
        again.load_state_dict(net.state_dict())


def test_training_drops_features_and_scoring_does_not():
    """Residual blocks drop a tenth of their input, with the expectation unchanged."""
    torch.manual_seed(0)
    block, x = Residual(8), torch.ones(512, 8, 4, 4)
    with torch.no_grad():
        learning = torch.stack([block(x) for _ in range(2)])
        block.eval()
        still = torch.stack([block(x) for _ in range(2)])
    assert torch.equal(*still) and not torch.equal(*learning)
    assert (learning.mean((0, 1)) - still[0, 0]).abs().max() < 0.02


def test_frame_scores_by_hand():
    stats = {"flow_mean": 10.0, "flow_std": 2.0, "frame_mean": 1.0, "frame_std": 0.5}
    s = scoring.combine(np.array([[14.0, 1.5], [10.0, 1.0]]), stats, 1.0, 0.1)
    assert s.tolist() == pytest.approx([2.1, 0.0])
    empty = scoring.empty_score(stats, 1.0, 0.1)
    assert empty == pytest.approx(-5.2)
    assert pipeline.frame_scores(np.array([1, 1]), s, 3, empty).tolist() == pytest.approx([-5.2, 2.1, -5.2])


@pytest.mark.kernels
def test_torchrun_with_two_processes(trained, tmp_path):
    base, root, _ = trained
    trained_by_two(
        "hf2vad",
        "finetune.pt",
        SMALL,
        ("--dataset", "folder", "--data-root", root, "--cache", base / "cache"),
        tmp_path,
    )
    same_losses("hf2vad/train.py", (*SMALL, "--data-root", root, "--cache", base / "cache"), tmp_path)


def test_two_shards_at_once_make_what_one_job_makes(trained, tmp_path):
    base, root, _ = trained
    flags = (
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--motion-area",
        "60",
        "--workers",
        "1",
    )
    with ThreadPoolExecutor(2) as pool:
        said = [
            x.stdout for x in pool.map(lambda i: script("hf2vad/preprocess.py", *flags, "--shard", f"{i}/2"), (0, 1))
        ]
    assert all("next:" in x and "train: " in x for x in said)
    made = sorted(p.relative_to(tmp_path / "cache") for p in (tmp_path / "cache").rglob("*.npy"))
    assert len(made) == 8 and not list((tmp_path / "cache").rglob("*.part*"))  # frames and cubes of four videos
    assert all((tmp_path / "cache" / p).read_bytes() == (base / "cache" / p).read_bytes() for p in made)


def test_shards_score_what_one_job_scores(trained, tmp_path):
    base, root, _ = trained
    flags = (
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--workers",
        1,
        "--checkpoint",
        base / "run" / "finetune.pt",
    )
    scored_by_shards("hf2vad/eval.py", flags, base / "run" / "strict" / "scores.npz", tmp_path)


def test_training_statistics_use_the_flows_that_were_written_down(trained, monkeypatch):
    """Stage cvae scores its own training set: the frozen autoencoder is not asked again."""
    base, root, _ = trained
    run = Run("cpu", "fp32")
    source = DataSource("folder", root, base / "cache", workers=1)
    dataset = preprocess.prepare(source, run, foreground={"motion_area": 60})
    net, _ = scoring.load_model(base / "run" / "cvae.pt")
    scorer, records = scoring.Scorer(net, run), dataset.records(dataset.train)
    data = stage_data("cvae", net, records, run, base / "run")
    whole = scorer.score_training_cubes(CubeDataset(records, scoring.FIELDS, run))
    monkeypatch.setattr(scorer.net.memAE, "forward", None)
    stored = scorer.score_training_cubes(data)
    assert len(stored) == len(whole) > 0 and np.allclose(stored, whole, rtol=1e-2)
