"""CUHK Avenue (Lu et al. 2013). Its two label sets differ in 441 frames: the masks win where both exist."""

from functools import partial
from pathlib import Path

from common.readers.dataset import Dataset, canonical_video_name, choose_labels, search
from common.readers.labels import read_masks
from common.readers.published import find_videos, mat_ranges


def read_dataset(name: str, data_root: Path) -> Dataset:
    """Its videos, masks and labels. Raises UserError where they are missing or damaged."""
    data = find_videos(name, data_root)
    data.label_forms = "testing_label_mask/1_label.mat … (in it, or in ground_truth_demo/ beside it), or avenue.mat"
    above = [p for root in (data.root.resolve(), data.root.absolute()) for p in (root.parent.parent, root.parent)]
    beside = [p / name for p in above for name in ("ground_truth_demo", "testing_label_mask")]
    places = [*(p for p in beside if p.is_dir()), data.root]  # the last and nearest counts
    files = [p for place in places for p in search(place, r"\d+_label\.mat", depth=4)]
    data._masks = {canonical_video_name("avenue", p.name.split("_")[0]): partial(read_masks, p) for p in files}
    data.mask_source = "testing_label_mask (volLabel)" if files else "none"
    ranges = [(p.name, mat_ranges(p)) for p in search(data.root, r"avenue\.mat")[:1]]
    choose_labels(data, [(f"masks: {data.mask_source}", data._masks), *ranges])
    return data
