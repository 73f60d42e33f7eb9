"""Tables of inputs. Damaged and hostile files: for every format that is read, a sound file, a reader, and ways to spoil
it.

KINDS[name] = (suffix, write a sound file, read it as the toolkit does). SPOILED[name](bytes, rng) -> other bytes.
SPECIAL lists whole files that are wrong in a way of their own: (kind, title, write). PLAIN and LACKING: videos that
ffmpeg writes, read in test_time.py. SITUATIONS: datasets as users have them, the command that meets them, and what is
right.
"""

import pickle
import zipfile
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy import io

from common import training
from common.diagnosis import read_events
from common.flow.sources import flow_from_files
from common.io import load_array, read_json
from common.objects import detectors
from common.readers import datasets, labels, published, ubnormal, ucsd
from common.readers.dataset import Dataset
from common.readers.pictures import read_image
from common.readers.video import Decoder, Video, list_videos, open_video
from common.report import compare
from frd_uvad import scoring as frd_scoring
from frd_uvad.features.data import FeatureVideo
from frd_uvad.features.folders import find_features
from frd_uvad.features.labels import listed_names
from frd_uvad.svmae.clips import Depth
from frd_uvad.svmae.data import read_captions
from scene_aware_ae.preprocess import read_scenes
from tests.helpers import save_frames, save_video, walkers
from tests.tools.shanghaitech_sd import build

FRAMES = 12


# ------------------------------------------------------------------------------------------------- sound files


def image(path):
    path.write_bytes(cv2.imencode(path.suffix, walkers(1)[0])[1].tobytes())


def video(path):
    if path.suffix == ".avi":
        save_video(path, walkers(FRAMES))
        return
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 64))
    for f in walkers(FRAMES):
        writer.write(f)
    writer.release()


def home(path):
    """A dataset folder around the file: one training and one test video."""
    root = path.parent
    for split, name in (("train", "a_1"), ("test", "b_1")):
        if not (root / split).exists():
            save_frames(root / split / name, walkers(FRAMES))
    return root


def moved(path, place):
    """The file where a dataset expects it."""
    target = home(path) / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(path.read_bytes())
    return target


def frame_labels(path):
    moved(path, f"labels/b_1{path.suffix}")
    data = datasets.find("folder", path.parent)
    return data.labels(data.test[0], FRAMES)


def label_table(path):
    moved(path, "labels.csv")
    data = datasets.find("folder", path.parent)
    return data.labels(data.test[0], FRAMES)


def label_archive(path):
    home(path)
    data = datasets.find("folder", path.parent, path)
    return data.labels(data.test[0], FRAMES)


def masks(path):
    moved(path, f"masks/b_1{path.suffix}")
    data = datasets.find("folder", path.parent)
    found = data.masks(data.test[0])
    assert found.dtype == bool and found.ndim == 3
    return found


def tracks(path):
    moved(path, "tracks/b_1.csv")
    data = datasets.find("folder", path.parent)
    found = data.tracks(data.test[0])
    assert found.shape[1] == 6 and np.isfinite(found).all()
    return found


def events(path):
    moved(path, "events.csv")
    return read_events(Dataset("demo", path.parent, [], []))


def boxes(path):
    detectors._npz.cache_clear()
    found = detectors.boxes_from_file(str(path), Video("b_1", ".", "test"), FRAMES)
    assert len(found) == FRAMES and all(b.shape[1] == 5 and np.isfinite(b).all() for b in found)
    return found


def features(path):
    moved(path, "features/train/a.npy")
    moved(path, "features/test/b.npy")
    data = find_features("features", path.parent / "features")
    return [v.clips(range(len(v))) for v in data.test]


def annotations(path):
    rows = np.zeros((3, 1, 8), np.float32)
    root = path.parent / "features"
    for split, name in (("train", "a"), ("test", "Abuse028_x264")):
        (root / split).mkdir(parents=True, exist_ok=True)
        np.save(root / split / f"{name}.npy", rows)
    (root / "Temporal_Anomaly_Annotation.txt").write_bytes(path.read_bytes())
    data = find_features("ucfcrime", root)
    return data.labels(data.test[0])


def depth(path):
    moved(path, f"depth/b_1{path.suffix}")
    return Depth(
        path.parent / "depth", [Video("b_1", ".")], [np.zeros((FRAMES, 8, 8, 1), np.uint8)], path.parent, "cpu"
    ).map(0, 3)


def flow(path):
    moved(path, "flow/b_1.npy")
    return flow_from_files(path.parent / "flow", Video("b_1", ".", "test"), (FRAMES, 64, 96, 3))([0, 1, FRAMES - 1])


def captions(path):
    moved(path, "captions/b_1.npy")
    return read_captions(path.parent / "captions", FeatureVideo("b_1", "test", [np.zeros((3, 1, 16), np.float32)]))


def scenes(path):
    home(path)
    data = datasets.find("folder", path.parent)
    read_scenes(path, data)
    return data


def scene_split(path):
    home(path)
    (path.parent / "source").mkdir(exist_ok=True)
    for split, name in (("training", "01_001"), ("testing", "01_0014")):
        if not (path.parent / "source" / split).exists():
            save_frames(path.parent / "source" / split / "frames" / name, walkers(2))
    masks = path.parent / "source" / "testing" / "test_frame_mask"
    masks.mkdir(exist_ok=True)
    np.save(masks / "01_0014.npy", [0, 1])
    return build(path, path.parent / "source", path.parent / "out")


def tracks_of_ubnormal(path):
    moved(path, "abnormal_scene_1_scenario_1_annotations/abnormal_scene_1_scenario_1_tracks.txt")
    return ubnormal.Annotations(
        Video("abnormal_scene_1_scenario_1", path.parent / "abnormal_scene_1_scenario_1.mp4")
    ).tracks


def mask_of_ubnormal(path):
    moved(path, "abnormal_scene_1_scenario_1_annotations/abnormal_scene_1_scenario_1_0000_gt.png")
    (path.parent / "abnormal_scene_1_scenario_1_annotations" / "abnormal_scene_1_scenario_1_tracks.txt").write_text(
        "1,0,0\n"
    )
    return ubnormal.Annotations(
        Video("abnormal_scene_1_scenario_1", path.parent / "abnormal_scene_1_scenario_1.mp4")
    ).boxes()


def mask_pictures(path):
    moved(path, f"masks/b_1/000{path.suffix}")
    image(path.parent / "masks" / "b_1" / f"001{path.suffix}")
    data = datasets.find("folder", path.parent)
    return data.masks(data.test[0])


def decoded(path):
    found = list(Decoder(open_video(path)))
    assert found and all(f.dtype == np.uint8 and f.shape == found[0].shape for f in found)
    return found


def picture(path):
    """As one frame of a folder: a damaged one is replaced by its neighbour and named."""
    folder = path.parent / "frames"
    save_frames(folder, walkers(2), digits=4)
    target = folder / f"0002{path.suffix}"
    target.write_bytes(path.read_bytes())
    decoder = Decoder(list_videos(path.parent)[0])
    found = list(decoder)
    assert len(found) == 3 and all(f.shape == found[0].shape for f in found)
    read = read_image(target)
    assert (read is None) == (decoder.damaged == [target.name])
    return found


def mat_cells(*cells):
    out = np.empty((1, len(cells)), object)
    for i, c in enumerate(cells):
        out[0, i] = c
    return out


LABELS = np.array([0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], np.uint8)
BOXES = {
    "testing.b_1.boxes": np.tile(np.array([[4, 4, 40, 50, 0.9]], np.float32), (FRAMES, 1)),
    "testing.b_1.count": np.ones(FRAMES, np.int32),
}
RNG = np.random.default_rng(0)
KINDS = {
    "frame.jpg": (image, picture),
    "frame.png": (image, picture),
    "frame.tif": (image, picture),
    "frame.bmp": (image, picture),
    "video.avi": (video, decoded),
    "video.mp4": (video, decoded),
    "labels.npy": (lambda p: np.save(p, LABELS), frame_labels),
    "labels.txt": (lambda p: p.write_text(" ".join(map(str, LABELS))), frame_labels),
    "table.csv": (lambda p: p.write_text("video,start,end\nb_1,2,5\n"), label_table),
    "labels.npz": (lambda p: np.savez(p, b_1=LABELS), label_archive),
    "ped2.mat": (
        lambda p: io.savemat(p, {"gt": mat_cells(np.array([[3], [5]]), np.array([[1], [2]]))}),
        published.mat_ranges,
    ),
    "1_label.mat": (lambda p: io.savemat(p, {"volLabel": mat_cells(*(walkers(3)[..., 0] > 100))}), labels.read_masks),
    "UCSDped2.m": (lambda p: p.write_text("TestVideoFile{end+1}.gt_frame = [61:180];\n"), ucsd.matlab_ranges),
    "masks.npy": (lambda p: np.save(p, walkers(FRAMES)[..., 0] > 150), masks),
    "masks.npz": (lambda p: np.savez(p, masks=walkers(FRAMES)[..., 0] > 150), masks),
    "mask.png": (image, mask_pictures),
    "mask.bmp": (image, mask_pictures),
    "packed.npz": (
        lambda p: np.savez(
            p, b_1=np.packbits(walkers(3)[..., 0] > 150, axis=-1), width=np.array(96), height=np.array(64)
        ),
        lambda p: [read() for read in ucsd.packed_masks(p).values()],
    ),
    "tracks.csv": (lambda p: p.write_text("# id,frame,x1,y1,x2,y2\n1,0,2,3,10,20\n1,1,3,3,11,20\n"), tracks),
    "events.csv": (lambda p: p.write_text("video,event,start,end\nb_1,cart,2,5\n"), events),
    "boxes.npz": (lambda p: np.savez(p, **BOXES), boxes),
    "scores.npz": (lambda p: np.savez(p, b_1=np.linspace(0, 1, FRAMES)), compare.load_scores),
    "features.npy": (lambda p: np.save(p, RNG.normal(size=(4, 2, 8)).astype(np.float32)), features),
    "annotation.txt": (lambda p: p.write_text("Abuse028_x264.mp4  Abuse  5  20  -1  -1\n"), annotations),
    "depth.npy": (lambda p: np.save(p, RNG.random((8, 8))), depth),
    "depth.png": (image, depth),
    "flow.npy": (lambda p: np.save(p, np.ones((FRAMES, 64, 96, 2), np.float16)), flow),
    "captions.npy": (lambda p: np.save(p, RNG.random((3, 16))), captions),
    "scenes.csv": (lambda p: p.write_text("a_1,x\nb_1,y\n"), scenes),
    "split.txt": (lambda p: p.write_text("training 01_001\ntesting 01_0014\n"), scene_split),
    "bags.txt": (lambda p: p.write_text("a.mp4\nb\n"), lambda p: listed_names(p, {"a", "b"})),
    "tracks.txt": (lambda p: p.write_text("1,3,9\n"), tracks_of_ubnormal),
    "object.png": (image, mask_of_ubnormal),
    "side.json": (lambda p: p.write_text('{"frames": 3}'), lambda p: read_json(p, "entry")),
    "weights.pt": (
        lambda p: torch.save({"method": "hf2vad", "model_state_dict": {"a": torch.zeros(300)}}, p),
        lambda p: training.load_checkpoint(p, "hf2vad"),
    ),
    "scorer.pkl": (
        lambda p: torch.save({"scorer.fc1.weight": torch.zeros(32, 8)}, p),
        lambda p: training.load_checkpoint(p),
    ),
    "pseudo.npz": (
        lambda p: np.savez(p, b_1=LABELS.astype(float)),
        lambda p: frd_scoring.load_auxiliary(f"labels:{p}"),
    ),
    "array.npy": (lambda p: np.save(p, np.arange(10)), lambda p: load_array(p, "array", mmap=True)),
}


# ------------------------------------------------------------------------------------------------- spoiling them


def flipped(data, rng, first, last, share):
    out = np.frombuffer(data, np.uint8).copy()
    first, last = int(first * len(out)), max(int(last * len(out)), min(8, len(out)))
    at = rng.integers(first, last, max(1, int(share * (last - first))))
    out[at] ^= rng.integers(1, 256, len(at)).astype(np.uint8)
    return out.tobytes()


SPOILED = {
    "empty": lambda data, rng: b"",
    "a tenth": lambda data, rng: data[: len(data) // 10],
    "half": lambda data, rng: data[: len(data) // 2],
    "all but the end": lambda data, rng: data[: -max(1, len(data) // 50)],
    "a damaged head": lambda data, rng: flipped(data, rng, 0, 0.05, 0.3),
    "damaged all over": lambda data, rng: flipped(data, rng, 0, 1, 0.02),
    "noise": lambda data, rng: rng.integers(0, 256, 700, dtype=np.uint8).tobytes(),
    "another format": lambda data, rng: "<html><body>Not found ✗</body></html>".encode(),
}


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def npy_header(shape, descr="<f4"):
    """A .npy that claims to be larger than it is."""

    def write(path):
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": descr, "fortran_order": False, "shape": shape})
            f.write(b"\0" * 64)

    return write


def npz_with(**members):
    """An archive whose members are raw bytes."""

    def write(path):
        with zipfile.ZipFile(path, "w") as z:
            for name, data in members.items():
                z.writestr(name.replace("__", "/"), data)

    return write


def saved(array):
    return lambda path: np.save(path, array, allow_pickle=True)


def archive(**arrays):
    return lambda path: np.savez(path, **arrays)


def text(content):
    return lambda path: path.write_text(content, encoding="utf-8")


def png_claiming(width, height):
    """A PNG whose header promises more pixels than memory holds."""

    def write(path):
        data = bytearray(cv2.imencode(".png", walkers(1)[0])[1].tobytes())
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        path.write_bytes(bytes(data))

    return write


def marker(path):
    """What a hostile file would leave behind if its code ran."""
    return Path(path).parent / "ran"


def pickled(path):
    path.write_bytes(pickle.dumps(Bomb(marker(path))))


def torch_pickled(path):
    torch.save({"method": "hf2vad", "x": Bomb(marker(path))}, path)


GIANT = (2**40, 3)
NUMBERS = ("labels.npy", "masks.npy", "features.npy", "depth.npy", "flow.npy", "captions.npy")
ARRAYS, ARCHIVES = (*NUMBERS, "array.npy"), ("labels.npz", "masks.npz", "boxes.npz", "scores.npz", "pseudo.npz")
SPECIAL = [
    *((kind, "a giant shape", npy_header(GIANT)) for kind in ARRAYS),
    *((kind, "objects", saved(np.array([{"a": 1}], object))) for kind in ARRAYS),
    *(
        (kind, "a pickle that runs code", pickled)
        for kind in (*ARRAYS, *ARCHIVES, "weights.pt", "scorer.pkl", "ped2.mat")
    ),
    *((kind, "a torch pickle that runs code", torch_pickled) for kind in ("weights.pt", "scorer.pkl")),
    *((kind, "members that leave the archive", npz_with(**{"..__..__evil.npy": b"x"})) for kind in ARCHIVES),
    *((kind, "strings", saved(np.array(["a", "b"]))) for kind in NUMBERS),
    *((kind, "no dimension", saved(np.float32(3))) for kind in NUMBERS),
    *((kind, "complex numbers", saved(np.zeros(FRAMES, complex) + 1j)) for kind in NUMBERS),
    *((kind, "no entry", saved(np.zeros((0, 4), np.float32))) for kind in NUMBERS if kind != "masks.npy"),
    ("labels.npy", "one short", saved(LABELS[:-1])),
    ("labels.npy", "one long", saved(np.r_[LABELS, 0])),
    ("labels.npy", "twos", saved(2 * LABELS)),
    ("labels.npy", "NaN", saved(np.where(LABELS, np.nan, 0))),
    ("labels.npy", "below 0", saved(LABELS.astype(int) - 1)),
    ("labels.txt", "one short", text("0 1 1")),
    ("labels.txt", "words", text("normal abnormal")),
    ("labels.txt", "numbers beyond float", text("1e999 " * FRAMES)),
    ("table.csv", "for another video", text("c_1,2,5\n")),
    ("table.csv", "past the end", text("b_1,2,500\n")),
    ("table.csv", "the wrong way round", text("b_1,5,2\n")),
    ("table.csv", "fractions", text("b_1,2.5,5\n")),
    ("table.csv", "a quote without end", text('b_1,"2,5\n')),
    ("labels.npz", "for another video", archive(c_1=LABELS)),
    ("labels.npz", "one short", archive(b_1=LABELS[1:])),
    ("labels.npz", "a matrix", archive(b_1=np.zeros((FRAMES, FRAMES)))),
    ("ped2.mat", "another variable", lambda p: io.savemat(p, {"x": 1})),
    ("ped2.mat", "text", lambda p: io.savemat(p, {"gt": "abc"})),
    ("ped2.mat", "ranges of three", lambda p: io.savemat(p, {"gt": mat_cells(np.ones((3, 2)))})),
    ("ped2.mat", "NaN", lambda p: io.savemat(p, {"gt": mat_cells(np.full((2, 1), np.nan))})),
    (
        "1_label.mat",
        "masks of two sizes",
        lambda p: io.savemat(p, {"volLabel": mat_cells(np.ones((3, 4)), np.ones((5, 4)))}),
    ),
    ("1_label.mat", "numbers", lambda p: io.savemat(p, {"volLabel": 3.0})),
    ("masks.npy", "one plane", saved(np.ones((8, 8), bool))),
    ("masks.npz", "no such array", archive(other=np.ones((2, 8, 8)))),
    ("masks.npz", "one plane", archive(masks=np.ones((8, 8)))),
    ("packed.npz", "no width", archive(b_1=np.zeros((3, 4, 2), np.uint8))),
    ("packed.npz", "floats", archive(b_1=np.zeros((3, 4, 2)), width=np.array(16))),
    ("mask.png", "another size", lambda p: p.write_bytes(cv2.imencode(".png", walkers(1, (50, 70))[0])[1].tobytes())),
    ("tracks.csv", "five columns", text("1,0,2,3,10\n")),
    ("tracks.csv", "NaN", text("1,0,nan,3,10,20\n")),
    ("events.csv", "other columns", text("a,b\n1,2\n")),
    ("boxes.npz", "one frame short", archive(**{**BOXES, "testing.b_1.count": np.ones(FRAMES - 1, np.int32)})),
    ("boxes.npz", "counts that do not add up", archive(**{**BOXES, "testing.b_1.count": np.full(FRAMES, 2, np.int32)})),
    (
        "boxes.npz",
        "counts below 0",
        archive(**{**BOXES, "testing.b_1.count": np.array([2 * FRAMES - 1, *[-1] * (FRAMES - 1)], np.int32)}),
    ),
    ("boxes.npz", "four columns", archive(**{**BOXES, "testing.b_1.boxes": np.ones((FRAMES, 4), np.float32)})),
    ("boxes.npz", "NaN", archive(**{**BOXES, "testing.b_1.boxes": np.full((FRAMES, 5), np.nan, np.float32)})),
    (
        "boxes.npz",
        "for another video",
        archive(**{"testing.c.boxes": np.ones((1, 5)), "testing.c.count": np.ones(1, int)}),
    ),
    ("scores.npz", "NaN", archive(b_1=np.full(FRAMES, np.nan))),
    ("scores.npz", "a matrix", archive(b_1=np.ones((2, 2)))),
    ("scores.npz", "nothing", archive()),
    ("scores.npz", "strings", archive(b_1=np.array(["a"]))),
    ("features.npy", "four dimensions", saved(np.ones((2, 2, 2, 2), np.float32))),
    ("features.npy", "a vector", saved(np.ones(8, np.float32))),
    ("annotation.txt", "letters for numbers", text("Abuse028_x264.mp4 Abuse a b\n")),
    ("annotation.txt", "the wrong way round", text("Abuse028_x264.mp4 Abuse 20 5 -1 -1\n")),
    ("depth.npy", "NaN", saved(np.full((8, 8), np.nan))),
    ("depth.npy", "of another length", saved(np.ones((5, 8, 8)))),
    ("flow.npy", "one short", saved(np.zeros((FRAMES - 1, 64, 96, 2), np.float16))),
    ("flow.npy", "of another size", saved(np.zeros((FRAMES, 32, 96, 2), np.float16))),
    ("flow.npy", "NaN", saved(np.full((FRAMES, 64, 96, 2), np.nan, np.float16))),
    ("captions.npy", "NaN", saved(np.full((3, 4), np.nan))),
    ("captions.npy", "three dimensions", saved(np.zeros((1, 2, 3)))),
    ("scenes.csv", "one video missing", text("a_1,x\n")),
    ("scenes.csv", "one column", text("a_1\nb_1\n")),
    ("split.txt", "one word a line", text("training\n")),
    ("split.txt", "a path that leaves the folder", text("training ../../x\n")),
    ("split.txt", "an unknown video", text("training 99_001\n")),
    ("tracks.txt", "words", text("a,b,c\n")),
    ("tracks.txt", "one number", text("1\n")),
    ("side.json", "a list without end", text("[1, 2")),
    ("side.json", "half a character", lambda p: p.write_bytes(b'{"a": "\xc3')),
    ("weights.pt", "another method", lambda p: torch.save({"method": "sdmae"}, p)),
    ("weights.pt", "a list", lambda p: torch.save([1], p)),
    ("pseudo.npz", "strings", archive(b_1=np.array(["a"]))),
    ("pseudo.npz", "NaN", archive(b_1=np.full(3, np.nan))),
    ("frame.png", "more pixels than memory", png_claiming(2**31 - 1, 2**31 - 1)),
    ("frame.png", "a width of 0", png_claiming(0, 64)),
    ("mask.png", "more pixels than memory", png_claiming(2**31 - 1, 2**31 - 1)),
    ("object.png", "more pixels than memory", png_claiming(2**31 - 1, 2**31 - 1)),
    ("depth.png", "more pixels than memory", png_claiming(2**31 - 1, 2**31 - 1)),
    ("frame.jpg", "1 × 1", lambda p: p.write_bytes(cv2.imencode(".jpg", np.zeros((1, 1, 3), np.uint8))[1].tobytes())),
    (
        "frame.png",
        "1 × 20000",
        lambda p: p.write_bytes(cv2.imencode(".png", np.zeros((1, 20000, 3), np.uint8))[1].tobytes()),
    ),
    (
        "frame.png",
        "16 bits and transparency",
        lambda p: p.write_bytes(cv2.imencode(".png", np.zeros((9, 9, 4), np.uint16))[1].tobytes()),
    ),
    (
        "frame.tif",
        "floats",
        lambda p: p.write_bytes(cv2.imencode(".tif", np.full((9, 9), np.nan, np.float32))[1].tobytes()),
    ),
]
# what is read after all, or replaced by its neighbour
HARMLESS = {(kind, title) for kind, title, _ in SPECIAL if kind.startswith("frame.")} | {
    ("events.csv", "other columns"),
    ("annotation.txt", "letters for numbers"),
    ("annotation.txt", "the wrong way round"),
}


# ---------------------------------------- what ffmpeg writes: command, and right: every frame, its picture and its time

X264 = "-c:v libx264 -preset veryfast -pix_fmt yuv420p"
PLAIN = {  # what: the file and ffmpeg's options; 25 frames/s
    "mpeg4": "a.avi -c:v mpeg4",
    "mpeg4 with B-frames": "a.avi -c:v mpeg4 -bf 2",
    "mpeg4 in mp4": "a.mp4 -c:v mpeg4 -bf 2",
    "xvid": "a.mkv -c:v libxvid",
    "msmpeg4": "a.avi -c:v msmpeg4",
    "msmpeg4v2": "a.avi -c:v msmpeg4v2",
    "h263+": "a.mkv -c:v h263p",
    "h264": f"a.mp4 {X264}",
    "h264 with B-frames": f"a.mp4 {X264} -bf 3 -b_strategy 0",
    "h264 in avi": f"a.avi {X264} -bf 2",
    "h264 in mkv": f"a.mkv {X264} -bf 3",
    "h264 in ts": f"a.ts {X264} -bf 3",
    "h264 in flv": f"a.flv {X264}",
    "h264 elementary": f"a.h264 {X264} -f h264",
    "h264 4:2:2": "a.mp4 -c:v libx264 -pix_fmt yuv422p",
    "h264 4:4:4": "a.mp4 -c:v libx264 -pix_fmt yuv444p",
    "h264 10 bits": "a.mp4 -c:v libx264 -pix_fmt yuv420p10le",
    "h264 rgb": "a.mp4 -c:v libx264rgb -pix_fmt rgb24",
    "h264 full range": "a.mp4 -c:v libx264 -pix_fmt yuvj420p",
    "h264 grey": "a.mp4 -c:v libx264 -pix_fmt gray",
    "h264 one key frame": f"a.mp4 {X264} -g 999",
    "h264 fragmented": f"a.mp4 {X264} -movflags frag_keyframe+empty_moov",
    "h264 faststart": f"a.mp4 {X264} -movflags faststart",
    "h264 NTSC": f"a.mp4 {X264} -r 30000/1001",
    "hevc": "a.mp4 -c:v libx265 -x265-params log-level=none",
    "hevc 10 bits": "a.mkv -c:v libx265 -pix_fmt yuv420p10le -x265-params log-level=none",
    "hevc 4:4:4": "a.mp4 -c:v libx265 -pix_fmt yuv444p -x265-params log-level=none",
    "vp8": "a.webm -c:v libvpx",
    "vp8 hidden frames": "a.webm -c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -arnr-maxframes 7",
    "vp9": "a.webm -c:v libvpx-vp9 -cpu-used 8",
    "vp9 in mp4": "a.mp4 -c:v libvpx-vp9 -cpu-used 8",
    "mpeg1": "a.mpg -c:v mpeg1video",
    "mpeg2 in ps": "a.mpg -c:v mpeg2video",
    "mpeg2 in vob": "a.vob -f vob -c:v mpeg2video -bf 2",
    "mpeg2 in ts": "a.ts -c:v mpeg2video -bf 2",
    "mjpeg": "a.avi -c:v mjpeg -q:v 2",
    "mjpeg in mov": "a.mov -c:v mjpeg -q:v 2",
    "mjpeg 4:4:4": "a.mkv -c:v mjpeg -pix_fmt yuvj444p -q:v 2",
    "wmv1": "a.wmv -c:v wmv1",
    "wmv2": "a.wmv -c:v wmv2",
    "flv1": "a.flv -c:v flv",
    "svq1": "a.mov -c:v svq1",
    "gif": "a.gif -c:v gif",
    "png in mov": "a.mov -c:v png",
    "qtrle": "a.mov -c:v qtrle",
    "rpza": "a.mov -c:v rpza",
    "prores": "a.mov -c:v prores_ks",
    "prores 4444": "a.mov -c:v prores_ks -pix_fmt yuva444p10le",
    "dnxhr": "a.mov -c:v dnxhd -profile:v dnxhr_hq -s 256x192 -pix_fmt yuv422p",
    "cineform": "a.mov -c:v cfhd",
    "ffv1": "a.mkv -c:v ffv1",
    "ffv1 16 bits": "a.mkv -c:v ffv1 -pix_fmt gray16le",
    "ffv1 with alpha": "a.mkv -c:v ffv1 -pix_fmt bgra",
    "huffyuv": "a.avi -c:v huffyuv -pix_fmt yuv422p",
    "huffyuv rgb": "a.avi -c:v huffyuv -pix_fmt rgb24",
    "ffvhuff": "a.avi -c:v ffvhuff",
    "utvideo": "a.avi -c:v utvideo -pix_fmt gbrp",
    "magicyuv": "a.avi -c:v magicyuv -pix_fmt gbrp",
    "raw bgr": "a.avi -c:v rawvideo -pix_fmt bgr24",
    "raw yuv": "a.avi -c:v rawvideo -pix_fmt yuv420p",
    "raw bgra": "a.mov -c:v rawvideo -pix_fmt bgra",
    "raw grey": "a.avi -c:v rawvideo -pix_fmt gray",
    "v210": "a.mov -c:v v210",
    "jpeg2000": "a.mkv -c:v libopenjpeg -pix_fmt rgb24",
    "msvideo1": "a.avi -c:v msvideo1",
    "cinepak": "a.avi -c:v cinepak",
    "zmbv": "a.avi -c:v zmbv",
    "flashsv": "a.flv -c:v flashsv",
    "theora": "a.ogv -c:v libtheora -q:v 8",
    "snow": "a.avi -c:v snow -strict -2",
    "odd width and height": "a.mkv -c:v ffv1 -s 63x47",
    "odd mjpeg": "a.avi -c:v mjpeg -q:v 2 -s 63x47 -pix_fmt yuvj420p",
    "odd h264": "a.mp4 -c:v libx264 -pix_fmt yuv444p -s 65x49",
    "starts late": f"a.mp4 {X264} -bf 2 -output_ts_offset 5",
    "starts late in ts": f"a.ts {X264} -bf 2 -output_ts_offset 5",
    "120 frames a second": f"a.mp4 {X264} -vf settb=1/120,setpts=N -r 120",
    "one frame in 2 s": f"a.mp4 {X264} -vf setpts=N*2/TB -r 0.5",
}
RATES = {  # of those that are not of 25 frames/s; None: ffmpeg repeats some
    "h264 NTSC": None,
    "120 frames a second": 120,
    "one frame in 2 s": 0.5,
}
LACKING = {  # right or refused with the codec's name and the line of ffmpeg that converts
    "av1": "a.mkv -c:v libaom-av1 -cpu-used 8",
    "hap": "a.mov -c:v hap",
    "asv1": "a.avi -c:v asv1 -s 64x48",
    "speedhq": "a.nut -c:v speedhq -pix_fmt yuv422p",
    "vc2": "a.mkv -c:v vc2 -strict -1 -pix_fmt yuv422p",
    "av1 in mp4": "a.mp4 -c:v libaom-av1 -cpu-used 8",
}


# ----------------------------------------------------------- whole datasets and videos, and the commands that meet them


def footage(root, split="test", names=("b_0", "b_1"), frames=32, suffix=".avi"):
    """Videos of a moving block, or folders of its frames (suffix "")."""
    for i, name in enumerate(names):
        save_video(root / split / f"{name}{suffix}", walkers(frames, seed=i)) if suffix else save_frames(
            root / split / name, walkers(frames, seed=i)
        )
    return root


def put(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def copied(source, *targets):
    for target in targets:
        put(target, source.read_bytes())


def two_frames_of(root, encode):
    """A video as a folder of two frames that `encode` makes of pictures."""
    for i, frame in enumerate(walkers(2)):
        put(root / "test" / "b_0" / f"{i:03d}{encode[0]}", cv2.imencode(encode[0], encode[1](frame))[1].tobytes())


def array_labels(root, **labels):
    """The two videos with one .npy of labels each."""
    footage(root)
    for name, y in labels.items():
        (root / "labels").mkdir(exist_ok=True)
        np.save(root / "labels" / f"{name}.npy", y)


Y = (np.arange(32) >= 20).astype(np.uint8)
CSV = "video,start,end\nb_0,20,32\nb_1,20,32\n"


def with_csv(content, **names):
    def make(root):
        footage(root, **names)
        put(root / "labels.csv", content)

    return make


def per_video(root, names=("a", "b"), clips=6, split="test", crops=1, width=1024, suffix=""):
    (root / split).mkdir(parents=True, exist_ok=True)
    for name in names:
        np.save(root / split / f"{name}{suffix}.npy", RNG.normal(size=(clips, crops, width)).astype(np.float32))


def feature_labels(root, lengths, names=("a", "b")):
    per_video(root, names)
    (root / "labels").mkdir()
    for name, n in zip(names, lengths):
        np.save(root / "labels" / f"{name}.npy", (np.arange(n) >= n // 2).astype(np.uint8))


def features_and_vector(root, order=None):
    per_video(root, ("b", "a"))
    np.save(root / "gt.npy", np.r_[np.ones(96), np.zeros(96)])  # the first video of the list is abnormal
    if order:
        put(root / "test.list", "".join(f"/x/{n}.npy\n" for n in order))


def linked(root):
    footage(root / "disk")
    (root / "test").symlink_to(root / "disk" / "test")
    (root / "disk" / "test" / "circle").symlink_to(root / "disk")


READ = "frd_uvad/preprocess.py --dataset folder --data-root {root} --cache {root}/cache --workers 1"
EVALUATE = READ.replace("preprocess", "eval") + " --checkpoint {checkpoint} --out {root}/out"
FEATURES = "frd_uvad/eval.py --dataset features --features {root} --checkpoint {checkpoint} --out {root}/out"
SDMAE = "sdmae/preprocess.py --dataset folder --data-root {root} --cache {root}/cache --workers 1"

# what lies there, how it is made, the command, and what is right: the exit code, and what is (! before: is not) printed
SITUATIONS = [
    (
        "class folders",
        lambda r: (footage(r / "test", "Abuse", ["v1"]), footage(r / "test", "Normal", ["v2"])),
        READ,
        0,
        "test: 2 videos",
    ),
    (
        "class folders two deep",
        lambda r: footage(r / "test" / "Crime", "Abuse", ["v1", "v2"]),
        READ,
        0,
        "test: 2 videos",
    ),
    (
        "one name in two class folders",
        lambda r: (footage(r / "test", "A", ["v1"]), footage(r / "test", "B", ["v1"])),
        READ,
        0,
        "test: 2 videos",
    ),
    (
        "videos and a sub-folder of videos",
        lambda r: (footage(r, names=["v1"]), footage(r / "test", "more", ["v2"])),
        READ,
        0,
        "test: 2 videos",
    ),
    (
        "videos and folders of frames",
        lambda r: (footage(r, names=["v1"]), footage(r, names=["v2"], suffix="")),
        READ,
        0,
        "test: 2 videos",
    ),
    (
        "files of unknown kinds",
        lambda r: (footage(r, names=["v1"]), put(r / "test" / "a.xyz"), put(r / "test" / "b.xyz")),
        READ,
        0,
        "note: 2 files in",
        "a.xyz",
    ),
    ("nothing but unknown kinds", lambda r: put(r / "test" / "a.xyz"), READ, 2, "a.xyz"),
    ("an empty folder", lambda r: (r / "test").mkdir(), READ, 2, "test"),
    (
        "files that macOS leaves",
        lambda r: (footage(r, names=["v1"]), put(r / "test" / "._v1.avi"), put(r / "test" / ".DS_Store")),
        READ,
        0,
        "test: 1 videos",
        "!_v1",
    ),
    (
        "Thumbs.db between frames",
        lambda r: (footage(r, names=["v1"], suffix=""), put(r / "test" / "v1" / "Thumbs.db")),
        READ,
        0,
        "test: 1 videos, 2 clips",
    ),
    ("capital suffixes", lambda r: footage(r, names=["v1", "v2"], suffix=".AVI"), READ, 0, "test: 2 videos"),
    (
        "two kinds of one name",
        lambda r: (footage(r, names=["v1"]), copied(r / "test" / "v1.avi", r / "test" / "v1.mkv")),
        READ,
        0,
        "test: 2 videos",
    ),
    (
        "a video of no bytes",
        lambda r: (footage(r, names=["v1"]), put(r / "test" / "v2.avi", b"")),
        READ,
        0,
        "test: 1 videos",
        "v2",
    ),
    (
        "a page instead of a video",
        lambda r: (footage(r, names=["v1"]), put(r / "test" / "v2.mp4", "<html>404</html>")),
        READ,
        0,
        "test: 1 videos",
        "v2",
    ),
    (
        "a link that leads nowhere",
        lambda r: (footage(r, names=["v1"]), (r / "test" / "v2.avi").symlink_to("gone.avi")),
        READ,
        0,
        "test: 1 videos",
    ),
    ("links to another disk, and a circle", linked, READ, 0, "test: 2 videos"),
    ("a video of one frame", lambda r: footage(r, names=["v1"], frames=1), READ, 0, "test: 1 videos, 1 clips"),
    ("a video of 17 frames", lambda r: footage(r, names=["v1"], frames=17), READ, 0, "test: 1 videos, 2 clips"),
    (
        "names of every kind",
        lambda r: footage(r, names=["a#b", "a b", "50%", "it's", "ü", "视频", "①", "file"]),
        READ,
        0,
        "test: 8 videos",
    ),
    (
        "frames numbered with a gap",
        lambda r: (footage(r, names=["v1"], suffix=""), (r / "test" / "v1" / "005.png").unlink()),
        READ,
        0,
        "test: 1 videos, 2 clips",
        "1 frames have no file",
    ),
    (
        "every frame twice",
        lambda r: (
            footage(r, names=["v1", "v2"], suffix=""),
            copied(r / "test" / "v1" / "000.png", r / "test" / "v1" / "000.bmp"),
        ),
        READ,
        0,
        "holds a frame twice",
        "test: 1 videos",
    ),
    (
        "frames of two sizes",
        lambda r: (
            footage(r, names=["v1", "v2"], suffix=""),
            put(r / "test" / "v1" / "003.png", cv2.imencode(".png", walkers(1, (50, 70))[0])[1].tobytes()),
        ),
        READ,
        0,
        "video v1: 1 frames of another size were resized",
    ),
    (
        "16-bit frames",
        lambda r: two_frames_of(r, (".png", lambda f: f.astype(np.uint16) * 257)),
        READ,
        0,
        "test: 1 videos",
        "uint16",
    ),
    (
        "float frames",
        lambda r: two_frames_of(r, (".tif", lambda f: f.astype(np.float32) / 255)),
        READ,
        0,
        "test: 1 videos",
    ),
    (
        "frames with transparency",
        lambda r: two_frames_of(r, (".png", lambda f: np.dstack([f, f[:, :, :1]]))),
        READ,
        0,
        "test: 1 videos",
    ),
    (
        "a picture that never changes",
        lambda r: [
            put(r / "test" / "v" / f"{i:02d}.png", cv2.imencode(".png", walkers(1)[0])[1].tobytes()) for i in range(4)
        ],
        READ,
        0,
        "one and the same picture",
    ),
    (
        "grey beside colour",
        lambda r: (
            footage(r, "train", ["d"], suffix=""),
            [
                put(r / "train" / "n" / f"{i:03d}.png", cv2.imencode(".png", f[:, :, 0])[1].tobytes())
                for i, f in enumerate(walkers(32))
            ],
        ),
        SDMAE,
        0,
        "!Traceback",
    ),
    # labels of videos
    (
        "a csv from Excel: a mark before it, semicolons, CRLF",
        with_csv("\ufeff" + CSV.replace(",", ";").replace("\n", "\r\n")),
        EVALUATE,
        0,
        "64 frames of 2 videos, 24 abnormal",
    ),
    (
        "a csv of shuffled lines",
        with_csv("b_1,20,32\nvideo,start,end\nb_0,20,32\n"),
        EVALUATE,
        0,
        "64 frames of 2 videos, 24 abnormal",
    ),
    (
        "a csv without a line for a normal video",
        with_csv("b_0,20,32\n"),
        EVALUATE,
        0,
        "64 frames of 2 videos, 12 abnormal",
    ),
    ("a csv of another video", with_csv("c_0,20,32\n"), EVALUATE, 2, "line 1", "c_0"),
    ("a csv past the end", with_csv("b_0,20,33\n"), EVALUATE, 2, "b_0", "32"),
    ("a csv the wrong way round", with_csv("b_0,30,20\n"), EVALUATE, 2, "30..20"),
    (
        "a csv with spaces and quotes",
        with_csv('"b_0", 20, 32\n"b_1", 20, 32\n'),
        EVALUATE,
        0,
        "64 frames of 2 videos, 24 abnormal",
    ),
    (
        "vectors of bools",
        lambda r: array_labels(r, b_0=Y > 0, b_1=Y > 0),
        EVALUATE,
        0,
        "64 frames of 2 videos, 24 abnormal",
    ),
    (
        "vectors of floats",
        lambda r: array_labels(r, b_0=Y.astype(float), b_1=Y),
        EVALUATE,
        0,
        "64 frames of 2 videos, 24 abnormal",
    ),
    (
        "columns and rows",
        lambda r: array_labels(r, b_0=Y[:, None], b_1=Y[None]),
        EVALUATE,
        0,
        "64 frames of 2 videos, 24 abnormal",
    ),
    ("255 for abnormal", lambda r: array_labels(r, b_0=Y * 255, b_1=Y), EVALUATE, 2, "b_0"),
    ("one label short", lambda r: array_labels(r, b_0=Y[:-1], b_1=Y), EVALUATE, 2, "b_0", "31", "32"),
    ("labels of one video of two", lambda r: array_labels(r, b_0=Y), EVALUATE, 2, "b_1"),
    (
        "labels under other names",
        lambda r: array_labels(r, b_0_label=Y, b_1_label=Y),
        EVALUATE,
        0,
        "no metrics",
        "b_0_label.npy",
    ),
    ("no labels", footage, EVALUATE, 0, "no metrics; looked for"),
    # features and their labels
    (
        "labels within a clip of the features",
        lambda r: feature_labels(r, (90, 96)),
        FEATURES,
        0,
        "186 frames of 2 videos, 93 abnormal",
    ),
    ("labels of another version", lambda r: feature_labels(r, (300, 96)), FEATURES, 2, "300", "96", "--segments"),
    (
        "segments",
        lambda r: feature_labels(r, (300, 1000)),
        FEATURES + " --segments",
        0,
        "1300 frames of 2 videos, 650 abnormal",
    ),
    ("a vector without an order", features_and_vector, FEATURES, 2, "gt.npy", "--order"),
    (
        "a vector and its list",
        lambda r: features_and_vector(r, "ba"),
        FEATURES,
        0,
        "192 frames of 2 videos, 96 abnormal",
        "gt.npy in the order of test.list",
    ),
    (
        "crops in files of their own",
        lambda r: [
            np.save(put(r / "test" / f"{n}__{c}.npy"), RNG.normal(size=(6, 1024)).astype("f4"))
            for n in "ab"
            for c in range(5)
        ],
        FEATURES,
        0,
        "no metrics",
    ),
    (
        "numbers that are no crops",
        lambda r: [np.save(put(r / "test" / f"a__{c}.npy"), RNG.normal(size=(6, 1024)).astype("f4")) for c in (0, 2)],
        FEATURES,
        0,
        "no metrics",
    ),
    (
        "axes that may be either",
        lambda r: [np.save(put(r / "test" / f"{n}.npy"), np.zeros((10, 10, 1024), "f4")) for n in "ab"],
        FEATURES,
        2,
        "cannot be told",
    ),
    (
        "[width, clips]",
        lambda r: [np.save(put(r / "test" / f"{n}.npy"), np.zeros((1024, k), "f4")) for n, k in (("a", 6), ("b", 7))],
        FEATURES,
        2,
        "transpose",
    ),
    ("widths that differ", lambda r: (per_video(r, "a"), per_video(r, "b", width=512)), FEATURES, 2, "1024", "512"),
    ("no features", lambda r: put(r / "test" / "readme.txt"), FEATURES, 2, "--features"),
    (
        "NaN in features",
        lambda r: (per_video(r, "a"), np.save(r / "test" / "b.npy", np.full((6, 1, 1024), np.nan, "f4"))),
        FEATURES,
        2,
        "of video b ",
    ),
]
