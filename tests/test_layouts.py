"""Datasets laid out as people have them: unpacked side by side, linked from other disks, incomplete, oddly named, in
any order. Labels, masks, tracks, boxes and features stand at the video that they were made for, and what is missing
is said."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io

from common import evaluation
from common.flow.sources import flow_from_files
from common.io import UserError
from common.objects import detectors
from common.readers import datasets
from common.readers.dataset import UsableVideos, report_skipped
from common.readers.labels import read_masks
from common.readers.ucsd import matlab_ranges
from common.readers.video import Decoder
from common.report import compare
from frd_uvad.features.data import CLIP_FRAMES
from frd_uvad.features.folders import find_features
from frd_uvad.features.labels import read_annotations
from scene_aware_ae.encoder import GivenFeatures
from tests.helpers import refused, save_frames, save_video, script, walkers

either_order = pytest.mark.usefixtures("listing")  # of files in folders

FRAMES = 12


def blank(n=FRAMES, channels=1):
    return np.full((n, 16, 16, channels), 100, np.uint8)


def video(path, n=FRAMES):
    return save_video(path, blank(n, 3))


def marks(*frames, n=FRAMES):
    """uint8 [n]: 1 at these frames."""
    y = np.zeros(n, np.uint8)
    y[list(frames)] = 1
    return y


def masks_of(y):
    """Black and white pictures, uint8 [T, 16, 16, 1]: a white square in the abnormal frames."""
    out = np.zeros((len(y), 16, 16, 1), np.uint8)
    out[np.flatnonzero(y), 4:8, 4:8] = 255
    return out


def labels_of(data):
    return {v.name: data.labels(v, FRAMES).tolist() for v in data.test}


def save_avenue_mask(folder, number, y):
    folder.mkdir(parents=True, exist_ok=True)
    cells = np.empty((1, len(y)), object)
    for t, mask in enumerate(masks_of(y)):
        cells[0, t] = mask[:, :, 0] // 255
    scipy.io.savemat(folder / f"{number}_label.mat", {"volLabel": cells})


def save_ranges(path, *videos):
    """A .mat as `gt`: per video its ranges, 1-based inclusive."""
    cells = np.empty((1, len(videos)), object)
    for i, ranges in enumerate(videos):
        cells[0, i] = np.array(ranges).T.reshape(2, -1)
    scipy.io.savemat(path, {"gt": cells})


# --------------------------------------------------------------------------------------- archives unpacked side by side

AVENUE = {1: marks(2, 3, 4), 2: marks(0, 11), 10: marks(7)}


def unpack_avenue(root, beside=None):
    for i in AVENUE:
        video(root / "testing_videos" / f"{i:02d}.avi")
    video(root / "training_videos" / "01.avi")
    for i, y in AVENUE.items() if beside else ():
        save_avenue_mask(beside, i, y)


@either_order
@pytest.mark.parametrize(
    "videos, masks",
    [
        ("Avenue Dataset", "ground_truth_demo/testing_label_mask"),
        ("Avenue Dataset", "testing_label_mask"),
        (
            "Avenue_Dataset/Avenue Dataset",
            "ground_truth_demo/ground_truth_demo/testing_label_mask",
        ),  # each in a folder of its own
        ("avenue", "ground_truth_demo/testing_label_mask"),
    ],
)
def test_avenues_two_archives_side_by_side(tmp_path, videos, masks):
    unpack_avenue(tmp_path / videos, tmp_path / masks)
    data = datasets.find("avenue", tmp_path)
    assert [v.name for v in data.train] == ["01"] and [v.name for v in data.test] == ["01", "02", "10"]
    assert labels_of(data) == {f"{i:02d}": y.tolist() for i, y in AVENUE.items()}
    assert data.label_source == "masks: testing_label_mask (volLabel)"
    assert data.masks(data.test[2]).sum((1, 2)).tolist() == (16 * AVENUE[10].astype(int)).tolist()
    assert labels_of(datasets.find("avenue", tmp_path / videos)) == labels_of(
        data
    )  # --data-root is the folder of videos itself


def test_avenue_without_masks_says_where_labels_were_looked_for(tmp_path):
    unpack_avenue(tmp_path / "Avenue Dataset")
    data = datasets.find("avenue", tmp_path)
    assert not data.has_labels and data.labels(data.test[0], FRAMES) is None
    for said in (tmp_path / "Avenue Dataset", "1_label.mat", "ground_truth_demo/", "avenue.mat"):
        assert str(said) in data.no_labels(), said


@pytest.mark.parametrize(
    "name, folders, forms",
    [
        ("ped1", ("Train/Train001", "Test/Test001"), ("ped1.mat", "UCSDped1.m", "Test*_gt")),
        ("shanghaitech", ("training/frames/01_001", "testing/frames/01_0014"), ("test_frame_mask/", ".npy")),
        ("folder", ("train/a", "test/b"), ("labels/<video>.npy", "labels.csv", "masks/")),
    ],
)
def test_missing_labels_name_the_forms_that_are_read(tmp_path, capsys, name, folders, forms):
    for folder in folders:
        save_frames(tmp_path / folder, blank())
    data = datasets.find(name, tmp_path)
    assert not data.has_labels
    evaluation.evaluate(
        tmp_path / "out",
        data,
        {v.name: np.arange(FRAMES) for v in data.test},
        protocol=evaluation.Protocol(),
        method="m",
    )
    said = capsys.readouterr().out
    for form in (*forms, str(tmp_path)):
        assert said.count(form) and form in data.no_labels(), form


# ------------------------------------------------------------------------------------------------------- symbolic links


def link(path, disk):
    """Move a file or folder to another disk and leave a symbolic link."""
    target = disk / f"{len(list(disk.iterdir()))}-{'x' if path.is_dir() else path.name}"
    shutil.move(path, target)
    path.symlink_to(target)


def ped1(root):
    for split in ("Train", "Test"):
        for i in (1, 2):
            save_frames(root / split / f"{split}00{i}", blank(), ".tif")
    (root / "Test" / "UCSDped1.m").write_text(
        "TestVideoFile{end+1}.gt_frame = [3:5];\nTestVideoFile{end+1}.gt_frame = [1:2, 10:12];\n"
    )
    save_frames(root / "Test" / "Test001_gt", masks_of(marks(2, 3, 4)), ".bmp")


def shanghai(root):
    video(root / "training" / "videos" / "01_001.avi")
    for i, name in enumerate(("01_0014", "02_0001")):
        save_frames(root / "testing" / "frames" / name, blank(), ".jpg")
        for kind, array in (("frame", marks(i, 5)), ("pixel", masks_of(marks(i, 5))[..., 0])):
            path = root / "testing" / f"test_{kind}_mask" / f"{name}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, array)


def own_folder(root):
    for name in ("a", "b"):
        save_frames(root / "test" / name, blank())
        save_frames(root / "masks" / name, masks_of(marks(3, 4)))
    video(root / "train" / "Abuse" / "c.avi")
    (root / "labels.csv").write_text("a,1,3\nb,11,12\n")


LINKED = {
    "ped1": ("ped1", "UCSDped1", ped1, ["", "Test", "Test/Test002", "Test/Test001_gt", "Test/UCSDped1.m"]),
    "avenue": (
        "avenue",
        "Avenue Dataset",
        lambda root: unpack_avenue(root, root.parent / "ground_truth_demo" / "testing_label_mask"),
        [
            "",
            "testing_videos",
            "testing_videos/02.avi",
            "../ground_truth_demo",
            "../ground_truth_demo/testing_label_mask",
            "../ground_truth_demo/testing_label_mask/2_label.mat",
        ],
    ),
    "shanghaitech": (
        "shanghaitech",
        "shanghaitech",
        shanghai,
        [
            "",
            "testing",
            "testing/frames",
            "testing/frames/02_0001",
            "testing/test_frame_mask",
            "testing/test_pixel_mask",
            "testing/test_frame_mask/01_0014.npy",
            "training/videos/01_001.avi",
        ],
    ),
    "ubnormal": (
        "ubnormal",
        "UBnormal",
        lambda root: ubnormal(root),
        [
            "",
            "scripts",
            "scripts/abnormal_test_video_names.txt",
            "Scene2",
            "Scene2/abnormal_scene_2_scenario_10.avi",
            "Scene2/abnormal_scene_2_scenario_10_annotations",
            "Scene2/abnormal_scene_2_scenario_10_annotations/abnormal_scene_2_scenario_10_tracks.txt",
            "Scene2/abnormal_scene_2_scenario_10_annotations/abnormal_scene_2_scenario_10_0003_gt.png",
        ],
    ),
    "folder": (
        "folder",
        "",
        own_folder,
        ["test", "test/a", "masks", "masks/b", "labels.csv", "train", "train/Abuse", "train/Abuse/c.avi"],
    ),
}


def seen(data):
    return (
        labels_of(data),
        [v.name for v in data.train],
        data.label_source,
        data.mask_source,
        {v.name: None if (x := data.masks(v)) is None else x.sum((1, 2)).tolist() for v in data.test},
    )


@either_order
@pytest.mark.parametrize(
    "layout, linked", [(name, place) for name, (*_, places) in LINKED.items() for place in [*places, "everything"]]
)
def test_links_to_another_disk_change_nothing(tmp_path, layout, linked):
    name, folder, make, places = LINKED[layout]
    data_root, disk = tmp_path / "data", tmp_path / "disk"
    disk.mkdir()
    make(data_root / folder)
    plain = seen(datasets.find(name, data_root))
    for place in sorted(places, key=lambda p: -len(p)) if linked == "everything" else [linked]:  # the inner ones first
        link(Path(os.path.normpath(data_root / folder / place)), disk)
    assert seen(datasets.find(name, data_root)) == plain
    if folder:
        assert seen(datasets.find(name, data_root / folder)) == plain
    link(data_root, disk)
    assert seen(datasets.find(name, data_root)) == plain


@either_order
@pytest.mark.parametrize("layout", LINKED)
def test_a_loop_of_links_ends(tmp_path, layout):
    name, folder, make, _ = LINKED[layout]
    root = tmp_path / folder
    make(root)
    plain = seen(datasets.find(name, tmp_path))
    for place in {
        "ped1": ("Test", ""),
        "avenue": ("testing_videos", ""),
        "shanghaitech": ("testing", ""),
        "ubnormal": ("scripts", "Scene2", ""),
        "folder": ("test",),
    }[layout]:
        (root / place / "back").symlink_to(root)
        (root / place / "nowhere").symlink_to(root / "nothing")
    assert seen(datasets.find(name, tmp_path)) == plain


@either_order
def test_features_behind_links(tmp_path):
    for path in ("test/Abuse/a.npy", "test/b.npy", "train/c.npy"):
        (tmp_path / "f" / path).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "f" / path, np.zeros((2, 1, 8), np.float32))
    (tmp_path / "f" / "labels").mkdir()
    for name, y in (("a", marks(3, n=2 * CLIP_FRAMES)), ("b", marks(4, n=2 * CLIP_FRAMES))):
        np.save(tmp_path / "f" / "labels" / f"{name}.npy", y)
    disk = tmp_path / "disk"
    disk.mkdir()
    for path in ("test/Abuse", "test/b.npy", "train", "labels/b.npy", "labels", "test", ""):
        link(tmp_path / "f" / path, disk)
        data = find_features("features", tmp_path / "f")
        assert {v.name: np.flatnonzero(data.labels(v)).tolist() for v in data.test} == {"a": [3], "b": [4]}, path
        assert [v.name for v in data.train] == ["c"], path
    (tmp_path / "f" / "test" / "back").symlink_to(tmp_path / "f" / "test")
    assert [v.name for v in find_features("features", tmp_path / "f").test] == ["a", "b"]


# ------------------------------------------------------------------------------------------------- masks of some videos

PED1 = [marks(2, 3, 4), marks(5, 6), marks(0), marks(9, 10, 11)]


PED1_MASKS = (PED1[0], None, None, PED1[3])


def published_ped1(root, masks=PED1_MASKS):
    """Ranges of four test videos, and masks of some."""
    for i, y in enumerate(masks, 1):
        save_frames(root / "Train" / f"Train00{i}", blank(), ".tif")
        save_frames(root / "Test" / f"Test00{i}", blank(), ".tif")
        if y is not None:
            save_frames(root / "Test" / f"Test00{i}_gt", masks_of(y), ".bmp")
    (root / "Test" / "UCSDped1.m").write_text(
        "".join(
            f"TestVideoFile{{end+1}}.gt_frame = [{y.nonzero()[0][0] + 1}:{y.nonzero()[0][-1] + 1}];\n" for y in PED1
        )
    )
    return datasets.find("ped1", root)


def evaluated(data, out, box=(4, 4, 7, 7)):
    """Perfect scores, and one box a frame where the masks of these tests are."""
    scores = {v.name: data.labels(v, FRAMES).astype(np.float32) for v in data.test}
    found = {k: np.array([(t, *box, s) for t, s in enumerate(y)], np.float32) for k, y in scores.items()}
    return evaluation.evaluate(
        out, data, scores, protocol=evaluation.Protocol("strict", "none"), method="m", detections=found
    ).metrics


def test_ped1_measures_regions_of_the_videos_that_have_masks(tmp_path, capsys):
    data = published_ped1(tmp_path / "UCSDped1")
    assert list(labels_of(data).values()) == [y.tolist() for y in PED1] and data.label_source == "UCSDped1.m"
    assert [data.masks(v) is not None for v in data.test] == [True, False, False, True]
    result = evaluated(data, tmp_path / "out")
    said = capsys.readouterr().out
    assert (result["videos_with_regions"], result["videos"]) == (2, 4)
    assert result["micro_auc"] == result["pixel_auc"] == 1 and result["rbdc"] == result["tbdc"] == 1
    assert said.count("are of the 2 of 4 videos that have masks or tracks") == 1 and "differs from" not in said
    wrong = evaluated(data, tmp_path / "wrong", box=(10, 10, 13, 13))
    assert wrong["micro_auc"] == 1 and wrong["rbdc"] == wrong["tbdc"] == 0 and wrong["pixel_auc"] < 1


def test_ped1_without_any_mask_leaves_regions_out(tmp_path, capsys):
    result = evaluated(published_ped1(tmp_path / "UCSDped1", [None] * 4), tmp_path / "out")
    assert result["micro_auc"] == 1 and "rbdc" not in result and "that have masks" not in capsys.readouterr().out


def test_masks_and_ranges_that_disagree_are_counted_once(tmp_path, capsys):
    masks = (marks(2, 3), None, marks(0), marks(8, 9, 10, 11, 1))  # one frame less, none here, the same, two more
    data = published_ped1(tmp_path / "UCSDped1", masks)
    result = evaluated(data, tmp_path / "out")
    sentence = "Test*_gt images differs from UCSDped1.m (the one in use) in 3 frames of 2 videos"
    assert result["other_labels"] == sentence and capsys.readouterr().out.count(sentence) == 1
    assert result["abnormal_frames"] == sum(int(y.sum()) for y in PED1)


def test_avenues_masks_count_and_its_ranges_are_compared(tmp_path, capsys):
    unpack_avenue(tmp_path / "Avenue Dataset", tmp_path / "ground_truth_demo" / "testing_label_mask")
    save_ranges(
        tmp_path / "Avenue Dataset" / "avenue.mat", [(3, 5)], [(1, 2), (12, 12)], *[[]] * 7, [(8, 9)]
    )  # 10 is the tenth
    data = datasets.find("avenue", tmp_path)
    result = evaluated(data, tmp_path / "out")
    sentence = "avenue.mat differs from masks: testing_label_mask (volLabel) (the one in use) in 2 frames of 2 videos"
    assert result["other_labels"] == sentence and capsys.readouterr().out.count(sentence) == 1
    assert result["abnormal_frames"] == sum(int(y.sum()) for y in AVENUE.values())


def test_avenues_ranges_of_another_version_are_named(tmp_path, capsys):
    unpack_avenue(tmp_path / "Avenue Dataset", tmp_path / "ground_truth_demo" / "testing_label_mask")
    save_ranges(tmp_path / "Avenue Dataset" / "avenue.mat", [(3, 5)], [(1, 900)], *[[]] * 7, [(8, 9)])
    data = datasets.find("avenue", tmp_path)
    assert evaluated(data, tmp_path / "out")["abnormal_frames"] == sum(int(y.sum()) for y in AVENUE.values())
    said = capsys.readouterr().out
    assert (
        "avenue.mat differs from masks: testing_label_mask (volLabel) (the one in use) in 1 frames of 1 videos; "
        "avenue.mat could not be compared with masks: testing_label_mask (volLabel) in 1 videos: labels of video 02 "
        "(avenue.mat) mark frames "
        "1..900" in said
    )


SOURCES = ["labels/ and labels.csv", "labels.csv and masks/", "labels/ and masks/", "masks/ alone", "labels.csv alone"]


@pytest.mark.parametrize("sources", SOURCES)
def test_two_sources_of_ones_own_labels_are_compared(tmp_path, capsys, sources):
    root, first = tmp_path / "data", [marks(1, 2), marks(4)]
    second = [marks(2, 3, 4), marks(4)]
    kinds = sources.replace(" alone", "").split(" and ")
    for name, *ys in zip("ab", first, second):
        save_frames(root / "test" / name, blank())
        for kind, y in zip(kinds, ys):
            if kind == "labels/":
                (root / "labels").mkdir(exist_ok=True)
                np.save(root / "labels" / f"{name}.npy", y)
            elif kind == "masks/":
                save_frames(root / "masks" / name, masks_of(y))
            else:
                with open(root / "labels.csv", "a") as f:
                    f.write("".join(f"{name},{t},{t + 1}\n" for t in np.flatnonzero(y)))
    data = datasets.find("folder", root)
    result = evaluated(data, tmp_path / "out")
    assert labels_of(data) == {name: y.tolist() for name, y in zip("ab", first)}
    said = capsys.readouterr().out
    if len(kinds) == 2:
        sentence = f"{kinds[1]} differs from {kinds[0]} (the one in use) in 3 frames of 1 videos"
        assert result["other_labels"] == sentence and said.count(sentence) == 1
    else:
        assert "other_labels" not in result and "differs from" not in said


def test_a_csv_that_cannot_be_compared_is_named(tmp_path, capsys):
    save_frames(tmp_path / "test" / "a", blank())
    (tmp_path / "labels").mkdir()
    np.save(tmp_path / "labels" / "a.npy", marks(1))
    (tmp_path / "labels.csv").write_text("a training video,0,3\n")
    assert labels_of(datasets.find("folder", tmp_path)) == {"a": marks(1).tolist()}
    assert "labels are those of labels/; labels.csv is not compared (" in capsys.readouterr().out


def test_regions_that_are_not_defined_are_said(tmp_path, capsys):
    data = published_ped1(tmp_path / "UCSDped1", [marks(), None, None, None])
    assert "rbdc" not in evaluated(data, tmp_path / "out")
    assert "RBDC, TBDC and pixel-level AUC: not defined here (" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["spoilt", "one missing", "the last missing"])
def test_damaged_masks_cost_the_regions_of_one_video(tmp_path, capsys, damage):
    data = published_ped1(tmp_path / "UCSDped1")
    place = tmp_path / "UCSDped1" / "Test" / "Test004_gt"
    if damage == "spoilt":
        (place / "005.bmp").write_bytes(b"BM")
    else:
        (place / ("005.bmp" if damage == "one missing" else "011.bmp")).unlink()
    result = evaluated(data, tmp_path / "out")
    assert result["videos_with_regions"] == 1 and result["micro_auc"] == result["rbdc"] == result["pixel_auc"] == 1
    assert list(result["unreadable_regions"]) == ["04"]
    assert "regions of video 04 are left out: " in (said := capsys.readouterr().out)
    if damage == "the last missing":
        assert "Test*_gt images differs from UCSDped1.m (the one in use) in 1 frames of 1 videos" in said
    else:
        assert "Test*_gt images could not be compared with UCSDped1.m in 1 videos: pixel mask" in said


# ------------------------------------------------------------------------------------------------- one split, or a part


@pytest.mark.parametrize("place", ["UCSDped1", "UCSD_Anomaly_Dataset.v1p2/UCSDped1", "link"])
def test_ped1_with_its_test_videos_alone(tmp_path, place):
    root = tmp_path / ("disk" if place == "link" else place)
    published_ped1(root)
    shutil.rmtree(root / "Train")
    if place == "link":
        (tmp_path / "UCSDped1").symlink_to(root)
        root = tmp_path / "UCSDped1"
    data = datasets.find("ped1", root)
    assert data.train == [] and list(labels_of(data).values()) == [y.tolist() for y in PED1]
    assert evaluated(data, tmp_path / "out")["rbdc"] == 1
    assert labels_of(datasets.find("ped1", tmp_path)) == labels_of(data)


@either_order
@pytest.mark.parametrize("lost", [1, 3])
def test_a_video_that_is_missing_moves_no_labels(tmp_path, lost):
    """Ranges go by the videos' numbers, also where one of them is not there."""
    published_ped1(tmp_path / "UCSDped1")
    shutil.rmtree(tmp_path / "UCSDped1" / "Test" / f"Test00{lost}")
    expected = {f"{i:02d}": y.tolist() for i, y in enumerate(PED1, 1) if i != lost}
    data = datasets.find("ped1", tmp_path)
    assert labels_of(data) == expected
    (tmp_path / "UCSDped1" / "Test" / "UCSDped1.m").unlink()
    save_ranges(tmp_path / "UCSDped1" / "ped1.mat", *[[(y.nonzero()[0][0] + 1, y.nonzero()[0][-1] + 1)] for y in PED1])
    assert labels_of(datasets.find("ped1", tmp_path)) == expected
    assert evaluated(data, tmp_path / "out")["videos_with_regions"] == 2 - (lost == 1)


@pytest.mark.parametrize(
    "place",
    ["UCSDped1", "UCSD/UCSDped1", "UCSD_Anomaly_Dataset/UCSD_Anomaly_Dataset.v1p2/UCSDped1"],
)
def test_a_datasets_own_folder_goes_before_videos_beside_it(tmp_path, place):
    published_ped1(tmp_path / place)
    for split in ("train", "test"):
        save_frames(tmp_path / split / "Test001", blank())
    assert datasets.find("ped1", tmp_path).root == tmp_path / place
    assert datasets.find("folder", tmp_path).root == tmp_path


def test_a_whole_dataset_goes_before_a_part_of_it(tmp_path):
    published_ped1(tmp_path)
    save_frames(tmp_path / "ped1" / "test" / "x1", blank())
    save_frames(tmp_path / "UCSD" / "train" / "b1", blank())
    save_frames(tmp_path / "UCSD" / "test" / "b1", blank())
    assert datasets.find("ped1", tmp_path).root == tmp_path


def test_shanghaitech_with_pixel_masks_alone(tmp_path):
    root = tmp_path / "shanghaitech"
    video(root / "training" / "videos" / "01_001.avi")
    save_frames(root / "testing" / "frames" / "01_0014", blank())
    (root / "testing" / "test_pixel_mask").mkdir()
    np.save(root / "testing" / "test_pixel_mask" / "01_0014.npy", masks_of(marks(3, 4))[..., 0])
    data = datasets.find("shanghaitech", tmp_path)
    assert labels_of(data) == {"01_0014": marks(3, 4).tolist()} and data.label_source == "masks: test_pixel_mask"


def test_frames_of_several_videos_in_one_folder_are_noticed(tmp_path):
    """As in a copy of UCF-Crime whose folders hold a class each."""
    folders = {
        "Abuse": [f"{name}_x264_{t}" for name in ("Abuse001", "Abuse002") for t in range(0, 80, 10)],
        "times": [f"frame_12-0{m}-{s:02d}" for m in (1, 2) for s in range(60)],
        "two cameras": [f"{t:04d}_cam{c}" for t in range(9) for c in (0, 1)],
        "one camera": [f"cam1_{t:04d}" for t in range(99)],
        "versions": [f"frame_{t:04d}_v2" for t in range(9)],
    }
    for folder, names in folders.items():
        (tmp_path / "test" / folder).mkdir(parents=True)
        for name in names:
            cv2.imwrite(str(tmp_path / "test" / folder / f"{name}.png"), blank()[0])
    for v in datasets.find("folder", tmp_path).test:
        decoder = Decoder(v)
        assert len(list(decoder)) == len(folders[v.name])
        assert ("may be frames of 2 videos" in " ".join(decoder.warnings)) == (v.name == "Abuse"), v.name


def test_a_test_folder_of_anything_is_no_ped1(tmp_path):
    published_ped1(tmp_path / "holiday")
    shutil.rmtree(tmp_path / "holiday" / "Train")
    with pytest.raises(UserError, match="ped1 was not found under --data-root"):
        datasets.find("ped1", tmp_path / "holiday")


def test_training_without_training_videos_is_refused(tmp_path):
    save_frames(tmp_path / "UCSDped1" / "Test" / "Test001", walkers(6), ".tif")
    refused(
        script(
            "hf2vad/train.py",
            "--dataset",
            "ped1",
            "--data-root",
            tmp_path / "UCSDped1",
            "--cache",
            tmp_path / "cache",
            "--device",
            "cpu",
            "--workers",
            "1",
            "--out",
            tmp_path / "run",
            check=False,
        ),
        "ped1 has no training videos under",
        "UCSDped1",
    )


# ----------------------------------------------------------------------------------------------------------------
# UBnormal

UBNORMAL = {
    "normal_training": ["normal_scene_1_scenario_1", "normal_scene_3_scenario_1"],
    "normal_test": ["normal_scene_2_scenario_1"],
    "abnormal_training": ["abnormal_scene_1_scenario_2", "abnormal_scene_3_scenario_2"],
    "abnormal_test": ["abnormal_scene_2_scenario_2", "abnormal_scene_2_scenario_10", "abnormal_scene_3_scenario_1"],
}
TRACK = {
    "abnormal_scene_1_scenario_2": (0, 3),
    "abnormal_scene_3_scenario_2": (1, 2),
    "abnormal_scene_2_scenario_2": (5, 8),
    "abnormal_scene_2_scenario_10": (2, 4),
    "abnormal_scene_3_scenario_1": (11, 11),
}  # first and last abnormal frame


def ubnormal(root, order=sorted):
    (root / "scripts").mkdir(parents=True)
    for kind, names in UBNORMAL.items():
        (root / "scripts" / f"{kind}_video_names.txt").write_text("\n".join(order(names)) + "\n")
        for name in order(names):
            scene = root / f"Scene{name.split('_')[2]}"
            video(scene / f"{name}.avi")
            if name in TRACK:
                notes = scene / f"{name}_annotations"
                notes.mkdir()
                first, last = TRACK[name]
                (notes / f"{name}_tracks.txt").write_text(f"1,{first},{last}\n")
                for t in order(range(first, last + 1)):
                    cv2.imwrite(str(notes / f"{name}_{t:04d}_gt.png"), masks_of(marks(0, n=1))[0] // 255)
    return root


def tracks_are_right(data):
    for v in data.test:
        first, last = TRACK.get(v.name, (1, 0))
        assert np.flatnonzero(data.labels(v, FRAMES)).tolist() == [*range(first, last + 1)], v.name
        assert data.tracks(v).tolist() == [[1, t, 4, 4, 7, 7] for t in range(first, last + 1)], v.name
        assert data.masks(v).any((1, 2)).nonzero()[0].tolist() == [*range(first, last + 1)], v.name


@pytest.mark.parametrize("with_list", [True, False])
def test_ucf_crimes_archives_are_arranged(tmp_path, with_list):
    source, out = tmp_path / "UCF_Crimes", tmp_path / "data" / "ucf-crime"
    places = ("Anomaly-Videos-Part-1/Abuse/Abuse001", "Anomaly-Videos-Part-1/Abuse/Abuse028", "Videos/Arson009")
    places += ("Training-Normal-Videos-Part-1/Normal_Videos001", "Testing_Normal_Videos_Anomaly/Normal_Videos_003")
    for place in places:
        video(source / f"{place}_x264.mp4", 24)
    refused(script("tests/tools/ucf_crime.py", "--source", source, "--out", out, check=False), "Temporal_Anomaly")
    lists = source / "lists"
    lists.mkdir()
    (lists / "Temporal_Anomaly_Annotation_for_Testing_Videos.txt").write_text(
        "Abuse028_x264.mp4  Abuse  3  5  20  99\nNormal_Videos_003_x264.mp4  Normal  -1  -1  -1  -1\n"
        "Burglary005_x264.mp4  Burglary  1  2  -1  -1\n"
    )
    if with_list:
        (lists / "Anomaly_Train.txt").write_text(
            "Abuse/Abuse001_x264.mp4\nTraining_Normal_Videos_Anomaly/Normal_Videos001_x264.mp4\n"
        )
    done = script("tests/tools/ucf_crime.py", "--source", source, "--out", out)
    assert "note: 1 videos of the lists are not in" in done.stdout and "Burglary005" in done.stdout
    data = datasets.find("folder", out)
    trained = ["Abuse001_x264", *([] if with_list else ["Arson009_x264"]), "Normal_Videos001_x264"]
    assert [v.name for v in data.train] == trained
    labels = {v.name: np.flatnonzero(data.labels(v, 24)).tolist() for v in data.test}
    assert labels == {"Abuse028_x264": [3, 4, 5, 20, 21, 22, 23], "Normal_Videos_003_x264": []}
    assert (out / "normal.txt").read_text() == "Normal_Videos001_x264\n"
    assert (out / "abnormal.txt").read_text().split() == trained[:-1]


@pytest.mark.parametrize("place", ["UBnormal-main/scripts", "scripts"])
def test_ubnormals_lists_may_lie_beside_it(tmp_path, place):
    root = ubnormal(tmp_path / "UBnormal")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (root / "scripts").rename(tmp_path / place)
    data = datasets.find("ubnormal", tmp_path)
    assert len(data.train) == 2 and len(data.test) == 4
    shutil.rmtree(tmp_path / place)
    with pytest.raises(UserError, match="no normal_training_video_names.txt in or beside .*lilygeorgescu/UBnormal"):
        datasets.find("ubnormal", tmp_path)


@either_order
def test_ubnormal_lacks_a_scene(tmp_path, capsys):
    root = ubnormal(tmp_path / "UBnormal")
    shutil.rmtree(root / "Scene3")
    data = datasets.find("ubnormal", tmp_path)
    said = capsys.readouterr().out
    assert [v.name for v in data.train] == ["normal_scene_1_scenario_1"]
    assert [v.name for v in data.test] == [
        "abnormal_scene_2_scenario_2",
        "abnormal_scene_2_scenario_10",
        "normal_scene_2_scenario_1",
    ]
    assert [v.name for v in data.abnormal_train] == ["abnormal_scene_1_scenario_2"]
    tracks_are_right(data)
    for kind, name in (
        ("normal_training", "normal_scene_3_scenario_1"),
        ("abnormal_training", "abnormal_scene_3_scenario_2"),
        ("abnormal_test", "abnormal_scene_3_scenario_1"),
    ):
        assert (
            f"note: {kind}_video_names.txt lists 1 of {len(UBNORMAL[kind])} videos that are not in {root}: {name}\n"
            in said
        )
    assert said.count("note:") == 3


def test_ubnormal_lacks_a_video(tmp_path, capsys):
    root = ubnormal(tmp_path / "UBnormal")
    (root / "Scene2" / "abnormal_scene_2_scenario_2.avi").unlink()
    data = datasets.find("ubnormal", tmp_path)
    assert [v.name for v in data.test] == [
        "abnormal_scene_2_scenario_10",
        "abnormal_scene_3_scenario_1",
        "normal_scene_2_scenario_1",
    ]
    tracks_are_right(data)
    assert (
        "lists 1 of 3 videos that are not in" in (said := capsys.readouterr().out)
        and "abnormal_scene_2_scenario_2" in said
    )


@pytest.mark.parametrize("text", [b"1,2\n", b"one,two,three\n", b"\xff\xfe\x00", b"1,nan,3\n", None])
def test_an_unreadable_track_file_costs_one_video(tmp_path, capsys, text):
    root = ubnormal(tmp_path / "UBnormal")
    lost = "abnormal_scene_2_scenario_2"
    path = root / "Scene2" / f"{lost}_annotations" / f"{lost}_tracks.txt"
    path.unlink() if text is None else path.write_bytes(text)
    data = datasets.find("ubnormal", tmp_path)
    assert [v.name for v in data.test] == [
        "abnormal_scene_2_scenario_10",
        "abnormal_scene_3_scenario_1",
        "normal_scene_2_scenario_1",
    ]
    tracks_are_right(data)
    usable = UsableVideos(data, data.train + data.test, {})
    assert len(usable.train) == 2 and len(usable.test) == 3
    report_skipped(usable.skipped)
    said = capsys.readouterr().out
    assert "skipped 1 videos:" in said and lost in said and path.name in said


# -------------------------------------------------------------------------------------- folders of frames and of videos


@either_order
def test_frames_and_videos_of_a_split_are_both_read(tmp_path, capsys):
    root = tmp_path / "shanghaitech"
    shanghai(root)  # 01_001.avi; 01_0014 and 02_0001 as frames
    for name in ("01_002", "01_010"):
        save_frames(root / "training" / "frames" / name, blank(), ".jpg")
    for name in ("01_0015", "02_0001"):  # the second one a second time
        video(root / "testing" / "videos" / f"{name}.avi")
    np.save(root / "testing" / "test_frame_mask" / "01_0015.npy", marks(8))
    data = datasets.find("shanghaitech", tmp_path)
    assert [v.name for v in data.train] == ["01_001", "01_002", "01_010"] and [bool(v.files) for v in data.train] == [
        False,
        True,
        True,
    ]
    assert [v.name for v in data.test] == ["01_0014", "01_0015", "02_0001"] and [bool(v.files) for v in data.test] == [
        True,
        False,
        True,
    ]
    assert labels_of(data) == {
        "01_0014": marks(0, 5).tolist(),
        "01_0015": marks(8).tolist(),
        "02_0001": marks(1, 5).tolist(),
    }
    assert (
        "note: 1 videos, such as " in (said := capsys.readouterr().out)
        and f"are in {root / 'testing' / 'frames'} too" in said
    )


# -------------------------------------------------------------------------------------------------------- class folders


@either_order
def test_class_folders_and_what_is_left_out(tmp_path, capsys):
    for path in (
        "train/Normal/n1.avi",
        "train/Abuse/a1.avi",
        "train/loose.avi",
        "test/Abuse/a2.avi",
        "test/Arrest/r1.avi",
        "test/Arrest/a2.avi",
    ):
        video(tmp_path / path)
    save_frames(tmp_path / "train" / "Abuse" / "as frames", blank())
    for path in (
        "train/Abuse/a3.vid",
        "train/notes.docx",
        "train/Abuse/readme.txt",
    ):  # a text beside videos is nothing strange
        (tmp_path / path).write_text("x")
    (tmp_path / "labels.csv").write_text("Abuse_a2,1,3\nArrest_a2,5,6\nr1,0,1\n")
    data = datasets.find("folder", tmp_path)
    said = capsys.readouterr().out
    assert sorted(v.name for v in data.train) == ["a1", "as frames", "loose", "n1"]
    assert labels_of(data) == {
        "Abuse_a2": marks(1, 2).tolist(),
        "Arrest_a2": marks(5).tolist(),
        "r1": marks(0).tolist(),
    }
    assert f"note: 2 files in {tmp_path / 'train'} are no part of a video, or of an unknown kind, such as " in said
    assert said.count("note:") == 1 and ("a3.vid" in said or "notes.docx" in said)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_with_files_and_no_video_is_refused(tmp_path, split):
    video(tmp_path / ("test" if split == "train" else "train") / "a.avi")
    (tmp_path / split / "monday").mkdir(parents=True)
    (tmp_path / split / "monday" / "a.vid").write_text("x")
    with pytest.raises(UserError, match=f"{split} holds no video: 1 entries, such as monday, .*ffmpeg"):
        datasets.find("folder", tmp_path)


# ----------------------------------------------------------------------------------------------------------------
# --labels

GIVEN = {"01": marks(1, 2, 8), "02": marks(), "10": marks(11)}
FORMS = ["npz", "npz of bools", "npy", "txt", "csv", "masks", "mask arrays", "mask archives", "mixed", "vector"]


def write_labels(where, form, given=GIVEN, spell=str):
    """Labels of videos in a form that --labels takes; sets of masks leave normal videos out. -> path"""
    if form.startswith("npz"):
        np.savez(where / "given.npz", **{spell(k): y.astype(bool) if "bools" in form else y for k, y in given.items()})
        return where / "given.npz"
    if form == "csv":
        (where / "given.csv").write_text(
            "video,start,end\n"
            + "".join(f"{spell(k)},{t},{t + 1}\n" for k, y in given.items() for t in np.flatnonzero(y)),
            encoding="utf-8",
        )
        return where / "given.csv"
    if form == "vector":  # as MNAD's frame_labels_ped2.npy, of all test videos in order
        np.save(where / "given.npy", np.concatenate(list(given.values()))[None])
        return where / "given.npy"
    path = where / "given"
    path.mkdir()
    for i, (k, y) in enumerate(given.items()):
        kind = ("masks", "npy")[i % 2] if form == "mixed" else form
        if kind == "npy":
            np.save(path / f"{spell(k)}.npy", y)
        elif kind == "txt":
            (path / f"{spell(k)}.txt").write_text(" ".join(map(str, y)))
        elif y.any() and kind == "masks":
            save_frames(path / spell(k), masks_of(y), digits=1)  # frame 10 follows frame 9
        elif y.any() and kind == "mask arrays":
            np.save(path / f"{spell(k)}.npy", masks_of(y)[..., 0])
        elif y.any() and kind == "mask archives":
            np.savez(path / f"{spell(k)}.npz", masks=masks_of(y)[..., 0] > 0)
        elif y.any():
            save_avenue_mask(path, int(k), y)
    return path


@either_order
@pytest.mark.parametrize(
    "dataset, form",
    [(dataset, form) for dataset in ("ped2", "avenue", "folder") for form in FORMS] + [("avenue", "volLabel")],
)
def test_labels_in_every_form_are_the_same(tmp_path, capsys, dataset, form):
    for name in GIVEN:
        save_frames(tmp_path / "data" / "test" / name, blank())
    save_frames(tmp_path / "data" / "train" / "01", blank())
    (tmp_path / "data" / "labels.csv").write_text("01,0,12\n")  # not asked
    spell = {"ped2": lambda k: f"Test0{k}", "avenue": lambda k: str(int(k)), "folder": str}[dataset]
    path = write_labels(tmp_path, form, spell=spell)
    data = datasets.find(dataset, tmp_path / "data", labels=path)
    assert labels_of(data) == {k: y.tolist() for k, y in GIVEN.items()} and data.label_source == str(path)
    normal = f"note: 1 test videos have no mask in {path} and count as normal, such as 02\n"
    assert capsys.readouterr().out == (normal if "mask" in form or form == "volLabel" else "")


def test_a_vector_of_other_videos_is_refused_and_a_mat_is_read(tmp_path):
    for name in ("01", "02"):
        save_frames(tmp_path / "ped2" / "testing" / "frames" / name, blank())
    save_frames(tmp_path / "ped2" / "training" / "frames" / "01", blank())
    np.save(tmp_path / "frame_labels_ped2.npy", np.zeros((1, 2 * FRAMES + 1)))
    with pytest.raises(UserError, match="frame_labels_ped2.npy holds 25 numbers for 24 test frames"):
        datasets.find("ped2", tmp_path, labels=tmp_path / "frame_labels_ped2.npy")
    save_frames(tmp_path / "own" / "test" / "9", blank())
    save_frames(tmp_path / "own" / "test" / "10", blank())
    np.save(tmp_path / "own.npy", np.zeros(2 * FRAMES))
    with pytest.raises(UserError, match="the order of its videos is ambiguous"):
        datasets.find("folder", tmp_path / "own", labels=tmp_path / "own.npy")
    save_ranges(tmp_path / "gt.mat", [(3, 5)], [(1, 1), (12, 12)])
    data = datasets.find("ped2", tmp_path, labels=tmp_path / "gt.mat")
    assert labels_of(data) == {"01": marks(2, 3, 4).tolist(), "02": marks(0, 11).tolist()}


@either_order
def test_ucsds_own_test_folder_as_labels(tmp_path, capsys):
    published_ped1(tmp_path / "UCSDped1")
    data = datasets.find(
        "ped1", tmp_path, labels=tmp_path / "UCSDped1" / "Test"
    )  # frames of videos and masks side by side
    assert list(labels_of(data).values()) == [
        marks(2, 3, 4).tolist(),
        marks().tolist(),
        marks().tolist(),
        marks(9, 10, 11).tolist(),
    ]
    assert "2 test videos have no mask in" in capsys.readouterr().out


def test_labels_of_one_video_in_two_entries_are_refused(tmp_path):
    for name in ("01", "02"):
        save_frames(tmp_path / "data" / "Test" / f"Test0{name}", blank())
        save_frames(tmp_path / "data" / "Train" / f"Train0{name}", blank())
    np.savez(tmp_path / "y.npz", Test001=marks(1), Train001=marks(), Test002=marks())
    with pytest.raises(UserError, match="y.npz.*Test001.*Train001|y.npz.*Train001.*Test001"):
        datasets.find("ped2", tmp_path / "data", labels=tmp_path / "y.npz")
    path = write_labels(tmp_path, "npy")
    np.save(path / "Test001.npy", marks(3))
    with pytest.raises(UserError, match="01.npy and Test001.npy|Test001.npy and 01.npy"):
        datasets.find("ped2", tmp_path / "data", labels=path)


def test_labels_that_name_no_video_are_refused(tmp_path):
    save_frames(tmp_path / "data" / "test" / "b_0", blank())
    path = write_labels(tmp_path, "npy", {"b_0_label": marks(1)})
    with pytest.raises(UserError, match="named after a test video such as b_0; it holds b_0_label.npy"):
        datasets.find("folder", tmp_path / "data", labels=path)
    np.save(path / "b_0.npy", marks(1))
    assert labels_of(datasets.find("folder", tmp_path / "data", labels=path)) == {"b_0": marks(1).tolist()}


# ------------------------------------------------------------------------------------------------------------ odd names

NAMES = [
    "with space",
    "#1",
    "a#b",
    "100%",
    "%s %d",
    "it's",
    'say "no"',
    "a,b",
    "①",
    "10²5",
    "0.25",
    "0.5",
    "0",
    "камера 1",
    "测试视频",
    "a__b",
    "a[1]",
    "a*",
    "*",
    "v=x__#1_label_B2",
    "naïve-ü",
    "-dash",
    "file",
    "{x}",
    "$HOME",
    "a;b",
    "~",
]
ODD = {name: marks(i % FRAMES, (i // FRAMES * 5 + i) % FRAMES) for i, name in enumerate(NAMES)}


def quoted(name):
    return '"' + name.replace('"', '""') + '"' if {",", '"'} & set(name) else name


def odd_videos(root, kind):
    for name in NAMES:
        if kind == "frames":
            save_frames(root / "test" / name, blank(FRAMES), ".bmp")
        else:
            (root / "test").mkdir(parents=True, exist_ok=True)
            (root / "test" / f"{name}.avi").write_bytes(b"")  # its name alone is asked
    return root


def same_as_odd(data):
    assert {v.name for v in data.test} == set(NAMES)
    for name, y in labels_of(data).items():
        assert y == ODD[name].tolist(), name


@either_order
@pytest.mark.parametrize("kind", ["frames", "files"])
@pytest.mark.parametrize("form", ["npy", "txt", "csv", "masks"])
def test_odd_names_in_a_folder(tmp_path, kind, form):
    root = odd_videos(tmp_path / "data", kind)
    write_labels(tmp_path, form, ODD, quoted if form == "csv" else str)
    if form == "csv":
        (tmp_path / "given.csv").rename(root / "labels.csv")
    else:
        (tmp_path / "given").rename(root / ("masks" if form == "masks" else "labels"))
    data = datasets.find("folder", root)
    same_as_odd(data)
    if form == "masks":
        assert all(data.masks(v).any((1, 2)).tolist() == ODD[v.name].astype(bool).tolist() for v in data.test)


@pytest.mark.parametrize("form", ["npz", "npy", "csv", "masks", "mask archives"])
def test_odd_names_given_by_labels(tmp_path, form):
    root = odd_videos(tmp_path / "data", "files")
    if form == "npz":  # a name "file" can not be an argument of numpy's savez
        given = {k: y for k, y in ODD.items() if k != "file"}
        (root / "test" / "file.avi").unlink()
    else:
        given = ODD
    path = write_labels(tmp_path, form, given, quoted if form == "csv" else str)
    data = datasets.find("folder", root, labels=path)
    assert labels_of(data) == {k: y.tolist() for k, y in given.items()}


@either_order
def test_odd_names_of_features(tmp_path):
    given = {name: np.repeat(y, CLIP_FRAMES)[: 2 * CLIP_FRAMES] for name, y in ODD.items()}
    for folder in ("test", "labels"):
        (tmp_path / folder).mkdir()
        for name, y in given.items():
            np.save(tmp_path / folder / f"{name}.npy", y if folder == "labels" else np.zeros((2, 1, 8), np.float32))
    data = find_features("features", tmp_path)
    assert {v.name: data.labels(v).tolist() for v in data.test} == {k: y.tolist() for k, y in given.items()}
    order = shuffled(given, 0)
    np.save(tmp_path / "gt.npy", np.concatenate([given[n] for n in order]))
    shutil.rmtree(tmp_path / "labels")
    (tmp_path / "order.list").write_text("# a comment\n" + "\n".join(order) + "\n", encoding="utf-8")
    data = find_features("features", tmp_path)
    assert {v.name: data.labels(v).tolist() for v in data.test} == {k: y.tolist() for k, y in given.items()}


# ------------------------------------------------------------------------------------------ joined by name in any order

CAMERAS = [f"cam{i}" for i in (1, 2, 3, 10, 11, 20)]
SEEDS = [0, 1]


def shuffled(names, seed):
    return np.random.default_rng(seed).permutation(list(names)).tolist()


def truth(name):
    number = int(name.removeprefix("cam"))
    return marks(number % FRAMES, (number * 5 + 1) % FRAMES)


def cameras(root, seed):
    for name in shuffled(CAMERAS, seed):
        save_frames(root / "test" / name, blank())
    return root


@either_order
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", ["npz", "npy", "txt", "csv", "masks", "mask archives", "mixed"])
def test_labels_in_any_order(tmp_path, form, seed):
    root = cameras(tmp_path / "data", seed)
    path = write_labels(tmp_path, form, {k: truth(k) for k in shuffled(CAMERAS, seed + 10)})
    expected = {k: truth(k).tolist() for k in CAMERAS}
    assert labels_of(datasets.find("folder", root, labels=path)) == expected
    if form in ("npy", "txt", "csv", "masks", "mask archives"):
        path.rename(root / ("labels.csv" if form == "csv" else "masks" if form.startswith("mask") else "labels"))
        assert labels_of(datasets.find("folder", root)) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_a_csv_in_any_order(tmp_path, seed):
    root = cameras(tmp_path, seed)
    rows = [f"{k},{t},{t + 1}" for k in CAMERAS for t in np.flatnonzero(truth(k))]
    (root / "labels.csv").write_text("video,start,end\n" + "\n".join(shuffled(rows, seed)) + "\n")
    assert labels_of(datasets.find("folder", root)) == {k: truth(k).tolist() for k in CAMERAS}


@either_order
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("made", ["masks, images", "masks, arrays", "tracks", "labels"])
def test_what_belongs_to_a_video_in_any_order(tmp_path, made, seed):
    root = cameras(tmp_path, seed)
    (root / "labels.csv").write_text("cam1,0,1\n")
    folder = root / made.split(",")[0]
    for name in shuffled(CAMERAS, seed + 20):
        folder.mkdir(exist_ok=True)
        frames = np.flatnonzero(truth(name)).tolist()
        if made == "masks, images":
            (folder / name).mkdir()
            for t in shuffled(range(FRAMES), seed):  # pictures are written in another order too
                cv2.imwrite(str(folder / name / f"{t}.png"), masks_of(truth(name))[t])
        elif made == "masks, arrays":
            np.save(folder / f"{name}.npy", masks_of(truth(name))[..., 0])
        elif made == "tracks":
            (folder / f"{name}.csv").write_text("".join(f"1,{t},4,4,7,7\n" for t in frames))
        else:
            np.save(folder / f"{name}.npy", truth(name))
    data = datasets.find("folder", root)
    for v in data.test:
        found = {
            "masks": lambda v=v: data.masks(v).any((1, 2)).nonzero()[0].tolist(),
            "tracks": lambda v=v: sorted(data.tracks(v)[:, 1].tolist()),
            "labels": lambda v=v: np.flatnonzero(data.labels(v, FRAMES)).tolist(),
        }[folder.name]()
        assert found == np.flatnonzero(truth(v.name)).tolist(), v.name


@pytest.mark.parametrize("seed", SEEDS)
def test_entries_of_a_boxes_file_in_any_order(tmp_path, seed):
    data, arrays = datasets.find("folder", cameras(tmp_path / "data", seed)), {}
    for name in CAMERAS:
        for split, value in (("testing", int(name[3:])), ("training", 77)):
            count = truth(name).astype(np.int64)
            arrays[f"{split}.{name}.count"] = count
            arrays[f"{split}.{name}.boxes"] = np.full((count.sum(), 5), value, np.float32)
    np.savez(tmp_path / "boxes.npz", **{k: arrays[k] for k in shuffled(arrays, seed)})
    for v in data.test:
        boxes = detectors.boxes_from_file(str(tmp_path / "boxes.npz"), v, FRAMES)
        assert [len(b) for b in boxes] == truth(v.name).tolist(), v.name
        assert {x for b in boxes for x in b.reshape(-1).tolist()} == {int(v.name[3:])}, v.name


@either_order
@pytest.mark.parametrize("seed", SEEDS)
def test_ubnormals_lists_and_tracks_in_any_order(tmp_path, seed):
    data = datasets.find("ubnormal", ubnormal(tmp_path / "UBnormal", lambda names: shuffled(names, seed)))
    assert len(data.test) == 4 and [v.scene for v in data.test] == ["2", "2", "3", "2"]
    tracks_are_right(data)


@either_order
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("per_frame", [False, True])
def test_flow_files_in_any_order(tmp_path, seed, per_frame):
    data, folder = datasets.find("folder", cameras(tmp_path / "data", seed)), tmp_path / "flow" / "test"
    for name in shuffled(CAMERAS, seed + 1):
        flow = (int(name[3:]) + np.arange(FRAMES, dtype=np.float32)[:, None, None, None] / 100) * np.ones(
            (1, 16, 16, 2), np.float32
        )
        (folder / name if per_frame else folder).mkdir(parents=True, exist_ok=True)
        for t in shuffled(range(FRAMES), seed) if per_frame else ():
            np.save(folder / name / f"{t}.npy", flow[t])
        if not per_frame:
            np.save(folder / f"{name}.npy", flow)
    for v in data.test:
        read = flow_from_files(tmp_path / "flow", v, (FRAMES, 16, 16, 1))(range(1, FRAMES))
        assert [round(float(x.mean()), 3) for x in read] == [
            round(int(v.name[3:]) + t / 100, 3) for t in range(1, FRAMES)
        ], v.name


@pytest.mark.parametrize("seed", SEEDS)
def test_features_made_elsewhere_in_any_order(tmp_path, seed):
    data, folder = datasets.find("folder", cameras(tmp_path / "data", seed)), tmp_path / "clip" / "test"
    folder.mkdir(parents=True)
    for name in shuffled(CAMERAS, seed + 2):
        np.save(
            folder / f"{name}.npy",
            int(name[3:]) + np.arange(FRAMES, dtype=np.float32)[:, None] / 16 * np.ones((1, 4), np.float32),
        )
    given = GivenFeatures(tmp_path / "clip")
    for v in data.test:
        assert given.load(v)[:, 0].tolist() == [int(v.name[3:]) + t / 16 for t in range(FRAMES)], v.name


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_in_any_order(tmp_path, seed):
    root = cameras(tmp_path / "data", seed)
    (root / "labels").mkdir()
    for name in CAMERAS:
        np.save(root / "labels" / f"{name}.npy", truth(name))
    data = datasets.find("folder", root)
    evaluation.save_scores(tmp_path / "scores.npz", {k: truth(k) + int(k[3:]) / 1000 for k in shuffled(CAMERAS, seed)})
    scores = compare.load_scores(tmp_path / "scores.npz")
    result, _ = evaluation.measure(scores, evaluation.labels_of(scores, data), evaluation.Protocol("strict", "none"))
    assert result["micro_auc"] == 1 and result["abnormal_frames"] == sum(int(truth(k).sum()) for k in CAMERAS)


# -------------------------------------------------------------------------------------- annotation files as published


def original_name(shared, pattern):
    found = sorted(shared.rglob(pattern))
    if not found:
        pytest.skip(f"{pattern} is not in {shared}")
    return found[0]


def test_published_ranges_of_ped1(shared_data):
    ranges = matlab_ranges(original_name(shared_data, "UCSDped1.m"))
    assert len(ranges) == 36 and sum(last - first + 1 for pairs in ranges.values() for first, last in pairs) == 4045


def test_published_masks_of_avenue(shared_data):
    folder = original_name(shared_data, "testing_label_mask")
    y = [read_masks(p).any((1, 2)) for p in sorted(folder.glob("*_label.mat"))]
    assert (len(y), sum(map(len, y)), sum(int(x.sum()) for x in y)) == (21, 15324, 3712)


def test_published_masks_of_shanghaitech(shared_data):
    y = [np.load(p) for p in sorted(original_name(shared_data, "test_frame_mask").glob("*.npy"))]
    assert (len(y), sum(map(len, y)), sum(int(x.sum()) for x in y)) == (107, 40791, 17326)


def test_published_annotations_of_ucf_crime(shared_data):
    found = read_annotations(original_name(shared_data, "Temporal_Anomaly_Annotation*.txt"))
    assert len(found) == 290 and sum(map(bool, found.values())) == 140


def test_published_annotations_of_xd_violence(shared_data):
    found = read_annotations(original_name(shared_data, "annotations.txt"))
    assert len(found) == 500 and all(found.values())


@pytest.mark.parametrize(
    "name, dataset, videos, frames, abnormal",
    [
        ("ped2", "ped2", 12, 2010, 1648),
        ("avenue_from_masks", "avenue", 21, 15324, 3712),
        ("shanghaitech", "shanghaitech", 107, 40791, 17326),
    ],
)
def test_published_labels_land_on_their_videos(tmp_path, shared_data, name, dataset, videos, frames, abnormal):
    """Through --labels and the dataset's reader, with the videos stood in for by files of their names."""
    given = np.load(shared_data / "labels" / f"{name}.npz")
    for split, names in (("training", ["01_001"]), ("testing", given.files)):
        (tmp_path / split / "videos").mkdir(parents=True)
        for x in shuffled(names, 0):
            (tmp_path / split / "videos" / f"{x}.avi").write_bytes(b"")
    data = datasets.find(dataset, tmp_path, labels=shared_data / "labels" / f"{name}.npz")
    y = {v.name: data.labels(v, len(given[v.name])) for v in data.test}
    assert (len(y), sum(map(len, y.values())), sum(int(x.sum()) for x in y.values())) == (videos, frames, abnormal)
    assert all((y[k] == given[k]).all() for k in given.files)
