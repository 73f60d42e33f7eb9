"""Where videos and labels are: one small reader per dataset in a file beside this one, all returning the same record.

data = find("ped2", "data")          # any layout in circulation, found under data/
data.train, data.test                # lists of common.readers.video.Video
data.labels(video, frames)           # uint8 [T], 1 = abnormal, or None where the dataset has none
data.masks(video)                    # bool [T, H, W] or None
data.tracks(video)                   # float32 [n, 6]: id, frame, x1, y1, x2, y2 (inclusive pixels) or None
"""

from pathlib import Path

from common.io import UserError, optional_module
from common.readers.dataset import Dataset, normalized_name

ALIASES = {
    "ped1": ("ped1", "ucsdped1"),
    "ped2": ("ped2", "ucsdped2"),
    "avenue": ("avenue", "avenuedataset", "cuhkavenue", "avenuecuhk"),
    "shanghaitech": ("shanghaitech", "shanghai", "sht", "shanghaitechcampus"),
    "shanghaitech-sd": ("shanghaitechsd", "shanghaisd", "shtsd", "shanghaitechscenedependent"),
    "ubnormal": ("ubnormal", "ubn"),
    "folder": ("folder",),
    "demo": ("demo",),
}
# modules beside this one, where they are not named after the dataset; a copy may leave out those that it does not use
READERS = {"ped1": "ucsd", "ped2": "ucsd", "shanghaitech-sd": "shanghaitech"}


def canonical(name: str) -> str:
    """The dataset's one name for any of the spellings in circulation. Raises UserError."""
    for key, names in ALIASES.items():
        if normalized_name(name) in names:
            return key
    raise UserError(f"--dataset {name} is not known; choose one of {', '.join(ALIASES)}")


def find(name: str, data_root="data", labels=None) -> Dataset:
    """The Dataset `name` under `data_root`, whatever its layout.

    labels: frame labels to take instead of its own, see given_labels.use_labels(). Raises UserError where videos or
    labels are missing, damaged, or do not fit.
    """
    name, root = canonical(name), Path(data_root)
    if name != "demo" and not root.is_dir():
        content = "train/ and test/ with videos or folders of frames" if name == "folder" else name
        raise UserError(f"--data-root {root} does not exist; it should hold {content}")
    reader = f"common.readers.{READERS.get(name, name)}"
    data = optional_module(reader, f"the {name} dataset", "choose another --dataset").read_dataset(name, root)
    if labels:
        given_labels = optional_module("common.readers.given_labels", "--labels", "leave it out")
        given_labels.use_labels(data, Path(labels))
    return data
