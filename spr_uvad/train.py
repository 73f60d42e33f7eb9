"""Train LBR-SPR on the unlabeled videos that it then scores; preprocessing runs first where it is missing.

python spr_uvad/train.py --dataset folder --data-root my_videos      # any videos, no labels: a ranked list of moments
python spr_uvad/train.py --dataset ped2 --data-root data --boxes file:boxes.npz --flow
python spr_uvad/train.py --dataset avenue --setting merge --flow
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from common import old_training as training
from common.batches import Batches
from common.io import UserError, run
from common.late import Late, torch
from spr_uvad import advantage, preprocess, scoring

model = Late("spr_uvad.model")

# Constants of the paper's configuration: how fast refinement tightens, and the grid of blocks (rows, columns).
PUBLISHED = {
    "ped1": dict(shrink=0.0001, grid=(4, 1)),
    "ped2": dict(shrink=0.005, grid=(1, 1)),
    "avenue": dict(shrink=0.0001, grid=(1, 1)),
    "shanghaitech": dict(shrink=0.005, grid=(1, 1)),
    "folder": dict(shrink=0.005, grid=(1, 1)),
    "demo": dict(shrink=0.005, grid=(1, 1)),
}
EPOCHS, WARMUP, BATCH, LR, STD_RANGE = 30, 5, 256, 1e-3, 4.0


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preprocess.add_data_flags(parser)
    training.add_flags(parser, out="runs/spr_uvad/<dataset>", epochs=EPOCHS, batch_size=BATCH, lr=LR)
    g = parser.add_argument_group("method")
    g.add_argument(
        "--setting",
        choices=["test", "merge"],
        default="test",
        help="train on the test videos alone (the paper's partial mode), or on training and test videos together "
        "(default: %(default)s)",
    )
    g.add_argument(
        "--self-paced",
        choices=["mixture", "hard", "linear", "huber", "none"],
        default="mixture",
        help="how cubes with large errors lose weight (default: %(default)s)",
    )
    g.add_argument("--warmup", type=int, default=WARMUP, help="epochs before refinement begins (default: %(default)s)")
    g.add_argument(
        "--shrink",
        type=float,
        default=None,
        help="deviations by which the upper limit tightens per step (default: the paper's; 0.0001 on ped1 and "
        "avenue, else 0.005)",
    )
    g.add_argument(
        "--std-range",
        type=float,
        default=STD_RANGE,
        help="upper limit at the start, in deviations (default: %(default)s)",
    )
    g.add_argument(
        "--grid",
        default=None,
        metavar="ROWSxCOLUMNS",
        help="one model per block of the frame (default: 4x1 on ped1, else 1x1)",
    )
    g.add_argument(
        "--size", choices=scoring.SIZES, default="full", help="model size; small is for tests (default: %(default)s)"
    )
    from spr_uvad.eval import add_eval_flags

    add_eval_flags(parser)
    return parser.parse_args(argv)


def parse_grid(text):
    try:
        grid = tuple(int(x) for x in text.lower().split("x"))
    except ValueError:
        grid = ()
    if len(grid) != 2 or min(grid) < 1 or max(grid) > 64:
        raise UserError(f"--grid {text}: expected rows x columns, such as 4x1")
    return grid


def plan_of(args, dataset):
    plan = {
        **PUBLISHED.get(dataset, PUBLISHED["folder"]),
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "lr": LR,
        "warmup": args.warmup,
        "self_paced": args.self_paced,
        "std_range": args.std_range,
        "setting": args.setting,
    }
    for key in ("epochs", "batch_size", "lr", "shrink"):
        if getattr(args, key) is not None:
            plan[key] = getattr(args, key)
    for key, least in (("epochs", 1), ("batch_size", 1), ("warmup", 0), ("shrink", 0)):
        if plan[key] < least:
            raise UserError(f"--{key.replace('_', '-')} must be at least {least}")
    if plan["lr"] <= 0:
        raise UserError("--lr must be above 0")
    if args.grid:
        plan["grid"] = parse_grid(args.grid)
    return plan


class Trainer:
    """One LBR per block of the frame, trained one after another; saved and continued as one run."""

    def __init__(self, plan, model_args, records, block, r, path, identity, foreground):
        self.plan, self.model_args, self.records, self.block, self.run, self.path = (
            plan,
            model_args,
            records,
            block,
            r,
            path,
        )
        self.identity, self.foreground = identity, foreground
        self.nets, self.statistics, self.seconds, self.done = {}, None, 0.0, False
        self.at = {"block": -1, "epoch": 0, "step": 0}  # where an interrupted run goes on
        self.pending, self.sums, self.errors = None, {}, None
        self.size = 3 * records[0].dtype["appearance"].shape[0] * records[0].dtype["appearance"].shape[2] ** 2

    def start_block(self, number, seed):
        """A fresh model and optimizer for a block, or those of the interrupted run."""
        training.seed_everything(seed + number)
        self.net = scoring.build(self.model_args).to(self.run.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.plan["lr"], fused=True)
        self.rows = np.flatnonzero(self.block == number)
        if self.pending:
            self.net.load_state_dict(self.pending["net"])
            self.optimizer.load_state_dict(self.pending["optimizer"])
            self.sums, self.errors = self.pending["sums"], self.pending["errors"].numpy()
            self.pending = None
        else:
            self.at = {"block": number, "epoch": 0, "step": 0}
            self.sums, self.errors = {}, np.zeros(len(self.rows), np.float32)
        self.nets[number] = self.net

    def save(self):
        if not self.run.is_main:
            return
        state = {
            "method": "spr_uvad",
            "done": self.done,
            "model_args": self.model_args,
            "grid": list(self.plan["grid"]),
            "model_state_dicts": {str(k): n.state_dict() for k, n in self.nets.items()},
            "plan": self.plan,
            "identity": self.identity,
            "foreground": self.foreground,
            "statistics": self.statistics,
            "seconds": self.seconds,
            "at": self.at,
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
            "errors": torch.from_numpy(self.errors.copy()),
        }
        training.save_checkpoint(self.path, state)

    def load(self):
        """Continue from the checkpoint, if there is one."""
        if not self.path.exists():
            return
        nets, state = scoring.load_checkpoint(self.path)
        training.check_identity(self.path, state.get("identity"), self.identity)
        self.nets = scoring.numbered(nets, self.plan["grid"])
        self.at, self.done, self.statistics, self.seconds = (
            state["at"],
            state["done"],
            state["statistics"],
            state["seconds"],
        )
        self.pending = {
            "net": state["model_state_dicts"][str(self.at["block"])],
            "optimizer": state["optimizer"],
            "sums": state["sums"],
            "errors": state["errors"],
        }

    def weights(self, cubes, part, count, t):
        """Self-paced weights of this process's cubes; mean and deviation are those of the whole batch."""
        with torch.no_grad(), self.run.autocast():
            raw = self.net.folded(cubes, flow=False)["raw"]
        global_batch = self.run.all_gather_batch(model.cube_errors(raw, cubes), count)
        return model.self_paced_weights(
            global_batch,
            t,
            mode=self.plan["self_paced"],
            shrink=self.plan["shrink"],
            init_std_range=self.plan["std_range"],
        )[part]

    def train_step(self, batch, part, count, t, share=1.0):
        """One step on this process's `part` of `count` cubes, whose mean loss counts `share` in the mean over the processes.

        t: number of refined steps before it, or None in warm-up. -> losses, raw errors of the part's cubes.
        """
        wanted = scoring.to_input(batch)
        weights = 1.0 if t is None else self.weights(wanted["raw"], part, count, t)
        with self.run.autocast():
            got = self.net(wanted["raw"])
        errors = {k: model.cube_errors(got[k], wanted[k]) for k in got}
        losses = {f"loss_{k}": model.weighted_loss(e, weights, wanted[k][0].numel()) for k, e in errors.items()}
        total = sum(losses.values())
        self.optimizer.zero_grad(set_to_none=True)
        (total * share).backward()
        self.run.average_gradients(list(self.net.parameters()))
        self.optimizer.step()
        with torch.no_grad():
            losses = {"loss": total, **losses}
            if t is not None:
                losses["weight"] = weights.mean()
                losses["given_up"] = (weights == 0).float().mean()
        return {k: v.detach() * share for k, v in losses.items()}, errors["raw"].detach()

    def train(self, args, log, after_epoch):
        r, plan = self.run, self.plan
        numbers, counts = np.unique(self.block, return_counts=True)
        total = sum(-(-int(n) // plan["batch_size"]) * plan["epochs"] for n in counts)
        bar = tqdm(
            total=total,
            desc="train",
            unit="step",
            disable=not r.is_main,
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        for number, n in zip(numbers.tolist(), counts.tolist()):
            steps = -(-n // plan["batch_size"])
            if number < self.at["block"]:
                bar.update(steps * plan["epochs"])
                continue
            self.start_block(number, args.seed)
            bar.update(self.at["epoch"] * steps + self.at["step"])
            data = Batches(self.records, scoring.fields(self.net.use_flow), r.device)
            if args.compile:
                self.net.compile()
            while self.at["epoch"] < plan["epochs"]:
                self.epoch(number, data, steps, args, log, after_epoch, bar)
        bar.close()

    def epoch(self, number, data, steps, args, log, after_epoch, bar):
        r, plan, at = self.run, self.plan, self.at
        refined = plan["self_paced"] != "none" and at["epoch"] >= plan["warmup"]
        order = training.epoch_order(len(self.rows), args.seed, at["epoch"])
        began = saved = time.perf_counter()
        data.waited, spent, first = 0.0, self.seconds, at["step"]
        self.net.train()
        size, start = plan["batch_size"], first * plan["batch_size"]
        for rows, batch in data.iterate(self.rows[order], size, start=first):
            where, (part, share) = order[start : start + size], r.batch_slice(len(rows))
            start += size
            batch = {k: v[part] for k, v in batch.items()}
            t = (at["epoch"] - plan["warmup"]) * steps + at["step"] if refined else None
            losses, raw = self.train_step(batch, part, len(rows), t, share)
            if r.is_main or len(rows) >= r.world_size:  # they are summed over the processes
                self.errors[where[part]] = raw.cpu().numpy()
            for k, v in losses.items():
                self.sums[k] = self.sums.get(k, 0.0) + v
            at["step"] += 1
            bar.update()
            now = time.perf_counter()
            save = now - saved > args.save_minutes * 60 and at["step"] < steps
            if save or at["step"] % 20 == 0 or at["step"] == steps:
                loss = float(self.sums["loss"])
                training.check_finite(loss, f"in block {number}, epoch {at['epoch'] + 1}, step {at['step']}")
                bar.set_postfix(loss=f"{loss / at['step']:.5f}", epoch=f"{at['epoch'] + 1}/{plan['epochs']}")
            if save:
                self.seconds = spent + now - began
                self.save()
                saved = time.perf_counter()
        now = time.perf_counter()
        self.seconds = spent + now - began
        means = r.mean_over_ranks({k: float(v) / steps for k, v in self.sums.items()})
        r.sync_buffers(self.net)
        errors = r.all_reduce_sum(self.errors)
        at["epoch"], at["step"], self.sums, self.errors = at["epoch"] + 1, 0, {}, np.zeros_like(self.errors)
        self.save()
        extra = after_epoch(self, number, errors)
        if r.is_main:
            log.write(
                stage=f"block {number}",
                epoch=at["epoch"],
                **means,
                seconds=self.seconds,
                cubes_per_second=(len(self.rows) - first * plan["batch_size"]) / (now - began),
                waited_share=data.waited / (now - began),
                **extra,
            )
            bar.write(
                f"block {number} epoch {at['epoch']}/{plan['epochs']}: "
                + ", ".join(f"{k} {v:.5g}" for k, v in {**means, **extra}.items() if v is not None)
            )


def videos_of(ready, setting):
    return ready.train + ready.test if setting == "merge" else ready.test


def train(args, ready, r):
    """-> path of the finished checkpoint."""
    dataset = ready.data.name
    plan, folder = plan_of(args, dataset), r.open_output_dir(args.out or Path("runs/spr_uvad") / dataset)
    if not ready.test:
        raise UserError(
            f"{dataset} has no test videos under {ready.data.root}: this method trains on the videos that it scores; "
            "put them into test/, or straight into the folder"
        )
    if args.setting == "merge" and not ready.train:
        raise UserError(
            f"--setting merge: {dataset} has no training videos under {ready.data.root}; --setting test needs none"
        )
    videos = videos_of(ready, args.setting)
    records = ready.records(videos)
    cubes = sum(map(len, records))
    if cubes == 0:
        raise UserError(
            "no boxes were found in these videos (nothing moves, or too little): lower --motion-threshold or "
            f"--motion-area, or choose another detector with --boxes (now {ready.store.s.boxes})"
        )
    block = scoring.blocks(ready.column(videos, "box"), ready.sizes(videos), plan["grid"])
    model_args = {
        **scoring.SIZES[args.size],
        "num_frames": len(ready.store.s.frames),
        "use_flow": args.flow is not None,
    }
    identity = {
        "model_args": model_args,
        "dataset": dataset,
        "cubes": [ready.store.s.key(), cubes],
        "seed": args.seed,
        "precision": r.precision,
        "processes": r.world_size,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in plan.items()},
    }
    if len(np.unique(block)) == 1:
        del identity["epochs"]  # one block can go on for more; several are trained one after another
    trainer = Trainer(
        {**plan, "grid": list(plan["grid"])},
        model_args,
        records,
        block,
        r,
        folder / "spr.pt",
        identity,
        vars(ready.store.s),
    )
    log = training.Log(folder / "log.jsonl")
    if args.resume:
        trainer.load()
    elif r.is_main:
        log.path.unlink(missing_ok=True)
    r.print(
        f"{dataset}, setting {args.setting}: {len(videos)} videos, {cubes} cubes in {len(np.unique(block))} blocks, "
        f"{'with' if args.flow else 'without'} motion, refinement {plan['self_paced']}, {r.device}, {r.precision}"
    )
    if trainer.done and trainer.at["epoch"] >= plan["epochs"]:
        r.print(f"{plan['epochs']} epochs done before ({trainer.path})")
        return trainer.path
    if trainer.pending:
        r.print(
            f"going on in block {trainer.at['block']} at epoch {trainer.at['epoch'] + 1}, step {trainer.at['step']}"
        )
        if r.is_main:
            log.drop_after(f"block {trainer.at['block']}", trainer.at["epoch"])
    trainer.done = False
    trainer.train(args, log, observer(ready, videos, r))
    nets = trainer.nets
    r.print("training statistics")
    if found := scoring.kept_score(nets, plan["grid"], ready, videos, folder, r):
        trainer.statistics = {str(k): v for k, v in scoring.statistics(found[0], block, nets).items()}
    trainer.done = True
    trainer.save()
    r.barrier()
    if r.is_main and ready.data.has_labels:
        advantage.plot({f"refinement {plan['self_paced']}": log.path}, folder / "normality_advantage.png")
    return trainer.path


def observer(ready, videos, r):
    """-> function(trainer, block, errors) with what is logged after an epoch. Labels are looked at, nothing depends on them."""
    labels = advantage.cube_labels(ready, videos) if ready.data.has_labels and r.is_main else None

    def after(trainer, number, errors):
        return {} if labels is None else advantage.means(errors / trainer.size, labels[trainer.rows])

    return after


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    r = training.Run.from_args(args)
    ready = preprocess.prepare(args, r, splits=("train", "test") if args.setting == "merge" else ("test",))
    checkpoint = train(args, ready, r)
    r.print(f"trained in {(time.perf_counter() - began) / 60:.1f} min with everything before; checkpoint {checkpoint}")
    from spr_uvad.eval import evaluate

    evaluate(args, ready, checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
