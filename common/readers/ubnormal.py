"""UBnormal (Acsintoae et al. 2022): videos listed by name, tracks as text, pixel masks as one image per frame."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.io import UserError, read_table, read_text, reading
from common.readers.dataset import Dataset, search
from common.readers.pictures import read_grey
from common.readers.video import VIDEOS, Decoder, Video, natural

SCENE = r"scene ?_?\d+"  # the folder of a scene


def read_dataset(name: str, data_root: Path) -> Dataset:
    """train holds its normal training videos, test the normal and abnormal test videos.

    Its abnormal training videos, which pseudo anomalies are cut out of, are in `abnormal_train`; their masks and tracks
    are read like those of test videos. The files *_video_names.txt of the dataset list which video is in which split.
    Raises UserError where there are no scenes, lists or videos; videos without readable tracks are skipped.
    """
    places = (p for p in [data_root, *sorted(data_root.iterdir())] if p.is_dir())
    root = next((p for p in places if search(p, SCENE, depth=1)), None)
    if root is None:
        looked = "looked there and one folder below for Scene1, Scene2, … with videos"
        raise UserError(f"ubnormal was not found under --data-root {data_root}: {looked}")
    pattern = r"(ab)?normal_(training|test)_video_names\.txt"
    found = search(root, pattern) or (search(root.parent, pattern) if os.access(root.parent, os.R_OK) else [])
    lists = {p.name.lower(): p for p in found}
    files = [p for scene in search(root, SCENE, depth=1) for p in sorted(scene.iterdir())]
    paths = {p.stem: p for p in files if p.suffix.lower() in VIDEOS}

    def listed(kind, split):
        name = f"{kind}_video_names.txt"
        if name not in lists:
            raise UserError(f"no {name} in or beside {root}: it is in scripts/ of github.com/lilygeorgescu/UBnormal")
        names = read_text(lists[name], "list of videos").split()
        missing = [n for n in names if n not in paths]
        if missing:
            count = f"{len(missing)} of {len(names)} videos that are not in {root}"
            print(f"note: {lists[name].name} lists {count}: {', '.join(missing[:5])}", flush=True)
        return [Video(n, paths[n], split, scene=re.findall(r"scene_(\d+)", n)[0]) for n in names if n in paths]

    def in_order(videos):
        return sorted(videos, key=lambda v: natural(v.name))

    train, test = listed("normal_training", "train"), listed("normal_test", "test") + listed("abnormal_test", "test")
    data = Dataset(name, root, in_order(train), in_order(test), "*_tracks.txt", "*_gt.png", cut_ranges=True)
    if "abnormal_training_video_names.txt" in lists:
        data.abnormal_train = in_order(listed("abnormal_training", "train"))
    for v in data.test + data.abnormal_train:
        try:
            annotations = Annotations(v)
        except UserError as e:
            data.skipped[v.key] = str(e)
            continue
        data._labels[v.name] = [(first, last) for _, first, last in annotations.tracks]
        data._tracks[v.name], data._masks[v.name] = annotations.boxes, annotations.masks
    data.test = [v for v in data.test if v.key not in data.skipped]
    data.abnormal_train = [v for v in data.abnormal_train if v.key not in data.skipped]
    if not data.train and not data.test:
        raise UserError(f"ubnormal in {root} holds none of the videos that its lists name")
    return data


class Annotations:
    """Tracks and masks of one video. tracks: [(id, first frame, last frame)], 0-based inclusive; [] of a normal video.

    Raises UserError where they are missing or damaged.
    """

    def __init__(self, video: Video):
        self.video, self.folder = video, video.path.with_name(f"{video.name}_annotations")
        self.tracks = []
        if not video.name.startswith("abnormal"):
            return
        corrected, path = (self.folder / f"{video.name}{suffix}_tracks.txt" for suffix in ("_new", ""))
        path = corrected if corrected.exists() else path
        with reading("tracks", path, "are not lines id,start,end", (ValueError, OverflowError)):
            rows = [row for _, row in read_table(path, "tracks")]
            self.tracks = [(int(float(i)), int(float(a)), int(float(b))) for i, a, b, *_ in rows]

    def ids(self) -> Iterator[tuple[int, np.ndarray]]:
        """(frame, uint8 [H, W]: the track of each pixel, 0 for none) of the frames that have a track and a file."""
        for t in sorted({t for _, first, last in self.tracks for t in range(first, last + 1)}):
            path = self.folder / f"{self.video.name}_{t:04d}_gt.png"
            if path.exists():
                yield t, read_grey(path, "pixel mask")

    def boxes(self) -> np.ndarray:
        """float32 [n, 6]: track id, frame, x1, y1, x2, y2 in inclusive pixels; in the order of tracks."""
        rows = []
        for t, image in self.ids():
            for track, first, last in self.tracks:
                ys, xs = np.nonzero(image == track) if first <= t <= last else ((), ())
                if len(ys):
                    rows.append((track, t, xs.min(), ys.min(), xs.max(), ys.max()))
        return np.array(sorted(rows), np.float32).reshape(-1, 6)

    def masks(self) -> np.ndarray:
        """bool [T, H, W] of abnormal pixels: of objects with a track in that frame; images mark normal objects too."""
        frames, out = self.video.expected_frames(), None
        for t, image in self.ids():
            out = np.zeros((frames, *image.shape), bool) if out is None else out
            if t < frames:
                out[t] = np.isin(image, [track for track, first, last in self.tracks if first <= t <= last])
        if out is None:
            out = np.zeros((frames, *next(iter(Decoder(self.video))).shape[:2]), bool)
        return out
