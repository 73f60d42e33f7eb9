"""What must hold for any input, tried on hundreds by hypothesis: measures, smoothing, labels, moments, batches."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common import metrics, smoothing
from common.diagnosis import shift_gain
from common.distributed import Run
from common.io import UserError, load_array, stream_npy
from common.loader import Loader, take_rows
from common.readers.labels import csv_ranges
from common.readers.video import select_frames
from common.report.page import rounded
from common.report.plots import ranges
from common.report.ranking import top_peaks
from frd_uvad.features.data import frames_of_clips

MANY = settings(max_examples=150, deadline=None)
NUMBERS = st.floats(-1e6, 1e6, width=32)
LEVELS = st.integers(-4, 4)  # few values: many ties
FILTERS = st.sampled_from(["median:17", "median:4", "gaussian:3", "moving_average:10", "aedmae:38:11", "none"])


@st.composite
def labelled(draw, values=LEVELS):
    """Labels with both classes, and scores with ties."""
    labels = draw(arrays.arrays(np.uint8, st.integers(2, 60), elements=st.integers(0, 1)))
    labels[:2] = 0, 1
    return labels, np.array(draw(st.lists(values, min_size=len(labels), max_size=len(labels))), np.float64)


@MANY
@given(labelled(), st.floats(0.1, 100), NUMBERS)
def test_measures_agree_with_counting_and_ignore_scale(case, scale, shift):
    labels, scores = case
    positive, negative = scores[labels == 1], scores[labels == 0]
    pairs = (positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2
    assert metrics.auc(labels, scores) == pytest.approx(pairs, abs=1e-9)
    assert metrics.auc(labels, -scores) == pytest.approx(1 - pairs, abs=1e-9)
    assert metrics.auc(labels, np.exp(scores / 3)) == pytest.approx(pairs, abs=1e-9)
    threshold = np.unique(scores)
    by_hand = sum(
        (((scores >= t) & (labels == 1)).sum() - ((scores > t) & (labels == 1)).sum())
        / labels.sum()
        * ((scores >= t) & (labels == 1)).sum()
        / (scores >= t).sum()
        for t in threshold
    )
    assert metrics.average_precision(labels, scores) == pytest.approx(by_hand, abs=1e-9)
    assert all(0 <= x <= 1 for x in (*metrics.eer(labels, scores), metrics.pr_auc(labels, scores)))


@MANY
@given(arrays.arrays(np.float64, st.integers(0, 80), elements=NUMBERS), FILTERS)
def test_filters_keep_length_and_range(x, name):
    y = smoothing.parse(name)(x)
    assert y.shape == x.shape and np.isfinite(y).all()
    if len(x):
        span = max(1.0, np.abs(x).max())
        assert (
            y.min() >= min(0, x.min()) - 1e-6 * span
            and y.max() <= max(0, x.max()) * (1.01 if "aed" in name else 1) + 1e-6 * span
        )


@MANY
@given(arrays.arrays(np.float64, st.integers(0, 50), elements=NUMBERS))
def test_minmax_lies_between_0_and_1(x):
    y = smoothing.minmax(x)
    assert y.shape == x.shape and ((y >= 0) & (y <= 1)).all()


@MANY
@given(st.text(max_size=12))
def test_any_text_names_a_filter_or_is_refused(text):
    try:
        assert len(smoothing.parse(text)(np.zeros(5))) == 5
    except UserError as e:
        assert "--smoothing" in str(e)


@MANY
@given(arrays.arrays(np.uint8, st.integers(0, 60), elements=st.integers(0, 1)))
def test_ranges_give_the_labels_back(tmp_path_factory, labels):
    out = np.zeros_like(labels)
    for a, b in ranges(labels):
        assert a < b
        out[a:b] = 1
    assert (out == labels).all()
    path = tmp_path_factory.mktemp("t") / "labels.csv"
    path.write_text("video,start,end\n" + "".join(f"v,{a},{b}\n" for a, b in ranges(labels)))
    assert [(a, b + 1) for a, b in csv_ranges(path, {"v"})["v"]] == ranges(labels)


@MANY
@given(
    st.dictionaries(
        st.sampled_from("abc"), arrays.arrays(np.float64, st.integers(0, 60), elements=NUMBERS), max_size=3
    ),
    st.integers(0, 8),
    st.integers(0, 20),
)
def test_moments_do_not_overlap_and_fall(scores, top, gap):
    found = top_peaks(scores, top=top, gap=gap)
    assert len(found) <= top
    taken = set()
    for video, first, last, peak, score in found:
        assert 0 <= first <= peak <= last < len(scores[video]) and score == scores[video][peak]
        assert not taken & {(video, t) for t in range(first, last + 1)}
        taken |= {(video, t) for t in range(first, last + 1)}
    assert [m[4] for m in found] == sorted((m[4] for m in found), reverse=True)


@MANY
@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 4))
def test_processes_share_every_row_once(n, size, world):
    class Rows:
        read = staticmethod(np.asarray)
        to_device = staticmethod(np.asarray)

        def __len__(self):
            return n

    class Rank:
        batch_slice, device = Run.batch_slice, SimpleNamespace(type="cpu")

        def __init__(self, rank):
            self.rank, self.world_size = rank, world

    per_rank = [[b.data for b in Loader(Rows(), size, n, Rank(rank)).batches(0)] for rank in range(world)]
    assert len({len(p) for p in per_rank}) == 1
    for batch in zip(*per_rank):
        whole = np.concatenate(batch)
        assert len(whole) >= 1 and (len(set(whole)) == len(whole) or all((b == batch[0]).all() for b in batch))
    assert set(np.concatenate([b for p in per_rank for b in p]).tolist() if n else []) == set(range(n))


@MANY
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(sum), st.data())
def test_rows_of_many_arrays_are_those_of_their_join(lengths, data):
    parts = [np.arange(2 * n).reshape(n, 2) + 100 * i for i, n in enumerate(lengths)]
    starts = np.cumsum([0, *lengths])
    rows = data.draw(st.lists(st.integers(0, sum(lengths) - 1), max_size=9))
    assert (take_rows(parts, starts, rows, (2,), parts[0].dtype) == np.concatenate(parts)[rows].reshape(-1, 2)).all()


@MANY
@given(arrays.arrays(np.float32, st.integers(1, 9), elements=st.floats(0, 1, width=32)), st.integers(1, 200))
def test_scores_of_clips_become_scores_of_frames(scores, frames):
    out = frames_of_clips(scores, frames)
    assert len(out) == frames and all(out[t] == scores[min(t // 16, len(scores) - 1)] for t in range(frames))


@MANY
@given(st.integers(0, 30), st.data())
def test_the_same_frames_from_an_array_and_from_a_stream(n, data):
    wanted = data.draw(st.sets(st.integers(0, n - 1), max_size=6)) if n else set()
    frames = list(range(100, 100 + n))
    from_array, from_stream = list(select_frames(frames, wanted)), list(select_frames(iter(frames), wanted))
    assert from_array == from_stream == [(t, 100 + t) for t in sorted(wanted)]


@MANY
@given(st.lists(st.integers(0, 5), max_size=5))
def test_streamed_arrays_are_the_whole_array(tmp_path_factory, lengths):
    path = tmp_path_factory.mktemp("s") / "x.npy"
    parts = [np.full((n, 3), i, np.int16) for i, n in enumerate(lengths)]
    shape = stream_npy(path, parts, np.int16)
    whole = load_array(path, "array")
    assert shape == whole.shape and whole.tolist() == [row for p in parts for row in p.tolist()]


@MANY
@given(st.lists(st.floats(width=64), max_size=20))
def test_numbers_of_a_page_are_json(values):
    out = rounded(values)
    assert all(
        (x is None) == (not np.isfinite(v)) and (x is None or abs(x - v) <= 1e-3 * abs(v)) for x, v in zip(out, values)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(-9, 9))
def test_moved_labels_are_found(seed, by):
    """Scores that follow the labels exactly: moving the labels loses AUC, and the guard names the way back."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(400, np.uint8)
    truth[100:180] = truth[260:300] = 1
    scores = truth + 0.3 * rng.random(400)
    moved = np.roll(truth, by)
    gain, frames = shift_gain({"v": scores}, {"v": moved})
    assert frames == -by and gain == pytest.approx(1 - metrics.auc(moved, scores), abs=1e-9)
