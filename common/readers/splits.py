"""The folders of training and test videos of a dataset, and the videos in them. All raise UserError."""

from collections.abc import Callable, Collection
from pathlib import Path

from common.io import UserError
from common.readers.video import Video, list_videos, natural

TRAIN = ("training/frames", "training/videos", "training_videos", "train/frames", "train/videos", "training", "train")
TEST = ("testing/frames", "testing/videos", "testing_videos", "test/frames", "test/videos", "testing", "test")
SPLITS = {"train": TRAIN, "test": TEST}


def child_folders(root: Path, names: Collection[str]) -> list[Path]:
    """The folders of these names, in lower case, in `root`, whatever their case; a/b descends."""
    out = []
    for name in names:
        folders = [root]
        for part in name.split("/"):
            folders = [p for f in folders[:1] for p in sorted(f.iterdir()) if p.name.lower() == part and p.is_dir()]
        out += folders[:1]
    return out


def split_folders(root: Path, split: str) -> list[Path]:
    """Folders of a split that hold videos: frames/ and videos/ may both be filled, else training/ counts."""
    filled = [p for p in child_folders(root, SPLITS[split]) if listed_videos(p)]
    specific = [p for p in filled if p.parent != root or p.name.lower().endswith("_videos")]
    return specific or filled[:1]


def listed_videos(folder: Path, split: str = "test", left_out: list | None = None) -> list[Video]:
    videos_and_masks = list_videos(folder, split, walk=True, left_out=left_out)
    return [v for v in videos_and_masks if not v.name.lower().endswith("_gt")]


def videos(folders: list[Path], split: str, canonical_name: Callable[[str], str] = str) -> list[Video]:
    """The videos of all folders of a split; one that is in two of them is taken from the first. Raises UserError."""
    by_name, repeated = {}, []
    for folder in folders:
        left_out, in_folder = [], set()
        for v in listed_videos(folder, split, left_out):
            v.name = canonical_name(v.name)
            if v.name in in_folder:
                raise UserError(f"{folder}: several videos are called {v.name}; keep one of each")
            in_folder.add(v.name)
            if by_name.setdefault(v.name, v) is not v:
                repeated.append(v)
        if left_out:
            files = f"{len(left_out)} files in {folder} are no part of a video, or of an unknown kind"
            print(f"note: {files}, such as {left_out[0]}", flush=True)
    if repeated:
        example, first = repeated[0].path, folders[0]
        count = f"{len(repeated)} videos, such as {example}"
        print(f"note: {count}, are in {first} too, which is used", flush=True)
    return sorted(by_name.values(), key=lambda v: natural(v.name))
