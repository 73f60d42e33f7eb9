"""Measures against hand-computed examples and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from common import evaluation, localization, metrics, smoothing
from common.diagnosis import per_event, read_events, shift_gain
from common.io import UserError
from common.readers.dataset import Dataset
from common.readers.video import Video
from tests.helpers import save_frames, walkers


def test_auc_with_ties_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, s = rng.integers(0, 2, 200), rng.integers(0, 5, 200) / 4
        y[:2] = 0, 1
        assert metrics.auc(y, s) == pytest.approx(roc_auc_score(y, s))
        assert metrics.average_precision(y, s) == pytest.approx(average_precision_score(y, s))


def test_eer_by_hand():
    # thresholds 4, 3, 2, 1: (fpr, tpr) = (0, .5), (.5, .5), (.5, 1), (1, 1): equality fpr = 1 - tpr at (.5, .5)
    assert metrics.eer([1, 0, 1, 0], [4, 3, 2, 1])[0] == pytest.approx(0.5)
    assert metrics.eer([0, 0, 1, 1], [1, 2, 3, 4]) == (0.0, 0.0)


def test_macro_auc_adds_one_frame_of_each_kind():
    mean, each, one_class = metrics.macro_auc([[0, 1], [0, 0]], [[0.9, 0.1], [0.3, 0.7]])
    # video 0: labels 0 0 1 1, scores 0 .9 .1 1 -> 3 of 4 pairs; video 1: the added frame is above everything
    assert each == [pytest.approx(0.75), 1.0] and one_class == 1 and mean == pytest.approx(0.875)
    assert metrics.macro_auc([[0, 1]], [[-5.0, 40.0]])[0] == 1.0


@pytest.mark.parametrize(
    "labels, scores, words",
    [
        ([], [], "no frames"),
        ([1, 1], [1, 2], "no normal"),
        ([0, 0], [1, 2], "no abnormal"),
        ([0, 1], [1], "2 labels but 1"),
        ([0, 1], [1, np.nan], "NaN"),
    ],
)
def test_undefined_measures_say_why(labels, scores, words):
    with pytest.raises(ValueError, match=words):
        metrics.auc(labels, scores)


def test_false_alarm_rate():
    assert metrics.false_alarm_rate([0, 0, 0, 1], [0.6, 0.5, 0.1, 0.9]) == pytest.approx(1 / 3)


def test_iou_counts_inclusive_pixels():
    assert localization.iou([[0, 0, 9, 9]], [[0, 0, 9, 9], [5, 0, 14, 9], [20, 20, 25, 25]])[0] == pytest.approx(
        [1, 50 / 150, 0]
    )


def test_rbdc_tbdc_by_hand():
    # One video of 4 frames, two tracks: A in frames 0 and 1, B in frame 2.
    tracks = [np.array([[0, 0, 0, 0, 9, 9], [0, 1, 0, 0, 9, 9], [1, 2, 50, 50, 59, 59]], float)]
    detections = [
        np.array(
            [
                [0, 0, 0, 9, 9, 0.9],  # finds A in frame 0
                [3, 70, 70, 79, 79, 0.8],  # false positive
                [1, 0, 0, 9, 9, 0.7],  # finds A in frame 1
                [1, 1, 1, 9, 9, 0.65],  # overlaps a region found already: neither
                [2, 80, 80, 89, 89, 0.6],
            ],
            float,
        )
    ]  # false positive; B is never found
    # thresholds .9: x 0, y 1/3 | .8: x 1/4 | .7: x 1/4, y 2/3 | .6: x 2/4, y 2/3, held to 1
    rbdc = (1 / 3) * 0.25 + (2 / 3) * 0.75
    tbdc = 0.5  # track A from the first threshold on, B never
    assert localization.rbdc_tbdc(tracks, detections, 4) == (pytest.approx(rbdc), pytest.approx(tbdc))


def test_rbdc_is_cut_at_one_false_positive_per_frame():
    tracks = [np.array([[0, 0, 0, 0, 9, 9]], float)]
    false = [[0, 50 + 10 * i, 50, 55 + 10 * i, 55, 0.9] for i in range(2)]
    # two false positives in one frame come before the region: at x = 1 the curve is half way up from (0, 0) to (2, 0)
    detections = [np.array(false + [[0, 0, 0, 9, 9, 0.5]], float)]
    assert localization.rbdc_tbdc(tracks, detections, 1) == (0.0, 0.0)
    detections = [np.array(false[:1] + [[0, 0, 0, 9, 9, 0.9], false[1][:5] + [0.2]], float)]
    # .9: (1, 1), reached from (0, 0) on a straight line: a half
    assert localization.rbdc_tbdc(tracks, detections, 1)[0] == pytest.approx(0.5)


def test_rbdc_needs_tracks():
    with pytest.raises(ValueError, match="regions"):
        localization.rbdc_tbdc([np.zeros((0, 6))], [np.zeros((0, 6))], 10)


def test_track_needs_a_tenth_of_its_regions():
    track = np.array([[0, t, 0, 0, 9, 9] for t in range(20)], float)
    two = np.array([[0, 0, 0, 9, 9, 0.9], [1, 0, 0, 9, 9, 0.4]], float)
    assert localization.rbdc_tbdc([track], [two[:1]], 20)[1] == 0  # 1 of 20 is below alpha = 0.1
    assert localization.rbdc_tbdc([track], [two], 20)[1] == 1


def test_tracks_from_masks_link_overlapping_regions():
    masks = np.zeros((4, 20, 20), bool)
    masks[0, 2:6, 2:6] = masks[1, 3:7, 3:7] = masks[3, 3:7, 3:7] = True
    masks[1, 12:15, 12:15] = masks[2, 12:15, 13:16] = True
    t = localization.tracks_from_masks(masks)
    ids = {(int(f), int(x)): int(i) for i, f, x, *_ in t}
    assert ids[0, 2] == ids[1, 3] != ids[3, 3]  # the gap in frame 2 ends the first track
    assert ids[1, 12] == ids[2, 13] and len(t) == 5
    assert t[0].tolist() == [0, 0, 2, 2, 5, 5]  # inclusive


def test_pixel_criterion_by_hand():
    mask = np.zeros((10, 10), bool)
    mask[0, :10] = True
    scores = localization.paint(np.array([[0, 0, 2, 0], [3, 0, 3, 0]], float), np.array([5.0, 2.0]), (10, 10))
    # 3 of 10 pixels reach 5, 4 of 10 reach 2: 40 % are covered up to threshold 2
    assert localization.pixel_frame_score(scores, mask) == 2.0
    assert localization.pixel_frame_score(scores, np.zeros((10, 10), bool)) == 5.0
    assert localization.pixel_auc([1, 0], [2.0, -np.inf]) == 1.0


def test_paint_takes_the_maximum():
    out = localization.paint(np.array([[0, 0, 5, 5], [3, 3, 8, 8]], float), np.array([7.0, 1.0]), (10, 10))
    assert out[4, 4] == 7 and out[7, 7] == 1 and out[9, 9] == -np.inf
    assert (localization.paint(np.array([[0, -9, 5, -5], [-9, 0, -5, 5]]), np.ones(2), (10, 10)) == -np.inf).all()


def regions_of(tmp_path, **more):
    """A dataset of three videos of 20 frames: tracks of a, whose frames 4 to 7 are abnormal; b is normal."""
    videos = [Video(x, save_frames(tmp_path / x, walkers(20))) for x in "abc"]
    for v in videos:
        v.files = sorted(p.name for p in v.path.iterdir())
    track = np.array([[0, t, 10, 10, 19, 19] for t in (4, 5, 6, 7, 30)], np.float32)  # the last one after its end
    labels = {x: np.zeros(20, np.uint8) for x in "abc"}
    labels["a"][4:8] = labels["c"][4:8] = 1
    return Dataset("x", tmp_path, [], videos, **{"_tracks": {"a": lambda: track}, **more}), labels


def test_false_positives_of_normal_videos_and_all_frames_count(tmp_path):
    data, labels = regions_of(tmp_path)
    hits = [[t, 10, 10, 19, 19, 1.0] for t in (4, 5, 6, 7)]
    false = [[t % 20, 40, 40, 49, 49, 2.0] for t in range(10)]
    found = {"a": np.array(hits), "b": np.array(false), "c": np.array(false)}  # abnormal, but nobody says where
    out = localization.measure(data, found, labels)
    assert out["videos_with_regions"] == 2 and "pixel_auc" not in out
    assert out["rbdc"] == 0.75  # 10 false positives in 40 frames, then all regions
    assert localization.measure(Dataset("x", tmp_path, [], data.test), found, labels) == {}


def test_masks_of_another_size_are_named_and_left_out(tmp_path):
    masks = np.zeros((20, 64, 96), bool)
    masks[4:8, 10:20, 10:20] = True
    data, labels = regions_of(tmp_path, _tracks={}, _masks={"a": lambda: masks, "c": lambda: masks[:, :32, :48]})
    found = {x: np.array([[t, 10, 10, 19, 19, 1.0 + (x == "a")] for t in (4, 5, 6, 7)]) for x in "abc"}
    out = localization.measure(data, found, labels)
    assert out["pixel_auc"] == out["rbdc"] == 1 and out["videos_with_regions"] == 2
    assert out["unreadable_regions"] == {"c": "masks of 48×32 pixels, the video has 96×64"}


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    data, _ = regions_of(tmp_path)
    scores = {"a": np.ones(20), "b": np.r_[np.nan, np.inf, np.ones(18)]}
    with pytest.raises(UserError, match="2 of the 20 scores of video b are NaN or infinite: try --precision fp32"):
        evaluation.evaluate(tmp_path / "out", data, scores, protocol=evaluation.Protocol(), method="x")
    assert not (tmp_path / "out").exists()


def test_smoothing_keeps_length_and_handles_short_videos():
    for spec in ("median:17", "gaussian:3", "moving_average:10", "aedmae:38:11", "aedmae:302:21", "none"):
        for n in (0, 1, 2, 5, 400):
            assert smoothing.parse(spec)(np.ones(n)).shape == (n,), (spec, n)
    for wrong in ("mean", "median:x", "median:-3", "none:4", "moving_average:0.5", "aedmae:1"):
        with pytest.raises(UserError):
            smoothing.parse(wrong)
    assert smoothing.minmax([3, 3]).tolist() == [0, 0]


def test_only_the_demo_has_events(tmp_path):
    (tmp_path / "events.csv").write_text("when,what\nMonday,rain\n")
    assert read_events(Dataset("folder", tmp_path, [], [])) == []
    with pytest.raises(UserError, match="columns"):
        read_events(Dataset("demo", tmp_path, [], []))


def test_auc_by_kind_of_event():

    labels = {"a": np.array([0, 0, 1, 1]), "b": np.array([0, 1, 0, 0])}
    scores = {"a": np.array([0.1, 0.5, 0.6, 0.2]), "b": np.array([0.3, 0.4, np.nan, 0.0])}
    events = [("a", "cart", 1, 3), ("a", "run", 3, 4), ("b", "run", 0, 2), ("gone", "run", 0, 1)]
    got = per_event(scores, labels, events)  # normal frames: 0.1, 0.5, 0.3, 0.0
    assert got == {"cart": 1.0, "run": pytest.approx((2 + 3) / 8)}


def test_labels_that_do_not_belong_are_noticed():
    rng, labels = np.random.default_rng(0), {}
    scores = {}
    for i in range(6):
        y = np.zeros(120, np.uint8)
        y[30 + 5 * i : 50 + 5 * i] = 1
        labels[f"v{i}"], scores[f"v{i}"] = y, y + rng.normal(0, 0.3, 120)
    gain, _ = shift_gain(scores, labels)
    assert gain < 0.005
    moved = {k: np.roll(y, 6) for k, y in labels.items()}  # labels come six frames late
    gain, frames = shift_gain(scores, moved)
    assert frames == -6 and gain > 0.1
    y, s = (np.concatenate([x[k] for k in labels]) for x in (labels, scores))
    late = np.concatenate([moved[k] for k in moved])
    assert abs(gain - (metrics.auc(y, s) - metrics.auc(late, s))) < 1e-9  # exactly what the shift costs
    swapped = {**labels, "v0": labels["v5"], "v5": labels["v0"]}
    assert metrics.auc(np.concatenate([swapped[k] for k in swapped]), s) < metrics.auc(y, s) - 0.05
