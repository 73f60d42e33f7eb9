"""LBR-SPR through its own scripts, in small."""

import csv
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import training
from common.io import UserError, load_arrays
from common.objects.cubes import Settings, flow_boxes
from common.report.ranking import top_peaks
from spr_uvad import advantage, authors, scoring
from spr_uvad.model import LBR, cube_errors, self_paced_weights
from spr_uvad.train import make_plan
from tests.helpers import (
    killed_after,
    refused,
    same_losses,
    save_frames,
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
    "3",
    "--warmup",
    "1",
    "--batch-size",
    "16",
    "--workers",
    "1",
    "--device",
    "cpu",
)


def train(root, out, *more, **kwargs):
    where = ("--data-root", root, "--cache", root.parent / "cache", "--out", out)
    return script("spr_uvad/train.py", *SMALL, *where, *more, **kwargs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("ein ordner für spr")
    root = tiny_folder(base / "data")
    done = train(root, base / "run", "--flow", "--setting", "merge")
    where = ("--dataset", "folder", "--data-root", root, "--cache", base / "cache", "--device", "cpu")
    script("spr_uvad/eval.py", *where, "--checkpoint", base / "run" / "spr.pt", "--overlay")
    return base, root, done


def test_one_command_goes_from_videos_to_a_ranking(trained):
    base, root, done = trained
    for text in ("micro AUC", "fastest box", "most abnormal moments", "next:"):
        assert text in done.stdout, done.stdout
    out = base / "run" / "strict"
    report = json.loads((out / "metrics.json").read_text())
    assert report["with_motion"] and report["plan"]["setting"] == "merge" and 0 <= report["micro_auc"] <= 1
    lines = [json.loads(x) for x in (base / "run" / "log.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines] == [1, 2, 3] and all(x["cubes_per_second"] > 0 for x in lines)
    assert "weight" not in lines[0] and 0 < lines[2]["weight"] <= 1  # the first epoch is warm-up
    assert all(x["normal_loss"] > 0 and x["abnormal_loss"] > 0 for x in lines)
    table = list(csv.DictReader(open(out / "ranking.csv")))
    assert table and all((out / x["thumbnail"]).stat().st_size > 1000 for x in table)
    assert all(int(x["start_frame"]) <= int(x["peak_frame"]) <= int(x["end_frame"]) < 24 for x in table)
    for name in ("contact_sheet.png", "roc.png", "curves/b0.png", "overlay/b1.mp4", "../normality_advantage.png"):
        assert (out / name).stat().st_size > 1000, name


def test_benchmark(trained):
    base, root, _ = trained
    done = script(
        "tests/perf/bench.py", "spr_uvad", *SMALL, "--data-root", root, "--cache", base / "cache", "--seconds", 0.05
    )
    for text in ("step without refinement", "step with refinement", "scoring pass as published", "peak memory"):
        assert text in done.stdout, done.stdout


def test_official_smooths_over_all_videos_as_one(trained):
    base, root, _ = trained
    done = script(
        "spr_uvad/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--checkpoint",
        base / "run" / "spr.pt",
        "--protocol",
        "official",
        "--top",
        1,
    )
    assert "over all videos as one" in done.stdout and "across the borders" in done.stdout
    a, b = (load_arrays(base / "run" / p / "scores.npz", "scores") for p in ("strict", "official"))
    assert all((a[k] == b[k]).all() for k in a)
    from sklearn.metrics import roc_auc_score

    smoothed = np.convolve(np.concatenate([b["b0"], b["b1"]]).astype(float), np.ones(10) / 10, "same")
    label = np.tile(np.arange(24) >= 12, 2)
    report = json.loads((base / "run" / "official" / "metrics.json").read_text())
    assert abs(report["micro_auc"] - roc_auc_score(label, smoothed)) < 1e-9


def test_killed_and_started_again_ends_with_the_same_weights(trained, tmp_path):
    base, root, _ = trained
    flags = (
        "--flow",
        "--setting",
        "merge",
        "--save-minutes",
        "0",
        "--cache",
        str(base / "cache"),
        "--out",
        str(tmp_path / "run"),
    )
    killed_after("*/spr.pt:9", "spr_uvad/train.py", *SMALL, "--data-root", root, *flags)
    stopped_at = training.load_checkpoint(tmp_path / "run" / "spr.pt")
    assert stopped_at["epoch"] >= 1 and stopped_at["step"] >= 1
    script("spr_uvad/train.py", *SMALL, "--data-root", root, *flags)
    a, b = (training.load_checkpoint(p / "spr.pt")["model_state_dicts"]["0"] for p in (base / "run", tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (load_arrays(p / "strict" / "scores.npz", "scores") for p in (base / "run", tmp_path / "run"))
    assert all((a[k] == b[k]).all() for k in a)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3
    again = script("spr_uvad/train.py", *SMALL, "--data-root", root, *flags)
    assert "done before" in again.stdout
    other = script("spr_uvad/train.py", *SMALL, "--data-root", root, *flags, "--shrink", "0.1", check=False)
    refused(other, "shrink", "--no-resume")


def test_videos_without_labels_without_folders_give_a_ranking(trained, tmp_path):
    root = tmp_path / "my videos"
    save_frames(root / "only one ö", walkers(30))
    done = script(
        "spr_uvad/train.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "run",
        "--size",
        "small",
        "--epochs",
        2,
        "--warmup",
        1,
    )  # fewer cubes than a batch of 256
    assert "AUC" not in done.stdout and "most abnormal moments" in done.stdout
    assert (tmp_path / "run" / "strict" / "contact_sheet.png").exists()
    assert not (tmp_path / "run" / "normality_advantage.png").exists()
    assert "micro_auc" not in json.loads((tmp_path / "run" / "strict" / "metrics.json").read_text())
    video = script(
        "spr_uvad/eval.py",
        "--video",
        root / "only one ö",
        "--cache",
        tmp_path / "cache",
        "--checkpoint",
        tmp_path / "run" / "spr.pt",
        "--out",
        tmp_path / "video",
    )
    out = next((tmp_path / "video").iterdir())
    assert "most abnormal moments" in video.stdout
    assert all(
        (out / x).exists() for x in ("scores.csv", "curve.png", "overlay.mp4", "ranking.csv", "contact_sheet.png")
    )


def test_one_model_per_block(trained, tmp_path):
    """The blocks walk through the left and the middle: the right third of the frame has no cubes and needs no model."""
    base, root, _ = trained
    done = train(root, tmp_path / "run", "--grid", "1x3", "--epochs", "1", "--no-resume")
    state = training.load_checkpoint(tmp_path / "run" / "spr.pt")
    assert 1 < len(state["model_state_dicts"]) <= 3 and state["grid"] == [1, 3] and "micro AUC" in done.stdout
    refused(train(root, tmp_path / "run", "--grid", "nine", check=False), "--grid nine")


def test_identical_frames_are_one_sentence(tmp_path):
    save_frames(tmp_path / "still" / "a", np.repeat(walkers(1), 12, 0))
    flags = (*SMALL, "--cache", tmp_path / "c", "--out", tmp_path / "o")
    refused(
        script("spr_uvad/train.py", *flags, "--data-root", tmp_path / "still", check=False),
        "no boxes",
        "--motion-threshold",
    )
    (tmp_path / "only_train" / "train").mkdir(parents=True)
    save_frames(tmp_path / "only_train" / "train" / "a", walkers(12))
    refused(script("spr_uvad/train.py", *flags, "--data-root", tmp_path / "only_train", check=False), "no test videos")


def test_the_authors_files_load(trained, tmp_path):
    base, root, _ = trained
    torch.manual_seed(0)
    net = LBR(features_root=8, use_flow=False)
    torch.save([[[net.state_dict()], [net.state_dict()]]], tmp_path / "model_set.npy")
    raw = np.empty((1, 2), object)
    raw[0, 0], raw[0, 1] = [np.array([3.0, 5.0])], [np.array([1.0, 2.0, 3.0])]
    np.save(tmp_path / "raw_training_scores.npy", raw, allow_pickle=True)
    torch.save([[np.array([3.0, 5.0]), np.array([1.0, 2.0, 3.0])]], tmp_path / "raw_torch.npy")
    for name in ("raw_training_scores.npy", "raw_torch.npy"):
        found = authors.load_training_scores(tmp_path / name, (1, 2))
        assert found[0].tolist() == [3, 5] and found[1].tolist() == [1, 2, 3]
    ev = lambda *a, **k: script(
        "spr_uvad/eval.py",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--cache",
        base / "cache",
        "--checkpoint",
        tmp_path / "model_set.npy",
        "--out",
        tmp_path / "out",
        *a,
        **k,
    )
    ev("--training-scores", tmp_path / "raw_training_scores.npy")
    report = json.loads((tmp_path / "out" / "strict" / "metrics.json").read_text())
    assert report["statistics"]["0"] == {"cubes": 2, "raw_mean": 4.0, "raw_std": 1.0}
    assert "scoring the cubes of setting test" in ev().stdout
    refused(ev("--training-scores", tmp_path / "no.npy", check=False), "no.npy")


class Evil:
    def __reduce__(self):
        return os.system, ("echo gotcha",)


def test_files_that_would_run_code_are_refused(tmp_path):
    trap = np.empty(1, object)
    trap[0] = Evil()
    np.save(tmp_path / "trap.npy", trap, allow_pickle=True)
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps([[Evil()]]))
    for name in ("trap.npy", "trap.pkl"):
        with pytest.raises(UserError, match="trap"):
            authors.load_training_scores(tmp_path / name, (1, 1))
        with pytest.raises(UserError, match="trap"):
            scoring.load_model(tmp_path / name)
    torch.save({"method": "hf2vad", "model_state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="hf2vad"):
        scoring.load_model(tmp_path / "other.pt")


def test_the_scoring_pass_equals_evaluation_mode():
    torch.manual_seed(0)
    net, cubes = LBR(features_root=8, use_flow=True), torch.rand(5, 15, 32, 32)
    for _ in range(3):
        net(torch.rand(8, 15, 32, 32))  # running statistics that differ from those of a new network
    fast = net.folded(cubes)
    assert net.training  # nothing was switched
    net.eval()
    for key, value in net(cubes).items():
        assert torch.allclose(value, fast[key], atol=1e-5)
    assert "flow" not in net.folded(cubes, flow=False)


def test_self_paced_weights_by_hand():
    s = torch.tensor([1.0, 2.0, 3.0, 10.0])  # mean 4, deviation sqrt(50/3) = 4.082
    deviation = float(np.sqrt(50 / 3))
    hard = self_paced_weights(s, 0, mode="hard", init_std_range=1.2)
    assert hard.tolist() == [1, 1, 1, 0]
    huber = self_paced_weights(s, 0, mode="huber", init_std_range=1.2)
    assert huber.tolist() == pytest.approx([1, 1, 1, (4 + 1.2 * deviation) / 10])
    late = self_paced_weights(s, 10**6, mode="mixture")  # the upper limit never falls below mean + deviation
    assert late.tolist() == [1, 1, 1, 0]
    assert self_paced_weights(torch.tensor([7.0]), 3).tolist() == [0.0]  # a batch of one: no deviation
    assert self_paced_weights(torch.full((4,), 2.0), 0, mode="huber").tolist() == [1.0] * 4


def test_the_rate_is_constant_or_falls_over_the_last_third():
    plan, published = (make_plan("ped2", epochs=9, lr=2.0, **flags) for flags in ({"decay": "cooldown"}, {}))
    for epoch, lr in ((0, 2.0), (6, 2.0), (7, 4 / 3), (7.5, 1.0), (8.5, 1 / 3)):
        assert abs(plan.lr_at(epoch) - lr) < 1e-9 and published.lr_at(epoch) == 2.0, epoch


def test_blocks_scores_and_moments_by_hand():
    boxes = np.array([[0, 0, 10, 10], [80, 0, 100, 20], [90, 70, 120, 99]], np.float32)
    assert scoring.blocks([boxes], [(100, 100)], (2, 2)).tolist() == [0, 1, 3]
    errors, block = np.array([[4, 9], [1, 1], [2, np.nan]], np.float32), np.array([0, 0, 1])
    stats = {0: {"raw_mean": 2.0, "raw_std": 2.0, "flow_mean": 1.0, "flow_std": 4.0, "cubes": 2}}
    assert scoring.combine(errors, block, stats, 0.5, 1.0).tolist() == [0.5 * 1 + 2, 0.5 * -0.5, scoring.NO_MODEL]
    found = top_peaks({"a": np.array([0, 0, 4, 8, 5, 0.0]), "b": np.array([0, 1, 0, 6, 0, 0.0])}, gap=0)
    assert found[0] == ("a", 2, 4, 3, 8.0) and found[1] == ("b", 3, 3, 3, 6.0)
    assert top_peaks({}) == [] and top_peaks({"a": np.full(3, np.nan)}) == []
    assert advantage.means(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1])) == {"normal_loss": 2.0, "abnormal_loss": 5.0}


def test_labels_of_cubes_and_masks_that_do_not_fit():
    """By the masks where they fit, else the frame's labels: labels serve a plot, which must not stop a training."""
    boxes, frames = np.array([[0, 0, 3, 3], [4, 4, 7, 7]]), np.array([0, 2])
    whole = np.zeros((3, 8, 8), bool)
    whole[:, :4, :4] = True

    def damaged():
        raise UserError("pixel masks are damaged")

    expected = {lambda: whole: [1, 0], lambda: whole[:2]: [0, 1], lambda: None: [0, 1], damaged: [0, 1]}
    for masks, labels in expected.items():
        data = SimpleNamespace(masks=lambda v, read=masks: read(), labels=lambda v, n: np.array([0, 0, 1]))
        columns = {"frame": frames, "box": boxes}
        dataset = SimpleNamespace(data=data, column=lambda v, k, c=columns: [c[k]], frames=lambda v: 3)
        assert advantage.cube_labels(dataset, [SimpleNamespace(split="test")]).tolist() == labels


def test_runs_of_equal_folder_names_are_two_curves(tmp_path, monkeypatch):
    for name in ("with", "without"):
        (tmp_path / name / "ped2").mkdir(parents=True)
        line = {"epoch": 1, "normal_loss": 1.0, "abnormal_loss": 2.0}
        (tmp_path / name / "ped2" / "log.jsonl").write_text(json.dumps(line))
    monkeypatch.setattr(advantage, "plot", lambda logs, path: drawn.extend(logs.values()))
    drawn = []
    advantage.main([str(tmp_path / name / "ped2") for name in ("with", "without")])
    assert len(drawn) == 2


def test_flow_boxes_by_hand():
    flow = np.zeros((60, 80, 2), np.float32)
    flow[10:30, 20:36] = 1.0  # squared length 2
    flow[40:52, 60:75] = 0.5  # squared length 0.5: too slow
    s = Settings(motion="flow", motion_threshold=1.0, motion_area=100)
    assert flow_boxes(flow, np.zeros((0, 4)), s).tolist() == [[18, 8, 38, 32]]
    assert len(flow_boxes(flow, np.array([[20, 10, 36, 30]]), s)) == 0


def test_errors_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    net, cubes = LBR(features_root=8).eval(), torch.rand(6, 15, 32, 32)
    whole = cube_errors(net.folded(cubes)["raw"], cubes)
    parts = torch.cat([cube_errors(net.folded(x)["raw"], x) for x in cubes.split(4)])
    assert torch.allclose(whole, parts, rtol=1e-4)


@pytest.mark.kernels
def test_torchrun_with_two_processes(trained, tmp_path):
    where = ("--dataset", "folder", "--data-root", trained[1], "--cache", tmp_path / "cache")
    trained_by_two("spr_uvad", "spr.pt", SMALL, where, tmp_path)
    same_losses("spr_uvad/train.py", (*SMALL, *where), tmp_path)


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
        base / "run" / "spr.pt",
    )
    scored_by_shards("spr_uvad/eval.py", flags, base / "run" / "strict" / "scores.npz", tmp_path)
