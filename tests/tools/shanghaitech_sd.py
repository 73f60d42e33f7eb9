"""Build the folder of ShanghaiTech-SD, a split by scenes, from ShanghaiTech.

python tests/tools/shanghaitech_sd.py --list LIST --source data/shanghaitech
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common.io import UserError, atomic_write, read_text, run_script
from common.readers.datasets import find


def build(split_list, source, out) -> int:
    """Link videos of ShanghaiTech and write their labels. -> number of videos. Raises UserError.

    split_list: a file with lines `training NAME` or `testing NAME`; source: ShanghaiTech's folder.
    """
    data = find("shanghaitech", source)
    videos = {v.name: v for v in data.train + data.test}
    text = read_text(split_list, "--list")
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        if len(line) != 2 or line[0] not in ("training", "testing") or line[1] not in videos:
            expected = f"`training NAME` or `testing NAME` of a video in {data.root}"
            raise UserError(f"--list {split_list}: {' '.join(line)!r} is not {expected}")
        if line[0] == "testing" and videos[line[1]].split == "test" and line[1] not in data._labels:
            raise UserError(f"video {line[1]} of {data.root} has no labels in {data.label_source}")
    out = Path(out)
    for split, name in lines:
        video = videos[name]
        place = out / split / ("frames" if video.files else "videos") / video.path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(video.path.resolve())
        if split == "testing":
            # a training video of ShanghaiTech is normal throughout
            labels = data._labels[name]() if name in data._labels else np.zeros(video.expected_frames(), np.uint8)
            masks = data._masks[name]() if name in data._masks else None
            for folder, array in (("test_frame_mask", labels), ("test_pixel_mask", masks)):
                if array is not None:
                    with atomic_write(out / folder / f"{name}.npy") as tmp:
                        np.save(tmp, array)
    return len(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", type=Path, required=True, help="file with lines `training NAME` or `testing NAME`, the split's videos"
    )
    parser.add_argument("--source", type=Path, required=True, help="folder of ShanghaiTech")
    parser.add_argument("--out", type=Path, default=Path("data/shanghaitech-sd"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    print(f"{build(args.list, args.source, args.out)} videos are linked in {args.out}")


if __name__ == "__main__":
    run_script(main)
