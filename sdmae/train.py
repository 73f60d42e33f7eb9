"""Train AED-MAE on normal videos: the teacher, then its student; decoding runs first where it is missing.

python sdmae/train.py --dataset demo
python sdmae/train.py --dataset ped2 --data-root data
python sdmae/train.py --dataset avenue --pseudo ubnormal --ubnormal-root data/UBnormal
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from common import datasets
from common import old_training as training
from common.batches import parts_of
from common.io import UserError, run
from common.late import Late, torch
from sdmae import preprocess, pseudo, scoring
from sdmae.frames import STEPS, Frames, gradient_of, image_of, target_of

model = Late("sdmae.model")

BETAS, DECAY = (0.9, 0.95), 0.05
PUBLISHED = dict(
    epochs=200, batch_size=100, lr=1e-4, student_from=0.5, decay="constant"
)  # student_from: a share of the epochs
# The demo's network is small and its schedule short, so that it is trained in minutes. Ped2 has a sixth of Avenue's frames: batches
# of 16 make as many steps of them (32 000) as the published 100 make of Avenue's.
PLANS = {
    "demo": dict(epochs=40, batch_size=20, lr=1e-3),
    "ped2": dict(batch_size=16, lr=5e-4, student_from=0.75, decay="cooldown"),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preprocess.add_data_flags(parser)
    training.add_flags(parser, out="runs/sdmae/<dataset>", **{k: PUBLISHED[k] for k in ("epochs", "batch_size", "lr")})
    preprocess.add_pseudo_flags(parser)
    g = parser.add_argument_group("method")
    g.add_argument(
        "--student-from",
        type=int,
        default=None,
        metavar="EPOCH",
        help="from this epoch on everything else is frozen and the student trains alone (default: half of --epochs; on "
        "ped2 three quarters)",
    )
    g.add_argument(
        "--decay",
        choices=["constant", "cooldown"],
        default=None,
        help="of the learning rate: none, or (short schedules) in a line to 0 over the last third of either phase "
        "(default: constant; on ped2 cooldown)",
    )
    g.add_argument(
        "--gradient-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="weigh tokens by motion gradients in the teacher's loss (default: yes)",
    )
    g.add_argument("--mask-ratio", type=float, default=0.5, help="share of tokens removed (default: %(default)s)")
    g.add_argument("--size", choices=scoring.SIZES, default=None, help="model size (default: full; on demo small)")
    from sdmae.eval import add_eval_flags

    add_eval_flags(parser)
    return parser.parse_args(argv)


def plan_of(args, dataset):
    known = {**PUBLISHED, **PLANS.get(dataset, {})}
    plan = {k: known[k] if getattr(args, k) is None else getattr(args, k) for k in ("epochs", "batch_size", "lr")}
    for key in ("epochs", "batch_size"):
        if plan[key] < 1:
            raise UserError(f"--{key.replace('_', '-')} must be at least 1")
    if plan["lr"] <= 0:
        raise UserError("--lr must be above 0")
    plan["student_from"] = (
        int(plan["epochs"] * known["student_from"]) if args.student_from is None else args.student_from
    )
    if not 0 <= plan["student_from"] <= plan["epochs"]:
        raise UserError(f"--student-from {plan['student_from']} must be between 0 and --epochs ({plan['epochs']})")
    if not 0 < args.mask_ratio < 1:
        raise UserError(f"--mask-ratio {args.mask_ratio} must be between 0 and 1")
    if (
        args.decay or known["decay"]
    ) == "cooldown":  # where it falls depends on the length: such a run cannot go on for more epochs
        plan["falls"] = f"cooldown, {plan['student_from']} of {plan['epochs']} epochs"
    return {
        **plan,
        "pseudo": args.pseudo,
        "pseudo_share": args.pseudo_share if args.pseudo != "none" else 0.0,
        "gradient_weights": args.gradient_weights,
    }


def optimizer_of(net, lr):
    """AdamW; norms, biases and single tokens do not decay."""
    own = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    plain = [p for n, p in own if p.ndim <= 1 or n.endswith("token")]
    rest = [p for n, p in own if not (p.ndim <= 1 or n.endswith("token"))]
    return torch.optim.AdamW(
        [{"params": rest, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=BETAS,
        fused=True,
    )


class Trainer:
    """Phase one trains everything but the student by the teacher's loss; phase two the student alone."""

    def __init__(self, plan, model_args, frames, bank, r, path, identity, seed, rule):
        self.plan, self.model_args, self.frames, self.run, self.path = plan, model_args, frames, r, path
        self.identity, self.seed, self.rule = identity, seed, rule
        self.bank = bank.to(r.device) if bank else None
        training.seed_everything(seed)
        self.net = model.SDMAE(**{**model_args, "image_size": tuple(model_args["image_size"])}).to(r.device)
        self.at, self.sums, self.seconds, self.done, self.statistics = {"epoch": 0, "step": 0}, {}, 0.0, False, None
        self.phase, self.optimizer, self.saved = None, None, time.perf_counter()

    def enter(self, phase):
        """1: the teacher, 2: the student. A new phase starts with a new optimizer."""
        if phase == self.phase:
            return
        self.phase = phase
        self.net.requires_grad_(True).train()
        if phase == 2:
            self.net.train_student_alone()
        else:
            self.net.train_teacher()
        self.optimizer = optimizer_of(self.net, self.plan["lr"])

    def set_rate(self, steps):
        """The learning rate of the step to come, where it falls."""
        if "falls" not in self.plan:
            return
        first, end = (
            (0, self.plan["student_from"]) if self.phase == 1 else (self.plan["student_from"], self.plan["epochs"])
        )
        left = (end - self.at["epoch"] - self.at["step"] / steps) / (end - first)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan["lr"] * min(1.0, 3 * left)

    def save(self):
        self.saved = time.perf_counter()
        if self.run.is_main:
            training.save_checkpoint(
                self.path,
                {
                    "method": "sdmae",
                    "done": self.done,
                    "model_args": self.model_args,
                    "identity": self.identity,
                    "plan": self.plan,
                    "model_state_dict": self.net.state_dict(),
                    "optimizer": self.optimizer.state_dict() if self.optimizer else None,
                    "phase": self.phase,
                    "at": self.at,
                    "sums": self.sums,
                    "seconds": self.seconds,
                    "rng": training.get_rng(),
                    "statistics": self.statistics,
                    "rule": {**self.rule, "parts": list(self.rule["parts"])},
                },
            )

    def load(self):
        """Continue from the checkpoint, if there is one. -> whether there was."""
        if not self.path.exists():
            return False
        state = training.load_checkpoint(self.path, "sdmae")
        training.check_identity(self.path, state.get("identity"), self.identity)
        self.net.load_state_dict(state["model_state_dict"])
        if state["phase"]:
            self.enter(state["phase"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.at, self.sums, self.seconds = state["at"], state["sums"], state["seconds"]
        self.done, self.statistics = state["done"], state["statistics"]
        training.set_rng(state["rng"])
        return True

    def input(self, five, rng, noise, global_batch=None):
        """Samples with pseudo anomalies -> network input, target, gradient, masking noise, all on the device.

        What is random is drawn for the whole batch of `global_batch`'s, so that it does not depend on the number of processes.
        """
        chosen = pseudo.choose(self.bank, global_batch or len(five), self.plan["pseudo_share"], self.frames.size, rng)
        chosen = pseudo.of_part(chosen, self.run.batch_slice(global_batch or len(five))[0])
        seen, mask = pseudo.paste(five, self.bank, chosen, STEPS)
        return (
            image_of(seen[:, ::2]),
            target_of(five[:, 2], mask),
            gradient_of(seen),
            noise.to(five.device, non_blocking=True),
        )

    def step(self, five, rng, noise, global_batch=None):
        """One step of the present phase on this process's samples, of a batch of `global_batch`'s. -> {name: loss}, detached."""
        image, target, gradient, noise = self.input(five, rng, noise, global_batch)
        net, n = self.net, len(five)
        share = self.run.batch_slice(global_batch or n)[1]
        if self.phase == 1:
            with self.run.autocast():
                out = net(image, noise, student=False)
            loss = model.teacher_loss(
                out["teacher"], target, gradient, net.patch_size, weighted=self.plan["gradient_weights"]
            )
            losses = {"teacher": loss.detach() / n * share}
            loss = loss * (
                share * (global_batch or n) / n
            )  # a sum over the whole batch, once the processes' gradients are averaged
        else:
            with self.run.autocast():
                with torch.no_grad():
                    shared, teacher, mask = net.teach(image, noise)
                student = net.learn(shared)
            loss = model.student_loss(student, teacher, mask) * share
            losses = {"student": loss.detach()}
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.run.average_gradients([p for p in net.parameters() if p.requires_grad])
        self.optimizer.step()
        return losses

    def train(self, args, log):
        r, plan, at = self.run, self.plan, self.at
        steps = -(-len(self.frames) // plan["batch_size"])
        bar = tqdm(
            total=plan["epochs"] * steps,
            initial=at["epoch"] * steps + at["step"],
            desc="train",
            unit="step",
            disable=not r.is_main,
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        if args.compile:
            self.net.compile()
        while at["epoch"] < plan["epochs"]:
            self.enter(1 if at["epoch"] < plan["student_from"] else 2)
            self.epoch(steps, args, log, bar)
        bar.close()

    def epoch(self, steps, args, log, bar):
        r, plan, at = self.run, self.plan, self.at
        order = training.epoch_order(len(self.frames), self.seed, at["epoch"])
        size, first = plan["batch_size"], at["step"]
        began = time.perf_counter()
        spent, self.frames.waited = self.seconds, 0.0
        for _, five in self.frames.iterate(parts_of(order, size, first, r.rank, r.world_size)):
            rng, global_batch = (
                np.random.default_rng([self.seed, at["epoch"], at["step"], 0]),
                min(size, len(order) - at["step"] * size),
            )
            noise = torch.from_numpy(
                rng.random((global_batch, self.net.tokens), np.float32)[r.batch_slice(global_batch)[0]]
            )
            self.set_rate(steps)
            for k, v in self.step(five, rng, noise, global_batch).items():
                self.sums[k] = self.sums.get(k, 0.0) + v
            at["step"] += 1
            bar.update()
            now = time.perf_counter()
            save = now - self.saved > args.save_minutes * 60 and at["step"] < steps
            if save or at["step"] % 20 == 0 or at["step"] == steps:
                name, total = next(iter(self.sums.items()))
                training.check_finite(float(total), f"in epoch {at['epoch'] + 1}, step {at['step']}")
                bar.set_postfix(
                    **{name: f"{float(total) / at['step']:.4f}"}, epoch=f"{at['epoch'] + 1}/{plan['epochs']}"
                )
            if save:
                self.seconds = spent + now - began
                self.save()
        now = time.perf_counter()
        self.seconds = spent + now - began
        means = r.mean_over_ranks({k: float(v) / at["step"] for k, v in self.sums.items()})
        r.sync_buffers(self.net)
        at["epoch"], at["step"], self.sums = at["epoch"] + 1, 0, {}
        if now - self.saved > 60 or at["epoch"] in (plan["student_from"], plan["epochs"]):
            self.save()
        if r.is_main:
            log.write(
                stage="teacher" if self.phase == 1 else "student",
                epoch=at["epoch"],
                **means,
                seconds=self.seconds,
                frames_per_second=(len(self.frames) - first * plan["batch_size"]) / (now - began),
                waited_share=self.frames.waited / (now - began),
            )
            bar.write(f"epoch {at['epoch']}/{plan['epochs']}: " + ", ".join(f"{k} {v:.5g}" for k, v in means.items()))


def train(args, ready, size, patch, r):
    """-> path of the finished checkpoint."""
    dataset = ready.data.name
    plan, folder = plan_of(args, dataset), r.open_output_dir(args.out or Path("runs/sdmae") / dataset)
    if not ready.train:
        raise UserError(f"{dataset} has no training videos under {ready.data.root}: put normal videos into train/")
    frames = Frames(ready.arrays(ready.train), r.device, STEPS)
    if 1 < r.world_size and len(frames) < r.world_size:
        raise UserError(f"{len(frames)} training frames are too few for {r.world_size} processes")
    rule = scoring.rule_of(dataset, args.norm, args.parts, args.student_on)
    model_args = {
        **scoring.SIZES[args.size or ("small" if dataset == "demo" else "full")],
        "patch_size": patch,
        "image_size": list(size),
        "mask_ratio": args.mask_ratio,
    }
    identity = {
        "model_args": model_args,
        "dataset": dataset,
        "frames": len(frames),
        "seed": args.seed,
        "precision": r.precision,
        "processes": r.world_size,
        **{k: v for k, v in plan.items() if k != "epochs"},
    }  # a run may go on for more
    trainer = Trainer(
        plan,
        model_args,
        frames,
        preprocess.bank_of(args, ready, size, r),
        r,
        folder / "sdmae.pt",
        identity,
        args.seed,
        rule,
    )
    log, resumed = training.Log(folder / "log.jsonl"), False
    if args.resume:
        resumed = trainer.load()
    elif r.is_main:
        log.path.unlink(missing_ok=True)
    parameters = sum(p.numel() for p in trainer.net.parameters()) / 1e6
    r.print(
        f"{dataset}: {len(ready.train)} training videos, {len(frames)} frames at {size[0]}×{size[1]}, "
        f"{trainer.net.tokens} tokens of {patch}×{patch} px, {parameters:.1f} M parameters, {r.device}, {r.precision}"
    )
    if trainer.done and trainer.at["epoch"] >= plan["epochs"]:
        r.print(f"{plan['epochs']} epochs done before ({trainer.path})")
        return trainer.path
    if resumed:
        r.print(f"going on at epoch {trainer.at['epoch'] + 1}, step {trainer.at['step']}")
        if r.is_main:
            for stage in ("teacher", "student"):
                log.drop_after(stage, trainer.at["epoch"])
    trainer.done = False
    trainer.train(args, log)
    trainer.statistics = scoring.statistics(
        scoring.Scorer(trainer.net, rule, r), Frames(ready.arrays(ready.train), r.device)
    )
    trainer.done = True
    trainer.save()
    r.barrier()
    return trainer.path


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    r = training.Run.from_args(args)
    name = datasets.canonical(args.dataset)
    plan_of(args, name)
    size, patch = preprocess.input_of(args, name)
    ready = preprocess.prepare(args, size, r)
    if args.preview:
        return preprocess.preview(
            preprocess.bank_of(args, ready, size, r), ready, args, args.out or Path("runs/sdmae") / name
        )
    checkpoint = train(args, ready, size, patch, r)
    r.print(f"trained in {(time.perf_counter() - began) / 60:.1f} min with everything before; checkpoint {checkpoint}")
    from sdmae.eval import evaluate

    evaluate(args, ready, checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
