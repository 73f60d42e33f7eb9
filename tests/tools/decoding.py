"""How fast videos are decoded and the frame cache is made, beside what cv2 alone decodes by as many processes.

python tests/tools/decoding.py --data-root my_videos
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2

from common.cache import FrameCache
from common.pool import cores, map_videos, tick
from common.readers.datasets import find
from common.readers.video import Decoder


def by_cv2(video):
    """Every frame of a video file, thrown away."""
    capture = cv2.VideoCapture(str(video.path))
    while capture.read()[0]:
        tick()


def by_decoder(video):
    for _ in Decoder(video):
        tick()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root", type=Path, required=True, help="folder of videos, as --dataset folder takes them"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    data = find("folder", args.data_root, None)
    videos = data.train + data.test
    total = sum(v.expected_frames() for v in videos)
    best = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            ways = {
                "cv2 alone": lambda: map_videos(by_cv2, videos, workers=cores(), total=total, label="cv2 alone"),
                "our decoder": lambda: map_videos(
                    by_decoder, videos, workers=cores(), total=total, label="our decoder"
                ),
                "frame cache, written and synced": lambda: FrameCache(folder).build(videos, cores()),
            }
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                best[name] = max(best.get(name, 0.0), total / (time.perf_counter() - began))
    print(f"{len(videos)} videos, {total} frames, {cores()} processes, best of {args.rounds}")
    for name, rate in best.items():
        print(f"  {name:<34}{rate:>8.0f} frames/s{100 * rate / best['cv2 alone']:>6.0f} %")


if __name__ == "__main__":
    main()
