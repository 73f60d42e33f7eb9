"""UBnormal (Acsintoae et al. 2022): videos listed by name, tracks as text, pixel masks as one image per frame."""

import re
from pathlib import Path

import cv2
import numpy as np

from common.dataset import Dataset, search
from common.io import UserError, first_line, opencv_path, read_table, read_text
from common.pictures import read_grey
from common.video import VIDEOS, Video, natural


def ubnormal(data_root):
    """train holds its normal training videos, test the normal and abnormal test videos.

    Its abnormal training videos, which pseudo anomalies are cut out of, are in `abnormal_train`; their masks and tracks are
    read like those of test videos. Which video is in which split is listed in the files *_video_names.txt of the dataset.
    """
    data_root = Path(data_root)
    places = (
        [p for p in [data_root, *sorted(data_root.iterdir())] if p.is_dir() and search(p, r"scene ?_?\d+", depth=1)]
        if data_root.is_dir()
        else []
    )
    if not places:
        raise UserError(
            f"ubnormal was not found under --data-root {data_root}: looked there and one folder below for Scene1, "
            "Scene2, … with videos"
        )
    root = places[0]
    lists = {p.name.lower(): p for p in search(root, r"(ab)?normal_(training|test)_video_names\.txt")}
    known = {
        p.stem: p
        for scene in search(root, r"scene ?_?\d+", depth=1)
        for p in sorted(scene.iterdir())
        if p.suffix.lower() in VIDEOS
    }

    def listed(name, split):
        if name not in lists:
            raise UserError(
                f"ubnormal in {root} has no {name}: put the dataset's four lists of video names ((ab)normal_training_"
                "video_names.txt, (ab)normal_test_video_names.txt) there"
            )
        names = read_text(lists[name], "list of videos").split()
        missing = [n for n in names if n not in known]
        if missing:
            print(
                f"note: {lists[name].name} lists {len(missing)} of {len(names)} videos that are not in {root}: {', '.join(missing[:5])}"
                + (" …" if len(missing) > 5 else ""),
                flush=True,
            )
        return sorted(
            (Video(n, known[n], split, scene=re.findall(r"scene_(\d+)", n)[0]) for n in names if n in known),
            key=lambda v: natural(v.name),
        )

    train, test = listed("normal_training_video_names.txt", "train"), listed("normal_test_video_names.txt", "test")
    test = sorted(test + listed("abnormal_test_video_names.txt", "test"), key=lambda v: natural(v.name))
    data = Dataset("ubnormal", root, train, test, "*_tracks.txt", "*_gt.png", cut_ranges=True)
    if "abnormal_training_video_names.txt" in lists:
        data.abnormal_train = listed("abnormal_training_video_names.txt", "train")
    for v in test + data.abnormal_train:
        try:
            notes = Annotations(v)
        except UserError as e:
            data.skipped[v.key] = str(e)
            continue
        data._ranges[v.name] = [(first, last) for _, first, last in notes.tracks]
        data._tracks[v.name], data._masks[v.name] = notes.boxes, notes.masks
    data.test, data.abnormal_train = (
        [v for v in videos if v.key not in data.skipped] for videos in (data.test, data.abnormal_train)
    )
    if not data.train and not data.test:
        raise UserError(f"ubnormal in {root} holds none of the videos that its lists name")
    return data


class Annotations:
    """What is known of one video. tracks: [(id, first frame, last frame)], 0-based inclusive; none of a normal video."""

    def __init__(self, video):
        self.video, self.folder, self.tracks = video, video.path.with_name(f"{video.name}_annotations"), []
        if not video.name.startswith("abnormal"):
            return
        # a corrected list goes before the first one
        names = [f"{video.name}{k}_tracks.txt" for k in ("_new", "")]
        path = next((p for p in (self.folder / n for n in names) if p.exists()), None)
        if path is None:
            raise UserError(f"ubnormal: {self.folder / names[1]} is missing")
        try:
            self.tracks = [
                (int(float(i)), int(float(a)), int(float(b))) for _, (i, a, b, *_) in read_table(path, "tracks")
            ]
        except (ValueError, OverflowError) as e:
            raise UserError(f"{path}: expected lines id,start,end ({first_line(e)})") from None

    def ids(self):
        """Yield (frame, uint8 [H, W]: the track that each pixel belongs to, 0 for none) of the frames with a track and a file."""
        for t in sorted({t for _, first, last in self.tracks for t in range(first, last + 1)}):
            path = self.folder / f"{self.video.name}_{t:04d}_gt.png"
            if path.exists():
                yield t, read_grey(path, "pixel mask")

    def boxes(self):
        """float32 [n, 6]: track id, frame, x1, y1, x2, y2 in inclusive pixels; in the order of tracks."""
        rows = []
        for t, image in self.ids():
            for track, first, last in self.tracks:
                ys, xs = np.nonzero(image == track) if first <= t <= last else ((), ())
                if len(ys):
                    rows.append((track, t, xs.min(), ys.min(), xs.max(), ys.max()))
        return np.array(sorted(rows), np.float32).reshape(-1, 6)

    def masks(self):
        """bool [T, H, W] of abnormal pixels: those of objects with a track in that frame; its images mark every object, normal ones too."""
        capture = cv2.VideoCapture(opencv_path(self.video.path))
        size = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        out = None
        for t, image in self.ids():
            if out is None:
                out = np.zeros((self.video.expected_frames(), *image.shape), bool)
            if t < len(out):
                out[t] = np.isin(image, [track for track, first, last in self.tracks if first <= t <= last])
        return np.zeros((self.video.expected_frames(), *size), bool) if out is None else out
