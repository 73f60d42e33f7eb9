"""Train AED-MAE on normal videos: the teacher, then its student; decoding runs first if it is missing.

python sdmae/train.py --dataset demo
python sdmae/train.py --dataset ped2 --data-root data
python sdmae/train.py --dataset avenue --pseudo ubnormal --ubnormal-root data/UBnormal
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.io import UserError, run_script
from sdmae import preprocess
from sdmae.eval import add_eval_flags, evaluate

# torch is imported inside functions: --help answers at once, and decoding processes never load it.

# The published configuration; student_from: a share of the epochs
DEFAULTS = dict(epochs=200, batch_size=100, lr=1e-4, student_from=0.5, decay="constant")
# The demo's network is small and its schedule short, so that it is trained in minutes. Ped2 has a sixth of Avenue's
# frames: batches of 16 make as many steps of them (32 000) as the published 100 make of Avenue's.
DATASETS = {
    "demo": dict(epochs=40, batch_size=20, lr=1e-3),
    "ped2": dict(batch_size=16, lr=5e-4, student_from=0.75, decay="cooldown"),
}
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.05
SIZES = {"full": {}, "small": dict(embed_dim=64, decoder_dim=32, depth=2, decoder_depth=2)}
TEACHER, STUDENT = "teacher", "student"  # the two phases of training


@dataclass
class Plan:
    epochs: int
    batch_size: int
    lr: float
    student_from: int  # from this epoch on only the student is trained
    # None: constant; else the rate falls, and a resumed run must have this same sentence "cooldown, N of M epochs"
    lr_schedule: str | None = None
    pseudo: str = "self"
    pseudo_share: float = 0.25
    gradient_weights: bool = True

    def phase(self, epoch: int) -> str:
        return TEACHER if epoch < self.student_from else STUDENT

    def lr_at(self, epoch: float) -> float:
        """Constant, or in a line to 0 over the last third of either phase; epoch may be a fraction."""
        if not self.lr_schedule:
            return self.lr
        first, end = (0, self.student_from) if epoch < self.student_from else (self.student_from, self.epochs)
        return self.lr * min(1.0, 3 * (end - epoch) / (end - first))


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/sdmae/<dataset>")
    cli.add_optimisation_flags(
        parser,
        epochs="200; on demo 40",
        batch_size="100; on ped2 16, on demo 20",
        lr="1e-4; on ped2 5e-4, on demo 1e-3",
    )
    preprocess.add_pseudo_flags(parser)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--student-from",
        type=cli.natural_int,
        metavar="EPOCH",
        help="from this epoch on only the student is trained (default: half of --epochs; on ped2 three quarters)",
    )
    group.add_argument(
        "--decay",
        choices=["constant", "cooldown"],
        help="learning rate: constant, or (short schedules) in a line to 0 over the last third of either phase "
        "(default: constant; on ped2 cooldown)",
    )
    group.add_argument(
        "--gradient-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="weigh tokens by motion gradients in the teacher's loss (default: yes)",
    )
    group.add_argument("--mask-ratio", type=float, default=0.5, help="share of tokens removed (default: %(default)s)")
    group.add_argument("--size", choices=SIZES, help="model size (default: full; on demo small)")
    add_eval_flags(parser, training=True)
    return parser.parse_args(argv)


def make_plan(
    dataset: str, *, student_from=None, decay=None, pseudo="self", pseudo_share=0.25, gradient_weights=True, **flags
) -> Plan:
    """The dataset's published constants; flags (epochs, batch_size, lr) override them."""
    values = {**DEFAULTS, **DATASETS.get(dataset, {}), **flags}
    if student_from is None:
        student_from = max(1, int(values["epochs"] * values["student_from"]))
    if student_from > values["epochs"]:
        raise UserError(f"--student-from {student_from} must be between 0 and --epochs ({values['epochs']})")
    plan = Plan(
        values["epochs"],
        values["batch_size"],
        values["lr"],
        student_from,
        pseudo=pseudo,
        pseudo_share=pseudo_share if pseudo != "none" else 0.0,
        gradient_weights=gradient_weights,
    )
    if (decay or values["decay"]) == "cooldown":  # depends on the length: such a run cannot continue for more epochs
        plan.lr_schedule = f"cooldown, {plan.student_from} of {plan.epochs} epochs"
    return plan


def check_mask_ratio(ratio: float, rows: int, columns: int) -> None:
    """The tokens that stay must fill the rows of a grid, on which the encoder convolves. Raises UserError."""
    kept = round(rows * columns * (1 - ratio))
    if kept % rows or not 0 < kept < rows * columns:
        fits = 1 - min(max(1, round(kept / rows)), columns - 1) / columns
        raise UserError(
            f"--mask-ratio {ratio}: the tokens left must fill {rows} rows; the nearest that fits is {fits:.4g}"
        )


def start_phase(net, phase, lr):
    """Freeze what this phase does not train.

    -> a new optimizer: AdamW; norms, biases and single tokens do not decay.
    """
    import torch

    net.requires_grad_(True)
    if phase == TEACHER:
        net.train_teacher()
    else:
        net.train_student()
    decaying, plain = [], []
    for name, p in net.named_parameters():
        if p.requires_grad:
            (plain if p.ndim <= 1 or name.endswith("token") else decaying).append(p)
    groups = [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def random_input(batch, bank, plan, tokens, run):
    """A batch's samples [n, 5, C, H, W] -> image [n, 9, H, W], target [n, 4, H, W], motion gradient [n, 3, H, W] and
    masking noise [n, tokens]; objects of `bank` are pasted where there is one.

    Random choices are made for the whole batch, so that they do not depend on the number of ranks.
    """
    from sdmae import data, pseudo

    noise = batch.rng.random((len(batch), tokens), np.float32)[batch.part]
    size = batch.data.shape[3:]
    chosen = pseudo.choose(bank, len(batch), plan.pseudo_share, size, batch.rng)
    seen, mask = pseudo.paste(batch.data, bank, pseudo.of_part(chosen, batch.part, run), data.SAMPLE_OFFSETS)
    target = data.network_target(batch.data[:, 2], mask)
    return data.network_input(seen[:, ::2]), target, data.motion_gradient(seen), run.to_device(noise)


def losses(net, phase, image, target, gradient, noise, plan, run):
    """{name: mean loss over this rank's samples}"""
    import torch

    from sdmae import model

    if phase == TEACHER:
        with run.autocast():
            out = net(image, noise, student=False)
        weighted = plan.gradient_weights
        loss = model.teacher_loss(out["teacher"], target, gradient, net.patch_size, weighted=weighted)
        return {TEACHER: loss / len(image)}
    with run.autocast():
        with torch.no_grad():
            shared, teacher, mask = net.encode_for_student(image, noise)
        student = net.student_head(shared)
    return {STUDENT: model.student_loss(student, teacher, mask)}


def train_one_epoch(net, loader, optimizer, plan, epoch, run, meter, bank):
    phase = plan.phase(epoch)
    (net.train if phase == TEACHER else net.train_student)()
    for batch, weight in meter.batches(loader, epoch):  # this rank's part, and its weight in the batch mean
        meter.set_lr(optimizer, plan.lr_at(epoch + meter.progress))
        image, target, gradient, noise = random_input(batch, bank, plan, net.tokens, run)
        loss_parts = run.data_parallel(losses, net)(phase, image, target, gradient, noise, plan, run)
        scale = len(batch) if phase == TEACHER else 1  # the published teacher loss is a sum over the batch
        optimizer.zero_grad(set_to_none=True)
        (loss_parts[phase] * weight * scale).backward()
        optimizer.step()
        meter.update(loss_parts, weight)
    run.sync(*net.buffers())  # such as running statistics of batch norms
    meter.end_epoch(loader)


def train(
    dataset,
    plan,
    patch,
    *,
    out,
    run,
    config,
    size="full",
    mask_ratio=0.5,
    bank_options=None,
    draws=1,
    seed=0,
    resume=True,
    save_minutes=5,
):
    """Phase one trains everything but the student by the teacher's loss; phase two only the student. -> checkpoint path

    dataset: preprocess.FrameVideos; config, draws: scoring.ScoreConfig and masks that training
    statistics are computed with.
    """
    from common import training
    from common.distributed import seed_everything
    from common.loader import Loader
    from sdmae import scoring
    from sdmae.data import INPUT_OFFSETS, SAMPLE_OFFSETS, FrameDataset

    out, name = run.open_output_dir(out), dataset.data.name
    image_size = dataset.cache.size
    if not dataset.train:
        raise UserError(f"{name} has no training videos under {dataset.data.root}: put normal videos into train/")
    frames = FrameDataset(dataset.arrays(dataset.train), run, SAMPLE_OFFSETS)
    if len(frames) < run.world_size:
        raise UserError(f"{len(frames)} training frames are too few for {run.world_size} processes")
    model_args = {**SIZES[size], "patch_size": patch, "image_size": list(image_size), "mask_ratio": mask_ratio}
    identity = {
        "model_args": model_args,
        "dataset": name,
        "frames": len(frames),
        "seed": seed,
        "precision": run.precision,
        "processes": run.world_size,
        **{k: v for k, v in asdict(plan).items() if k != "epochs"},  # a run may continue for more epochs
    }
    seed_everything(seed)
    net = scoring.build_model(model_args).to(run.device)
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    run.print(
        f"{name}: {len(dataset.train)} training videos, {len(frames)} frames at {image_size[0]}×{image_size[1]}, "
        f"{net.tokens} tokens of {patch}×{patch} px, {parameters:.1f} M parameters, {run.device}, {run.precision}"
    )
    path, log = out / "sdmae.pt", training.Log(out / "log.jsonl")
    statistics = None

    def save():
        training.save_training(
            path,
            "sdmae",
            meter,
            net,
            optimizer,
            done=statistics is not None,
            model_args=model_args,
            identity=identity,
            plan=asdict(plan),
            phase=phase,
            statistics=statistics,
            rule=config.state_dict(),
        )

    state = training.previous_run(path, "sdmae", identity, resume)
    phase = state["phase"] if state else plan.phase(0)
    optimizer = start_phase(net, phase, plan.lr)
    meter = training.EpochMeter(run, phase, plan.epochs, log=log, save=save, unit="frame", save_minutes=save_minutes)
    training.resume(state, path, meter, net, optimizer)
    if run.is_main:
        for stage in (TEACHER, STUDENT):
            log.drop_after(stage, meter.epoch)
    if state and state["done"] and meter.epoch >= plan.epochs:
        return path
    bank = preprocess.make_bank(dataset, image_size, run, **(bank_options or {"pseudo": plan.pseudo, "seed": seed}))
    bank = bank and bank.to(run.device)
    loader = Loader(frames, plan.batch_size, seed, run)
    for epoch in range(meter.epoch, plan.epochs):
        if phase != plan.phase(epoch):
            phase = plan.phase(epoch)
            optimizer = start_phase(net, phase, plan.lr)
        meter.stage = phase
        train_one_epoch(net, loader, optimizer, plan, epoch, run, meter, bank)
    statistics = scoring.statistics(scoring.Scorer(net, config, run, draws=draws), frames.with_offsets(INPUT_OFFSETS))
    save()
    run.barrier()
    return path


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    name = cli.dataset_name(args)
    plan = make_plan(
        name,
        student_from=args.student_from,
        decay=args.decay,
        pseudo=args.pseudo,
        pseudo_share=args.pseudo_share,
        gradient_weights=args.gradient_weights,
        **cli.given(args, ("epochs", "batch_size", "lr")),
    )
    size, patch = preprocess.input_size(name, args.image_size, args.patch)
    check_mask_ratio(args.mask_ratio, size[0] // patch, size[1] // patch)
    from common.distributed import Run
    from sdmae.scoring import score_config

    with Run(args.device, args.precision) as run:
        dataset = preprocess.prepare(cli.DataSource.from_args(args), size, run)
        out, bank_options = args.out or Path("runs/sdmae") / name, preprocess.pseudo_options(args)
        if args.preview:
            bank = preprocess.make_bank(dataset, size, run, **bank_options)
            return preprocess.preview(bank, dataset, out, run, args.seed)
        checkpoint = train(
            dataset,
            plan,
            patch,
            out=out,
            run=run,
            config=score_config(name, args.norm, args.parts, args.student_on),
            size=args.size or ("small" if name == "demo" else "full"),
            mask_ratio=args.mask_ratio,
            bank_options=bank_options,
            draws=args.mask_draws,
            seed=args.seed,
            resume=args.resume,
            save_minutes=args.save_minutes,
        )
        minutes = (time.perf_counter() - began) / 60
        run.print(f"finished in {minutes:.1f} min including preprocessing; checkpoint {checkpoint}")
        options = cli.ScoreOptions.from_args(args)
        evaluate(
            dataset,
            checkpoint,
            out=out,
            run=run,
            options=options,
            norm=args.norm,
            parts=args.parts,
            tokens=args.student_on,
            draws=args.mask_draws,
            workers=args.workers,
            training_frames=lambda: dataset,
        )


if __name__ == "__main__":
    run_script(main)
