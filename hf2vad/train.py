"""Train HF2-VAD: preprocessing, three stages, evaluation; finished steps are not repeated.

python hf2vad/train.py --dataset demo
python hf2vad/train.py --dataset ped2 --data-root data --boxes file:boxes.npz
torchrun --nproc-per-node 4 hf2vad/train.py --dataset shanghaitech
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.io import UserError, run_script
from common.objects import pipeline
from hf2vad import preprocess
from hf2vad.eval import add_eval_flags, evaluate

# torch is imported inside functions: --help answers at once, and decoding processes never load it.

# The published configuration
DEFAULTS = {
    "memae": dict(epochs=80, batch_size=256, lr=1e-4),
    "cvae": dict(epochs=80, batch_size=128, lr=1e-4),
    "finetune": dict(epochs=80, batch_size=128, lr=8e-5),
}
DEMO = {
    "memae": dict(epochs=10, batch_size=32, lr=1e-3),
    "cvae": dict(epochs=3, batch_size=32, lr=1e-3),
    "finetune": dict(epochs=0, batch_size=32, lr=1e-3),
}
STAGES = tuple(DEFAULTS)
SIZES = {"full": {}, "small": dict(features_root=8, num_slots=100, shrink_threshold=0.01, nf_start=16, nf_max=32)}


@dataclass
class Stage:
    """The schedule of one stage."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    decay: str = "published"

    def lr_at(self, epoch: float) -> float:
        """Learning rate; epoch may be a fraction. published: the paper's steps; cooldown: to 0 over the last third."""
        if self.decay == "cooldown":
            return self.lr * min(1.0, 3 * (self.epochs - epoch) / self.epochs)
        if self.name == "memae":
            return self.lr * (0.8 if epoch >= 50 else 1.0)
        return self.lr * (0.8 ** int(epoch // 50) if self.name == "cvae" else 1.0)


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/hf2vad/<dataset>")
    cli.add_optimisation_flags(
        parser,
        epochs="80, each stage; one number or memae,cvae,finetune; on demo 10,3,0",
        batch_size="256,128,128; one number or three as above; on demo 32",
        lr="1e-4,1e-4,8e-5; as above; on demo 1e-3",
        types=(str, str, str),
    )
    group = parser.add_argument_group("method")
    group.add_argument("--stage", choices=STAGES, help="train only this stage (default: all that are missing)")
    group.add_argument(
        "--size", choices=SIZES, help="model size; small is for demo and tests (default: full, small on demo)"
    )
    group.add_argument(
        "--decay",
        choices=["published", "cooldown"],
        help="learning rate: in the paper's steps, or (short schedules) in a line to 0 over the last third (default: "
        "published; demo: cooldown)",
    )
    add_eval_flags(parser, training=True)
    return parser.parse_args(argv)


def make_plan(dataset: str, *, epochs=None, batch_size=None, lr=None, decay=None) -> dict[str, Stage]:
    """The schedule of every stage. epochs, batch_size, lr: "6" or "6,2,0" (memae,cvae,finetune), None for the
    defaults."""
    decay = decay or ("cooldown" if dataset == "demo" else "published")
    plan = {s: Stage(s, **(DEMO if dataset == "demo" else DEFAULTS)[s], decay=decay) for s in STAGES}
    for key, kind, least, text in (
        ("epochs", int, 0, epochs),
        ("batch_size", int, 1, batch_size),
        ("lr", float, 1e-12, lr),
    ):
        if text is not None:
            for stage, value in zip(plan.values(), per_stage(f"--{key.replace('_', '-')}", text, kind, least)):
                setattr(stage, key, value)
    return plan


def per_stage(flag, text, kind, least):
    """ "6" or "6,2,0" -> three numbers."""
    try:
        values = [kind(x) for x in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(least <= x < 1e9 for x in values):
        raise UserError(
            f"{flag} {text}: expected one number of at least {least}, or three for memae,cvae,finetune, such as 6,2,1"
        )
    return values * (3 // len(values))


def losses(net, batch, stage, run) -> dict:
    """{name: mean loss over this rank's cubes}, "total" among them."""
    import torch

    from hf2vad import model, scoring

    if stage.name == "memae":
        flow = batch["flow"].flatten(1, 2).float().contiguous(memory_format=torch.channels_last)
        with run.autocast():
            out = net(flow)
        return model.memae_losses(out, flow)
    frames, flows = scoring.to_input(batch)
    if stage.name == "cvae":  # the frozen autoencoder's flows were written down once
        recon = batch["recon"].float().contiguous(memory_format=torch.channels_last)
        with run.autocast():
            out = net.vunet(frames[:, : net.past_channels], recon)
        return model.cvae_losses(out, frames[:, -3:])
    with run.autocast():
        out = net(frames, flows)
    return model.full_losses(out, frames, flows)


def train_one_epoch(net, loader, optimizer, stage, epoch, run, meter):
    net.train()
    if stage.name == "cvae":
        net.memAE.eval()
    for batch, weight in meter.batches(loader, epoch):  # this rank's part, and its weight in the batch mean
        meter.set_lr(optimizer, stage.lr_at(epoch + meter.progress))
        loss_parts = run.data_parallel(losses, net)(batch.data, stage, run)
        optimizer.zero_grad(set_to_none=True)
        (loss_parts["total"] * weight).backward()
        optimizer.step()
        meter.update(loss_parts, weight)
    run.sync(*net.buffers())  # such as running statistics of batch norms
    meter.end_epoch(loader)


def train_stage(stage, net, records, identity, *, out, run, seed, foreground, resume=True, save_minutes=5) -> Path:
    """Train one stage from where its checkpoint is. -> path of the checkpoint"""
    import torch

    from common import training
    from common.loader import Loader
    from hf2vad.data import stage_data

    path, log = out / f"{stage.name}.pt", training.Log(out / "log.jsonl")
    net.to(run.device).to(memory_format=torch.channels_last)
    if stage.name == "cvae":
        net.memAE.requires_grad_(False)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=stage.lr, eps=1e-7, fused=True)

    def save():
        training.save_training(
            path,
            "hf2vad",
            meter,
            net,
            optimizer,
            stage=stage.name,
            done=meter.epoch >= stage.epochs,
            model_args=identity["model_args"],
            identity=identity,
            foreground=foreground,
        )

    meter = training.EpochMeter(
        run, stage.name, stage.epochs, log=log, save=save, unit="cube", save_minutes=save_minutes
    )
    state = training.previous_run(path, "hf2vad", identity, resume)
    training.resume(state, path, meter, net, optimizer)
    if meter.epoch < stage.epochs:
        loader = Loader(stage_data(stage.name, net, records, run, out), stage.batch_size, seed, run)
        for epoch in range(meter.epoch, stage.epochs):
            train_one_epoch(net, loader, optimizer, stage, epoch, run, meter)
    run.barrier()
    return path


def add_statistics(path, records, run) -> None:
    """Add to a checkpoint what turns errors into scores, if it is not there yet: mean and deviation of the training
    cubes' errors."""
    from common.training import save_checkpoint
    from hf2vad import scoring
    from hf2vad.data import stage_data

    net, state = scoring.load_model(path)
    if state.get("statistics"):
        return
    fields_of = "cvae" if state["stage"] == "cvae" else "finetune"  # memae alone trains on less than is scored
    data = stage_data(fields_of, net, records, run, path.parent)
    errors = scoring.Scorer(net, run).score_training_cubes(data)
    if run.is_main:
        save_checkpoint(path, {**state, "statistics": scoring.statistics(errors)})
    run.barrier()


def train(dataset, plan, *, out, run, size="full", seed=0, only=None, resume=True, save_minutes=5) -> Path:
    """Train the missing stages. dataset: pipeline.CubeVideos; only: one stage.

    -> path of the last stage that was trained; where none was, of the last one that exists.
    """
    from common import training
    from common.distributed import seed_everything
    from hf2vad import scoring

    out = run.open_output_dir(out)
    records = training_records(dataset)
    cubes = sum(map(len, records))
    channels = {x.dtype["appearance"].shape[1] for x in records}
    run.print(
        f"{dataset.data.name}: {len(dataset.train)} training videos, {cubes} cubes "
        f"({'grey' if channels == {1} else 'colour'}), model {size}, {run.device}, {run.precision}"
    )
    newest = existing = None
    for name in STAGES:
        stage, path = plan[name], out / f"{name}.pt"
        if stage.epochs == 0 or (only and name != only):
            existing = path if path.exists() else existing
            continue
        seed_everything(seed)
        net = scoring.build_model(dict(SIZES[size]), name)
        if name != "memae":
            load_previous_stage(net, name, out)
        identity = {
            "model_args": dict(SIZES[size]),
            "dataset": dataset.data.name,
            "cubes": [dataset.store.s.key(), cubes],
            "seed": seed,
            "precision": run.precision,
            "processes": run.world_size,
            "batch_size": stage.batch_size,
            "lr": stage.lr,
            "decay": f"cooldown, {stage.epochs} epochs" if stage.decay == "cooldown" else None,
            "start": None if name == "memae" else training.weights_hash(net.memAE if name == "cvae" else net),
        }
        newest = train_stage(
            stage,
            net,
            records,
            identity,
            out=out,
            run=run,
            seed=seed,
            foreground=vars(dataset.store.s),
            resume=resume,
            save_minutes=save_minutes,
        )
    if newest:
        add_statistics(newest, records, run)
    elif existing is None:
        raise UserError("nothing to train: --epochs is 0 for every stage")
    return newest or existing


def training_records(dataset):
    """Records of the training cubes, one array per video. Raises UserError without any."""
    if not dataset.train:
        raise UserError(
            f"{dataset.data.name} has no training videos under {dataset.data.root}: HF2-VAD learns from normal videos "
            "in a training folder; add one with videos of ordinary days"
        )
    records = dataset.records(dataset.train)
    if not sum(map(len, records)):
        raise UserError(
            "no boxes were found in the training videos: lower --motion-threshold or --motion-area, or choose "
            f"another detector with --boxes (now {dataset.store.s.boxes})"
        )
    return records


def load_previous_stage(net, name, out):
    """cvae starts from memae's autoencoder, finetune from cvae's whole network."""
    from common import training

    path = out / ("memae.pt" if name == "cvae" else "cvae.pt")
    if not path.exists():
        raise UserError(f"stage {name} starts from {path}, which is missing: run the stage before it")
    part = net.memAE if name == "cvae" else net
    part.load_state_dict(training.load_checkpoint(path, "hf2vad")["model_state_dict"])


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    plan = make_plan(
        cli.dataset_name(args), epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, decay=args.decay
    )
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        source = cli.DataSource.from_args(args)
        dataset = preprocess.prepare(source, run, foreground=cli.given(args, pipeline.FLAGS))
        out = args.out or Path("runs/hf2vad") / dataset.data.name
        checkpoint = train(
            dataset,
            plan,
            out=out,
            run=run,
            size=args.size or ("small" if dataset.data.name == "demo" else "full"),
            seed=args.seed,
            only=args.stage,
            resume=args.resume,
            save_minutes=args.save_minutes,
        )
        minutes = (time.perf_counter() - began) / 60
        run.print(f"finished in {minutes:.1f} min including preprocessing; checkpoint {checkpoint}")
        options = cli.ScoreOptions.from_args(args)
        evaluate(dataset, checkpoint, out=out, run=run, options=options, w_flow=args.w_flow, w_frame=args.w_frame)


if __name__ == "__main__":
    run_script(main)
