"""Comparison of runs: intervals against independent libraries, fusion by hand, files that others read."""

import csv
import json

import numpy as np
import pytest

from common import metrics
from common.io import UserError
from common.report import compare
from tests.helpers import refused, script, tiny_folder


def test_a_resample_of_one_kind_has_no_auc():
    scores = {"run": {"video": np.arange(3.0)}}
    assert np.isnan(compare.bootstrap(scores, {"video": np.ones(3)}, 4, 0)["run"]).all()
    assert (compare.bootstrap(scores, {"video": np.array([0, 1, 1])}, 4, 0)["run"] == 1).all()


def test_intervals_narrow_with_videos_and_hold_the_mean():
    rng, widths = np.random.default_rng(0), []
    for count in (8, 80):
        labels = {f"v{i}": np.r_[np.zeros(20, int), np.ones(20, int)] for i in range(count)}
        scores = {k: y + rng.normal(0, 1 + 0.5 * rng.random(), 40) for k, y in labels.items()}
        values = compare.bootstrap({"a": scores}, labels, 300, 0)["a"]
        low, high = compare.interval(values)
        assert low < metrics.auc(np.concatenate(list(labels.values())), np.concatenate(list(scores.values()))) < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]
    assert compare.interval(np.full(3, np.nan)) is None


def test_fusion_by_hand():
    a, b = {"v": np.array([0.0, 2.0])}, {"v": np.array([10.0, 30.0])}
    assert np.allclose(compare.fuse({"a": a, "b": b}, [1, 1])["v"], [-1, 1])
    assert np.allclose(compare.fuse({"a": a, "b": {"v": np.array([5.0, 5.0])}}, [3, 1])["v"], [-0.75, 0.75])
    with pytest.raises(UserError, match="expected 2 numbers"):
        compare.weights_of("1,2,3", 2)


def test_compare_runs_of_one_dataset(tmp_path):
    root = tiny_folder(tmp_path / "data", train=1, test=6)
    rng, y = np.random.default_rng(0), np.arange(24) >= 12
    for name, noise, report in (
        (
            "good/strict",
            0.1,
            {"method": "A|B", "parameters": 7.1e6, "rbdc": 0.5, "training_seconds": 90.0, "frames_per_second": 123.4},
        ),
        ("good/official", 0.11, {}),
        ("bad/strict", 5.0, {}),
    ):
        (tmp_path / name).mkdir(parents=True)
        np.savez(tmp_path / name / "scores.npz", **{f"b{i}": y + rng.normal(0, noise, 24) for i in range(6)})
        (tmp_path / name / "metrics.json").write_text(json.dumps(report))
    runs = [tmp_path / "good" / "strict", tmp_path / "good" / "official" / "scores.npz", tmp_path / "bad" / "strict"]
    common = ("--dataset", "folder", "--data-root", root, "--smoothing", "none", "--resamples", "200")
    done = script("common/report/compare.py", *runs, *common, "--fuse", "--out", tmp_path / "out")
    assert "frames/s, scoring" in done.stdout and "123" in done.stdout
    assert "good/strict − good/official" in done.stdout and "within noise" in done.stdout
    assert "good/strict − bad/strict" in done.stdout and "good/strict is better" in done.stdout
    rows = list(csv.DictReader(open(tmp_path / "out" / "comparison.csv")))
    assert [r["run"] for r in rows] == ["good/strict", "good/official", "bad/strict", "fused"]
    assert float(rows[0]["micro AUC"]) > 99 > float(rows[2]["micro AUC"])
    assert rows[0]["RBDC"] == "50.00" and rows[0]["training, min"] == "1.5"
    assert rows[0]["frames/s, scoring"] == "123" and rows[0]["parameters, M"] == "7.1"
    assert "A\\|B" in (tmp_path / "out" / "comparison.md").read_text() and "TBDC" not in rows[0]
    tex = (tmp_path / "out" / "comparison.tex").read_text()
    assert tex.startswith("\\begin{tabular}{l") and "95 \\% interval" in tex
    assert (tmp_path / "out" / "roc.png").stat().st_size > 1000 and len(
        list((tmp_path / "out" / "curves").iterdir())
    ) == 6
    refused(
        script("common/report/compare.py", *runs, *common, "--fuse", "--fuse-weights", "1,x,1", check=False),
        "--fuse-weights",
    )
    refused(script("common/report/compare.py", runs[0], runs[0], *common, check=False), "twice")
    refused(script("common/report/compare.py", tmp_path, *common, check=False), "scores.npz")
    np.savez(tmp_path / "bad" / "strict" / "scores.npz", b0=np.zeros(24))
    refused(script("common/report/compare.py", *runs, *common, check=False), "different videos")
