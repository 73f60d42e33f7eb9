"""LBR-SPR: training steps with and without refinement, the scoring pass folded and as published."""

import numpy as np
import torch

from common import old_training as training
from common.batches import Batches
from common.io import UserError
from spr_uvad import model, preprocess, scoring
from spr_uvad.train import Trainer, plan_of, videos_of
from tests.perf.rates import line, rates, where


def measure_train(args, seconds, r):
    """Cubes/s of a training step without and with the scoring pass, folded and as published, and of scoring."""
    ready = preprocess.prepare(args, r, splits=("train", "test") if args.setting == "merge" else ("test",))
    videos = videos_of(ready, args.setting)
    records = ready.records(videos)
    plan, cubes = plan_of(args, ready.data.name), sum(map(len, records))
    if cubes == 0:
        raise UserError("no cubes to measure with")
    n = min(plan["batch_size"], cubes)
    model_args = {
        **scoring.SIZES[args.size],
        "num_frames": len(ready.store.s.frames),
        "use_flow": args.flow is not None,
    }
    trainer = Trainer(plan, model_args, records, np.zeros(cubes, np.int64), r, None, {}, {})
    trainer.start_block(0, args.seed)
    trainer.net.train()
    data = Batches(records, scoring.fields(trainer.net.use_flow), r.device)
    batch = data.get(np.arange(n))
    whole, cubes_in = slice(0, n), scoring.to_input(batch)["raw"]

    def published_pass():
        trainer.net.eval()
        with torch.no_grad(), r.autocast():
            out = model.cube_errors(trainer.net(cubes_in)["raw"], cubes_in)
        trainer.net.train()
        return out

    def folded_pass():
        with torch.no_grad(), r.autocast():
            return model.cube_errors(trainer.net.folded(cubes_in, flow=False)["raw"], cubes_in)

    plain = scoring.build(model_args).to(r.device).train()
    optimizer, order = (
        torch.optim.Adam(plain.parameters(), lr=plan["lr"]),
        np.random.default_rng(args.seed).permutation(cubes)[:n],
    )
    which = np.searchsorted(data.starts, order, side="right") - 1

    def plain_step():
        """A first version: cubes read one by one, float32, channels first, the network as it is for both passes."""
        own = [data.records[v][i - data.starts[v]] for v, i in zip(which, order)]
        rows = {k: torch.from_numpy(np.stack([x[k] for x in own])).to(r.device) for k in data.fields}
        wanted = {k: x.contiguous() for k, x in scoring.to_input(rows).items()}
        with torch.no_grad():
            plain.eval()
            weights = model.self_paced_weights(
                model.cube_errors(plain(wanted["raw"])["raw"], wanted["raw"]),
                0,
                mode="mixture",
                shrink=plan["shrink"],
                init_std_range=plan["std_range"],
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
        "step without refinement": lambda: trainer.train_step(batch, whole, n, None),
        "step with refinement": lambda: trainer.train_step(batch, whole, n, 0),
        "scoring pass as published": published_pass,
        "scoring pass, folded, raw part alone": folded_pass,
    }
    found = dict(zip(ways, rates(list(ways.values()), n, r.device, seconds)))
    print(f"\nLBR-SPR ({args.size}) on {where(r)}, batch {n}, {'with' if args.flow else 'without'} motion")
    for name, value in found.items():
        line(name, value, "cubes/s", f"{1e3 * n / value:.1f} ms")
    print(
        f"  a step with refinement is {found['step with refinement'] / found['a first version of a step with refinement']:.2f}× as fast "
        "as the first version's (one cube read at a time, float32, channels first, no folding)"
    )
    print(
        f"  the scoring pass is {found['scoring pass, folded, raw part alone'] / found['scoring pass as published']:.2f}× as fast; "
        f"largest relative difference of its scores {float(((a - b).abs() / a).max()):.1e}"
    )
    print(
        f"  refinement costs {100 * (found['step without refinement'] / found['step with refinement'] - 1):.0f} % of a step"
    )
    print(f"  peak memory {training.peak_memory():.0f} MiB")
