"""Train FRD-UVAD on clip features without any label, training and test videos alike; encoding runs first where it is missing.

    python frd_uvad/train.py --dataset demo                                     # stand-in features, no download
    python frd_uvad/train.py --dataset folder --data-root my_videos --backbone s3d --rounds 2
    python frd_uvad/train.py --dataset_name ucfcrime --feature_pretrain_model i3d --feature_modal rgb --cross_clip 4 --lab False \\
        --lab_type wlab --beta 0.1 --delta 0.5 --Vitblock_num 8 --max_seqlen 320 --max_epoch 5 --Lambda 1_1_1    # as published
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from common import cli
from common import old_training as training
from common.batches import parts_of
from common.evaluation import report_folder
from common.features.data import CLIP_FRAMES
from common.io import UserError, run
from common.late import Late, torch
from common.pictures import as_channels, resize
from common.video import Decoder
from frd_uvad import preprocess, scoring
from frd_uvad.windows import Bank, Windows

model = Late("frd_uvad.model")

EPOCHS, BATCH, LR, BETAS = 5, 320, 1e-3, (0.9, 0.95)


def flag(text):
    """True or False, as the published command line writes them."""
    if str(text).lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return str(text).lower() in ("true", "1", "yes")


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/frd_uvad/<dataset>")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=EPOCHS, help="(default: %(default)s)")
    g.add_argument(
        "--batch-size",
        type=int,
        default=BATCH,
        help="windows a step (default: %(default)s)",
    )
    g.add_argument("--lr", type=float, default=LR, help="(default: %(default)s)")
    g.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on where an interrupted run of the same settings stopped",
    )
    g = parser.add_argument_group("method")
    g.add_argument("--cross-clip", "--cross_clip", type=int, default=4, help="clips of a window (default: %(default)s)")
    g.add_argument(
        "--num-blocks",
        "--Vitblock_num",
        type=int,
        default=8,
        help="transformer blocks; 0: a two-layer autoencoder (default: %(default)s)",
    )
    g.add_argument(
        "--loss-weights",
        "--Lambda",
        default="1_1_1",
        metavar="A_B_C",
        help="of reconstruction, disruption and scorer (default: %(default)s)",
    )
    g.add_argument(
        "--bank",
        "--lab",
        type=flag,
        default=True,
        metavar="True|False",
        help="keep a latent anomaly bank, whose clips the reconstructor is pushed not to reconstruct (default: %(default)s)",
    )
    g.add_argument(
        "--bank-type",
        "--lab_type",
        choices=["wlab", "slab"],
        default="wlab",
        help="a window joins the bank when one of its clips is abnormal (wlab), or all are (slab) (default: %(default)s)",
    )
    g.add_argument("--beta", type=float, default=0.1, help="size of the bank, in batches (default: %(default)s)")
    g.add_argument(
        "--delta",
        type=float,
        default=0.5,
        help="deviations above the mean score for a pseudo label to join (default: %(default)s)",
    )
    g.add_argument(
        "--auxiliary",
        default="none",
        help="a scorer that must agree: none, c2fpl:FILE, frd:FILE or labels:FILE.npz (default: %(default)s)",
    )
    g.add_argument(
        "--rounds", type=int, default=1, help="2: train again with the first scorer as auxiliary (default: %(default)s)"
    )
    from frd_uvad.eval import add_eval_flags

    add_eval_flags(parser)
    return parser.parse_args(cli.with_synonyms(argv, preprocess.SYNONYMS))


def plan_of(args):
    try:
        weights = tuple(float(x) for x in args.loss_weights.split("_"))
    except ValueError:
        weights = ()
    if len(weights) != 3 or min(weights) < 0:
        raise UserError(f"--loss-weights {args.loss_weights}: expected three numbers, such as 1_1_1")
    for key in ("epochs", "batch_size", "cross_clip", "rounds"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} must be at least 1")
    if args.num_blocks < 0 or args.lr <= 0 or args.beta < 0:
        raise UserError("--num-blocks and --beta must be at least 0, --lr above 0")
    return {
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "cross_clip": args.cross_clip,
        "weights": list(weights),
        "bank": args.bank,
        "bank_type": args.bank_type,
        "beta": args.beta,
        "delta": args.delta,
    }


class Trainer:
    def __init__(self, plan, model_args, windows, auxiliary, r, path, identity, seed):
        self.plan, self.model_args, self.windows, self.auxiliary, self.run = plan, model_args, windows, auxiliary, r
        self.path, self.identity, self.seed = path, identity, seed
        training.seed_everything(seed)
        self.net = model.FRD(**model_args).to(r.device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=plan["lr"], betas=BETAS, fused=True)
        self.bank, self.epoch, self.seconds, self.done = (
            Bank(max(1, int(plan["beta"] * plan["batch_size"]))),
            0,
            0.0,
            False,
        )
        self.labels, self.features = None, None
        if auxiliary and auxiliary.labels is not None:
            self.labels = torch.from_numpy(labels_of_clips(auxiliary, windows)).to(r.device)
        elif auxiliary:
            if auxiliary.net.fc1.in_features != model_args["feature_size"]:
                raise UserError(
                    f"--auxiliary {auxiliary.source} scores features of width {auxiliary.net.fc1.in_features}, these have "
                    f"{model_args['feature_size']}"
                )
            auxiliary.net.to(r.device)

    def save(self):
        if self.run.is_main:
            training.save_checkpoint(
                self.path,
                {
                    "method": "frd_uvad",
                    "done": self.done,
                    "model_args": self.model_args,
                    "plan": self.plan,
                    "identity": self.identity,
                    "model_state_dict": self.net.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "epoch": self.epoch,
                    "seconds": self.seconds,
                    "features": self.features,
                    "bank": self.bank.windows,
                    "bank_first": self.bank.first.tolist(),
                    "rng": training.get_rng(),
                },
            )

    def load(self):
        if not self.path.exists():
            return False
        state = training.load_checkpoint(self.path, "frd_uvad")
        training.check_identity(self.path, state.get("identity"), self.identity)
        self.net.load_state_dict(state["model_state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.seconds, self.done = state["epoch"], state["seconds"], state["done"]
        self.bank.windows = state["bank"].to(self.run.device) if state["bank"] is not None else None
        self.bank.first = np.array(state["bank_first"], np.int64)
        training.set_rng(state["rng"])
        return True

    def agreement(self, first, features):
        """Auxiliary scores [n, T] of the windows `first`, or None."""
        if self.auxiliary is None:
            return None
        if self.labels is not None:
            return self.labels[torch.from_numpy(self.windows.rows(first)).to(self.labels.device)]
        with torch.no_grad():
            return self.run.all_gather_batch(self.auxiliary.net(features)[..., 0], len(first))

    def step(self, first, features, rng):
        """One step on the windows `first` [n], of which this process has the features of its part. -> ({loss: value}, pseudo labels
        [n, T])"""
        plan, bank, r, n = self.plan, self.bank.windows if self.plan["bank"] else None, self.run, len(first)
        with r.autocast():
            out = self.net(features)
            bank_error = self.net.error(bank) if bank is not None else None
        out = {
            "error": r.all_gather_batch(out["error"], n),  # as the threshold is the whole batch's
            "score": r.all_gather_batch(out["score"].float(), n),
        }
        parts = model.losses(out, self.agreement(first, features), bank_error, plan["weights"])
        self.optimizer.zero_grad(set_to_none=True)
        parts["total"].backward()
        r.average_gradients(self.net)
        self.optimizer.step()
        if plan["bank"]:
            with torch.no_grad():
                joins = model.joins_bank(parts["pseudo"], out["score"][..., 0], plan["bank_type"], plan["delta"])
                chosen = first[joins.cpu().numpy()]
                if len(chosen):
                    self.bank.add(features[joins] if len(features) == n else self.windows.get(chosen), chosen, rng)
        return {k: parts[k].detach() for k in ("total", "reconstruction", "disruption", "scorer")}, parts["pseudo"]

    def train(self, args, log, observe):
        r, plan = self.run, self.plan
        steps = -(-len(self.windows) // plan["batch_size"])
        bar = tqdm(
            total=plan["epochs"] * steps,
            initial=self.epoch * steps,
            desc="train",
            unit="step",
            disable=not r.is_main,
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 15,
        )
        self.net.train()
        while self.epoch < plan["epochs"]:
            began, sums, rows, said = time.perf_counter(), {}, [], []
            self.windows.waited = 0.0
            order = training.epoch_order(len(self.windows), self.seed, self.epoch)
            batches = parts_of(order, plan["batch_size"])
            own = self.windows.iterate([first[r.batch_slice(len(first))[0]] for first in batches])
            for i, (first, (_, features)) in enumerate(zip(batches, own)):
                rng = np.random.default_rng([self.seed, self.epoch, i, 0])
                values, pseudo = self.step(first, features, rng)
                for k, v in values.items():
                    sums[k] = sums.get(k, 0.0) + v
                rows.append(first)
                said.append(pseudo[:, 0])
                bar.update()
            means = {k: float(v) / len(said) for k, v in sums.items()}
            seen = dict(zip(np.concatenate(rows).tolist(), torch.cat(said).tolist()))
            training.check_finite(means["total"], f"in epoch {self.epoch + 1}")
            now = time.perf_counter()
            self.epoch, self.seconds = self.epoch + 1, self.seconds + now - began
            r.sync_buffers(self.net)
            self.save()
            extra = {
                **observe(self, seen),
                "bank_size": 0 if self.bank.windows is None else len(self.bank.windows),
                "pseudo_share": float(np.mean(list(seen.values()))),
            }
            if r.is_main:
                log.write(
                    stage="train",
                    epoch=self.epoch,
                    **means,
                    seconds=self.seconds,
                    windows_per_second=len(order) / (now - began),
                    waited_share=self.windows.waited / (now - began),
                    **extra,
                )
                bar.write(
                    f"epoch {self.epoch}/{plan['epochs']}: "
                    + ", ".join(f"{k} {v:.4g}" for k, v in {**means, **extra}.items())
                )
        bar.close()
        self.done = True
        self.save()


def labels_of_clips(auxiliary, windows):
    """One number per clip of every video, from a file of pseudo labels: by split/name, or by name where only one video has it."""
    out, names = [], [v.name for v in windows.videos]
    for v in windows.videos:
        pseudo = auxiliary.labels.get(v.key, auxiliary.labels.get(v.name))
        if pseudo is None:
            raise UserError(f"--auxiliary {auxiliary.source} has no entry for the video {v.name}")
        if v.key not in auxiliary.labels and names.count(v.name) > 1:
            raise UserError(
                f"--auxiliary {auxiliary.source}: a training and a test video are called {v.name}: name their entries "
                f"train/{v.name} and test/{v.name}"
            )
        if len(pseudo) != len(v):
            raise UserError(
                f"--auxiliary {auxiliary.source}: {len(pseudo)} numbers for video {v.name}, which has {len(v)} clips"
            )
        out.append(pseudo)
    return np.concatenate(out)


def observer(data, windows):
    """-> function(trainer, seen) with precision and recall of pseudo labels of test clips (labels for looking only)."""
    known = {}
    if data.has_labels:
        tests = {id(v) for v in data.test}
        for i, v in enumerate(windows.videos):
            if id(v) in tests:
                y = data.labels(v)
                abnormal = np.bincount(data.rows_of_frames(v, len(y)), weights=y, minlength=len(v))
                known.update({int(windows.starts[i]) + c: bool(n) for c, n in enumerate(abnormal)})

    def observe(trainer, seen):
        own = [(known[k], p > 0) for k, p in seen.items() if k in known]
        hit, said, true = sum(a and b for a, b in own), sum(b for _, b in own), sum(a for a, _ in own)
        if not true:
            return {}
        return {"pseudo_precision": hit / said if said else 0.0, "pseudo_recall": hit / true}

    return observe


def bank_sheet(bank, windows, data, path, most=24):
    """The middle frame of what the bank holds, where there are videos to look at and there is a common/report."""
    report = report_folder()
    if report is None:
        return
    wanted, tiles = {}, []
    for row in np.unique(bank.first)[:most]:
        v = int(np.searchsorted(windows.starts, row, side="right")) - 1
        video = windows.videos[v]
        wanted.setdefault((video.split, video.name), []).append(int(row - windows.starts[v]))
    for key, clips in wanted.items():
        last, left = None, {c * CLIP_FRAMES + CLIP_FRAMES // 2: c for c in clips}
        for t, frame in enumerate(Decoder(data.videos[key])):
            last = frame
            if t in left:
                tiles.append((thumbnail(frame), f"{'/'.join(key)} clip {left.pop(t)}"))
            if not left:
                break
        tiles += [
            (thumbnail(last), f"{'/'.join(key)} clip {c}") for c in left.values()
        ]  # a last clip shorter than half
    report.plots.contact_sheet(path, tiles, 4)


def thumbnail(frame, width=320):
    return resize(as_channels(frame, 3), (max(1, round(frame.shape[0] * width / frame.shape[1])), width))


def plot_pseudo_labels(log, path):
    """Precision and recall of pseudo labels over the epochs."""
    kept = [x for x in map(json.loads, Path(log).read_text().splitlines()) if "pseudo_precision" in x]
    report = report_folder()
    if kept and report:
        epochs = [x["epoch"] for x in kept]
        report.plots.lines(
            {
                label: (epochs, [x[key] for x in kept])
                for key, label in (
                    ("pseudo_precision", "precision"),
                    ("pseudo_recall", "recall"),
                    ("pseudo_share", "share of clips labelled"),
                )
            },
            "pseudo labels of test clips (true labels serve this plot alone)",
            path,
            xlabel="epoch",
            ylim=(0, 1.02),
        )


def model_args_of(args, data):
    if data.width % 256:
        raise UserError(
            f"features of width {data.width} do not fit: the model cuts them into 16 parts for 16 heads, so it must be a "
            "multiple of 256"
        )
    return {"feature_size": data.width, "num_blocks": args.num_blocks, "heads": 16}


def train(args, data, r, folder, auxiliary_spec, title):
    """One round. -> path of the finished checkpoint."""
    plan = plan_of(args)
    videos = data.train + data.test  # fully unsupervised: every video there is, none with labels
    windows = Windows(videos, plan["cross_clip"], r)
    auxiliary = scoring.load_auxiliary(auxiliary_spec)
    model_args = model_args_of(args, data)
    identity = {
        "model_args": model_args,
        "dataset": data.name,
        "clips": len(windows),
        "seed": args.seed,
        "precision": r.precision,
        "processes": r.world_size,
        "auxiliary": auxiliary_spec.split(":")[0],
        **{k: v for k, v in plan.items() if k != "epochs"},
    }
    trainer = Trainer(
        plan, model_args, windows, auxiliary, r, r.open_output_dir(folder) / "frd.pt", identity, args.seed
    )
    trainer.features = data.settings
    log = training.Log(folder / "log.jsonl")
    resumed = trainer.load() if args.resume else False
    if r.is_main and not resumed:
        log.path.unlink(missing_ok=True)
    r.print(
        f"{title}: {len(videos)} videos, {len(windows)} windows of {plan['cross_clip']} clips, {data.crops} crops of width {data.width}"
        f", auxiliary {auxiliary_spec}, {'on the device' if windows.whole is not None else 'read from disk'}, {r.device}, {r.precision}"
    )
    if trainer.epoch >= plan["epochs"]:
        r.print(f"{trainer.epoch} epochs done before ({trainer.path})")
        return trainer.path
    if resumed:
        r.print(f"going on at epoch {trainer.epoch + 1}")
        if r.is_main:
            log.drop_after("train", trainer.epoch)
    trainer.train(args, log, observer(data, windows))
    if r.is_main and data.has_labels:
        plot_pseudo_labels(log.path, folder / "pseudo_labels.png")
    if r.is_main and data.videos:
        bank_sheet(trainer.bank, windows, data, folder / "bank.png")
    r.barrier()
    return trainer.path


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    plan_of(args)
    scoring.load_auxiliary(args.auxiliary)  # a wrong file is refused before any work
    r = training.Run.from_args(args)
    data = preprocess.prepare(args, r)
    out = args.out or Path("runs/frd_uvad") / data.name
    checkpoint = train(args, data, r, out if args.rounds == 1 else out / "round1", args.auxiliary, "round 1")
    for i in range(2, args.rounds + 1):
        folder = out if i == args.rounds else out / f"round{i}"
        checkpoint = train(args, data, r, folder, f"frd:{checkpoint}", f"round {i}")
    r.print(f"trained in {(time.perf_counter() - began) / 60:.1f} min with everything before; checkpoint {checkpoint}")
    from frd_uvad.eval import evaluate

    evaluate(args, data, checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
