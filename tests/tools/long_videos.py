"""Untrimmed videos out of short clips: 10 to 20 clips in a row, some with a fight, with exact frame labels.

    python tests/tools/long_videos.py --clips ../shared/data/fight --out data/fights
    python frd_uvad/train.py --dataset folder --data-root data/fights --rounds 2
    python tests/tools/long_videos.py --clips ../shared/data/fight --out data/bags --videos 20 --train 40

Writes test/<video>.avi and labels/<video>.npy of a `folder` dataset; half of the videos hold one to three fights. A
fight is used once, a calm clip once in a video. All frames are brought to one size, so that a join shows in the picture
and nowhere else.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
from tqdm import tqdm

from common.io import UserError, atomic_write, run_script
from common.readers.pictures import resize
from common.readers.video import Decoder, list_videos

FPS = 25.0


def plan(fights, calm, videos, rng, shortest=10, longest=20):
    """Which clips make up each video, in order: [[(number of the clip, is a fight), …], …]; fights and calm are
    their counts."""
    left, out = rng.permutation(fights).tolist(), []
    for i in range(videos):
        n = int(rng.integers(shortest, longest + 1))
        own = [(left.pop(), True) for _ in range(min(len(left), int(rng.integers(1, 4))))] if i % 2 == 0 else []
        own += [(int(k), False) for k in rng.permutation(calm)[: n - len(own)]]  # fewer where there are not enough
        out.append([own[k] for k in rng.permutation(len(own))])
    return out


def join(video, clips, out, size, split="test"):
    """Write one video and its labels. -> frames."""
    labels = []
    with atomic_write(out / split / f"{video}.avi") as tmp:
        writer = cv2.VideoWriter(str(tmp), cv2.VideoWriter_fourcc(*"MJPG"), FPS, size[::-1])
        for clip, fight in clips:
            for frame in Decoder(clip):
                frame = frame if frame.shape[2] == 3 else np.repeat(frame, 3, axis=2)
                writer.write(resize(frame, size))
                labels.append(int(fight))
        writer.release()
    if split == "train":
        return len(labels)
    with atomic_write(out / "labels" / f"{video}.npy") as tmp:
        np.save(tmp, np.array(labels, np.uint8))
    return len(labels)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with fight/ and noFight/")
    parser.add_argument("--out", type=Path, default=Path("data/fights"), help="(default: %(default)s)")
    parser.add_argument("--videos", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument(
        "--train",
        type=int,
        default=0,
        metavar="N",
        help="also N training videos in train/, of other clips than the test "
        "videos, and their names in normal.txt and abnormal.txt (default: %(default)s)",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(240, 320), metavar=("HEIGHT", "WIDTH"), help="(default: 240 320)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    kinds = {}
    for kind in ("fight", "noFight"):
        if not (args.clips / kind).is_dir():
            raise UserError(f"--clips {args.clips} has no folder {kind}/")
        kinds[kind] = list_videos(args.clips / kind)
    rng = np.random.default_rng(args.seed)
    halves = {k: rng.permutation(len(v)) if args.train else np.arange(len(v)) for k, v in kinds.items()}
    splits = {"test": args.videos} if not args.train else {"test": args.videos, "train": args.train}
    frames, bags = 0, {"normal": [], "abnormal": []}
    for i, (split, count) in enumerate(splits.items()):
        own = {k: [kinds[k][j] for j in halves[k][i :: len(splits)]] for k in kinds}
        videos = plan(len(own["fight"]), len(own["noFight"]), count, rng)
        for j, clips in enumerate(tqdm(videos, desc=f"join {split} videos", unit="video")):
            name = f"{'train' if split == 'train' else 'long'}{j:02d}"
            clips = [(own["fight" if fight else "noFight"][k], fight) for k, fight in clips]
            frames += join(name, clips, args.out, tuple(args.size), split)
            if split == "train":
                bags["abnormal" if any(fight for _, fight in clips) else "normal"].append(name)
    for kind, names in bags.items() if args.train else ():
        (args.out / f"{kind}.txt").write_text("".join(f"{x}\n" for x in names))
    print(f"{sum(splits.values())} videos, {frames} frames in {args.out}")
    print(f"next: python frd_uvad/train.py --dataset folder --data-root {args.out} --rounds 2")


if __name__ == "__main__":
    run_script(main)
