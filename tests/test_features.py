"""Clip features as people have them: folders, axes, crops and index files are understood or refused, and labels never
reach a video that they were not made for, in whichever order files are listed."""

import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from common.cli import DataSource
from common.distributed import Run
from common.features import prefetch
from common.io import UserError, safe_filename
from common.readers.video import Video, list_videos
from frd_uvad.features.data import CLIP_FRAMES, FeatureVideo
from frd_uvad.features.folders import find_features, read_files
from frd_uvad.preprocess import FeatureOptions, prepare
from frd_uvad.svmae.clips import Depth
from frd_uvad.svmae.data import find_bags, read_captions
from frd_uvad.train import labels_of_clips, parse
from scene_aware_ae.encoder import GivenFeatures
from tests.helpers import refused, save_frames, script, walkers

pytestmark = pytest.mark.usefixtures("listing")

VIDEOS = {
    "Vandalism028": 5,
    "Abuse028": 7,
    "Normal_Videos_003": 6,
    "Stealing019": 4,
}  # clips of each; in the order of the list
EVENTS = {"Vandalism028": (20, 40), "Abuse028": (60, 100), "Stealing019": (0, 31)}  # first and last abnormal frame


def truth(name):
    y = np.zeros(VIDEOS[name] * CLIP_FRAMES, np.uint8)
    if name in EVENTS:
        y[EVENTS[name][0] : EVENTS[name][1] + 1] = 1
    return y


def rows(clips, *shape, value=0.0):
    return np.full((clips, *shape), value, np.float32)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def write_features(root, ending="_x264_i3d"):
    for name, clips in VIDEOS.items():
        save(root / "test" / f"{name}{ending}.npy", rows(clips, 1, 8))
    save(root / "train" / "Normal_Videos001_x264_i3d.npy", rows(3, 1, 8))
    return root


def write_vector(root, order=VIDEOS):
    save(root / "gt-ucf.npy", np.concatenate([truth(n) for n in order]).astype(float))


def annotate(path):
    path.write_text(
        "".join(
            f"{n}_x264.mp4  Crime  {EVENTS.get(n, (-1, -1))[0]}  {EVENTS.get(n, (-1, -1))[1]}  -1  -1\n"
            for n in sorted(VIDEOS)
        )
    )
    return path


def has_the_truth(data):
    for v in data.test:
        name = v.name.removesuffix("_x264")
        assert data.labels(v).tolist() == truth(name).tolist(), v.name
    return data


# ------------------------------------------------------------------------------------------ a vector and its order

LISTS = {
    "names": lambda n: n + "_x264",
    "names with the extractor's ending": lambda n: n + "_x264_i3d",
    "files": lambda n: n + "_x264.mp4",
    "paths": lambda n: f"/data/UCF Crime/test/{n}_x264_i3d.npy",
    "Windows paths": lambda n: f"D:\\ucf\\test\\{n}_x264_i3d.npy",
    "names and a label": lambda n: f"{n}_x264 {int(n in EVENTS)}",
    "ten crops, two underscores": lambda n: "\n".join(f"UCF/{n}_x264__{i}.npy" for i in range(10)),
    "ten crops, one underscore": lambda n: "\n".join(f"UCF/{n}_x264_{i}.npy" for i in range(10)),
    "comments and empty lines": lambda n: f"# of the test set\n\n{n}_x264\n",
}


@pytest.mark.parametrize("form", LISTS)
@pytest.mark.parametrize("place", ["beside.list", "beside.txt", "--order"])
def test_a_vector_is_cut_in_the_order_of_its_list(tmp_path, form, place):
    root, order = write_features(tmp_path / "f"), None
    write_vector(root)
    file = tmp_path / "order" if place == "--order" else root / place
    file.write_text("\n".join(LISTS[form](n) for n in VIDEOS) + "\n")
    if place == "--order":
        order = file
        (root / "other.list").write_text("\n".join(sorted(LISTS["names"](n) for n in VIDEOS)))  # --order decides
    data = has_the_truth(find_features("ucfcrime", root, order=order))
    assert data.label_source == f"gt-ucf.npy in the order of {file.name}"


def test_a_vector_without_an_order_is_refused(tmp_path):
    root = write_features(tmp_path)
    write_vector(root)
    (root / "train.list").write_text("Normal_Videos001_x264\n")  # a list, but not of these videos
    with pytest.raises(UserError, match=r"order that is not known: .*\.list .*--order FILE.*labels/<video>\.npy"):
        find_features("ucfcrime", root)


def test_two_lists_that_differ_are_refused(tmp_path):
    root = write_features(tmp_path)
    write_vector(root)
    for name, order in (("a.list", list(VIDEOS)), ("b.list", sorted(VIDEOS))):
        (root / name).write_text("\n".join(f"{n}_x264" for n in order))
    with pytest.raises(UserError, match="a.list and b.list differ"):
        find_features("ucfcrime", root)


def test_an_order_of_other_videos_is_refused(tmp_path):
    root = write_features(tmp_path / "f")
    write_vector(root)
    (tmp_path / "x").write_text("\n".join(f"{n}_x264" for n in list(VIDEOS)[1:]) + "\nRobbery001\nRobbery002\n")
    with pytest.raises(
        UserError, match="1 of them are missing there and 2 others are listed, such as Vandalism028_x264"
    ):
        find_features("ucfcrime", root, order=tmp_path / "x")


def test_a_normal_video_with_abnormal_frames_shows_a_wrong_order(tmp_path):
    root = write_features(tmp_path)
    write_vector(root, sorted(VIDEOS))
    (root / "test.list").write_text(
        "\n".join(f"{n}_x264" for n in ("Normal_Videos_003", "Abuse028", "Vandalism028", "Stealing019"))
    )
    with pytest.raises(UserError, match="Normal_Videos_003_x264, which is normal by its name"):
        find_features("ucfcrime", root)


def test_one_video_and_one_array_need_no_list(tmp_path):
    save(tmp_path / "one" / "test" / "Abuse028.npy", rows(7, 1, 8))
    save(tmp_path / "one" / "gt.npy", truth("Abuse028"))
    has_the_truth(find_features("features", tmp_path / "one"))
    root, ends = tmp_path / "array", np.cumsum([0, *VIDEOS.values()])
    save(root / "Concat_test_10.npy", rows(sum(VIDEOS.values()), 10, 8))
    save(root / "concat_UCF.npy", rows(9, 10, 8))
    save(root / "nalist_test.npy", np.stack([ends[:-1], ends[1:]], 1))
    write_vector(root)
    data = find_features("ucfcrime", root)
    assert [data.labels(v).tolist() for v in data.test] == [truth(n).tolist() for n in VIDEOS]


def test_labels_by_name_go_before_a_vector(tmp_path, capsys):
    root = write_features(tmp_path)
    annotate(root / "Temporal_Anomaly_Annotation_for_Testing_Videos.txt")
    wrong = np.concatenate([truth(n) for n in VIDEOS])
    wrong[:20] = 1  # 20 frames of the first video that the annotations do not mark
    save(root / "gt-ucf.npy", wrong)
    has_the_truth(find_features("ucfcrime", root))
    assert "gt-ucf.npy is not compared" in capsys.readouterr().out
    (root / "test.list").write_text("\n".join(f"{n}_x264" for n in VIDEOS))
    has_the_truth(find_features("ucfcrime", root))
    assert "gt-ucf.npy in the order of test.list differs in 20 frames" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- labels by name


@pytest.mark.parametrize(
    "form", ["npz", "npz of extensionless bools", "folder", "folder of text", "csv", "annotations", "labels/ beside"]
)
def test_labels_by_name_in_every_form(tmp_path, form):
    root, labels = write_features(tmp_path / "f"), {f"{n}_x264": truth(n) for n in reversed(VIDEOS)}
    path = tmp_path / "labels"
    if form.startswith("npz"):
        path = tmp_path / "labels.npz"
        np.savez(path, **{k: y.astype(bool) if "bools" in form else y for k, y in labels.items()})
    elif form == "csv":
        path = tmp_path / "labels.csv"
        path.write_text("video,start,end\n" + "".join(f"{n}_x264,{a},{b + 1}\n" for n, (a, b) in EVENTS.items()))
    elif form == "annotations":
        path = annotate(tmp_path / "a.txt")
    else:
        path = root / "labels" if "beside" in form else path
        for k, y in labels.items():
            if "text" in form:
                path.mkdir(exist_ok=True)
                (path / f"{k}.txt").write_text(" ".join(map(str, y)))
            else:
                save(path / f"{k}.npy", y)
    has_the_truth(find_features("ucfcrime", root, None if "beside" in form else path))


def test_labels_of_another_length_name_both(tmp_path):
    root = write_features(tmp_path)
    for name in VIDEOS:
        save(root / "labels" / f"{name}_x264.npy", truth(name))
    for length, right in (
        (VIDEOS["Abuse028"] * CLIP_FRAMES - 15, True),
        (VIDEOS["Abuse028"] * CLIP_FRAMES + 15, True),
        (1231, False),
        (95, False),
    ):
        save(root / "labels" / "Abuse028_x264.npy", np.ones(length, np.uint8))
        if right:
            data = find_features("ucfcrime", root)
            v = next(v for v in data.test if v.name == "Abuse028_x264")
            assert len(data.labels(v)) == len(data.frame_scores(v, np.arange(7.0))) == length
        else:
            with pytest.raises(
                UserError, match=f"Abuse028_x264 .* {length} frames, its 7 clips of features have 112.*--segments"
            ):
                find_features("ucfcrime", root)


def test_an_annotation_behind_the_end_is_refused(tmp_path):
    root = write_features(tmp_path)
    path = annotate(root / "annotations.txt")
    path.write_text(path.read_text().replace("  60  100 ", "  806  1074 "))
    with pytest.raises(
        UserError, match="marks frames 806 to 1074 of video Abuse028_x264, whose features end at frame 112"
    ):
        find_features("ucfcrime", root)


def test_segments_are_stretched_to_the_frames_of_the_labels(tmp_path):
    save(tmp_path / "test" / "a.npy", rows(32, 1, 8))
    save(tmp_path / "labels" / "a.npy", (np.arange(1000) >= 500).astype(np.uint8))
    with pytest.raises(UserError, match="--segments"):
        find_features("features", tmp_path)
    data = find_features("features", tmp_path, segments=True)
    stretched = data.frame_scores(data.test[0], np.arange(32.0))
    assert stretched.tolist() == [t * 32 // 1000 for t in range(1000)]
    assert ((stretched >= 16) == data.labels(data.test[0])).all()
    (tmp_path / "a.txt").write_text("a.mp4  Abuse  500  999  -1  -1\n")
    with pytest.raises(UserError, match="one 0 or 1 per frame"):
        find_features("features", tmp_path, tmp_path / "a.txt", segments=True)


# ------------------------------------------------------------------------------------ folders, axes, crops, index files


def test_xd_violence_reads_rgb_alone(tmp_path, capsys):
    for folder in ("RGB", "RGBTest", "Flow", "FlowTest", "vggish"):
        for crop in range(5):
            save(tmp_path / folder / f"v=S-7__#1_label_B4-0-0__{crop}.npy", rows(6, 8, value=crop))
    data = find_features("xdviolence", tmp_path)
    said = capsys.readouterr().out
    assert {v.path.parent.name for v in data.train} == {"RGB"} and {v.path.parent.name for v in data.test} == {
        "RGBTest"
    }
    assert (
        data.crops == 5 and [v.name for v in data.test] == ["v=S-7__#1_label_B4-0-0"] and "not read: FlowTest" in said
    )
    assert (data.test[0].clips([0])[0, :, 0] == np.arange(5)).all()  # crops stand in the order of their numbers


def test_kinds_of_features_are_never_joined_as_crops(tmp_path):
    for kind in ("rgb", "flow"):
        for crop in range(5):
            save(tmp_path / "test" / kind / f"a__{crop}.npy", rows(6, 8))
    with pytest.raises(UserError, match=r"flow/a__0.npy and .*rgb/a__0.npy are both called a"):
        find_features("features", tmp_path)


CLASSES = ("Vandalism", "Abuse", "Testing_Normal_Videos_Anomaly", "Stealing")  # of VIDEOS


@pytest.mark.parametrize("place", ["beside", "--labels"])
def test_folders_of_classes_are_split_by_the_annotations(tmp_path, place):
    """Features of UCF-Crime as VadCLIP and UR-DMU read them: what is annotated is tested."""
    root = tmp_path / "UCFClipFeatures"
    for folder, (name, clips) in zip(CLASSES, VIDEOS.items()):
        for crop in range(10):
            save(root / folder / f"{name}_x264__{crop}.npy", rows(clips, 8))
            save(root / "Abuse" / f"Abuse001_x264__{crop}.npy", rows(3, 8))
            save(root / "Training_Normal_Videos_Anomaly" / f"Normal_Videos001_x264__{crop}.npy", rows(3, 8))
    with pytest.raises(UserError, match="is not known: put the temporal annotations .* beside them"):
        find_features("ucfcrime", root)
    path = annotate((root if place == "beside" else tmp_path) / "Temporal_Anomaly_Annotation.txt")
    data = has_the_truth(find_features("ucfcrime", root, None if place == "beside" else path))
    assert sorted(v.name for v in data.train) == ["Abuse001_x264", "Normal_Videos001_x264"] and data.crops == 10
    assert sorted(v.name for v in data.test) == sorted(f"{name}_x264" for name in VIDEOS)
    assert {v.split for v in data.test} == {"test"} and {v.split for v in data.train} == {"train"}


def test_the_first_crop_may_have_no_number(tmp_path):
    """As DeepMIL's features of UCF-Crime: name.npy, name__1.npy, …"""
    for split, name in (("Train", "Abuse001_x264"), ("Test", "Abuse028_x264")):
        for crop in range(10):
            save(tmp_path / split / "RGB" / f"{name}{f'__{crop}' if crop else ''}.npy", rows(7, 8, value=crop))
    data = find_features("ucfcrime", tmp_path)
    assert [v.name for v in data.test] == ["Abuse028_x264"] and data.crops == 10
    assert data.test[0].clips([3])[0, :, 0].tolist() == list(range(10))
    for name in ("cam", "cam__1"):
        save(tmp_path / "two" / "test" / f"{name}.npy", rows(7, 8))
    assert [v.name for v in find_features("features", tmp_path / "two").test] == ["cam", "cam__1"]


def test_features_of_another_dataset_are_not_taken(tmp_path):
    for folder in ("XDTrainClipFeatures", "XDTestClipFeatures", "UCF_Train", "UCF_Test"):
        save(tmp_path / folder / "a.npy", rows(4, 8))
    with pytest.raises(UserError, match="holds XDT.*named after xdviolence, with --dataset ucfcrime"):
        find_features("ucfcrime", tmp_path)
    for folder in ("features_train", "features_test"):
        save(tmp_path / "own" / folder / "a.npy", rows(4, 8))
    save(tmp_path / "own" / "shanghaitech" / "masks" / "01_0014.npy", rows(4))  # which is not read
    assert len(find_features("ucfcrime", tmp_path / "own").test) == 1


def test_splits_of_normal_and_abnormal_videos_are_no_classes(tmp_path):
    for folder in ("Train_Normal", "Train_Abnormal", "Test_Normal", "Test_Abnormal", "text"):
        save(tmp_path / folder / f"{folder}1.npy", rows(4, 8))
    data = find_features("ucfcrime", tmp_path)
    assert {v.name for v in data.test} == {"Test_Normal1", "Test_Abnormal1"} and len(data.train) == 2


def test_annotations_of_other_videos_are_refused(tmp_path):
    annotate(tmp_path / "Temporal_Anomaly_Annotation.txt")
    for folder in ("Abuse", "Testing_Normal_Videos"):
        save(tmp_path / folder / f"{folder}1.npy", rows(4, 8))
    with pytest.raises(UserError, match="name none of the videos under"):
        find_features("ucfcrime", tmp_path)


def test_the_folder_to_name_is_named(tmp_path):
    for folder in ("RGB", "RGBTest"):
        save(tmp_path / "XD-Violence" / "i3d-features" / folder / "v=a__#1_label_A.npy", rows(6, 5, 8))
    with pytest.raises(UserError, match="looked for train.*; try --features .*/i3d-features$"):
        find_features("xdviolence", tmp_path / "XD-Violence")


def test_a_dataset_of_features_with_videos_only(tmp_path):
    save_frames(tmp_path / "Videos" / "Abuse" / "a", walkers(3))
    done = script("frd_uvad/train.py", "--dataset", "ucfcrime", "--data-root", tmp_path, check=False)
    refused(done, "--dataset ucfcrime reads clip features", "--dataset folder")


def test_parts_of_a_split_are_read_together(tmp_path, capsys):
    for folder, name in (
        ("Training-Normal-1", "Normal1"),
        ("Training-Normal-2", "Normal2"),
        ("Training-Anomaly", "Abuse1"),
        ("Testing", "a"),
    ):
        save(tmp_path / folder / f"{name}.npy", rows(4, 8))
    data = find_features("ucfcrime", tmp_path)
    assert {v.name for v in data.train} == {"Normal1", "Normal2", "Abuse1"}
    assert "Training-Anomaly, Training-Normal-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "shapes, crops, clips",
    [
        ([(6, 8), (4, 8)], 1, [6, 4]),
        ([(6, 1, 8), (4, 1, 8)], 1, [6, 4]),
        ([(6, 10, 8), (4, 10, 8)], 10, [6, 4]),
        ([(10, 6, 8), (10, 4, 8)], 10, [6, 4]),
        ([(5, 47, 8)], 5, [47]),
        ([(1, 6, 8), (1, 7, 8)], 1, [6, 7]),
        ([(10, 1, 8)], 1, [10]),
        ([(6, 2, 8), (4, 2, 8)], 2, [6, 4]),
    ],
)
def test_axes_are_recognised(tmp_path, shapes, crops, clips):
    for i, shape in enumerate(shapes):
        save(tmp_path / "test" / f"v{i}.npy", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    data = find_features("features", tmp_path)
    assert data.crops == crops and data.width == 8 and [len(v) for v in data.test] == clips
    x = np.load(tmp_path / "test" / "v0.npy")
    wanted = x[:, None] if x.ndim == 2 else x.swapaxes(0, 1) if x.shape[0] != clips[0] else x
    assert (data.test[0].clips(range(clips[0])) == wanted).all()


@pytest.mark.parametrize(
    "shapes, words",
    [
        ([(8, 6), (8, 4)], "transpose them"),
        ([(5, 10, 8)], "cannot be told"),
        ([(10, 10, 8)], "cannot be told"),
        ([(0, 8)], "at least one clip"),
        ([(1024, 30)], "transpose them"),
        ([(6, 8), (4, 9)], "width"),
        ([(3,)], "expected \\[clips"),
        ([(2, 2, 2, 2)], "expected \\[clips"),
    ],
)
def test_axes_that_cannot_be_right_are_refused(tmp_path, shapes, words):
    for i, shape in enumerate(shapes):
        save(tmp_path / "test" / f"v{i}.npy", np.zeros(shape, np.float32))
    with pytest.raises(UserError, match=words):
        find_features("features", tmp_path)


def test_names_with_numbers_are_crops_only_where_none_is_missing(tmp_path):
    for name in ("lobby__1", "lobby__2", "door__0", "door__1", "gate__0", "gate__2"):
        save(tmp_path / "test" / f"{name}.npy", rows(6, 8))
    for name in ("hall_rgb", "hall_clip"):
        save(tmp_path / "test" / f"{name}.npy", rows(6, 2, 8))
    videos = read_files([tmp_path / "test"], "test")
    assert {v.name: v.shape[0] for v in videos} == {
        "lobby__1": 1,
        "lobby__2": 1,
        "door": 2,
        "gate__0": 1,
        "gate__2": 1,
        "hall_rgb": 2,
        "hall_clip": 2,
    }


def test_the_toolkits_own_features_keep_their_names(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    names = {"door_clip", "gate_rgb", "lobby__0", "lobby__1", "x_i3d"}
    for name in names:
        save(tmp_path / "test" / f"{name}.npy", rows(4, 1, 8))
    assert {v.name for v in find_features("features", tmp_path).test} == names


@pytest.mark.parametrize(
    "train, test, file, outcome",
    [
        (20, 30, "nalist.npy", "train"),
        (20, 30, "nalist_train.npy", "train"),
        (30, 20, "nalist.npy", "train"),
        (20, 20, "nalist.npy", "refused"),
        (20, 20, "nalist_train.npy", "train"),
        (20, 20, "nalist_test.npy", "test"),
    ],
)
def test_an_index_goes_to_the_array_that_it_ends_with(tmp_path, train, test, file, outcome):
    save(tmp_path / "concat_UCF.npy", rows(train, 2, 8))
    save(tmp_path / "Concat_test_10.npy", rows(test, 2, 8))
    edges = np.linspace(0, train, 6).astype(int)  # first clips and ends of five videos, of the training clips
    save(tmp_path / file, np.stack([edges[:-1], edges[1:]], 1))
    if outcome == "refused":
        with pytest.raises(UserError, match="fits several arrays.*nalist_train.npy or nalist_test.npy"):
            find_features("ucfcrime", tmp_path)
        return
    data = find_features("ucfcrime", tmp_path)
    assert {"train": len(data.train), "test": len(data.test)} == {"train": 1, "test": 1, outcome: 5}


@pytest.mark.parametrize(
    "rows_of, words",
    [
        ([[0, 5], [5, 30]], "ends at clip 30"),
        ([[0, 5], [6, 9]], "gaps or overlaps"),
        ([[0, 3], [5, 8]], "gaps or overlaps"),
        ([[8, 0]], "first and last"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, rows_of, words):
    save(tmp_path / "concat_UCF.npy", rows(20, 1, 8))
    save(tmp_path / "Concat_test_10.npy", rows(9, 1, 8))
    save(tmp_path / "nalist.npy", np.array(rows_of))
    with pytest.raises(UserError, match=words):
        find_features("ucfcrime", tmp_path)


def test_videos_without_a_mask_are_normal_and_counted(tmp_path, capsys):
    """ShanghaiTech's weakly supervised split: names say nothing, test_frame_mask/ holds only the abnormal videos."""
    for n in ("01_0015", "01_001", "02_003"):
        save(tmp_path / "SH_Test" / f"{n}_i3d.npy", rows(4, 1, 8))
    save(tmp_path / "test_frame_mask" / "01_0015.npy", np.arange(64) > 30)
    save(tmp_path / "test_frame_mask" / "03_0031.npy", np.ones(99))
    pixels = np.zeros((64, 3, 4), np.uint8)
    pixels[31:, 1, 2] = 255
    save(tmp_path / "own" / "01_0015.npy", pixels)
    for source in (None, tmp_path / "test_frame_mask", tmp_path / "own"):
        data = find_features("shanghaitech", tmp_path, source)
        assert {v.name: int(data.labels(v).sum()) for v in data.test} == {"01_0015": 33, "01_001": 0, "02_003": 0}
        assert "has no mask of 2 test videos, such as 01_001: they are taken for normal" in capsys.readouterr().out
    (tmp_path / "test_frame_mask").rename(tmp_path / "labels")
    with pytest.raises(UserError, match="no annotation for the test video"):
        find_features("shanghaitech", tmp_path)


@pytest.mark.parametrize(
    "line, words", [("a 30 20", "pairs"), ("a 1 2 3", "pairs"), ("a 90 99", "whose features end at frame 64")]
)
def test_annotations_that_cannot_be_right_are_refused(tmp_path, line, words):
    save(tmp_path / "test" / "a.npy", rows(4, 1, 8))
    (tmp_path / "a.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        find_features("features", tmp_path, tmp_path / "a.txt")


def test_events_of_one_video_on_several_lines(tmp_path):
    save(tmp_path / "test" / "a.npy", rows(4, 1, 8))
    (tmp_path / "a.txt").write_text("a 1 2\na 10 11\n")
    data = find_features("features", tmp_path, tmp_path / "a.txt")
    assert np.flatnonzero(data.labels(data.test[0])).tolist() == [1, 2, 10, 11]


def test_fortran_ordered_files_are_read_rightly(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 10, 8)).astype(np.float32)
    for order in ("C", "F"):
        save(tmp_path / order / "test" / "a.npy", np.asarray(x, order=order))
        assert (find_features("features", tmp_path / order).test[0].clips([5, 2]) == x[[5, 2]]).all()


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    save(tmp_path / "disk" / "a.npy", rows(4, 1, 8))
    (tmp_path / "f" / "test").mkdir(parents=True)
    (tmp_path / "f" / "test" / "part").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "circle").symlink_to(tmp_path / "f" / "test")
    assert [v.name for v in find_features("features", tmp_path / "f").test] == ["a"]


def test_an_ending_that_only_some_files_have_is_part_of_their_names(tmp_path):
    for n in ("door_clip", "gate_rgb"):
        save(tmp_path / "test" / f"{n}.npy", rows(4, 1, 8))
    assert [v.name for v in find_features("features", tmp_path).test] == ["door_clip", "gate_rgb"]


def test_published_annotations_are_read_in_both_forms(tmp_path):
    for suffix in ("", ".mp4"):
        root = write_features(tmp_path / f"ucf{suffix}")
        path = annotate(root / "Temporal_Anomaly_Annotation_for_Testing_Videos.txt")
        path.write_text(path.read_text().replace(".mp4", suffix))
        has_the_truth(find_features("ucfcrime", root))
    root = tmp_path / "xd"
    for name in ("v=a__#1_label_B4-0-0", "Bad.Boys.1995__#01-11-55_01-12-40_label_G-B2-B6", "Calm__#00-01_label_A"):
        for crop in range(5):
            save(root / "RGBTest" / f"{name}__{crop}.npy", rows(6, 8))
    (root / "annotations.txt").write_text(
        "v=a__#1_label_B4-0-0 3 9 20 30\nBad.Boys.1995__#01-11-55_01-12-40_label_G-B2-B6 0 5\n"
    )
    data = find_features("xdviolence", root)
    marked = {v.name.split("__")[0]: np.flatnonzero(data.labels(v)).tolist() for v in data.test}
    assert marked == {"v=a": [*range(3, 10), *range(20, 31)], "Bad.Boys.1995": [*range(6)], "Calm": []}


# ---------------------------------------------------------------------------------- what else is joined with features


def twins():
    """A training and a test video of one name."""
    return [FeatureVideo("01", s, [np.zeros((3, 1, 8), np.float32)]) for s in ("train", "test")]


def test_pseudo_labels_of_two_videos_of_one_name():
    videos = twins()
    aux = SimpleNamespace(source="labels:x.npz", labels={"01": np.ones(3)})
    with pytest.raises(UserError):
        labels_of_clips(aux, videos)
    aux.labels = {"test/01": np.ones(3), "train/01": np.zeros(3)}
    assert labels_of_clips(aux, videos).tolist() == [0, 0, 0, 1, 1, 1]


def test_captions_and_depth_of_two_videos_of_one_name(tmp_path):
    for i, s in enumerate(("train", "test")):
        save(tmp_path / s / "01.npy", np.full((3, 8), i, np.float32) + np.arange(8))
    a, b = twins()
    assert (read_captions(tmp_path, a)[:, 0] == 0).all() and (read_captions(tmp_path, b)[:, 0] == 1).all()
    save(tmp_path / "test" / "01.npy", np.zeros((5, 8)))
    with pytest.raises(UserError):
        read_captions(tmp_path, b)
    save(tmp_path / "depth" / "train" / "01.npy", np.repeat(np.arange(8.0)[:, None], 8, 1))
    save(tmp_path / "depth" / "test" / "01.npy", np.repeat(np.arange(8.0)[None], 8, 0))
    own = [
        Depth(tmp_path / "depth", [Video("01", ".", s)], [np.zeros((4, 8, 8, 1), np.uint8)], tmp_path, "cpu").map(0, 0)
        for s in ("train", "test")
    ]
    assert (own[0][:, 0] == own[1][0]).all() and own[0][7, 0] == 255 and own[1][7, 0] == 0


def test_bags_are_by_name(tmp_path, capsys, listing):
    for n in ("b", "a", "d", "c", "e"):
        save(tmp_path / "train" / f"{n}_i3d.npy", rows(4 + ord(n), 1, 8))
    (tmp_path / "normal.txt").write_text("Training_Normal/a.mp4\n# a comment\nc_i3d.npy\ngone\n")
    (tmp_path / "abnormal.txt").write_text("d\nb\n")
    data = find_features("features", tmp_path)
    assert [[v.name for v in part] for part in find_bags(data)] == [["a", "c"], ["b", "d"]]
    said = capsys.readouterr().out
    assert (
        "1 videos of" in said
        and "such as gone" in said
        and "1 training videos are in neither list and left out, such as e" in said
    )
    (tmp_path / "abnormal.txt").write_text("d\na\n")
    with pytest.raises(UserError):
        find_bags(data)


def test_given_features_of_frames(tmp_path):
    x = np.arange(3, dtype=np.float32)[:, None, None] + np.zeros((3, 10, 8), np.float32)
    save(tmp_path / "labels" / "v.npy", np.zeros(40))  # is no feature
    video = SimpleNamespace(name="v", split="test", expected_frames=lambda: 40)
    for form in (x, x.transpose(1, 0, 2), x[:, 0]):
        save(tmp_path / "test" / "v.npy", form)
        given = GivenFeatures(tmp_path)
        assert given.width == 8 and given.load(video)[:, 0].tolist() == [0] * 16 + [1] * 16 + [2] * 8
    save(tmp_path / "test" / "v.npy", np.zeros((3, 3, 8)))
    with pytest.raises(UserError):
        given.load(video)


def test_flags_of_features_are_refused_with_videos(tmp_path):
    args = parse(["--dataset", "folder", "--data-root", str(tmp_path), "--segments"])
    with pytest.raises(UserError, match="--segments are for --features"):
        prepare(DataSource.from_args(args), Run("cpu", "fp32"), FeatureOptions.from_args(args))


def test_where_labels_were_looked_for_is_said(tmp_path):
    save(tmp_path / "f" / "test" / "a.npy", rows(4, 1, 8))
    assert "looked for *emporal*nnotation*.txt" in find_features("features", tmp_path / "f").as_dataset().no_labels()
    save_frames(tmp_path / "d" / "test" / "b_0", walkers(20))
    save(tmp_path / "d" / "labels" / "b_0_label.npy", np.zeros(20))
    args = parse(
        ["--dataset", "folder", "--data-root", str(tmp_path / "d"), "--cache", str(tmp_path / "c"), "--workers", "1"]
    )
    data = prepare(DataSource.from_args(args), Run("cpu", "fp32"), FeatureOptions.from_args(args))
    said = data.as_dataset().no_labels()
    assert "looked for" in said and "b_0_label.npy" in said


def test_exchanged_files_are_another_source(tmp_path):
    for i, name in enumerate("ab"):
        save(tmp_path / "test" / f"{name}.npy", rows(40, 1, 8, value=i))
        os.utime(tmp_path / "test" / f"{name}.npy", ns=(10**18, 10**18))
    first = find_features("features", tmp_path).test[0].fingerprint()
    assert find_features("features", tmp_path).test[0].fingerprint() == first
    for old, new in (("a", "t"), ("b", "a"), ("t", "b")):
        (tmp_path / "test" / f"{old}.npy").rename(tmp_path / "test" / f"{new}.npy")
    assert find_features("features", tmp_path).test[0].fingerprint() != first


def test_the_toolkits_own_features_of_odd_names(tmp_path):
    for name in ("a#b", "50%", "視频"):
        save(tmp_path / "test" / f"{safe_filename(name)}.npy", rows(4, 1, 8))
        save(tmp_path / "labels" / f"{safe_filename(name)}.npy", np.ones(64))
    (tmp_path / "settings.json").write_text("{}")
    data = find_features("features", tmp_path)
    assert sorted(v.name for v in data.test) == ["50%", "a#b", "視频"] and all(data.labels(v).all() for v in data.test)


@pytest.mark.parametrize(
    "train, test, clips, crops",
    [((5, 10), [(7, 10), (4, 10)], 5, 10), ((5, 10), [(5, 7), (5, 4)], 10, 5), ((10, 10), [(10, 3), (10, 4)], 10, 10)],
)
def test_the_other_split_tells_axes_apart(tmp_path, train, test, clips, crops):
    for split, shapes in (("train", [train]), ("test", test)):
        for i, shape in enumerate(shapes):
            save(tmp_path / split / f"{split}{i}.npy", rows(*shape, 8))
    data = find_features("features", tmp_path)
    assert [len(v) for v in data.train] == [clips] and data.crops == crops


# ---------------------------------------------------------------------------------------------------------- prefetching


def videos_of(root, lengths):
    for i, n in enumerate(lengths):
        save_frames(root / "test" / f"v{i}", [np.full((8, 8, 3), 10 * i + t, np.uint8) for t in range(n)])
    return list_videos(root / "test")


def wait_for_threads():
    for thread in threading.enumerate():
        if isinstance(thread, prefetch.DecodeThread):
            thread.join(10)
            assert not thread.is_alive()


def numbers(frames):
    return [int(frame[0, 0, 0]) for frame in frames]


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_prefetched_frames_are_in_order(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(prefetch, "QUEUE_FRAMES", 2)
    videos = videos_of(tmp_path, (5, 1, 7, 3))
    read = {v.name: numbers(frames) for v, frames in prefetch.decode_ahead(videos, lambda f: f + 1, threads)}
    assert read == {f"v{i}": [10 * i + t + 1 for t in range(n)] for i, n in enumerate((5, 1, 7, 3))}
    wait_for_threads()


@pytest.mark.parametrize("error", [UserError("no frame"), ValueError("bad bytes")])
def test_an_error_of_a_decoder_is_raised_at_its_video(tmp_path, error):
    def preprocess_frame(frame):
        if frame[0, 0, 0] == 12:
            raise error
        return frame

    read, errors = {}, {}
    for video, frames in prefetch.decode_ahead(videos_of(tmp_path, (3, 4, 3)), preprocess_frame, 2):
        read[video.name] = []
        try:
            for frame in frames:
                read[video.name] += numbers([frame])
        except UserError as e:
            errors[video.name] = str(e)
    assert read == {"v0": [0, 1, 2], "v1": [10, 11], "v2": [20, 21, 22]}
    assert list(errors) == ["v1"] and str(error) in errors["v1"]
    wait_for_threads()


def test_prefetching_is_bounded_and_stops_early(tmp_path, monkeypatch):
    """No more videos and frames are decoded than threads and queues allow; a consumer may leave at any frame."""
    monkeypatch.setattr(prefetch, "QUEUE_FRAMES", 2)
    videos, decoded = videos_of(tmp_path, (9, 9, 9, 9)), []

    def preprocess_frame(frame):
        decoded.extend(numbers([frame]))
        return frame

    for leave_after in (0, 1, 4, 9):
        del decoded[:]
        for _, frames in prefetch.decode_ahead(videos, preprocess_frame, 2):
            until = time.monotonic() + 30
            while len(decoded) < 2 * (2 + 1) and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.1)
            assert sorted(decoded) == [0, 1, 2, 10, 11, 12]  # in each thread two in the queue, and one that waits
            for _ in zip(range(leave_after), frames):
                pass
            break
        wait_for_threads()
    for _, frames in prefetch.decode_ahead(videos, preprocess_frame, 2):  # leaves each video, and goes on to the next
        assert len(list(zip(range(3), frames))) == 3
    wait_for_threads()
