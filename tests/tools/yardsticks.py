"""How far optical flow alone gets, without any training: for every flow the micro AUC of two scores of a frame's boxes,
the largest mean squared flow and the largest distance to the nearest flow of a training cube.

    python tests/tools/yardsticks.py --dataset ped2 --data-root DIR --boxes file:boxes.npz \\
        --flows dis raft-small:FILE@1 raft-small:FILE@2 raft-large:FILE@1 --train-step 12 --test-step 6

FLOW@SCALE: frames are enlarged SCALE times. Boxes are those of hf2vad; only every n-th frame is looked at.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from tqdm import tqdm

from common import cli, metrics, smoothing
from common.distributed import Run
from common.flow import sources
from common.flow.raft import load_raft, video_flow
from common.io import run_script, write_json
from common.objects import pipeline
from common.objects.cubes import crop_all
from hf2vad import preprocess


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/yardsticks")
    parser.add_argument("--flows", nargs="+", default=["dis"], metavar="FLOW[@SCALE]")
    parser.add_argument("--train-step", type=cli.positive_int, default=12, help="every n-th training frame")
    parser.add_argument("--test-step", type=cli.positive_int, default=6, help="every n-th test frame")
    return parser.parse_args(argv)


def pair_flows(spec, run):
    """ "raft-small:FILE@2" -> function(two frames [2, H, W, C]) -> float32 [H, W, 2]"""
    method, _, scale = spec.partition("@")
    if not sources.is_learned(method):
        dis = sources.make_dis(method, float(scale or 1))
        return lambda frames: dis(*frames)
    net = load_raft(method, run.device)

    def flow(frames):
        chosen = sources.flow_scale(method, float(scale or 0), *frames.shape[1:3])
        return next(video_flow(net, frames, scale=chosen, bf16=run.precision == "bf16"))

    return flow


def cubes_of(dataset, videos, flow_of, step):
    """-> flows float32 [n, 2·32·32] of the cubes of every `step`-th frame, (video, frame) of each, seconds a pair"""
    flows, places = [], []
    seconds, pairs = 0.0, 0
    for v in tqdm(videos, unit="video", mininterval=10):
        frames, records = dataset.cache.frames(v), dataset.store.array(v)
        numbers, boxes = np.array(records["frame"]), np.array(records["box"])
        for t in range(step // 2 + 1, len(frames), step):
            began = time.perf_counter()
            flow = flow_of(frames[[t - 1, t]])
            seconds, pairs = seconds + time.perf_counter() - began, pairs + 1
            corners = np.ceil(boxes[numbers == t]).astype(int)
            if len(corners):
                limits = np.array([*frames.shape[2:0:-1]])
                corners[:, :2] = np.clip(corners[:, :2], 0, limits - 1)
                corners[:, 2:] = np.clip(corners[:, 2:], corners[:, :2] + 1, limits)
                flows.append(crop_all([flow], corners.tolist(), 32).reshape(len(corners), -1))
            places += [(v.name, t)] * len(corners)
    return np.concatenate(flows), places, seconds / pairs


def frame_auc(data, videos, dataset, places, values, step):
    """Micro AUC of the largest value of every `step`-th frame, after a median of 3."""
    scores, labels = [], []
    for v in videos:
        count = dataset.frames(v)
        best = np.zeros(count, np.float32)
        mine = [(t, value) for (name, t), value in zip(places, values) if name == v.name]
        np.maximum.at(best, [t for t, _ in mine], [value for _, value in mine])
        chosen = np.arange(step // 2 + 1, count, step)
        scores.append(smoothing.parse("median:3")(best[chosen]))
        labels.append(data.labels(v, count)[chosen])
    return metrics.auc(np.concatenate(labels), np.concatenate(scores))


def main(argv=None):
    args = parse(argv)
    out, rows = args.out or Path("runs/yardsticks"), []
    with Run(args.device, args.precision) as run:
        dataset = preprocess.prepare(cli.DataSource.from_args(args), run, foreground=cli.given(args, pipeline.FLAGS))
        print(f"{'flow':<40}{'nearest flow':>14}{'flow energy':>14}{'median px':>12}{'s a pair':>10}")
        for spec in args.flows:
            flow_of = pair_flows(spec, run)
            train, _, _ = cubes_of(dataset, dataset.train, flow_of, args.train_step)
            test, places, seconds = cubes_of(dataset, dataset.test, flow_of, args.test_step)
            nearest = torch.cdist(torch.from_numpy(test), torch.from_numpy(train)).amin(1).numpy()
            energy = np.square(test).mean(1)
            speed = np.median(np.sqrt(2 * np.square(train).mean(1)))
            aucs = [
                frame_auc(dataset.data, dataset.test, dataset, places, values, args.test_step)
                for values in (nearest, energy)
            ]
            name = Path(spec.partition(":")[2] or spec).name
            print(f"{name:<40}{100 * aucs[0]:>14.2f}{100 * aucs[1]:>14.2f}{speed:>12.2f}{seconds:>10.2f}", flush=True)
            rows.append({"flow": name, "nearest_flow": aucs[0], "flow_energy": aucs[1], "seconds_per_pair": seconds})
            write_json(out / "yardsticks.json", rows)


if __name__ == "__main__":
    run_script(main)
