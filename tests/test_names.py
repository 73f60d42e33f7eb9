"""Names of every kind: readers, caches, archives, tables and links take them; a renamed source is noticed."""

import csv
import os
import subprocess
import sys
import urllib.parse
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import own_video
from common.cache import FrameCache, VideoFiles
from common.flow import sources
from common.io import UserError, load_arrays, read_table, safe_filename, save_arrays, writing_table
from common.objects import detectors
from common.objects.baselines import baseline_path
from common.objects.cubes import BoxFiles, CubeStore, Settings
from common.readers import container, datasets
from common.readers.container import Clock
from common.readers.dataset import Dataset
from common.readers.video import Decoder, Video, list_videos, open_video
from common.report import page as report
from common.report import plots, ranking
from common.score_cache import ScoreCache
from frd_uvad.clip_files import ClipFiles
from frd_uvad.features.names import original_name
from frd_uvad.svmae import clips
from frd_uvad.svmae import preprocess as svmae
from scene_aware_ae import encoder as scene_encoder
from scene_aware_ae import preprocess as scene_aware
from tests.helpers import ROOT, save_frames, save_video, script, tiny_folder, walkers
from tests.test_report import content

NOT_UTF8 = os.fsdecode(b"caf\xe9") if os.name == "posix" else "caf\udce9"
NAMES = [
    "ordinary_01",
    "file",
    "allow_pickle",
    "arr_0",
    "seconds",
    "source",
    "labels",
    "smoothing",
    "a#b",
    "#1",
    "a?b",
    "a%20b",
    "%2F",
    "a:b",
    "it's",
    'say "x"',
    "a b",
    " lead",
    "trail ",
    "trail.",
    "-dash",
    "$x_1$",
    r"$\bad{$",
    "<b>&",
    "a\\b",
    "a,b",
    "a*b",
    "a|b",
    "视频",
    "e\u0301",
    "\u00e9",
    "①",
    "10²5",
    "😀",
    "a\nb",
    "a\tb",
    "\x1b[31m",
    "n" * 200,
    "é" * 120,
    "CON",
    "nul.x",
    "a.b.c",
    "a.npy",
    "img%03d",
    "concat:a",
    "~x",
    NOT_UTF8,
]
FRAMES = 4


def able(path, make):
    """make(), or a skip where this file system cannot hold such a name."""
    try:
        return make()
    except OSError as e:
        pytest.skip(f"this file system holds no {path!a} ({e.strerror})")


def score_page(folder, name):
    """A report on one video with a link to its overlay, a file that is there."""
    scores, file = {name: np.linspace(0, 1, FRAMES)}, folder / "overlay" / f"{safe_filename(name)}.mp4"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    report.write(folder / "report.html", f"method on {name}", scores, scores, overlays={name: f"overlay/{file.name}"})
    return folder / "report.html"


# ------------------------------------------------------------------------------------------------------- names of files


def test_there_are_many_names():
    assert len(set(NAMES)) == len(NAMES) >= 25


def test_ordinary_names_stay_and_no_two_become_one():
    for name in (
        "01",
        "Test001",
        "01_0014",
        "normal_scene_1_scenario_2",
        "Abuse028_x264",
        "a b",
        "a.b.c",
        "视频",
        "Straße-3",
    ):
        assert safe_filename(name) == name
    hard = [
        *NAMES,
        "a/b",
        "a_b",
        "a%2Fb",
        "a%252Fb",
        "..",
        ".",
        "n" * 201,
        "n" * 199 + "m" * 2,
        "caf\u00e9",
        "caf%E9",
        "cam/1?user=…",
    ]
    assert len({safe_filename(name) for name in hard}) == len(set(hard))
    for name, filename in (("a/b", "a%2Fb"), ("..", "%2E%2E"), ("CON", "%43ON"), ("trail ", "trail%20")):
        assert safe_filename(name) == filename


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Z", "C")), max_size=30))
@settings(max_examples=200, deadline=None)
def test_a_name_comes_back(name):
    stem = safe_filename(name)
    assert (
        original_name(stem) == name
        and stem.isprintable()
        and not set(stem) & set('/\\:*?"<>|')
        and stem == stem.strip(" .")
    )
    assert len(stem.encode()) <= 300


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_every_name_works(name, tmp_path, capsys):
    """Folder of frames, video file, cache, archive, table, report, kept scores."""
    frames = walkers(FRAMES)
    able(name, lambda: save_frames(tmp_path / "test" / name, frames))
    able(
        name,
        lambda: (
            (tmp_path / "files").mkdir()
            or (tmp_path / "files" / f"{name}.avi").write_bytes(save_video(tmp_path / "plain.avi", frames).read_bytes())
        ),
    )
    (folder,), (file,) = list_videos(tmp_path / "test"), list_videos(tmp_path / "files")
    assert folder.name == file.name == name and open_video(file.path).name == name
    for video in (folder, file):
        assert len(list(Decoder(video))) == video.expected_frames() == FRAMES
        cache = FrameCache(tmp_path / "cache" / video.path.parent.name)
        assert cache.build([video], 1) == ([video], {}) and cache.frames(video).shape == frames.shape
        assert cache.info(video)["frames"] == FRAMES and cache.path(video).parent == cache.folder / "test"
    assert np.array_equal(FrameCache(tmp_path / "cache" / "test").frames(folder), frames)

    scores = {name: np.arange(FRAMES, dtype=np.float32), "other": np.ones(2)}
    save_arrays(tmp_path / "scores.npz", scores)
    found = load_arrays(tmp_path / "scores.npz", "scores")
    assert list(found) == [name, "other"] and all(np.array_equal(found[k], scores[k]) for k in scores)
    assert np.array_equal(load_arrays(tmp_path / "scores.npz", "scores", [name])[name], scores[name])

    sys.stdout.reconfigure(errors="backslashreplace")  # as common.io.run_script does
    ranking.write_ranking(scores, tmp_path)
    with open(tmp_path / "ranking.csv", encoding="utf-8", newline="") as f:
        assert [row["video"] for row in csv.DictReader(f)] == [name if name != NOT_UTF8 else "caf\\udce9"]

    page = score_page(tmp_path, name)
    (video,) = content(page)["videos"]
    assert video["name"] == name and content(page)["title"] == f"method on {name}"
    assert (page.parent / urllib.parse.unquote(video["overlay"])).is_file() and not set(video["overlay"]) & set(
        "#?<>\"' :\\"
    )
    assert page.read_bytes().count(b"</script>") == 2

    r = SimpleNamespace(is_main=True, rank=0, world_size=1, barrier=lambda: None, print=print)
    for video in (folder, file):
        kept = ScoreCache(tmp_path / "kept" / video.path.parent.name, {"weights": "w"}, Video.fingerprint)
        made = kept.compute([video], lambda v, tick: {"scores": scores[v.name]}, r, size=lambda v: 1, unit="video")
        assert (
            np.array_equal(made[f"test/{name}"]["scores"], scores[name]) and len(list(kept.folder.rglob("*.npz"))) == 1
        )


def test_hidden_files_are_left_out_and_those_put_aside_are_named(tmp_path):
    for name in (".hidden", "..x", "_aside", "a"):
        save_frames(tmp_path / name, walkers(2))
    left_out = []
    assert [v.name for v in list_videos(tmp_path, left_out=left_out)] == ["a"] and left_out == ["_aside"]


def test_names_alike_in_archives(tmp_path):
    """What np.load takes for one another, and a name that looks like an escaped one."""
    arrays = {"a": np.zeros(1), "a.npy": np.ones(2), "x/y": np.ones(3), "caf\\udce8": np.ones(4), NOT_UTF8: np.array(5)}
    save_arrays(tmp_path / "a.npz", arrays)
    found = load_arrays(tmp_path / "a.npz", "arrays")
    assert list(found) == list(arrays) and all(np.array_equal(found[k], arrays[k]) for k in arrays)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as other:  # others read it too
        assert other["x/y"].shape == (3,)
    np.savez(tmp_path / "b.npz", one=np.ones(1), two=np.ones(2))
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as z:
        z.infolist()[0].comment = b"a comment of somebody else's \xff"
        z.writestr("note", b"")
    with pytest.raises(UserError, match="readable .npz archive"):
        load_arrays(tmp_path / "b.npz", "arrays")
    np.savez(tmp_path / "b.npz", one=np.ones(1), two=np.ones(2))
    assert list(load_arrays(tmp_path / "b.npz", "arrays")) == ["one", "two"]


def test_tables_keep_names_with_breaks(tmp_path):
    with writing_table(tmp_path / "t.csv") as table:
        table.writerows([["video", "start"], ["a\nb", 1], ["a\u2028b", 2], ['say "x", y', 3]])
    with open(tmp_path / "t.csv", "a") as f:
        f.write('# a comment\n"#1",4\n')
    assert read_table(tmp_path / "t.csv", "table") == [
        (1, ["video", "start"]),
        (3, ["a\nb", "1"]),
        (4, ["a\u2028b", "2"]),
        (5, ['say "x", y', "3"]),
        (7, ["#1", "4"]),
    ]


def test_a_comment_says_nothing_of_the_delimiter(tmp_path):
    (tmp_path / "t.csv").write_text("# of Monday, by hand\n\nvideo;start\na;1\n")
    assert [row for _, row in read_table(tmp_path / "t.csv", "table")] == [["video", "start"], ["a", "1"]]


@pytest.mark.parametrize("name", [r"$\bad{$", "$x_1$", "a\nb\x1b", NOT_UTF8], ids=ascii)
def test_titles_of_plots(name, tmp_path):
    plots.curve(np.arange(3.0), np.arange(3.0), None, f"method · {name}", tmp_path / "c.png")
    plots.curves({name: np.arange(3.0)}, np.array([0, 1, 0]), name, tmp_path / "d.png")
    plots.roc({name: {"v": np.arange(3.0)}}, {"v": np.array([0, 1, 0])}, tmp_path / "e.png")
    assert all((tmp_path / f"{x}.png").stat().st_size > 1000 for x in "cde")


@pytest.mark.parametrize("name", ["$x_1$", NOT_UTF8, "a#b"], ids=ascii)
def test_results_of_ones_own_video(name, tmp_path, capsys):
    sys.stdout.reconfigure(errors="backslashreplace")
    out = tmp_path / safe_filename(name)
    own_video.write(name, walkers(FRAMES), Clock(10.0), np.arange(4.0), "none", "method", out)
    (video,) = content(out / "report.html")["videos"]
    assert (
        video["name"] == name
        and (out / video["overlay"]).stat().st_size > 500
        and (out / "curve.png").stat().st_size > 1000
    )


@pytest.mark.skipif(os.name != "posix", reason="names are UTF-8 elsewhere")
def test_an_overlay_in_a_folder_whose_name_is_not_utf8(tmp_path):
    able(NOT_UTF8, (tmp_path / NOT_UTF8).mkdir)
    path, frames = tmp_path / NOT_UTF8 / "o.mp4", walkers(FRAMES)
    plots.overlay(frames, None, np.arange(FRAMES), None, path, Clock(10.0), (0, 1), (0, 1))
    assert len(list(Decoder(open_video(path)))) == FRAMES


@pytest.mark.skipif(os.name != "posix", reason="names are UTF-8 elsewhere")
def test_an_opencv_that_takes_no_bytes_skips_the_video(tmp_path, monkeypatch):
    able(NOT_UTF8, lambda: (tmp_path / f"{NOT_UTF8}.avi").write_bytes(b"x"))

    def refuse(path):
        assert isinstance(path, bytes)  # a str would end the process
        raise TypeError

    monkeypatch.setattr(container.cv2, "VideoCapture", refuse)
    usable, failed = FrameCache(tmp_path / "cache").build(list_videos(tmp_path), 1)
    assert usable == [] and "not UTF-8, rename it" in failed[f"test/{NOT_UTF8}"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_a_name(encoding):
    code = (
        "from common.io import UserError, run_script\n"
        "def main():\n    print('64×96 ± … 视频 caf\\udce9')\n    raise UserError('no video a\\nb 视频')\n"
        "run_script(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 2 and b"\\u89c6\\u9891 caf\\udce9" in done.stdout and b"96" in done.stdout
    assert done.stderr.decode(encoding).splitlines() == [r"error: no video a\nb \u89c6\u9891"]


def test_a_script_over_all_names_at_once(tmp_path):
    """Prepared, trained, scored and shown on a terminal that knows ASCII alone; every second name, as each is drawn."""
    there = []
    for i, name in enumerate(sorted({"file", *NAMES[::2], NOT_UTF8})):
        try:
            save_frames(tmp_path / "data" / "test" / name, walkers(2, seed=i))
        except OSError:
            continue
        there.append(name)
        (tmp_path / "data" / "labels").mkdir(exist_ok=True)
        np.save(tmp_path / "data" / "labels" / f"{name}.npy", np.array([0, i % 2], np.uint8))
    save_frames(tmp_path / "data" / "train" / "a", walkers(40))
    assert len(there) >= 25
    out = tmp_path / "run"
    where = ("--dataset", "folder", "--data-root", tmp_path / "data", "--cache", tmp_path / "cache", "--out", out)
    small = ("--epochs", 1, "--batch-size", 8, "--num-blocks", 2, "--cross-clip", 2, "--workers", 1, "--device", "cpu")
    ascii_terminal = {"PYTHONIOENCODING": "ascii"}
    trained = script("frd_uvad/train.py", *where, *small, env=ascii_terminal)
    scored = script("frd_uvad/eval.py", *where, "--checkpoint", out / "frd.pt", "--top", 100, env=ascii_terminal)
    for done in (trained, scored):
        assert "micro AUC" in done.stdout and done.stdout.isascii() and "Traceback" not in done.stderr
    page = content(out / "strict" / "report.html")
    assert (
        set(load_arrays(out / "strict" / "scores.npz", "scores")) == {v["name"] for v in page["videos"]} == set(there)
    )
    assert {p.stem for p in (out / "strict" / "curves").iterdir()} == {safe_filename(name) for name in there}
    with open(out / "strict" / "ranking.csv", encoding="utf-8", newline="") as f:
        assert {row["video"] for row in csv.DictReader(f)} <= {
            n.encode("utf-8", "backslashreplace").decode() for n in there
        }


# ------------------------------------------------------------------------------------------------------------- renaming


@pytest.fixture(params=["frames", "files"])
def exchanged(request, tmp_path):
    """-> (the video v, a function that exchanges names of its source with files of the same size and time)."""
    a, b = (walkers(3, seed=i) for i in (1, 2))
    if request.param == "frames":
        folder = save_frames(tmp_path / "v", a, ".bmp")
        first, second = folder / "000.bmp", folder / "002.bmp"
    else:
        save_video(tmp_path / "v.avi", a)
        save_video(tmp_path / "w.avi", b)
        first, second = tmp_path / "v.avi", tmp_path / "w.avi"
        size = max(p.stat().st_size for p in (first, second))
        for p in (first, second):
            os.truncate(p, size)
    for p in [*tmp_path.rglob("*.bmp"), *tmp_path.rglob("*.avi")]:
        os.utime(p, ns=(10**18, 10**18))
    return (lambda: open_video(first if request.param == "files" else first.parent)), lambda: exchange(first, second)


def exchange(first, second):
    first.rename(first.with_name("t"))
    second.rename(first)
    first.with_name("t").rename(second)


@pytest.mark.parametrize(
    "files",
    [
        VideoFiles,
        FrameCache,
        ClipFiles,
        lambda folder: scene_aware.Features(folder, {"encoder": "x"}),
        lambda folder: CubeStore(None, folder, Settings()),
        lambda folder: BoxFiles(None, folder, "motion", False, "cpu"),
    ],
    ids=["files", "frames", "clips", "scene", "cubes", "boxes"],
)
def test_caches_of_videos_notice(files, exchanged, tmp_path):
    video, rename = exchanged
    store = files(tmp_path / "cache")
    store.write(video(), iter([np.zeros((2, 3), np.float32)]), lambda shape: {})
    assert store.info(video()) and store.missing([video()]) == ([], {})
    rename()
    assert store.info(video()) is None and store.missing([video()])[0] == [video()]


def test_kept_scores_and_baselines_notice(exchanged, tmp_path):
    video, rename = exchanged
    cache = ScoreCache(tmp_path / "scores", {}, Video.fingerprint)
    run = SimpleNamespace(is_main=True, rank=0, world_size=1, barrier=lambda: None, print=print)
    cache.compute([video()], lambda v, tick: {"scores": np.ones(3)}, run, size=lambda v: 1, unit="video")
    before = baseline_path(SimpleNamespace(folder=tmp_path), video())
    assert cache.load(video()) is not None
    rename()
    assert cache.load(video()) is None and baseline_path(SimpleNamespace(folder=tmp_path), video()) != before


def test_depth_by_midas_notices(exchanged, tmp_path, monkeypatch):
    import torch

    video, rename = exchanged
    loaded = []

    class Net(torch.nn.Module):
        def forward(self, x):
            return x[:, 0]

    monkeypatch.setattr(torch.hub, "load", lambda *args, **kwargs: loaded.append(1) or Net())

    def depth():
        arrays = [np.stack(list(Decoder(video())))]
        return clips.Depth("midas", [video()], arrays, tmp_path / "cache", "cpu").map(0, 2)

    first = depth()
    assert first.shape == (64, 96) and np.array_equal(depth(), first) and len(loaded) == 1
    rename()
    depth()
    assert len(loaded) == 2


@pytest.mark.parametrize("kind", ["flow", "features"])
def test_files_made_elsewhere_notice(kind, tmp_path):
    (tmp_path / "test").mkdir()
    for i in range(3):
        np.save(tmp_path / "test" / f"v{i}.npy", np.full((4, 8), i, np.float32))
        os.utime(tmp_path / "test" / f"v{i}.npy", ns=(10**18, 10**18))
    known = (
        (lambda: sources.fingerprint(f"files:{tmp_path}"))
        if kind == "flow"
        else (lambda: scene_encoder.GivenFeatures(tmp_path).stamp)
    )
    before = known()
    assert before == known()
    exchange(tmp_path / "test" / "v0.npy", tmp_path / "test" / "v2.npy")
    assert known() != before


def test_boxes_file_by_another_name_is_other_boxes(tmp_path):
    save_arrays(tmp_path / "a.npz", {"x": np.ones(2)})
    first = detectors.fingerprint(f"file:{tmp_path / 'a.npz'}")
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    assert detectors.fingerprint(f"file:{tmp_path / 'b.npz'}") != first


def test_features_of_svmae_and_their_labels_have_one_name(tmp_path):
    """What preprocess.py writes beside each other."""
    files, video = (
        ClipFiles(tmp_path / "out"),
        Video("a#b", save_frames(tmp_path / "a#b", walkers(2)), files=["000.png", "001.png"]),
    )
    files.write(video, iter([np.zeros((1, 1, 4), np.float16)]), lambda shape: {"frames": 2, "width": 4})
    data = Dataset("folder", tmp_path, [], [video], _labels={"a#b": lambda: np.array([0, 1])})
    svmae.write_labels(tmp_path / "out", svmae.FeatureVideos(data, [video], {}, files))
    assert files.path(video).name == "a%23b.npy" and (tmp_path / "out" / "labels" / "a%23b.npy").exists()


def test_scores_of_a_copied_video_are_kept_and_of_a_changed_one_not(tmp_path):
    """What scores are made from: the content of the frames' files, whatever their times."""
    root = tiny_folder(tmp_path / "data")
    folder = next(p for p in sorted((root / "test").iterdir()) if p.is_dir())
    cache = FrameCache(tmp_path / "cache")

    def video():
        return next(v for v in datasets.find("folder", root).test if v.name == folder.name)

    cache.build([video()], workers=1, show=False)
    before = cache.source_of(video())
    files = sorted(folder.iterdir())
    for file in files:
        os.utime(file, ns=(1, 1))
    assert cache.source_of(video()) == before
    files[0].write_bytes(files[1].read_bytes() + b" ")
    assert cache.source_of(video()) != before
