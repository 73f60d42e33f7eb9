"""Boxes and cubes against hand-made examples."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common.cache import FrameCache
from common.distributed import Run
from common.flow.sources import PairFlow, make_dis
from common.io import UserError
from common.loader import Loader
from common.objects import detectors, networks
from common.objects.cube_dataset import CubeDataset
from common.objects.cubes import CubeStore, Settings, cubes_of_video, drop_covered, motion_boxes, object_boxes
from common.readers.video import Video, open_video
from tests.helpers import refused, save_frames, script, walkers

EVERYTHING = np.array([[4, 4, 40, 50, 0.9]], np.float32)


def test_covered_boxes_are_dropped_by_their_own_area():
    big, inside = [0, 0, 99, 99], [10, 10, 19, 19]
    half, apart = [95, 0, 104, 9], [200, 200, 210, 210]
    kept = drop_covered(np.array([big, inside, half, apart], np.float32), 0.6)
    assert sorted(kept.tolist()) == sorted([big, half, apart])  # `half` is covered by exactly 0.5 of its area
    assert len(drop_covered(np.array([big, half], np.float32), 0.4)) == 1


def test_score_and_area_limits():
    found = np.array([[0, 0, 9, 9, 0.9], [0, 0, 8, 8, 0.9], [50, 50, 80, 80, 0.5]], np.float32)
    assert object_boxes(found, Settings(min_score=0.5, min_area=100)).tolist() == [[0, 0, 9, 9]]


def test_motion_boxes_find_what_moves_outside_known_boxes():
    s = Settings(motion_threshold=18, motion_area=100)
    before, now, after = (np.full((80, 120), 50, np.uint8) for _ in range(3))
    now[20:40, 30:50] = 200
    box = motion_boxes(before, now, after, np.zeros((0, 4)), s)
    assert box.tolist() == [[28, 18, 52, 42]]  # grown by 2 px
    assert len(motion_boxes(before, now, after, np.array([[28, 18, 52, 42]]), s)) == 0
    now[:] = 50
    now[20:22, 10:100] = 200  # aspect above 10
    assert len(motion_boxes(before, now, after, np.zeros((0, 4)), s)) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_cubes_are_crops_of_each_frame_resized(channels):
    frames = walkers(8, channels=channels)
    flow, calls = make_dis(), []

    def counted(a, b):
        calls.append(a)
        return flow(a, b)

    s = Settings(motion_threshold=255)
    records = np.concatenate(list(cubes_of_video(frames, [EVERYTHING] * 8, s, PairFlow(frames, counted))))
    assert len(records) == 8 and len(calls) == 8  # every flow is computed once
    for t in (0, 2, 7):
        for k, d in enumerate(s.frames):
            f = frames[max(0, t + d), 4:50, 4:40]
            expected = cv2.resize(f, (32, 32)).reshape(32, 32, channels).transpose(2, 0, 1)
            assert (records["appearance"][t, k] == expected).all()
        a, b = frames[max(0, t - 1)], frames[t]
        full = flow(a, b)[4:50, 4:40]
        assert np.abs(records["flow"][t, -1] - cv2.resize(full, (32, 32)).transpose(2, 0, 1)).max() < 2e-2
        assert records["speed"][t] == pytest.approx(np.hypot(full[..., 0], full[..., 1]).mean(), rel=1e-3)
    assert (records["flow"][0] == 0).all()  # the pair (first, first)


def test_boxes_beyond_the_image_are_clipped():
    frames = walkers(3)
    wild = np.array([[-20, -20, 300, 300, 0.9], [90, 60, 200, 200, 0.9]], np.float32)
    s = Settings(motion_threshold=255, min_area=1, covered=2)
    records = np.concatenate(list(cubes_of_video(frames, [wild] * 3, s, PairFlow(frames, make_dis()))))
    assert len(records) == 6 and np.isfinite(records["flow"].astype(np.float32)).all()


def store_of(tmp_path, frames, settings=None, name="v"):
    video = open_video(save_frames(tmp_path / name, frames))
    cache = FrameCache(tmp_path / "cache")
    cache.build([video], 1)
    return video, CubeStore(cache, tmp_path / "cubes", settings or Settings())


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_videos_shorter_than_the_history(tmp_path, frames):
    video, store = store_of(tmp_path, walkers(frames))
    assert store.build([video], 1) == ([video], {})
    assert len(store.array(video)) == store.info(video)["cubes"]


def test_a_still_video_has_no_cubes(tmp_path):
    video, store = store_of(tmp_path, np.full((6, 64, 96, 1), 90, np.uint8))
    store.build([video], 1)
    assert len(store.array(video)) == 0 and store.info(video)["cubes"] == 0


def test_workers_do_not_change_the_cubes(tmp_path):
    for i in range(3):
        save_frames(tmp_path / "in" / f"v{i}", walkers(12, seed=i))
    videos = [open_video(tmp_path / "in" / f"v{i}") for i in range(3)]
    cache = FrameCache(tmp_path / "cache")
    cache.build(videos, 2)
    stores = [CubeStore(cache, tmp_path / f"cubes{w}", Settings()) for w in (1, 2)]
    for w, s in zip((1, 2), stores):
        s.build(videos, w)
    for v in videos:
        a, b = (s.path(v).read_bytes() for s in stores)
        assert a == b and len(a) > 10000


@pytest.mark.parametrize("first_pair", [(0, 0), (0, 1)])
@pytest.mark.parametrize("per_frame", [False, True])
def test_flow_from_files_gives_the_cubes_of_the_same_flow(tmp_path, per_frame, first_pair):
    frames = walkers(12)
    video, store = store_of(tmp_path, frames, Settings(first_pair=first_pair))
    store.build([video], 1)
    flow = np.zeros((12, *frames.shape[1:3], 2), np.float32)
    flow[1:] = list(map(make_dis(), frames[:-1], frames[1:]))
    (tmp_path / "flow" / "test" / "v").mkdir(parents=True)
    if per_frame:
        for t, f in enumerate(flow):
            np.save(tmp_path / "flow" / "test" / "v" / f"{t}.npy", f)
    else:
        np.save(tmp_path / "flow" / "v.npy", flow)
    s = Settings(flow=f"files:{tmp_path / 'flow'}", first_pair=first_pair)
    if not per_frame:
        (tmp_path / "flow" / "test" / "v").rmdir()
    own = CubeStore(store.cache, tmp_path / "cubes", s)
    assert own.build([video], 1) == ([video], {})
    assert len(own.array(video)) > 10 and own.folder != store.folder
    assert own.array(video).tobytes() == store.array(video).tobytes()
    np.save(tmp_path / "flow" / "v.npy", flow[:11])
    if not per_frame:  # a changed file is noticed, and one of another length refused
        assert (
            "is of 11 frames, the video has 12"
            in CubeStore(store.cache, tmp_path / "cubes", s).build([video], 1)[1][video.key]
        )
    with pytest.raises(UserError, match="no such folder"):
        CubeStore(store.cache, tmp_path, Settings(flow="files:nowhere"))


def test_boxes_from_a_file(tmp_path):
    frames = walkers(4)
    np.savez(
        tmp_path / "boxes.npz",
        **{"testing.v.boxes": np.repeat(EVERYTHING, 4, 0), "testing.v.count": np.ones(4, np.int32)},
    )
    s = Settings(boxes=f"file:{tmp_path / 'boxes.npz'}", motion_threshold=255)
    video, store = store_of(tmp_path, frames, s)
    store.build([video], 1)
    assert np.array(store.array(video)["box"]).tolist() == [[4, 4, 40, 50]] * 4
    video, store = store_of(tmp_path, walkers(5), s, "w")
    assert "no testing.w.boxes" in store.build([video], 1)[1][video.key]
    np.savez(tmp_path / "boxes.npz", **{"testing.w.boxes": EVERYTHING, "testing.w.count": np.ones(1, np.int32)})
    detectors._npz.cache_clear()
    assert "1 frames there, 5 on disk" in CubeStore(store.cache, tmp_path / "c2", s).build([video], 1)[1][video.key]


@pytest.mark.parametrize(
    "spec", ["yolo", "file:", "onnx:/no/such/file.onnx", "mmdet:onlyone", "mmdet:no.py:no.pth", "file:nothing.npz"]
)
def test_wrong_boxes_are_refused_at_once(spec):
    with pytest.raises(UserError, match="--boxes"):
        detectors.check(spec)


def test_yolox_finds_people_in_ped2(shared_data):
    """Against the YOLOv3 boxes of the same frame: most of what the small detector finds, the large one found too."""
    from common.localization import iou

    frame = cv2.imread(str(shared_data / "ped2" / "training" / "frames" / "01" / "000.jpg"))
    spec = f"onnx:{shared_data / 'weights' / 'yolox_nano.onnx'}"
    reference = detectors.boxes_from_file(shared_data / "ped2" / "boxes_yolov3.npz", Video("01", ".", "train"), 120)[0]
    plain = networks.make_detector(spec, min_score=0.3)([frame])[0]
    tiled = networks.make_detector(spec, min_score=0.3, tile=True)([frame])[0]
    assert len(tiled) >= len(plain) and len(tiled) >= 5
    assert (iou(tiled[:, :4], reference[:, :4]).max(1) > 0.4).mean() > 0.6


def test_batches_gather_rows_across_files():
    dtype = np.dtype([("appearance", "u1", (2, 1, 4, 4)), ("flow", "<f2", (3, 2, 4, 4))])
    rng = np.random.default_rng(0)
    files = []
    for n in (5, 0, 7):
        r = np.empty(n, dtype)
        r["appearance"], r["flow"] = rng.integers(0, 255, r["appearance"].shape), rng.normal(size=r["flow"].shape)
        files.append(r)
    together = np.concatenate(files)
    run = Run("cpu", "fp32")
    data = CubeDataset(files, {"appearance": slice(None), "flow": slice(-1, None)}, run)
    order = rng.permutation(12)
    loader = Loader(data, 5, 0, run, order=lambda epoch: order)
    seen = []
    for batch in loader.batches(0, start=1):
        assert (batch.data["appearance"].numpy() == together["appearance"][batch.rows]).all()
        assert (batch.data["flow"].numpy() == together["flow"][batch.rows][:, -1:]).all()
        seen += batch.rows.tolist()
    assert seen == order[5:].tolist() and len(data) == 12 and loader.steps(0) == 3
    for rows, batch in data.batches(order, 5):
        assert (batch["appearance"].numpy() == together["appearance"][rows]).all()


def test_detections_are_made_anew_when_the_video_was_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "make_detector", lambda *_: lambda frames: [EVERYTHING] * len(frames))
    monkeypatch.setattr(detectors, "check", lambda spec: "onnx")
    monkeypatch.setattr(detectors, "fingerprint", lambda spec: [spec])
    video, store = store_of(tmp_path, walkers(4), Settings(boxes="onnx:x", motion_threshold=255))
    store.build([video], 1)
    assert store.boxes.info(video) and len(store.array(video)) == 4
    picture = tmp_path / "v" / "000.png"
    picture.write_bytes(picture.read_bytes())  # a copy: another time, the same bytes
    assert store.boxes.info(video) and len(store.array(video)) == 4
    picture.write_bytes(picture.read_bytes()[:-1] + b"?")
    assert not store.boxes.info(video)
    store.cache.build([video], 1)
    store.build([video], 1)
    assert store.boxes.info(video)


def test_mmdet_boxes(tmp_path):
    """A detector of mmdet's own, untrained, from a file such as its trainings write."""
    pytest.importorskip("mmdet", reason="optional: requirements.txt says how to install it")
    import mmdet
    from mmdet.apis import init_detector
    from mmengine.logging import HistoryBuffer

    config = Path(mmdet.__file__).parent / ".mim" / "configs" / "rtmdet" / "rtmdet_tiny_8xb32-300e_coco.py"
    net = init_detector(str(config), None, device="cpu")
    weights = tmp_path / "epoch_1.pth"
    torch.save(
        {
            "state_dict": net.state_dict(),
            "meta": {"dataset_meta": net.dataset_meta, "epoch": 1},
            "message_hub": {"log_scalars": {"loss": HistoryBuffer([1.0, 0.5], [1, 1]), "none": HistoryBuffer()}},
        },
        weights,
    )
    spec, frames = f"mmdet:{config}:{weights}", [walkers(1)[0], walkers(1, seed=3)[0]]
    detectors.check(spec)
    for tile in (False, True):
        found = networks.make_detector(spec, min_score=0.0, tile=tile)(frames)
        assert len(found) == 2 and all(
            len(x) and x.shape[1] == 5 and x.dtype == np.float32 and np.isfinite(x).all() for x in found
        )
    (tmp_path / "broken.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged, or holds"):
        networks.make_detector(f"mmdet:{config}:{tmp_path / 'broken.pth'}")


def test_windows_paths_in_a_spec_of_mmdet():
    for config, weights in (
        ("C:\\mm\\cfg.py", "D:\\w\\rtmdet.pth"),
        ("C:/mm/cfg.py", "w.pth"),
        ("cfg.py", "C:\\w.pth"),
        ("a.py", "b.pth"),
    ):
        assert detectors.files_of(f"mmdet:{config}:{weights}") == [config, weights]
    for spec in ("mmdet:C:\\cfg.py:w.pth", "onnx:C:\\yolox.onnx", "file:missing.npz"):
        with pytest.raises(UserError, match="does not exist"):
            detectors.check(spec)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--boxes", "file:missing.npz"),
        ("--boxes", "onnx:missing.onnx"),
        ("--boxes", "mmdet:a.py:b.pth"),
        ("--flow", "files:missing"),
    ],
)
def test_what_is_missing_is_said_before_any_work(tmp_path, flag, value):
    save_frames(tmp_path / "test" / "v", walkers(6))
    done = script(
        "hf2vad/preprocess.py",
        "--dataset",
        "folder",
        "--data-root",
        tmp_path,
        "--cache",
        tmp_path / "c",
        flag,
        value,
        check=False,
    )
    refused(done, value)
    assert not [p for p in (tmp_path / "c").rglob("*") if p.is_file()]
