"""Train LBR-SPR on the unlabeled videos that it then scores; preprocessing runs first if it is missing.

python spr_uvad/train.py --dataset folder --data-root my_videos      # any videos, no labels: a ranking of moments
python spr_uvad/train.py --dataset ped2 --data-root data --boxes file:boxes.npz --flow
python spr_uvad/train.py --dataset avenue --setting merge --flow
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.io import UserError, run_script
from common.objects import pipeline
from spr_uvad import preprocess
from spr_uvad.eval import add_eval_flags, evaluate, score_videos

# torch is imported inside functions: --help answers at once, and decoding processes never load it.

# The paper's configuration: how fast refinement tightens, and the grid of blocks (rows, columns)
DEFAULTS = {
    "ped1": dict(shrink=0.0001, grid=(4, 1)),
    "ped2": dict(shrink=0.005, grid=(1, 1)),
    "avenue": dict(shrink=0.0001, grid=(1, 1)),
    "shanghaitech": dict(shrink=0.005, grid=(1, 1)),
    "folder": dict(shrink=0.005, grid=(1, 1)),
    "demo": dict(shrink=0.005, grid=(1, 1)),
}
SIZES = {"full": {}, "small": dict(features_root=8)}


@dataclass
class Plan:
    shrink: float  # deviations by which the upper limit tightens per step
    grid: tuple  # rows, columns: one model per block of the frame
    epochs: int = 30
    batch_size: int = 256
    lr: float = 1e-3
    warmup: int = 5  # epochs before refinement begins
    self_paced: str = "mixture"
    std_range: float = 4.0  # upper limit at the start, in deviations
    setting: str = "test"
    decay: str = "constant"

    def lr_at(self, epoch: float) -> float:
        """Constant, as published, or in a line to 0 over the last third; epoch may be a fraction."""
        return self.lr if self.decay == "constant" else self.lr * min(1.0, 3 * (self.epochs - epoch) / self.epochs)

    def refined(self, epoch: int) -> bool:
        return self.self_paced != "none" and epoch >= self.warmup

    def state_dict(self) -> dict:
        return {**asdict(self), "grid": list(self.grid)}


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/spr_uvad/<dataset>")
    cli.add_optimisation_flags(parser, epochs=Plan.epochs, batch_size=Plan.batch_size, lr=Plan.lr)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--setting",
        choices=["test", "merge"],
        default="test",
        help="train on the test videos only (the paper's partial mode), or on training and test videos (merge) "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--self-paced",
        choices=["mixture", "hard", "linear", "huber", "none"],
        help=f"how cubes with large errors lose weight (default: {Plan.self_paced})",
    )
    group.add_argument(
        "--warmup", type=cli.natural_int, help=f"epochs before refinement begins (default: {Plan.warmup})"
    )
    group.add_argument(
        "--shrink",
        type=cli.natural_float,
        help="deviations by which the upper limit tightens per step (default: 0.0001 on ped1 and avenue, else 0.005)",
    )
    group.add_argument(
        "--decay",
        choices=["constant", "cooldown"],
        help="learning rate: constant, or (ours) in a line to 0 over the last third of the epochs, so that scores do "
        "not jump from one epoch to the next (default: constant)",
    )
    group.add_argument("--grid", metavar="ROWSxCOLUMNS", help="one model per block (default: 4x1 on ped1, else 1x1)")
    group.add_argument(
        "--size", choices=SIZES, default="full", help="model size; small is for tests (default: %(default)s)"
    )
    add_eval_flags(parser, training=True)
    return parser.parse_args(argv)


def make_plan(dataset: str, *, grid: str | None = None, **flags) -> Plan:
    """The dataset's published constants; flags {name of a Plan field: value} override them. grid: "4x1"."""
    plan = Plan(**{**DEFAULTS.get(dataset, DEFAULTS["folder"]), **flags})
    if grid:
        plan.grid = cli.parse_size("--grid", grid, 64, "rows x columns, such as 4x1")
    return plan


def self_paced_weights(net, cubes, batch, step, plan, run):
    """Weights of this rank's cubes at refined step number `step`; mean and deviation are those of the whole batch."""
    import torch

    from spr_uvad import model

    with torch.no_grad(), run.autocast():
        raw = net.folded(cubes, flow=False)["raw"]
    errors = run.all_gather_batch(model.cube_errors(raw, cubes), len(batch))
    weights = model.self_paced_weights(
        errors, step, mode=plan.self_paced, shrink=plan.shrink, init_std_range=plan.std_range
    )
    return weights[batch.part]


def losses(net, target, cube_weights, run):
    """-> {name: mean loss over this rank's cubes}, raw errors of these cubes [n]. cube_weights: [n] or 1."""
    from spr_uvad import model

    with run.autocast():
        out = net(target["raw"])
    errors = {k: model.cube_errors(out[k], target[k]) for k in out}
    parts = {f"loss_{k}": model.weighted_loss(e, cube_weights, target[k][0].numel()) for k, e in errors.items()}
    return {"loss": sum(parts.values()), **parts}, errors["raw"].detach()


def train_one_epoch(net, loader, optimizer, plan, epoch, run, meter, errors):
    """errors: float32 [cubes of all blocks] on the device; the raw errors of this rank's cubes are written into it."""
    from spr_uvad import scoring

    net.train()
    for batch, weight in meter.batches(loader, epoch):  # this rank's part, and its weight in the batch mean
        meter.set_lr(optimizer, plan.lr_at(epoch + meter.progress))
        target, cube_weights = scoring.to_input(batch.data), 1.0
        if plan.refined(epoch):
            step = (epoch - plan.warmup) * meter.steps + meter.step
            cube_weights = self_paced_weights(net, target["raw"], batch, step, plan, run)
        loss_parts, raw_errors = run.data_parallel(losses, net)(target, cube_weights, run)
        optimizer.zero_grad(set_to_none=True)
        (loss_parts["loss"] * weight).backward()
        optimizer.step()
        if plan.refined(epoch):
            loss_parts["weight"] = cube_weights.mean()
            loss_parts["given_up"] = (cube_weights == 0).float().mean()
        meter.update(loss_parts, weight)
        if run.is_main or len(batch) >= run.world_size:  # they are summed over the ranks
            errors[run.to_device(batch.rows[batch.part])] = raw_errors
    run.sync(*net.buffers())  # such as running statistics of batch norms


def train(dataset, plan, *, out, run, size="full", flow=False, seed=0, resume=True, save_minutes=5):
    """Train one model per block, one after another, as one run. dataset: pipeline.CubeVideos. -> checkpoint path"""
    import torch

    from common import training
    from common.distributed import seed_everything
    from common.loader import Loader, epoch_order
    from common.objects.cube_dataset import CubeDataset
    from spr_uvad import advantage, scoring

    out = run.open_output_dir(out)
    videos, records = training_cubes(dataset, plan.setting)
    block = scoring.blocks(dataset.column(videos, "box"), dataset.sizes(videos), plan.grid)
    numbers = np.unique(block).tolist()
    settings = dataset.store.s
    model_args = {**SIZES[size], "num_frames": len(settings.frames), "use_flow": flow}
    identity = make_identity(dataset, plan, model_args, block, seed, run)
    run.print(
        f"{dataset.data.name}, setting {plan.setting}: {len(videos)} videos, {len(block)} cubes in {len(numbers)} "
        f"blocks, {'with' if flow else 'without'} motion, refinement {plan.self_paced}, {run.device}, {run.precision}"
    )
    path, log = out / "spr.pt", training.Log(out / "log.jsonl")
    state = training.previous_run(path, "spr_uvad", identity, resume)
    if run.is_main and not state:
        log.path.unlink(missing_ok=True)  # an earlier run may have had other blocks
    if state and state["done"] and state["epoch"] >= plan.epochs:
        run.print(f"{plan.epochs} epochs done before ({path})")
        return path
    labels = advantage.cube_labels(dataset, videos) if dataset.data.has_labels and run.is_main else None
    values_per_cube = 3 * len(settings.frames) * settings.size**2
    data = CubeDataset(records, scoring.fields(flow), run)
    nets, seconds = {}, state["seconds"] if state else 0.0
    statistics = None

    def save():
        training.save_training(
            path,
            "spr_uvad",
            meter,
            net,
            optimizer,
            done=statistics is not None,
            model_args=model_args,
            grid=list(plan.grid),
            plan=plan.state_dict(),
            identity=identity,
            foreground=vars(settings),
            statistics=statistics,
            block=number,
            errors=errors.cpu(),
            model_state_dicts={str(k): n.state_dict() for k, n in nets.items()},
        )

    for number in numbers:
        seed_everything(seed + number)
        net = scoring.build_model(model_args).to(run.device, memory_format=torch.channels_last)
        nets[number] = net
        if state and number < state["block"]:
            net.load_state_dict(state["model_state_dicts"][str(number)])
            continue
        optimizer = torch.optim.Adam(net.parameters(), lr=plan.lr, fused=True)
        rows = np.flatnonzero(block == number)

        def order(epoch, rows=rows):
            return rows[epoch_order(len(rows), seed, epoch)]

        loader = Loader(data, plan.batch_size, seed, run, order=order)
        errors = torch.zeros(len(block), device=run.device)
        meter = training.EpochMeter(
            run, f"block {number}", plan.epochs, log=log, save=save, unit="cube", save_minutes=save_minutes
        )
        meter.seconds = seconds
        if state and number == state["block"]:
            training.resume(state, path, meter, net, optimizer)
            if run.is_main:  # what other ranks saw of this epoch is missing in its logged means of normal and abnormal
                errors.copy_(state["errors"])
        for epoch in range(meter.epoch, plan.epochs):
            train_one_epoch(net, loader, optimizer, plan, epoch, run, meter, errors)
            epoch_errors = sum(run.all_gather_object(errors.cpu().numpy()))[rows] / values_per_cube
            errors.zero_()
            means = {} if labels is None else advantage.means(epoch_errors, labels[rows])
            meter.end_epoch(loader, **means)
        seconds = meter.seconds
    run.print("training statistics")
    arrays = score_videos(dataset, videos, nets, plan.grid, run, out=out)
    if arrays:  # on rank 0
        cube_errors = np.concatenate([arrays[v.key]["errors"] for v in videos])
        statistics = {str(k): v for k, v in scoring.statistics(cube_errors, block, nets).items()}
    save()
    run.barrier()
    if labels is not None:
        advantage.plot({f"refinement {plan.self_paced}": log.path}, out / "normality_advantage.png")
    return path


def make_identity(dataset, plan, model_args, block, seed, run) -> dict:
    """What must be the same for a run to continue. block: int [cubes], the block of every cube."""
    identity = {
        "model_args": model_args,
        "dataset": dataset.data.name,
        "cubes": [dataset.store.s.key(), len(block)],
        "seed": seed,
        "precision": run.precision,
        "processes": run.world_size,
        **plan.state_dict(),
    }
    if plan.decay == "constant":
        identity["decay"] = None  # as in checkpoints from before there was another
        if len(np.unique(block)) == 1:
            del identity["epochs"]  # with one block --epochs may be raised on resume; several are trained in sequence
    return identity


def training_cubes(dataset, setting):
    """-> the videos of a setting and their records, one array per video. Raises UserError without any cube."""
    if not dataset.test:
        raise UserError(
            f"{dataset.data.name} has no test videos under {dataset.data.root}: this method trains on the videos that "
            "it scores; put them into test/, or straight into the folder"
        )
    if setting == "merge" and not dataset.train:
        raise UserError(
            f"--setting merge: {dataset.data.name} has no training videos under {dataset.data.root}; --setting test "
            "needs none"
        )
    videos = dataset.train + dataset.test if setting == "merge" else dataset.test
    records = dataset.records(videos)
    if not sum(map(len, records)):
        raise UserError(
            "no boxes were found in these videos (nothing moves, or too little): lower --motion-threshold or "
            f"--motion-area, or choose another detector with --boxes (now {dataset.store.s.boxes})"
        )
    return videos, records


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    fields = ("epochs", "batch_size", "lr", "warmup", "self_paced", "shrink", "setting", "decay")
    plan = make_plan(cli.dataset_name(args), grid=args.grid, **cli.given(args, fields))
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        dataset = preprocess.prepare(
            cli.DataSource.from_args(args),
            run,
            foreground=cli.given(args, pipeline.FLAGS),
            splits=("train", "test") if args.setting == "merge" else ("test",),
        )
        out = args.out or Path("runs/spr_uvad") / dataset.data.name
        checkpoint = train(
            dataset,
            plan,
            out=out,
            run=run,
            size=args.size,
            flow=args.flow is not None,
            seed=args.seed,
            resume=args.resume,
            save_minutes=args.save_minutes,
        )
        minutes = (time.perf_counter() - began) / 60
        run.print(f"finished in {minutes:.1f} min including preprocessing; checkpoint {checkpoint}")
        options = cli.ScoreOptions.from_args(args)
        evaluate(dataset, checkpoint, out=out, run=run, options=options, w_raw=args.w_raw, w_flow=args.w_flow)


if __name__ == "__main__":
    run_script(main)
