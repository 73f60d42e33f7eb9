"""ShanghaiTech Campus (Luo et al. 2017), in its own split or the scene-dependent one."""

from functools import partial
from pathlib import Path

from common.readers.dataset import Dataset, choose_labels, search
from common.readers.labels import frame_labels, read_masks
from common.readers.published import find_videos


def read_dataset(name: str, data_root: Path) -> Dataset:
    """Its videos, with scenes, masks and labels. Raises UserError where they are missing or damaged."""
    data = find_videos(name, data_root)
    data.label_forms = "test_frame_mask/ (or frame_masks/) with one .npy per test video"
    for v in data.train + data.test:
        v.scene = v.name.split("_")[0]
    for p in search(data.root, r"(test_?)?frame_?masks?"):
        data._labels = {f.stem: partial(frame_labels, f) for f in sorted(p.glob("*.npy"))}
        data.label_source = p.name
    for p in search(data.root, r"(test_?)?pixel_?masks?"):
        data._masks = {f.stem: partial(read_masks, f) for f in sorted(p.glob("*.npy"))}
        data.mask_source = p.name
    if not data._labels:
        choose_labels(data, [])  # the masks
    return data
