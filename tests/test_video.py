"""Decoding and the frame cache, on good and on damaged input."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from common.cache import FrameCache, VideoFiles
from common.io import UserError
from common.readers.video import Decoder, Video, list_videos, natural, open_video
from tests.helpers import save_frames, save_video, walkers


def cached(tmp_path, video, workers=1):
    cache = FrameCache(tmp_path / "cache")
    usable, failed = cache.build([video], workers)
    return cache, usable, failed


def test_frames_in_a_folder_come_back_exactly(tmp_path):
    frames = walkers(7, channels=3)
    video = open_video(save_frames(tmp_path / "ü v", frames))
    cache, usable, failed = cached(tmp_path, video)
    got = cache.frames(video)
    assert not failed and isinstance(got, np.memmap) and got.dtype == np.uint8 and (got == frames).all()


def test_grey_stays_grey(tmp_path):
    video = open_video(save_frames(tmp_path / "v", walkers(4, channels=1)))
    assert cached(tmp_path, video)[0].frames(video).shape == (4, 64, 96, 1)


def test_video_file_and_its_rate(tmp_path):
    video = open_video(save_video(tmp_path / "my film é.avi", walkers(9), fps=12))
    cache, _, _ = cached(tmp_path, video)
    assert cache.frames(video).shape == (9, 64, 96, 3) and cache.info(video)["fps"] == pytest.approx(12)


def test_frame_order_is_by_number(tmp_path):
    names = ["frame10.png", "frame9.png", "frame1.png", "Frame 2.png"]
    assert sorted(names[:3], key=natural) == ["frame1.png", "frame9.png", "frame10.png"]
    for n in ("1.png", "10.png", "2.png"):
        save_frames(tmp_path / n, np.full((1, 16, 16, 1), int(n.split(".")[0]), np.uint8))
        os.rename(tmp_path / n / "000.png", tmp_path / f"x{n}")
        (tmp_path / n).rmdir()
    assert [int(f[0, 0, 0]) for f in Decoder(open_video(tmp_path))] == [1, 2, 10]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif"])
@pytest.mark.parametrize("harm", ["truncated", "empty", "noise"])
def test_a_damaged_frame_is_replaced_and_named(tmp_path, capsys, suffix, harm):
    folder = save_frames(tmp_path / "v", walkers(5), suffix)
    bad = folder / f"002{suffix}"
    data = bad.read_bytes()
    bad.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "noise": os.urandom(500)}[harm])
    video = open_video(folder)
    cache, _, failed = cached(tmp_path, video)
    got = cache.frames(video)
    assert not failed and len(got) == 5
    assert (got[2] == got[1]).all() and cache.info(video)["damaged"] == [bad.name]
    assert bad.name in capsys.readouterr().out


def test_a_damaged_first_frame_is_replaced_by_the_next(tmp_path):
    folder = save_frames(tmp_path / "v", walkers(4))
    (folder / "000.png").write_bytes(b"")
    decoder = Decoder(open_video(folder))
    got = list(decoder)
    assert len(got) == 4 and (got[0] == got[1]).all()
    assert (np.stack(list(decoder)) == got).all() and decoder.lost == [0] and len(decoder.warnings) == 1


def test_frames_of_another_size_are_resized_and_counted(tmp_path, capsys):
    folder = save_frames(tmp_path / "v", walkers(3))
    save_frames(tmp_path / "w", walkers(1, size=(80, 120)))
    os.replace(tmp_path / "w" / "000.png", folder / "001.png")
    video = open_video(folder)
    cache, _, _ = cached(tmp_path, video)
    assert cache.frames(video).shape == (3, 64, 96, 3) and cache.info(video)["resized"] == 1
    assert "another size" in capsys.readouterr().out


def test_truncated_and_empty_video_files(tmp_path, capsys):
    path = save_video(tmp_path / "a.avi", walkers(40))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "b.avi").write_bytes(b"")
    (tmp_path / "c.avi").write_bytes(b"not a video at all" * 100)
    cache = FrameCache(tmp_path / "cache")
    usable, failed = cache.build(list_videos(tmp_path), 2)
    assert [v.name for v in usable] == ["a"] and sorted(failed) == ["test/b", "test/c"]
    assert 5 < len(cache.frames(usable[0])) < 40 and "could not be decoded" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.part*"))


def test_nothing_is_decoded_twice_until_the_source_changes(tmp_path):
    video = open_video(save_frames(tmp_path / "v", walkers(4)))
    cache, _, _ = cached(tmp_path, video)
    first = os.stat(cache.path(video)).st_mtime_ns
    cache.build([video], 1)
    assert os.stat(cache.path(video)).st_mtime_ns == first
    picture = tmp_path / "v" / "000.png"
    picture.write_bytes(picture.read_bytes())  # copied anew: another time, the same bytes
    assert cache.info(video)["source"] == video.fingerprint()
    data = bytearray(picture.read_bytes())
    data[-1] ^= 1  # of the last chunk's checksum, which no decoder asks for
    picture.write_bytes(data)
    assert cache.info(video) is None
    cache.build([video], 1)
    assert os.stat(cache.path(video)).st_mtime_ns != first
    picture.unlink()
    with pytest.raises(UserError, match="000.png cannot be read"):
        video.content()


def test_missing_and_empty_input(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_video(tmp_path / "none.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no frames"):
        open_video(tmp_path / "empty")
    assert list_videos(tmp_path) == []
    with pytest.raises(UserError, match="cannot be opened"):
        list(Decoder(Video("x", tmp_path / "empty.avi")))


def test_two_files_of_one_name_stay_apart(tmp_path):
    save_video(tmp_path / "a.avi", walkers(3))
    save_frames(tmp_path / "a", walkers(3))
    assert sorted(v.name for v in list_videos(tmp_path, walk=True)) == ["a", "a.avi"]


def test_a_damaged_training_video_leaves_the_test_video_of_its_name(tmp_path):
    good = Video("01", save_frames(tmp_path / "test" / "01", walkers(6)), "test")
    good.files = sorted(p.name for p in good.path.iterdir())
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "01.avi").write_bytes(b"nonsense" * 50)
    bad = Video("01", tmp_path / "train" / "01.avi", "train")
    usable, failed = FrameCache(tmp_path / "cache").build([bad, good], 1)
    assert usable == [good] and list(failed) == ["train/01"]


def test_input_deleted_in_mid_run_is_a_named_skip(tmp_path):
    for i in range(3):
        save_frames(tmp_path / "v" / f"a{i}", walkers(8, seed=i))
    save_video(tmp_path / "v" / "c.avi", walkers(8))
    videos, cache = list_videos(tmp_path / "v"), FrameCache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "v" / "a1")
    (tmp_path / "v" / "a2" / "004.png").unlink()
    (tmp_path / "v" / "c.avi").unlink()
    usable, failed = cache.build(videos, 2)
    assert [v.name for v in usable] == ["a0"] and set(failed) == {"test/a1", "test/a2", "test/c"}
    assert all("No such file" in why for why in failed.values())


def test_any_number_of_workers_makes_the_same_files(tmp_path):
    videos = [open_video(save_frames(tmp_path / "v" / f"a{i}", walkers(6 + i, seed=i))) for i in range(4)]
    made = []
    for workers in (1, 2, 3):
        cache = FrameCache(tmp_path / f"cache{workers}", (32, 48))
        cache.build(videos, workers)
        made.append(
            [cache.path(v).read_bytes() for v in videos]
            + [cache.path(v).with_suffix(".json").read_text() for v in videos]
        )
    assert made[0] == made[1] == made[2]


class Lengths(VideoFiles):
    """One number per video, its frames; a video called "bad" cannot be made."""

    action = "counting"

    def make(self, videos, workers, show, *, factor):
        failed = {}
        for v in videos:
            try:
                if v.name == "bad":
                    raise UserError("no")
                self.write(v, iter([np.array([len(v.files) * factor])]), lambda shape: {"warnings": ["short"]})
            except UserError as e:
                failed[v.key] = str(e)
        return failed


def test_a_subclass_makes_what_is_missing(tmp_path, capsys):
    """build() skips finished videos and unreadable sources, and prints warnings; prepare() shares the videos out."""
    for name, count in (("a", 2), ("b", 3), ("bad", 1), ("gone", 1)):
        save_frames(tmp_path / "v" / name, walkers(count))
    videos, files = list_videos(tmp_path / "v"), Lengths(tmp_path / "cache")
    shutil.rmtree(tmp_path / "v" / "gone")
    run = SimpleNamespace(rank=0, world_size=1, is_main=True, all_gather_object=lambda x: [x])
    usable, failed = files.prepare(videos, run, shard="0/2", factor=1)
    assert [v.name for v in usable] == ["a"] and list(failed) == ["test/bad"]
    out = capsys.readouterr().out
    assert "counting: 2 of 2 videos, into " in out and out.count("warning: video a: short") == 1
    usable, failed = files.prepare(videos, run, factor=10)
    assert [int(files.array(v)[0]) for v in usable] == [2, 30]
    assert failed["test/bad"] == "no" and "No such file" in failed["test/gone"]
    assert "counting: 3 of 4 videos, into " in capsys.readouterr().out
    usable, failed = files.prepare(videos[:2], run, factor=0)
    out = capsys.readouterr().out
    assert [v.name for v in usable] == ["a", "b"] and failed == {} and "counting" not in out
    run.all_gather_object = lambda x: [x, [videos[1]] if isinstance(x, list) else {}]  # of a machine with its own disk
    usable, failed = files.prepare(videos[:2], run)
    assert [v.name for v in usable] == ["a"] and "every machine" in failed["test/b"]
