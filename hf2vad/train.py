"""Train HF2-VAD: preprocess, three stages, evaluation; what was done before is not done again.

python hf2vad/train.py --dataset demo
python hf2vad/train.py --dataset ped2 --data-root data --boxes file:boxes.npz
torchrun --nproc-per-node 4 hf2vad/train.py --dataset shanghaitech
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from common import old_training as training
from common.batches import Batches, copy_rows
from common.io import UserError, atomic_write, load_array, read_json, run, write_json
from common.late import Late, torch
from hf2vad import preprocess, scoring

model = Late("hf2vad.model")

STAGES = ("memae", "cvae", "finetune")
# The paper's configuration; decay: factor of lr after so many (parts of) epochs
SCHEDULE = {
    "memae": dict(epochs=80, batch_size=256, lr=1e-4, decay=lambda e: 0.8 if e >= 50 else 1.0),
    "cvae": dict(epochs=80, batch_size=128, lr=1e-4, decay=lambda e: 0.8 ** int(e // 50)),
    "finetune": dict(epochs=80, batch_size=128, lr=8e-5, decay=lambda e: 1.0),
}
DEMO = {
    "memae": dict(epochs=10, batch_size=32, lr=1e-3),
    "cvae": dict(epochs=3, batch_size=32, lr=1e-3),
    "finetune": dict(epochs=0),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preprocess.add_data_flags(parser)
    training.add_flags(
        parser,
        out="runs/hf2vad/<dataset>",
        number=str,
        epochs="80, each stage; one number or memae,cvae,finetune",
        batch_size="256,128,128; one number or three as above",
        lr="1e-4,1e-4,8e-5; as above",
    )
    g = parser.add_argument_group("method")
    g.add_argument("--stage", choices=STAGES, default=None, help="run this stage alone (default: all that are missing)")
    g.add_argument(
        "--size",
        choices=scoring.SIZES,
        default=None,
        help="model size; small is for demo and tests (default: full, small on demo)",
    )
    g.add_argument(
        "--decay",
        choices=["published", "cooldown"],
        default=None,
        help="how the learning rate falls: in the "
        "paper's steps, or (short schedules) in a line to 0 over the last third (default: published; demo: cooldown)",
    )
    from hf2vad.eval import add_eval_flags

    add_eval_flags(parser)
    return parser.parse_args(argv)


def per_stage(flag, text, kind, least):
    """ "6" or "6,2,0" -> {stage: number}."""
    try:
        values = [kind(x) for x in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(least <= x < 1e9 for x in values):
        raise UserError(
            f"{flag} {text}: expected one number of at least {least}, or three for memae,cvae,finetune, such as 6,2,1"
        )
    return dict(zip(STAGES, values * (3 // len(values))))


def plan_of(args, dataset):
    """{stage: epochs, batch_size, lr, decay} after defaults of the dataset and flags."""
    plan = {s: {**SCHEDULE[s], **(DEMO[s] if dataset == "demo" else {})} for s in STAGES}
    for key, kind, least in (("epochs", int, 0), ("batch_size", int, 1), ("lr", float, 1e-12)):
        text = getattr(args, key)
        if text is not None:
            for s, value in per_stage(f"--{key.replace('_', '-')}", text, kind, least).items():
                plan[s][key] = value
    if args.decay == "cooldown" or (args.decay is None and dataset == "demo"):
        for s in STAGES:
            plan[s]["decay"] = lambda e, n=plan[s]["epochs"]: min(1.0, 3 * (n - e) / n)
            plan[s]["falls"] = f"cooldown, {plan[s]['epochs']} epochs"
    return plan


class Stage:
    """One stage of training: its network, optimizer and loss, and how it is saved and continued."""

    def __init__(self, name, plan, net, r, folder, identity, foreground):
        self.name, self.plan, self.net, self.run, self.folder = name, plan, net.to(r.device), r, folder
        self.net.to(memory_format=torch.channels_last)
        self.identity = identity  # settings that must agree for a run to be continued
        self.foreground = foreground  # how the cubes were cut, for scoring other videos alike
        self.parameters = list(net.vunet.parameters() if name == "cvae" else net.parameters())
        if name == "cvae":
            net.memAE.requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.parameters, lr=plan["lr"], eps=1e-7, fused=True)
        self.epoch, self.step, self.seconds, self.sums, self.statistics = 0, 0, 0.0, {}, None

    @property
    def path(self):
        return self.folder / f"{self.name}.pt"

    def save(self, done=False):
        if not self.run.is_main:
            return
        state = {
            "method": "hf2vad",
            "stage": self.name,
            "done": done,
            "epoch": self.epoch,
            "step": self.step,
            "model_args": self.identity["model_args"],
            "identity": self.identity,
            "foreground": self.foreground,
            "model_state_dict": self.net.state_dict(),
            "seconds": self.seconds,
            "sums": self.sums,
            "rng": training.get_rng(),
            "statistics": self.statistics,
            "optimizer": self.optimizer.state_dict(),
        }
        training.save_checkpoint(self.path, state)

    def load(self):
        """Continue from the checkpoint of this stage, if there is one. -> True when the stage is complete."""
        if not self.path.exists():
            return False
        state = training.load_checkpoint(self.path, "hf2vad")
        training.check_identity(self.path, state.get("identity"), self.identity)
        self.net.load_state_dict(state["model_state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.sums, self.statistics = state["sums"], state["statistics"]
        training.set_rng(state["rng"])
        return self.epoch >= self.plan["epochs"]

    def mode(self):
        self.net.train()
        if self.name == "cvae":
            self.net.memAE.eval()

    def losses(self, batch):
        if self.name == "memae":
            flow = batch["flow"].flatten(1, 2).float().contiguous(memory_format=torch.channels_last)
            with self.run.autocast():
                out = self.net(flow)
            return model.memae_losses(out, flow)
        frames, flows = scoring.to_input(batch)
        if self.name == "cvae":  # the frozen network's answers were written down once
            recon = batch["recon"].float().contiguous(memory_format=torch.channels_last)
            with self.run.autocast():
                out = self.net.vunet(frames[:, : self.net.past_channels], recon)
            return model.cvae_losses(out, frames[:, -3:])
        with self.run.autocast():
            out = self.net(frames, flows)
        return model.full_losses(out, frames, flows)

    def train_step(self, batch, share=1.0):
        """One step on this process's part of a batch, whose mean loss counts `share` in the mean over the processes."""
        losses = {k: v * share for k, v in self.losses(batch).items()}
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        self.run.average_gradients(self.parameters)
        self.optimizer.step()
        return losses

    def train(self, data, args, log):
        r, size = self.run, self.plan["batch_size"]
        steps = -(-len(data) // size)
        done = self.epoch * steps + self.step
        bar = tqdm(
            total=self.plan["epochs"] * steps,
            initial=done,
            desc=self.name,
            unit="step",
            disable=not r.is_main,
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        self.mode()
        while self.epoch < self.plan["epochs"]:
            order = training.epoch_order(len(data), args.seed, self.epoch)
            saved = began = time.perf_counter()
            data.waited, spent, first = 0.0, self.seconds, self.step
            for rows, batch in data.iterate(order, size, start=self.step):
                part, share = r.batch_slice(len(rows))
                batch = {k: v[part] for k, v in batch.items()}
                for g in self.optimizer.param_groups:
                    g["lr"] = self.plan["lr"] * self.plan["decay"](self.epoch + self.step / steps)
                losses = self.train_step(batch, share)
                for k, v in losses.items():
                    self.sums[k] = self.sums.get(k, 0.0) + v.detach()
                self.step += 1
                bar.update()
                now = time.perf_counter()
                save = now - saved > args.save_minutes * 60 and self.step < steps
                if save or self.step % 20 == 0 or self.step == steps:  # what is saved has been looked at
                    total = float(self.sums["total"])
                    training.check_finite(total, f"in stage {self.name}, epoch {self.epoch + 1}, step {self.step}")
                    bar.set_postfix(loss=f"{total / self.step:.4f}", epoch=f"{self.epoch + 1}/{self.plan['epochs']}")
                if save:
                    self.seconds = spent + now - began
                    self.save()
                    saved = time.perf_counter()
            now = time.perf_counter()
            self.seconds = spent + now - began
            means = r.mean_over_ranks({k: float(v) / steps for k, v in self.sums.items()})
            self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
            r.sync_buffers(self.net)
            self.save()
            if r.is_main:
                log.write(
                    stage=self.name,
                    epoch=self.epoch,
                    **means,
                    lr=self.optimizer.param_groups[0]["lr"],
                    seconds=self.seconds,
                    cubes_per_second=(len(data) - first * size) / (now - began),
                    waited_share=data.waited / (now - began),
                )
                bar.write(
                    f"{self.name} epoch {self.epoch}/{self.plan['epochs']}: "
                    + ", ".join(f"{k} {v:.5g}" for k, v in means.items())
                )
        bar.close()


def reconstructions(net, records, r, path):
    """The frozen ML-MemAE-SC's answer for every training cube: float16 [N, 2·flows, S, S] memory map at `path`.

    Stage `cvae` would compute it anew in every epoch; the file is named by the weights it comes from.
    """
    side, key = (
        path.with_suffix(".json"),
        {"weights": training.weights_hash(net.memAE), "cubes": sum(map(len, records))},
    )
    if r.is_main and not (path.exists() and side.exists() and read_json(side, "reconstructions' entry") == key):
        frozen = scoring.Scorer(net.memAE, r)
        data = Batches(records, {"flow": slice(None)}, r.device)
        n, f, c, s, _ = (len(data), *records[0].dtype["flow"].shape)
        with atomic_write(path) as tmp:
            out = np.lib.format.open_memmap(tmp, "w+", np.float16, (n, f * c, s, s))
            for rows, batch in tqdm(
                data.iterate(np.arange(n), 256),
                total=-(-n // 256),
                desc="reconstruct flows",
                unit="batch",
                dynamic_ncols=True,
                mininterval=1 if sys.stderr.isatty() else 30,
            ):
                with torch.inference_mode(), r.autocast():
                    flow = batch["flow"].float().flatten(0, 1).contiguous(memory_format=torch.channels_last)
                    out[rows] = frozen.net(flow)["recon"].float().cpu().numpy().reshape(len(rows), f * c, s, s)
            out.flush()
            del out
        write_json(side, key)
    r.barrier()
    return load_array(path, "reconstructed flows", mmap=True)


class WithReconstructions(Batches):
    """Cube batches with one more field, `recon`, from a file of the same order."""

    def __init__(self, records, recon, device):
        self.recon = recon
        super().__init__(records, scoring.FIELDS, device)
        if self.resident is not None:
            self.resident["recon"] = torch.from_numpy(np.ascontiguousarray(recon)).to(self.device)

    def bytes(self):
        return super().bytes() + self.recon.nbytes

    def rows(self, rows):
        recon = np.empty((len(rows), *self.recon.shape[1:]), self.recon.dtype)
        copy_rows(self.recon, np.asarray(rows), recon, np.arange(len(rows)))
        return {**super().rows(rows), "recon": recon}


def stage_data(name, net, records, r, folder):
    if name == "memae":
        return Batches(records, {"flow": slice(-1, None)}, r.device)
    if name == "finetune":
        return Batches(records, scoring.FIELDS, r.device)
    return WithReconstructions(records, reconstructions(net, records, r, folder / "reconstructed_flows.npy"), r.device)


def train(args, ready, r):
    """Run the stages that are missing. -> path of the newest complete checkpoint."""
    dataset = ready.data.name
    plan, size = plan_of(args, dataset), args.size or ("small" if dataset == "demo" else "full")
    folder = r.open_output_dir(args.out or Path("runs/hf2vad") / dataset)
    if not ready.train:
        raise UserError(
            f"{dataset} has no training videos under {ready.data.root}: HF2-VAD learns from normal videos in a "
            "training folder; add one with videos of ordinary days"
        )
    records = ready.records(ready.train)
    cubes = sum(map(len, records))
    if cubes == 0:
        raise UserError(
            "no boxes were found in the training videos: lower --motion-threshold or --motion-area, or choose "
            f"another detector with --boxes (now {ready.store.s.boxes})"
        )
    channels = {x.dtype["appearance"].shape[1] for x in records}
    identity = {
        "model_args": dict(scoring.SIZES[size]),
        "dataset": dataset,
        "cubes": [ready.store.s.key(), cubes],
        "seed": args.seed,
        "precision": r.precision,
        "processes": r.world_size,
    }
    log, newest = training.Log(folder / "log.jsonl"), None
    r.print(
        f"{dataset}: {len(ready.train)} training videos, {cubes} cubes ({'grey' if channels == {1} else 'colour'}), "
        f"model {size}, {r.device}, {r.precision}"
    )
    for name in STAGES:
        if plan[name]["epochs"] == 0 or (args.stage and name != args.stage):
            if (folder / f"{name}.pt").exists():
                newest = folder / f"{name}.pt"
            continue
        training.seed_everything(args.seed)
        net = scoring.build(identity["model_args"], name)
        if name != "memae":
            previous = folder / ("memae.pt" if name == "cvae" else "cvae.pt")
            if not previous.exists():
                raise UserError(f"stage {name} starts from {previous}, which is missing: run the stage before it")
            weights = training.load_checkpoint(previous, "hf2vad")["model_state_dict"]
            (net.memAE if name == "cvae" else net).load_state_dict(weights)
        own = {
            **identity,
            "batch_size": plan[name]["batch_size"],
            "lr": plan[name]["lr"],
            "decay": plan[name].get("falls"),
            "start": None if name == "memae" else training.weights_hash(net.memAE),
        }
        stage, data = Stage(name, plan[name], net, r, folder, own, vars(ready.store.s)), None
        last = name == "finetune" or args.stage or not any(plan[s]["epochs"] for s in STAGES[STAGES.index(name) + 1 :])
        if args.resume and stage.load():
            r.print(f"stage {name}: {stage.epoch} epochs done before ({stage.path})")
        else:
            if stage.epoch or stage.step:
                r.print(f"stage {name}: going on at epoch {stage.epoch + 1}, step {stage.step}")
            if r.is_main:
                log.drop_after(name, stage.epoch)
            if args.compile:
                (net.vunet if name == "cvae" else net).compile()
            data = stage_data(name, net, records, r, folder)
            stage.statistics = None
            stage.train(data, args, log)
            if not last:
                stage.save(done=True)
        if last and stage.statistics is None:
            if name == "memae":  # it trains on the last flow alone
                data = Batches(records, scoring.FIELDS, r.device)
            data = data or stage_data(name, net, records, r, folder)
            stage.statistics = scoring.statistics(
                scoring.Scorer(net, r).shared_errors(data, np.arange(len(data)), "training statistics")
            )
            stage.save(done=True)
        r.barrier()
        newest = stage.path
    if newest is None:
        raise UserError("nothing to train: --epochs is 0 for every stage")
    return newest


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    r = training.Run.from_args(args)
    ready = preprocess.prepare(args, r)
    checkpoint = train(args, ready, r)
    r.print(f"trained in {(time.perf_counter() - began) / 60:.1f} min with everything before; checkpoint {checkpoint}")
    from hf2vad.eval import evaluate

    evaluate(args, ready, checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
