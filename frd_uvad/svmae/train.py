"""Train the weakly supervised detector of SVMAE on bags: whole videos that are labelled as normal or abnormal.
With --encoder, the videos of a dataset are encoded first if they are not yet.

python frd_uvad/svmae/train.py --features features/svmae/folder              # normal.txt and abnormal.txt lie there
python frd_uvad/svmae/train.py --features data/UCF-Crime --text data/captions --fusion add
python frd_uvad/svmae/train.py --dataset folder --data-root my_videos \\
    --encoder svmae:runs/svmae/folder/pretrain.pt+timm:tf_efficientnet_lite0
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli
from common.features.encoders import describe_forms
from common.io import UserError, run_script
from frd_uvad.features.folders import find_features
from frd_uvad.svmae import preprocess
from frd_uvad.svmae.data import SEGMENTS, Bags, find_bags
from frd_uvad.svmae.eval import FUSIONS, GROUPS, add_data_flags, add_eval_flags, evaluate

# torch is imported inside functions: --help answers at once, and decoding processes never load it.

DEFAULTS = dict(iterations=1000, batch_size=64, lr=1e-3)
WEIGHT_DECAY = 5e-3
DROPOUT = 0.7  # of segments, where the loss chooses among them
# where there are fewer bags than a published step has: chosen by cross-validation, see NOTES.md
COMPONENTS, FEW_ITERATIONS = 128, 100


@dataclass
class Plan:
    iterations: int
    batch_size: int  # bags of a step, half of them normal
    lr: float
    top_k: int = 3
    components: int = 0  # principal components of the visual features; 0: the features as they are


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    group = add_data_flags(parser)
    group.add_argument(
        "--encoder",
        help=f"{describe_forms(preprocess.KINDS)}, or several joined by +: first encode the videos of --dataset that "
        "are missing in --features (default then: features/svmae/<dataset>); preprocess.py itself has more flags",
    )
    group.add_argument(
        "--data-root", type=Path, default=Path("data"), help="folder of the videos for --encoder (default: %(default)s)"
    )
    cli.add_run_flags(parser, out="runs/svmae/<dataset>-detector")
    cli.add_optimisation_flags(
        parser,
        epochs="as many as --iterations make; given, it sets them: passes over the abnormal bags",
        batch_size=f"{DEFAULTS['batch_size']}, or all if there are fewer: bags of a step, half of them normal",
        lr=DEFAULTS["lr"],
    )
    group = parser.add_argument_group("method")
    group.add_argument(
        "--normal",
        type=Path,
        help="file with the names of normal training videos, one a line (default: normal.txt beside the features, else "
        "by the names of UCF-Crime and XD-Violence)",
    )
    group.add_argument("--abnormal", type=Path, help="the same of abnormal ones (default: abnormal.txt, else by names)")
    group.add_argument(
        "--iterations",
        type=cli.positive_int,
        help=f"training steps (default: {DEFAULTS['iterations']}, with fewer than {DEFAULTS['batch_size']} bags "
        f"{FEW_ITERATIONS})",
    )
    group.add_argument(
        "--fusion", choices=FUSIONS, default="concat", help="of visual and text features (default: %(default)s)"
    )
    group.add_argument(
        "--feature-group", choices=GROUPS, help="what the detector reads (default: both with --text, else vis)"
    )
    group.add_argument(
        "--aggregate-text",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="text passes another multi-scale temporal network (default: yes)",
    )
    group.add_argument(
        "--top-k",
        type=cli.positive_int,
        default=Plan.top_k,
        help="segments of a bag that decide (default: %(default)s)",
    )
    group.add_argument(
        "--components",
        type=cli.natural_int,
        help="principal components of the standardized visual features that the detector reads; 0: the features as "
        f"they are, as published (default: 0, with fewer than {DEFAULTS['batch_size']} bags {COMPONENTS})",
    )
    add_eval_flags(parser, training=True)
    return parser.parse_args(argv)


def make_plan(counts, width: int, *, epochs=None, top_k=Plan.top_k, components=None, **flags) -> Plan:
    """The published settings, or those for few bags; flags (iterations, batch_size, lr) override them.

    counts: of normal and abnormal bags; width: of their visual features; epochs: passes over the abnormal bags.
    """
    values, few = dict(DEFAULTS), sum(counts) < DEFAULTS["batch_size"]
    if few:
        values |= {"batch_size": max(4, 2 * min(counts)), "iterations": FEW_ITERATIONS}
    values |= flags
    batch = values["batch_size"]
    if batch % 2 or batch < 4:
        raise UserError(f"--batch-size {batch} must be even and at least 4: half of the bags are normal")
    if top_k > SEGMENTS:
        raise UserError(f"--top-k {top_k}: a bag has {SEGMENTS} segments")
    if components and (components > width or components % 4 or components < 8):
        raise UserError(
            f"--components {components} must be a multiple of 4, from 8 to the width of the features, {width}"
        )
    if components is None:
        components = min(COMPONENTS, width - width % 4) if few and width >= 8 else 0
    if epochs and "iterations" not in flags:
        values["iterations"] = -(-epochs * counts[1] // (batch // 2))
    return Plan(**values, top_k=top_k, components=components)


def losses(net, batch, plan, run) -> dict:
    """{name: loss of the whole batch}: the losses compare bags, so the outputs of all ranks are put together."""
    from frd_uvad.svmae import detector

    with run.autocast():
        outputs = net(*batch.data)
    for name, x in outputs.items():
        outputs[name] = run.all_gather_batch(x.float(), len(batch), 1 if name == "features" else 0)
    margin = detector.margin_of(outputs["features"].shape[3]) if plan.components else {}
    parts = detector.losses(outputs, top_k=plan.top_k, dropout=DROPOUT, **margin)
    return {name: parts[name] for name in ("total", "rtfm", "smooth", "sparsity")}


def train_one_epoch(net, loader, optimizer, plan, epoch, run, meter):
    """The steps up to the next line of the log."""
    net.train()
    for batch, _ in meter.batches(loader, epoch):  # this rank's part
        loss_parts = run.data_parallel(losses, net)(batch, plan, run)
        optimizer.zero_grad(set_to_none=True)
        loss_parts["total"].backward()
        optimizer.step()
        meter.update(loss_parts)
    run.sync(*net.buffers())  # such as running statistics of batch norms
    meter.end_epoch(loader)


def train(data, bags, plan, model_args, *, out, run, seed=0, resume=True, save_minutes=5) -> Path:
    """Train a detector on data.Bags of the videos of `data`, a FeatureData. -> checkpoint path"""
    import torch

    from common import training
    from common.distributed import seed_everything
    from common.draw_loader import DrawLoader
    from frd_uvad.svmae import detector, scoring

    path, settings = out / "detector.pt", preprocess.read_settings(data.root)
    identity = {
        "model_args": model_args,
        "features": str(data.root.resolve()),
        "bags": bags.counts,
        "precision": run.precision,
        "processes": run.world_size,
        "seed": seed,
        **asdict(plan),
    }
    if plan.iterations % DrawLoader.LOG_STEPS == 0:  # else it cannot go on: its last interval was cut short
        identity["iterations"] = f"a multiple of {DrawLoader.LOG_STEPS}"
    seed_everything(seed)
    net = scoring.build_model(model_args)
    if plan.components:
        net.mean, net.components = detector.fit_components(bags.visual.flatten(0, 2).cpu(), plan.components)
    net = net.to(run.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=plan.lr, weight_decay=WEIGHT_DECAY, fused=True)

    def draw(rng):
        return bags.draw(rng, plan.batch_size // 2)

    def save():
        training.save_training(
            path,
            scoring.DETECTOR,
            meter,
            net,
            optimizer,
            done=meter.epoch >= loader.epochs,
            model_args=model_args,
            plan=asdict(plan),
            identity=identity,
            features=settings,
        )

    loader = DrawLoader(bags, plan.batch_size, seed, run, draw, plan.iterations)
    meter = training.EpochMeter(
        run,
        "train",
        loader.epochs,
        log=training.Log(out / "log.jsonl"),
        save=save,
        unit="bag",
        save_minutes=save_minutes,
        print_epochs=False,
        log_steps=DrawLoader.LOG_STEPS,
    )
    state = training.previous_run(path, scoring.DETECTOR, identity, resume)
    training.resume(state, path, meter, net, optimizer)
    for epoch in range(meter.epoch, loader.epochs):
        train_one_epoch(net, loader, optimizer, plan, epoch, run, meter)
    run.barrier()
    return path


def make_model_args(
    data, text_dim: int | None, components=0, *, fusion="concat", feature_group=None, aggregate_text=True
) -> dict:
    """The arguments of detector.Detector for a FeatureData. text_dim: width of the captions, None without them;
    components: see Plan."""
    for what, width in (("features", components or data.width), ("caption embeddings", text_dim or 8)):
        if width % 4 or width < 8:
            raise UserError(
                f"{what} of width {width} do not fit: the detector cuts them into 4 equal parts of at least 2"
            )
    return {
        "feature_size": components or data.width,
        **({"input_size": data.width} if components else {}),
        "fusion": fusion,
        "feature_group": feature_group or ("both" if text_dim else "vis"),
        "text_dim": text_dim or 768,
        "aggregate_text": aggregate_text,
    }


def prepare(source: cli.DataSource, features, encoder, run, *, order=None, segments=False):
    """-> FeatureData of the folder `features`. encoder: what --encoder says, which encodes missing videos of the
    dataset, or None."""
    if not encoder:
        if not features:
            raise UserError(
                "nothing to train on: give --features DIR, or videos by --dataset, --data-root and --encoder"
            )
        return find_features(source.dataset, features, source.labels, order, segments)
    features = features or Path("features/svmae") / source.dataset
    dataset = preprocess.prepare(source, preprocess.parse_specs(encoder), run, out=features)
    run.print(dataset.summary())
    data = find_features(source.dataset, features)  # the labels are there
    data.skipped, data.dataset = dataset.skipped, dataset.data
    videos = {(v.split, v.name): v for v in dataset.train + dataset.test}
    # features may be left of a video that is no longer there: then there are no pictures and trivial baselines
    data.videos = videos if all((v.split, v.name) in videos for v in data.test) else {}
    return data


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    if args.feature_group in ("both", "text") and not args.text:
        raise UserError(f"--feature-group {args.feature_group} needs caption embeddings: give --text DIR")
    if args.encoder and (args.order or args.segments):
        raise UserError("--order and --segments are for features made elsewhere, not for --encoder")
    name = cli.dataset_name(args) if args.encoder else args.dataset
    source = cli.DataSource(name, args.data_root, labels=args.labels, workers=args.workers)
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        data = prepare(source, args.features, args.encoder, run, order=args.order, segments=args.segments)
        videos = find_bags(data, args.normal, args.abnormal)
        flags = cli.given(args, ("iterations", "batch_size", "lr", "components"))
        plan = make_plan([len(v) for v in videos], data.width, epochs=args.epochs, top_k=args.top_k, **flags)
        bags = Bags(*videos, args.text, run)
        model_args = make_model_args(
            data,
            None if bags.text is None else bags.text.shape[3],
            plan.components,
            fusion=args.fusion,
            feature_group=args.feature_group,
            aggregate_text=args.aggregate_text,
        )
        text = f", text of width {model_args['text_dim']}, {args.fusion}" if args.text else ""
        text = f" in {plan.components} components{text}" if plan.components else text
        run.print(
            f"{name}: {bags.counts[0]} normal and {bags.counts[1]} abnormal bags of {SEGMENTS} segments, {data.crops} "
            f"crops of width {data.width}{text}, {run.device}, {run.precision}"
        )
        out = run.open_output_dir(args.out or Path("runs/svmae") / f"{name}-detector")
        checkpoint = train(
            data,
            bags,
            plan,
            model_args,
            out=out,
            run=run,
            seed=args.seed,
            resume=args.resume,
            save_minutes=args.save_minutes,
        )
        minutes = (time.perf_counter() - began) / 60
        run.print(f"finished in {minutes:.1f} min including preprocessing; checkpoint {checkpoint}")
        options = cli.ScoreOptions.from_args(args)
        evaluate(data, checkpoint, out=out, run=run, options=options, text=args.text, source=source)


if __name__ == "__main__":
    run_script(main)
