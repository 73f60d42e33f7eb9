"""Does `--false-alarms-per-hour` keep its promise? Events in normal videos that the threshold was not calibrated on.

python tests/tools/false_alarms.py --dataset ped2 --data-root data --checkpoint runs/sdmae/ped2/sdmae.pt --fps 10
python tests/tools/false_alarms.py --dataset folder --data-root my_videos --checkpoint sdmae.pt --parts 16

The training videos are split into halves, again and again: the threshold comes from one half, events are counted in the
other one. --parts cuts the videos into so many pieces first, where they are few.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common import cli
from common.distributed import Run
from common.io import UserError, run_script
from sdmae import eval as evaluation
from sdmae import live, preprocess, scoring


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="folder", help="(default: %(default)s)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of sdmae/train.py")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="of decoded frames (default: %(default)s)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="(default: auto)")
    parser.add_argument("--fps", type=float, help="frames per second, where the videos do not say")
    parser.add_argument("--parts", type=int, help="cut all videos together into so many pieces (default: the videos)")
    parser.add_argument("--splits", type=int, default=1000, help="random halves (default: %(default)s)")
    parser.add_argument("--per-hour", type=float, nargs="+", default=[1, 10, 100], help="(default: 1 10 100)")
    args = parser.parse_args(argv)
    with Run("cpu", args.precision) as run:
        loaded = evaluation.load(args.checkpoint, args.dataset, run)
        source = cli.DataSource(args.dataset, args.data_root, cache=args.cache)
        dataset = preprocess.prepare(source, loaded.size, run)
        fps = args.fps or (dataset.cache.clock(dataset.train[0]).fps if dataset.train else 0)
        if not fps:
            raise UserError("no training video says how many frames it has per second: give --fps")
        videos = [scoring.score_video(loaded.scorer, x)["scores"] for x in dataset.arrays(dataset.train)]
    if args.parts:
        videos = np.array_split(np.concatenate(videos), args.parts)
    if len(videos) < 2:
        raise UserError("there is one training video: cut it with --parts")
    width = max(1, round(live.LiveOptions.window * fps))
    smooth = [live.moving_mean(x, width) for x in videos]
    hours = np.array([len(x) for x in videos]) / fps / 3600
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(videos)) for _ in range(args.splits)]
    print(f"{len(videos)} pieces of normal footage, {60 * hours.sum():.1f} minutes, {len(orders)} splits\n")
    print("| asked per hour | in the other half | splits without any |")
    print("|---|---|---|")
    for asked in args.per_hour:
        rates = []
        for order in orders:
            first, second = np.array_split(order, 2)
            level = live.calibrate(np.concatenate([videos[i] for i in first]), asked, fps, width)
            rates.append(sum(live.count_events(smooth[i], level, fps) for i in second) / hours[second].sum())
        print(f"| {asked:g} | {np.mean(rates):.1f} | {100 * np.mean(np.array(rates) == 0):.0f} % |")


if __name__ == "__main__":
    run_script(main)
