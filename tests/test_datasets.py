"""Every layout in circulation, on the real Ped2 and on small synthetic trees."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from common.io import UserError, load_arrays
from common.readers import datasets
from common.readers.dataset import search
from common.readers.labels import read_masks
from tests.helpers import save_frames, save_video, tiny_folder, walkers
from tests.tools.shanghaitech_sd import build

pytestmark = pytest.mark.usefixtures("listing")


def blank(n):
    return np.full((n, 16, 16, 1), 100, np.uint8)


def test_names_ignore_case_and_know_the_papers_spellings():
    for spelling, name in (
        ("UCSDped2", "ped2"),
        ("Ped1", "ped1"),
        ("ShanghaiTech", "shanghaitech"),
        ("shanghai", "shanghaitech"),
        ("AVENUE", "avenue"),
        ("folder", "folder"),
    ):
        assert datasets.canonical(spelling) == name
    with pytest.raises(UserError, match="ped2"):
        datasets.canonical("ped3")


def test_real_ped2(shared_data):
    data = datasets.find("UCSDped2", shared_data)
    assert (len(data.train), len(data.test)) == (16, 12)
    assert sum(len(v.files) for v in data.train) == 2550 and sum(len(v.files) for v in data.test) == 2010
    assert data.label_source == "ped2.mat"
    labels = {v.name: data.labels(v, len(v.files)) for v in data.test}
    assert sum(int(x.sum()) for x in labels.values()) == 1648
    for name, expected in load_arrays(shared_data / "labels" / "ped2.npz", "labels").items():
        assert (labels[name] == expected).all(), name
    for v in data.test:  # pixel masks say the same as the frame labels
        assert (data.masks(v).any((1, 2)) == labels[v.name]).all(), v.name


@pytest.mark.parametrize("name, frames, abnormal", [("avenue_from_masks", 15324, 3712), ("shanghaitech", 40791, 17326)])
def test_label_counts_of_the_other_sets(shared_data, name, frames, abnormal):
    labels = load_arrays(shared_data / "labels" / f"{name}.npz", "labels")
    assert sum(map(len, labels.values())) == frames and sum(int(x.sum()) for x in labels.values()) == abnormal


@pytest.mark.parametrize("layout", ["original", "copy", "copy with original names"])
def test_ucsd_layouts(tmp_path, layout):
    n = 12
    for i in (1, 2):
        for split, short in (("training", "Train"), ("testing", "Test")):
            folder = {
                "original": tmp_path / "UCSD_Anomaly_Dataset.v1p2" / "UCSDped1" / short / f"{short}00{i}",
                "copy": tmp_path / "ped1" / split / "frames" / f"0{i}",
                "copy with original names": tmp_path / "ped1" / split / "frames" / f"{short}00{i}",
            }[layout]
            save_frames(folder, blank(n), ".jpg" if layout == "copy" else ".tif")
    if layout == "original":
        root = tmp_path / "UCSD_Anomaly_Dataset.v1p2" / "UCSDped1"
        (root / "Test" / "UCSDped1.m").write_text(
            "% ground truth\nTestVideoFile = {};\nTestVideoFile{end+1}.gt_frame = [3:5];\n"
            "TestVideoFile{end+1}.gt_frame = [1:2, 10:12];\n"
        )
        masks = np.zeros((n, 16, 16, 1), np.uint8)
        masks[2:5, 4:8, 4:8] = 255
        save_frames(root / "Test" / "Test001_gt", masks, ".bmp")
    else:
        cells = np.empty((1, 2), object)
        cells[0, 0], cells[0, 1] = np.array([[3], [5]]), np.array([[1, 10], [2, 12]])
        scipy.io.savemat(tmp_path / "ped1" / "ped1.mat", {"gt": cells})
    data = datasets.find("ped1", tmp_path)
    assert [v.name for v in data.train] == [v.name for v in data.test] == ["01", "02"]
    labels = [data.labels(v, n) for v in data.test]
    assert labels[0].tolist() == [0, 0, 1, 1, 1] + [0] * 7 and labels[1].tolist() == [1, 1] + [0] * 7 + [1, 1, 1]
    if layout == "original":
        assert data.masks(data.test[0]).sum() == 3 * 16 and data.masks(data.test[1]) is None


def test_ucsd_labels_from_masks_alone(tmp_path):
    for i in (1, 2):
        save_frames(tmp_path / "Train" / f"Train00{i}", blank(4), ".tif")
        save_frames(tmp_path / "Test" / f"Test00{i}", blank(4), ".tif")
        masks = np.zeros((4, 16, 16, 1), np.uint8)
        masks[i:, 3:9, 3:9] = 255
        folder = save_frames(tmp_path / "Test" / f"Test00{i}_gt", masks, ".bmp")
        for f in list(folder.iterdir()):
            f.rename(folder / f"frame{f.name}")  # the other spelling in circulation
    data = datasets.find("ped2", tmp_path)
    assert [data.labels(v, 4).tolist() for v in data.test] == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert "masks" in data.label_source


@pytest.mark.parametrize("videos", [True, False])
def test_avenue_layouts(tmp_path, videos):
    root = tmp_path / "Avenue Dataset"
    for split, count in (("training", 1), ("testing", 2)):
        for i in range(1, count + 1):
            if videos:
                save_video(root / f"{split}_videos" / f"{i:02d}.avi", np.repeat(blank(6), 3, 3))
            else:
                save_frames(root / split / "frames" / f"{i:02d}", blank(6), ".jpg", digits=4)
    if videos:
        for i in (1, 2):
            cells = np.empty((1, 6), object)
            for t in range(6):
                cells[0, t] = np.full((16, 16), int(t >= 3 * i - 1), np.uint8)
            (root / "ground_truth_demo" / "testing_label_mask").mkdir(parents=True, exist_ok=True)
            scipy.io.savemat(root / "ground_truth_demo" / "testing_label_mask" / f"{i}_label.mat", {"volLabel": cells})
    else:
        cells = np.empty((1, 2), object)
        cells[0, 0], cells[0, 1] = np.array([[3], [6]]), np.array([[6], [6]])
        scipy.io.savemat(root / "avenue.mat", {"gt": cells})
    data = datasets.find("avenue", tmp_path)
    assert [v.name for v in data.test] == ["01", "02"]
    assert [data.labels(v, 6).tolist() for v in data.test] == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    assert data.label_source == ("masks: testing_label_mask (volLabel)" if videos else "avenue.mat")


def test_shanghaitech_layout(tmp_path):
    root = tmp_path / "shanghaitech"
    save_video(root / "training" / "videos" / "01_001.avi", np.repeat(blank(5), 3, 3))
    save_frames(root / "testing" / "frames" / "01_0014", blank(5), ".jpg")
    for kind in ("test_frame_mask", "test_pixel_mask"):
        (root / "testing" / kind).mkdir()
    np.save(root / "testing" / "test_frame_mask" / "01_0014.npy", np.array([0, 1, 1, 0, 0], np.int8))
    np.save(root / "testing" / "test_pixel_mask" / "01_0014.npy", np.zeros((5, 16, 16), np.int8))
    data = datasets.find("shanghai", tmp_path)
    v = data.test[0]
    assert (v.name, v.scene, data.train[0].scene) == ("01_0014", "01", "01")
    assert data.labels(v, 5).tolist() == [0, 1, 1, 0, 0] and data.masks(v).shape == (5, 16, 16)


def test_folder_with_every_kind_of_label(tmp_path):
    save_video(tmp_path / "train" / "café one.avi", walkers(5))
    for name in ("a", "b", "c d"):
        save_frames(tmp_path / "test" / name, blank(6))
    (tmp_path / "labels.csv").write_text("video,start,end\na,1,3\na,5,6\nc d,0,1\n", encoding="utf-8")
    data = datasets.find("folder", tmp_path)
    assert [v.name for v in data.train] == ["café one"]
    assert {v.name: data.labels(v, 6).tolist() for v in data.test} == {
        "a": [0, 1, 1, 0, 0, 1],
        "b": [0] * 6,
        "c d": [1, 0, 0, 0, 0, 0],
    }
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels" / "a.npy", np.array([0, 0, 1, 0, 0, 0]))
    (tmp_path / "labels" / "b.txt").write_text("0 0 0\n0 1 1\n")
    data = datasets.find("folder", tmp_path)
    assert data.labels(data.test[1], 6).tolist() == [0, 0, 0, 0, 1, 1]
    with pytest.raises(UserError, match="no labels for video c d"):
        data.labels(data.test[2], 6)


def test_folder_without_splits_is_all_test(tmp_path):
    save_video(tmp_path / "one.avi", walkers(5))
    data = datasets.find("folder", tmp_path)
    assert data.train == [] and [v.name for v in data.test] == ["one"] and data.labels(data.test[0], 5) is None


def test_labels_of_the_wrong_length_name_both(tmp_path):
    save_frames(tmp_path / "test" / "a", blank(6))
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels" / "a.npy", np.zeros(5, np.uint8))
    data = datasets.find("folder", tmp_path)
    with pytest.raises(UserError, match="video a .* 5 entries.*6 frames"):
        data.labels(data.test[0], 6)
    (tmp_path / "labels.csv").write_text("a,2,9\n")
    (tmp_path / "labels" / "a.npy").unlink()
    data = datasets.find("folder", tmp_path)
    with pytest.raises(UserError, match="3..9.*6 frames"):
        data.labels(data.test[0], 6)


@pytest.mark.parametrize(
    "text, words", [("a,x,3", "line 1"), ("nobody,1,3", "no test video nobody"), ("a,3,3", "empty")]
)
def test_csv_labels_name_the_line(tmp_path, text, words):
    save_frames(tmp_path / "test" / "a", blank(6))
    (tmp_path / "labels.csv").write_text(text + "\n")
    with pytest.raises(UserError, match=words):
        datasets.find("folder", tmp_path)


def test_a_wrong_root_says_what_was_looked_for_and_found(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        datasets.find("ped2", tmp_path / "nowhere")
    (tmp_path / "holiday pictures").mkdir()
    with pytest.raises(UserError) as e:
        datasets.find("ped2", tmp_path)
    assert "training/frames" in str(e.value) and "holiday pictures/" in str(e.value)
    with pytest.raises(UserError, match="holds no videos"):
        datasets.find("folder", tmp_path)


def test_labels_are_never_unpickled(tmp_path):
    save_frames(tmp_path / "test" / "a", blank(3))
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels" / "a.npy", np.array([{"x": 1}] * 3, object), allow_pickle=True)
    data = datasets.find("folder", tmp_path)
    with pytest.raises(UserError, match="pickled objects are refused"):
        data.labels(data.test[0], 3)


def test_labels_from_an_npz(tmp_path, shared_data):
    data = datasets.find("ped2", shared_data, labels=shared_data / "labels" / "ped2.npz")
    assert data.label_source.endswith("ped2.npz") and data.labels(data.test[0], 180).sum() == 120


def test_soft_labels_are_refused(tmp_path):
    root = tiny_folder(tmp_path)
    for p in (root / "labels").iterdir():
        p.unlink()
    (root / "labels" / "b0.txt").write_text("0 1 " * 12)
    (root / "labels" / "b1.txt").write_text("0 0.7 " * 12)
    data = datasets.find("folder", root)
    assert data.labels(data.test[0], 24).sum() == 12
    with pytest.raises(UserError, match="labels of video b1 .* must be 0 or 1 per frame"):
        data.labels(data.test[1], 24)


@pytest.mark.parametrize("white", [1, 255])
def test_masks_of_zeros_and_ones(tmp_path, white):
    masks = np.zeros((3, 8, 8, 1), np.uint8)
    masks[1, 2:4] = white
    assert (read_masks(save_frames(tmp_path / "m", masks)) == (masks[..., 0] > 0)).all()


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    for name in ("closed", "open"):
        (tmp_path / name / "wanted").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "closed")
    assert search(tmp_path, "wanted") == [tmp_path / "open" / "wanted"]


def test_a_test_video_without_labels_is_not_normal(tmp_path):
    for place in ("training/frames/01_001", "testing/frames/01_0014", "testing/frames/01_0015"):
        save_frames(tmp_path / "a" / place, walkers(2))
    (tmp_path / "a" / "testing" / "test_frame_mask").mkdir()
    np.save(tmp_path / "a" / "testing" / "test_frame_mask" / "01_0014.npy", [0, 1])
    (tmp_path / "list").write_text("training 01_001\ntesting 01_0014\n")
    assert build(tmp_path / "list", tmp_path / "a", tmp_path / "b") == 2
    (tmp_path / "list").write_text("testing 01_0014\ntesting 01_001\ntesting 01_0015\n")
    with pytest.raises(UserError, match="video 01_0015 of .* has no labels"):
        build(tmp_path / "list", tmp_path / "a", tmp_path / "c")
