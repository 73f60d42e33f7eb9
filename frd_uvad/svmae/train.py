"""Train SVMAE's weakly supervised detector on bags: videos of which it is known only whether something abnormal happens in them.

python frd_uvad/svmae/train.py --features features/svmae/folder                        # normal.txt and abnormal.txt lie there
python frd_uvad/svmae/train.py --features data/UCF-Crime --text data/captions --fusion add
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from common import cli
from common import old_training as training
from common.features.folders import find_features
from common.features.labels import listed_names
from common.io import UserError, run
from common.late import Late, torch
from common.steps import StepTrainer
from frd_uvad.svmae.eval import FUSIONS, GROUPS, METHOD, add_data_flags, add_eval_flags, evaluate, text_of
from frd_uvad.svmae.preprocess import settings_of

detector = Late("frd_uvad.svmae.detector")
SEGMENTS, ITERATIONS, BAGS, LR, DECAY = 32, 1000, 32, 1e-3, 5e-3


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/svmae/<dataset>-detector")
    g = cli.add_optimisation_flags(
        parser,
        lr=LR,
        epochs="as many as --iterations make; given, it sets them: passes over the abnormal bags",
        batch_size=f"{2 * BAGS}: bags of a step, half of them normal",
    )
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g = parser.add_argument_group("method")
    g.add_argument(
        "--normal",
        type=Path,
        default=None,
        help="file with the names of normal training videos, a line each (default: "
        "normal.txt beside the features, else by the names of UCF-Crime and XD-Violence)",
    )
    g.add_argument("--abnormal", type=Path, default=None, help="of abnormal ones (default: abnormal.txt likewise)")
    g.add_argument("--iterations", type=int, default=None, help=f"training steps (default: {ITERATIONS})")
    g.add_argument(
        "--fusion", choices=FUSIONS, default="concat", help="of visual and text features (default: %(default)s)"
    )
    g.add_argument(
        "--feature-group",
        choices=GROUPS,
        default=None,
        help="what the detector reads (default: both with --text, else vis)",
    )
    g.add_argument(
        "--aggregate-text",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="text passes a multi-scale temporal network of its own (default: yes)",
    )
    g.add_argument("--top-k", type=int, default=3, help="segments of a bag that decide (default: %(default)s)")
    add_eval_flags(parser)
    return parser.parse_args(argv)


def bags_of(args, data):
    """-> normal and abnormal training videos."""
    files = {
        k: getattr(args, k) or (args.features / f"{k}.txt" if (args.features / f"{k}.txt").exists() else None)
        for k in ("normal", "abnormal")
    }
    if files["normal"] and files["abnormal"]:
        by_name, out = {v.name: v for v in data.train}, []
        for path in files.values():
            names = set(listed_names(path, by_name))
            out.append([by_name[n] for n in sorted(names & set(by_name))])
            if names - set(by_name):
                print(
                    f"note: {len(names - set(by_name))} videos of {path} have no features, such as {sorted(names - set(by_name))[0]}"
                )
        normal, abnormal = ({v.name for v in videos} for videos in out)
        if normal & abnormal:
            raise UserError(
                f"the training video {min(normal & abnormal)} is in {files['normal']} and in {files['abnormal']}: "
                "leave it in one"
            )
        if unlisted := sorted(set(by_name) - normal - abnormal):
            print(f"note: {len(unlisted)} training videos are in neither list and left out, such as {unlisted[0]}")
    else:
        normal = [v for v in data.train if "Normal" in v.name or "label_A" in v.name]
        if not normal:
            raise UserError(
                f"which training videos are normal is not known: put normal.txt and abnormal.txt with their names into "
                f"{args.features}, or give --normal and --abnormal"
            )
        out = [normal, [v for v in data.train if v not in normal]]
    if not all(out):
        raise UserError(
            f"the detector needs normal and abnormal training videos; there are {len(out[0])} and {len(out[1])}"
        )
    return out


def segments(clips, count=SEGMENTS):
    """Mean of the clips that fall into each of `count` equal parts of a video; where there are fewer, the nearest clip.

    [clips, …] -> [count, …]
    """
    edges = np.linspace(0, len(clips), count + 1).astype(int)
    return np.stack(
        [clips[a : max(b, a + 1)].mean(0) for a, b in zip(np.minimum(edges[:-1], len(clips) - 1), edges[1:])]
    )


class Bags:
    """Segments of all training videos on the device: visual [N, crops, 32, C], text [N, crops, 32, D] or None; normal ones first."""

    def __init__(self, videos, text, device):
        self.count = [len(v) for v in videos]
        visual, words = [], []
        for v in tqdm(
            [v for part in videos for v in part], desc="read bags", unit="video", dynamic_ncols=True, mininterval=5
        ):
            clips = v.clips(range(len(v))).astype(np.float32)
            if not np.isfinite(clips).all():
                raise UserError(
                    f"features of video {v.name} ({v.path}) hold NaN or infinite numbers: encode it again, or take it away"
                )
            visual.append(segments(clips).transpose(1, 0, 2))
            if text:
                words.append(np.repeat(segments(text_of(text, v))[None], visual[-1].shape[0], axis=0))
        self.visual = torch.from_numpy(np.stack(visual)).to(device)
        self.text = torch.from_numpy(np.stack(words)).to(device) if text else None

    def draw(self, rng, bags):
        """Rows of `bags` normal and as many abnormal videos; without repetition where there are enough."""
        normal, abnormal = self.count
        rows = [rng.choice(n, bags, replace=n < bags) + at for n, at in ((normal, 0), (abnormal, normal))]
        return torch.from_numpy(np.concatenate(rows)).to(self.visual.device)


class Trainer(StepTrainer):
    method = METHOD

    def __init__(self, plan, model_args, bags, r, path, identity, extra):
        training.seed_everything(plan["seed"])
        net, self.bags = detector.Detector(**model_args).to(r.device), bags
        super().__init__(
            net,
            torch.optim.Adam(net.parameters(), lr=plan["lr"], weight_decay=DECAY, fused=True),
            plan,
            model_args,
            r,
            path,
            identity,
            extra,
        )

    def one(self, rng):
        r, n = self.run, self.plan["batch_size"]
        rows = self.bags.draw(rng, n // 2)[r.batch_slice(n)[0]]
        with r.autocast():
            out = self.net(self.bags.visual[rows], None if self.bags.text is None else self.bags.text[rows])
        out = {
            k: r.all_gather_batch(v.float(), n, 1 if k == "features" else 0) for k, v in out.items()
        }  # the losses span bags
        parts = detector.losses(out, top_k=self.plan["top_k"], dropout=0.7)
        self.descend(parts["total"])
        return {k: parts[k].detach() for k in ("total", "rtfm", "smooth", "sparsity")}


def plan_of(args, abnormal):
    for key in ("epochs", "batch_size", "iterations", "top_k"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} must be at least 1")
    if args.lr is not None and args.lr <= 0:
        raise UserError("--lr must be above 0")
    if args.top_k > SEGMENTS:
        raise UserError(f"--top-k {args.top_k}: a bag has {SEGMENTS} segments")
    batch = args.batch_size or 2 * BAGS
    if batch % 2 or batch < 4:
        raise UserError(f"--batch-size {batch} must be even and at least 4: half of the bags are normal")
    iterations = args.iterations or (-(-args.epochs * abnormal // (batch // 2)) if args.epochs else ITERATIONS)
    return {"iterations": iterations, "batch_size": batch, "lr": args.lr or LR, "top_k": args.top_k, "seed": args.seed}


def train(args, data, r):
    """-> path of the finished checkpoint."""
    if args.feature_group in ("both", "text") and not args.text:
        raise UserError(f"--feature-group {args.feature_group} needs caption embeddings: give --text DIR")
    videos = bags_of(args, data)
    plan = plan_of(args, len(videos[1]))
    bags = Bags(videos, args.text, r.device)
    group = args.feature_group or ("both" if args.text else "vis")
    model_args = {
        "feature_size": data.width,
        "fusion": args.fusion,
        "feature_group": group,
        "text_dim": bags.text.shape[3] if args.text else 768,
        "aggregate_text": args.aggregate_text,
    }
    identity = {
        "model_args": model_args,
        "features": str(args.features.resolve()),
        "bags": bags.count,
        "precision": r.precision,
        "processes": r.world_size,
        **{k: v for k, v in plan.items() if k != "iterations"},
    }
    out = r.open_output_dir(args.out or Path("runs/svmae") / f"{args.dataset}-detector")
    try:
        trainer = Trainer(
            plan, model_args, bags, r, out / "detector.pt", identity, {"features": settings_of(args.features)}
        )
    except RuntimeError as e:
        raise UserError(
            f"features of width {data.width} and text of width {model_args['text_dim']} do not fit --fusion {args.fusion} "
            f"({e})"
        ) from None
    text = f", text of width {model_args['text_dim']}, {args.fusion}" if args.text else ""
    trainer.start(
        args,
        training.Log(out / "log.jsonl"),
        f"{args.dataset}: {bags.count[0]} normal and {bags.count[1]} abnormal bags of "
        f"{SEGMENTS} segments, {data.crops} crops of width {data.width}{text}",
    )
    return trainer.path


def main(argv=None):
    args = parse(argv)
    r = training.Run.from_args(args)
    data = find_features(args.dataset, args.features, args.labels, args.order, args.segments)
    checkpoint = train(args, data, r)
    r.print(f"checkpoint {checkpoint}")
    evaluate(args, data, checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
