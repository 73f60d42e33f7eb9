"""Which short clips were cut from the same source video, by the likeness of their frames: a csv with lines
fight/<clip>,source.

    python tests/tools/sources.py --clips ../shared/data/fight --out sources.csv --encoder timm:tf_efficientnet_lite0
    python tests/tools/long_videos.py --clips ../shared/data/fight --out data/bags --videos 20 --train 24 \\
        --sources sources.csv

Two clips are linked where any frame of one is like any frame of the other: the cosine of their features, less the mean
over all frames, is above --threshold. Clips that are linked, directly or through others, are one source. A threshold
that is too low joins sources, which makes a split stricter, never laxer.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from common.features.encoders import IMAGE_KINDS, parse_encoder
from common.io import UserError, atomic_write, run_script
from common.readers.video import Decoder, list_videos


def sources_of(features: np.ndarray, threshold: float) -> np.ndarray:
    """Features of some frames of each clip [clips, frames, width] -> the number of each clip's source [clips]."""
    from scipy.sparse.csgraph import connected_components

    x = features - features.mean((0, 1))
    x = x / np.linalg.norm(x, axis=2, keepdims=True)
    likeness = np.einsum("afw,bgw->abfg", x, x).max((2, 3))
    return connected_components(likeness > threshold, directed=False)[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with fight/ and noFight/")
    parser.add_argument("--encoder", default="timm:tf_efficientnet_lite0", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("sources.csv"), help="(default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.5, help="(default: %(default)s)")
    parser.add_argument("--frames", type=int, default=6, help="looked at in each clip (default: %(default)s)")
    args = parser.parse_args(argv)
    folders = [args.clips / kind for kind in ("fight", "noFight")]
    clips = {f"{folder.name}/{v.name}": v for folder in folders if folder.is_dir() for v in list_videos(folder)}
    if not clips:
        raise UserError(f"--clips {args.clips} holds no videos in fight/ and noFight/")
    from common.distributed import Run
    from common.features.image import ImageEncoder

    features = []
    with Run("cpu", "fp32") as run:
        encoder = ImageEncoder(parse_encoder(args.encoder, IMAGE_KINDS), run)
        for video in tqdm(clips.values(), desc="look at clips", unit="clip"):
            frames = [encoder.preprocess_frame(frame) for frame in Decoder(video)]
            chosen = np.linspace(0, len(frames) - 1, args.frames).astype(int)
            features.append(encoder.encode(np.stack([frames[t] for t in chosen])).numpy())
    sources = sources_of(np.stack(features), args.threshold)
    with atomic_write(args.out) as tmp, open(tmp, "w", newline="") as file:
        csv.writer(file).writerows(zip(clips, sources))
    sizes = np.sort(np.bincount(sources))[::-1]
    print(f"{len(clips)} clips of {len(sizes)} sources, the largest {sizes[:5].tolist()}: {args.out}")


if __name__ == "__main__":
    run_script(main)
