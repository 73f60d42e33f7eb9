"""Untrimmed videos out of short clips: 10 to 20 clips in a row, some with a fight, with exact frame labels.

    python tests/tools/long_videos.py --clips ../shared/data/fight --out data/fights
    python frd_uvad/train.py --dataset folder --data-root data/fights --auxiliary self
    python tests/tools/long_videos.py --clips ../shared/data/fight --out data/bags --videos 20 --train 40
    … --train 40 --sources sources.csv       # of tests/tools/sources.py: what a clip was cut from is on one side only

Writes test/<video>.avi and labels/<video>.npy of a `folder` dataset; half of the videos hold one to three fights. A
fight is used once, a calm clip once in a video, or with --once in one video only: what a method without supervision saw
once among clips that it saw several times, it may take for abnormal for that alone. All frames are brought to one size,
so that a join shows in the picture and nowhere else.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
from tqdm import tqdm

from common.io import UserError, atomic_write, read_table, run_script
from common.readers.pictures import resize
from common.readers.video import Decoder, list_videos

FPS = 25.0


def plan(fights, calm, videos, rng, shortest=10, longest=20, once=False):
    """Which clips make up each video, in order: [[(number of the clip, is a fight), …], …]; fights and calm are
    their counts. once: calm clips too are in one video only, and divided evenly."""
    left, out = rng.permutation(fights).tolist(), []
    parts = np.array_split(rng.permutation(calm), videos) if once else None
    for i in range(videos):
        n = int(rng.integers(shortest, longest + 1))
        own = [(left.pop(), True) for _ in range(min(len(left), int(rng.integers(1, 4))))] if i % 2 == 0 else []
        chosen = parts[i] if once else rng.permutation(calm)[: n - len(own)]  # fewer where there are not enough
        own += [(int(k), False) for k in chosen]
        out.append([own[k] for k in rng.permutation(len(own))])
    return out


def split_sources(source_of, names, rng):
    """Whole sources to two sides with about as many clips of each kind: {kind: [numbers of clips, of others]}.

    source_of: {"kind/clip": source}; names: {kind: its clips, in order}. The largest source comes first, sources of one
    size in random order; each goes to the side that has fewer clips of its kinds.
    """
    clips = {}
    for kind in names:
        for number, name in enumerate(names[kind]):
            clips.setdefault(source_of[f"{kind}/{name}"], []).append((kind, number))
    sides = {kind: [[], []] for kind in names}
    order = [clips[source] for source in rng.permutation(sorted(clips))]
    for group in sorted(order, key=len, reverse=True):
        sizes = [sum(len(sides[kind][i]) for kind, _ in group) for i in (0, 1)]
        for kind, number in group:
            sides[kind][int(sizes[1] < sizes[0])].append(number)
    return sides


def read_sources(path, names):
    """{"kind/clip": source} from lines fight/<clip>,source. Raises UserError where one of `names` has no line."""
    source_of = {row[0]: row[1] for _, row in read_table(path, "--sources") if len(row) > 1}
    missing = next((name for name in names if name not in source_of), None)
    if missing:
        raise UserError(f"--sources {path} has no line for {missing}: make it with tests/tools/sources.py")
    return source_of


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
    parser.add_argument("--once", action="store_true", help="a calm clip is in one video only")
    parser.add_argument(
        "--sources", type=Path, help="csv with lines fight/<clip>,source: with --train, no source is on both sides"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(240, 320), metavar=("HEIGHT", "WIDTH"), help="(default: 240 320)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.sources and not args.train:
        raise UserError("--sources divides training from test videos: give --train N too")
    kinds = {}
    for kind in ("fight", "noFight"):
        if not (args.clips / kind).is_dir():
            raise UserError(f"--clips {args.clips} has no folder {kind}/")
        kinds[kind] = list_videos(args.clips / kind)
    rng = np.random.default_rng(args.seed)
    splits = {"test": args.videos} if not args.train else {"test": args.videos, "train": args.train}
    if args.sources:
        names = {kind: [v.name for v in videos] for kind, videos in kinds.items()}
        source_of = read_sources(args.sources, [f"{kind}/{name}" for kind in names for name in names[kind]])
        sides = split_sources(source_of, names, rng)
    else:
        orders = {k: rng.permutation(len(v)) if args.train else np.arange(len(v)) for k, v in kinds.items()}
        sides = {k: [order[i :: len(splits)] for i in range(len(splits))] for k, order in orders.items()}
    frames, bags = 0, {"normal": [], "abnormal": []}
    for i, (split, count) in enumerate(splits.items()):
        own = {k: [kinds[k][j] for j in sides[k][i]] for k in kinds}
        videos = plan(len(own["fight"]), len(own["noFight"]), count, rng, once=args.once)
        for j, clips in enumerate(tqdm(videos, desc=f"join {split} videos", unit="video")):
            name = f"{'train' if split == 'train' else 'long'}{j:02d}"
            clips = [(own["fight" if fight else "noFight"][k], fight) for k, fight in clips]
            frames += join(name, clips, args.out, tuple(args.size), split)
            if split == "train":
                bags["abnormal" if any(fight for _, fight in clips) else "normal"].append(name)
    for kind, names in bags.items() if args.train else ():
        (args.out / f"{kind}.txt").write_text("".join(f"{x}\n" for x in names))
    print(f"{sum(splits.values())} videos, {frames} frames in {args.out}")
    print(f"next: python frd_uvad/train.py --dataset folder --data-root {args.out} --auxiliary self")


if __name__ == "__main__":
    run_script(main)
