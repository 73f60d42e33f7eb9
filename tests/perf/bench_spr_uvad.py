"""LBR-SPR: training steps with and without refinement, the scoring pass folded and as published."""

import numpy as np
import torch

from common import training
from common.cli import DataSource, given
from common.distributed import seed_everything
from common.loader import Batch
from common.objects.cube_dataset import CubeDataset
from common.objects.pipeline import FLAGS
from spr_uvad import model, preprocess, scoring
from spr_uvad.train import SIZES, losses, make_plan, self_paced_weights, training_cubes
from tests.perf.rates import line, rates, where


def measure_train(args, seconds, run):
    """Cubes/s of a training step without and with the scoring pass, folded and as published, and of scoring."""
    splits = ("train", "test") if args.setting == "merge" else ("test",)
    source, foreground = DataSource.from_args(args), given(args, FLAGS)
    dataset = preprocess.prepare(source, run, splits=splits, foreground=foreground)
    _, records = training_cubes(dataset, args.setting)
    plan, cubes = make_plan(dataset.data.name, grid=args.grid), sum(map(len, records))
    n = min(args.batch_size or plan.batch_size, cubes)
    model_args = {**SIZES[args.size], "num_frames": len(dataset.store.s.frames), "use_flow": args.flow is not None}
    seed_everything(args.seed)
    net = scoring.build_model(model_args).to(run.device, memory_format=torch.channels_last).train()
    adam = torch.optim.Adam(net.parameters(), lr=plan.lr, fused=True)
    data = CubeDataset(records, scoring.fields(net.use_flow), run)
    rows = np.arange(n)
    batch = Batch(rows, slice(None), data.to_device(data.read(rows)), None)
    target = scoring.to_input(batch.data)
    cubes_in = target["raw"]

    def step(refined):
        weights = self_paced_weights(net, cubes_in, batch, 0, plan, run) if refined else 1.0
        loss_parts, _ = losses(net, scoring.to_input(batch.data), weights, run)
        adam.zero_grad(set_to_none=True)
        loss_parts["loss"].backward()
        adam.step()

    def published_pass():
        net.eval()
        with torch.no_grad(), run.autocast():
            out = model.cube_errors(net(cubes_in)["raw"], cubes_in)
        net.train()
        return out

    def folded_pass():
        with torch.no_grad(), run.autocast():
            return model.cube_errors(net.folded(cubes_in, flow=False)["raw"], cubes_in)

    plain = scoring.build_model(model_args).to(run.device).train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=plan.lr)
    order = np.random.default_rng(args.seed).permutation(cubes)[:n]
    which = np.searchsorted(data.starts, order, side="right") - 1

    def plain_step():
        """A first version: cubes read one by one, float32, channels first, the network as it is for both passes."""
        own = [data.records[v][i - data.starts[v]] for v, i in zip(which, order)]
        rows = {k: torch.from_numpy(np.stack([x[k] for x in own])).to(run.device) for k in data.fields}
        wanted = {k: x.contiguous() for k, x in scoring.to_input(rows).items()}
        with torch.no_grad():
            plain.eval()
            weights = model.self_paced_weights(
                model.cube_errors(plain(wanted["raw"])["raw"], wanted["raw"]),
                0,
                mode="mixture",
                shrink=plan.shrink,
                init_std_range=plan.std_range,
            )
            plain.train()
        got = plain(wanted["raw"])
        loss = sum(
            model.weighted_loss(model.cube_errors(got[k], wanted[k]), weights, wanted[k][0].numel()) for k in got
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    a, b = published_pass(), folded_pass()
    ways = {
        "a first version of a step with refinement": plain_step,
        "step without refinement": lambda: step(False),
        "step with refinement": lambda: step(True),
        "scoring pass as published": published_pass,
        "scoring pass, folded, raw part only": folded_pass,
    }
    found = dict(zip(ways, rates(list(ways.values()), n, run.device, seconds)))
    print(f"\nLBR-SPR ({args.size}) on {where(run)}, batch {n}, {'with' if args.flow else 'without'} motion")
    for name, value in found.items():
        line(name, value, "cubes/s", f"{1e3 * n / value:.1f} ms")
    print(
        "  a step with refinement is "
        f"{found['step with refinement'] / found['a first version of a step with refinement']:.2f}× as fast "
        "as the first version's (one cube read at a time, float32, channels first, no folding)"
    )
    print(
        "  the scoring pass is "
        f"{found['scoring pass, folded, raw part only'] / found['scoring pass as published']:.2f}× as fast; "
        f"largest relative difference of its scores {float(((a - b).abs() / a).max()):.1e}"
    )
    print(
        f"  refinement costs {100 * (found['step without refinement'] / found['step with refinement'] - 1):.0f} % of a "
        "step"
    )
    print(f"  peak memory {training.peak_memory():.0f} MiB")
