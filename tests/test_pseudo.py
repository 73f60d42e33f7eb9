"""Pseudo anomalies of AED-MAE: what is cut out, where it is pasted; and UBnormal, whose objects the paper pastes."""

import cv2
import numpy as np
import pytest
import torch

from common.distributed import Run
from common.io import UserError
from common.readers import datasets
from common.readers.video import Decoder
from sdmae import pseudo
from sdmae.data import SAMPLE_OFFSETS
from tests.helpers import cached, refused, save_frames, save_video, script, walkers
from tests.tools import held_out


def test_pasted_objects_are_where_the_mask_says():
    rng = np.random.default_rng(0)
    found = [
        [
            (np.full((3, 64, 64), 250, np.uint8), np.full((1, 64, 64), 255, np.uint8), (8, 6), (20.0, 30.0 + t))
            for t in range(pseudo.LENGTH)
        ]
        for _ in range(3)
    ]
    bank = pseudo.make_bank(found, "self")
    five = torch.full((40, 5, 3, 32, 64), 10, dtype=torch.uint8)
    chosen = pseudo.choose(bank, 40, 0.5, (32, 64), rng)
    on_device = pseudo.of_part(chosen, slice(None), Run("cpu", "fp32"))
    seen, mask = pseudo.paste(five, bank, on_device, SAMPLE_OFFSETS)
    touched = torch.zeros(40, dtype=torch.bool)
    touched[chosen["sample"]] = True
    assert (five == 10).all() and 8 < int(touched.sum()) < 32
    assert (seen[~touched] == 10).all() and (mask[~touched] == 0).all()
    inside, outside = mask[touched, 0] > 0, seen[touched, 2, 0] == 10
    assert (seen[touched, 2, 0][inside] > 120).all()  # the object's colour where the mask is
    grown = torch.nn.functional.max_pool2d(inside.float()[:, None], 3, 1, 1)[:, 0] > 0
    assert outside[~grown].all()  # untouched elsewhere
    whole = [i for i in range(len(inside)) if not (inside[i][[0, -1]].any() or inside[i][:, [0, -1]].any())]
    for i in whole:  # as large as chosen
        area = 48 * float(chosen["grow"][i]) ** 2
        assert 0.6 * area - 6 < int(inside[i].sum()) < 1.4 * area + 6
    # the motion: speed factor times the object's own pixel per frame
    for i in whole:
        rows, columns = (torch.nonzero(seen[touched][i, k, 0] > 120).float().mean(0) for k in (1, 3))
        moved = float((columns - rows).norm())
        edge = (seen[touched][i][[1, 3], 0][:, [0, -1]] > 10).any() or (
            seen[touched][i][[1, 3], 0][:, :, [0, -1]] > 10
        ).any()
        assert edge or abs(moved - 2 * float(chosen["speed"][i])) < 1.0


def test_moving_objects_are_cut_out(tmp_path):
    arrays = cached(tmp_path, walkers(60, size=(64, 96), speed=1), size=(64, 96))
    bank = pseudo.from_training(arrays)
    assert bank.source == "self" and len(bank) >= 3
    assert bank.sizes.mean() > 8 and (bank.masks > 0).float().mean() > 0.5
    speed = (bank.places[:, -1] - bank.places[:, 0]) / (pseudo.LENGTH - 1)
    assert abs(float(speed[:, 1].median()) - 1) < 0.3 and abs(float(speed[:, 0].median())) < 0.3
    assert pseudo.from_training([np.full((20, 32, 64, 1), 9, np.uint8)]) is None


def test_people_far_away_are_cut_out_one_by_one():
    """They are a third of a token of 16 × 16 px large."""
    frames = np.full((40, 160, 240, 1), 100, np.uint8)
    for t, f in enumerate(frames):
        f[60:74, 20 + 2 * t : 26 + 2 * t] = 20
    assert [14, 6] in pseudo.from_training([frames]).sizes[:, 0].int().tolist()


# ------------------------------------------------------------------------------------------------------------- UBnormal


def make_ubnormal(root):
    (root / "scripts").mkdir(parents=True)
    lists = {
        "normal_training": ["normal_scene_1_scenario_1"],
        "abnormal_training": ["abnormal_scene_1_scenario_2"],
        "normal_test": ["normal_scene_2_scenario_1"],
        "abnormal_test": ["abnormal_scene_2_scenario_10"],
    }
    for k, names in lists.items():
        (root / "scripts" / f"{k}_video_names.txt").write_text("\n".join(names) + "\n")
        for name in names:
            scene = root / f"Scene{name.split('_')[2]}"
            save_video(scene / f"{name}.avi", walkers(12, size=(160, 320)))
            if name.startswith("abnormal"):
                notes = scene / f"{name}_annotations"
                notes.mkdir()
                (notes / f"{name}_tracks.txt").write_text("1.000e+00,2.000e+00,9.000e+00\n2,4,30\n")
                for t in range(2, 12):
                    ids = np.zeros((160, 320), np.uint8)
                    ids[40:80, 20 + t : 50 + t] = 1 if t < 10 else 0
                    ids[100:120, 200:220] = 2 if t >= 4 else 0
                    cv2.imwrite(str(notes / f"{name}_{t:04d}_gt.png"), ids)
    return root


def test_ubnormal_reader_and_its_objects(tmp_path):
    data = datasets.find("UBnormal", make_ubnormal(tmp_path / "UBnormal"))
    assert [v.name for v in data.train] == ["normal_scene_1_scenario_1"]
    assert [v.name for v in data.test] == ["abnormal_scene_2_scenario_10", "normal_scene_2_scenario_1"]
    assert [v.name for v in data.abnormal_train] == ["abnormal_scene_1_scenario_2"] and data.test[0].scene == "2"
    assert data.labels(data.test[0], 12).tolist() == [0, 0] + [1] * 10  # a track that ends after the video is cut
    assert data.labels(data.test[1], 12).sum() == 0
    tracks = data.tracks(data.test[0])
    assert tracks[0].tolist() == [1, 2, 22, 40, 51, 79] and (tracks[:, 0] == 2).sum() == 8
    assert data.masks(data.test[0]).shape == (12, 160, 320) and data.masks(data.test[1]).sum() == 0
    bank = pseudo.from_ubnormal(data, (160, 320), 3)
    assert (
        len(bank) == 1 and bank.source == "ubnormal" and bank.sizes[0, 0].tolist() == [40, 30]
    )  # the 20 × 20 one is too small
    assert (bank.crops[:, :, 0] == bank.crops[:, :, 2]).all()
    (tmp_path / "UBnormal" / "scripts" / "normal_test_video_names.txt").unlink()
    with pytest.raises(UserError, match="normal_test_video_names.txt"):
        datasets.find("ubnormal", tmp_path)


def test_each_object_is_kept_as_often(monkeypatch):
    monkeypatch.setattr(pseudo, "OBJECTS", 5)
    assert pseudo.subsample(iter("abcde"), 0) == list("abcde")
    kept = [pseudo.subsample(iter(range(20)), seed) for seed in range(2000)]
    assert all(len(set(x)) == 5 and x == sorted(x) for x in kept)
    assert np.abs(np.bincount(np.concatenate(kept)) / 2000 - 5 / 20).max() < 0.04


# ------------------------------------------------------------------------------------------------------------ held out


@pytest.mark.parametrize("centre", [(70, 30), (-6, 30), (30, 101), (30, -6)])
def test_an_object_outside_the_frame_is_not_pasted(centre):
    step = np.full((1, 8, 8), 250, np.uint8), np.full((1, 8, 8), 255, np.uint8), (8, 6), (0, 0)
    frame = np.full((64, 96, 1), 10, np.uint8)
    assert held_out.paste_object(frame, step, centre, 1.0, False) is None and (frame == 10).all()


def test_half_of_the_training_videos_become_a_labelled_test_set(tmp_path):
    originals = {f"a{i}": walkers(150, speed=1, seed=i) for i in range(4)}
    for name, frames in originals.items():
        save_frames(tmp_path / "data" / "train" / name, frames)
    out = tmp_path / "held out"
    flags = ("--dataset", "folder", "--data-root", tmp_path / "data", "--out", out)
    done = script("tests/tools/held_out.py", *flags)
    data = datasets.find("folder", out)
    assert [v.name for v in data.train] == ["a0", "a2"] and [v.name for v in data.test] == ["a1", "a3"]
    abnormal = 0
    for v in data.train:
        assert np.array_equal(list(Decoder(v)), originals[v.name])
    for v in data.test:
        frames, masks = np.stack(list(Decoder(v))), data.masks(v)
        labels = data.labels(v, len(frames))
        assert np.array_equal(labels, masks.any((1, 2))) and 0 < labels.sum() < len(labels)
        changed = (frames != originals[v.name]).any((1, 2, 3))
        assert not changed[labels == 0].any()  # a frame without an object is left as it is
        assert changed[labels == 1].mean() > 0.9
        grown = np.stack([cv2.dilate(m.astype(np.uint8), np.ones((7, 7))) > 0 for m in masks])  # with its soft edge
        assert not (frames != originals[v.name]).any(3)[~grown].any()
        abnormal += labels.sum()
    assert f"2 training and 2 test videos in {out}; {abnormal} of 300 test frames hold an object" in done.stdout
    refused(script("tests/tools/held_out.py", *flags, check=False), "is not empty")
    flags = ("--dataset", "folder", "--data-root", tmp_path / "data" / "train" / "a0", "--out", tmp_path / "x")
    refused(script("tests/tools/held_out.py", *flags, check=False), "two are needed")
