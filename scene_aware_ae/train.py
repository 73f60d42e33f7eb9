"""Train the scene-aware autoencoder on features of normal videos; encoding runs first where it is missing.

python scene_aware_ae/train.py --dataset demo                                   # a stand-in encoder, no download
python scene_aware_ae/train.py --dataset shanghaitech-sd --encoder clip:ViT-L-14-quickgelu:FILE.pt
python scene_aware_ae/train.py --dataset ped2 --encoder timm:tf_efficientnet_lite0       # one scene: mode 0
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.io import UserError, run_script
from scene_aware_ae import preprocess
from scene_aware_ae.eval import add_eval_flags, evaluate

# torch is imported inside functions: --help answers at once, and decoding processes never load it.


@dataclass
class Plan:
    """The schedule; by default the published one."""

    iterations: int = 5000
    segments_per_scene: int = 30  # in each step
    lr: float = 1e-4
    mode: int = 1  # 0: reconstruction; 1: and contrast between scenes; 2: and a classifier of scenes


DEFAULTS = Plan()
MODEL = {"hidden_dim": 256, "latent_dim": 256}


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/scene_aware_ae/<dataset>")
    cli.add_optimisation_flags(
        parser,
        lr=DEFAULTS.lr,
        epochs="as many as --iterations make; given, it sets them: passes over the training frames",
        batch_size="--segments-per-scene times scenes; given, it sets them: segments of a step",
    )
    group = parser.add_argument_group("method")
    group.add_argument(
        "--mode",
        "--training_mode",
        type=int,
        choices=[0, 1, 2],
        help="0: reconstruction; 1: and contrast between scenes; 2: and a classifier of scenes (default: 1; with one "
        "scene 0)",
    )
    group.add_argument("--iterations", type=cli.positive_int, help=f"training steps (default: {DEFAULTS.iterations})")
    group.add_argument(
        "--segments-per-scene", type=cli.positive_int, help=f"in each step (default: {DEFAULTS.segments_per_scene})"
    )
    group.add_argument("--variational", action="store_true", help="a variational autoencoder instead")
    add_eval_flags(parser, training=True)
    return parser.parse_args(argv)


def make_plan(
    scenes: int,
    frames: int,
    *,
    iterations=None,
    segments_per_scene=None,
    lr=None,
    mode=None,
    epochs=None,
    batch_size=None,
) -> Plan:
    """The schedule for training videos of so many scenes and frames; None: the default. Raises UserError.

    epochs (passes over the frames) and batch_size (segments of a step) are other words for the first two.
    """
    from scene_aware_ae.scoring import LENGTH

    if not segments_per_scene:
        segments_per_scene = max(1, batch_size // scenes) if batch_size else DEFAULTS.segments_per_scene
    if not iterations:
        frames_per_step = segments_per_scene * scenes * LENGTH
        iterations = -(-epochs * frames // frames_per_step) if epochs else DEFAULTS.iterations
    if mode is None:
        mode = DEFAULTS.mode if scenes > 1 else 0
    if mode and scenes < 2:
        raise UserError(
            f"--mode {mode} contrasts scenes, and this dataset has one: use --mode 0, or name the scenes with --scenes "
            "FILE.csv (lines video,scene)"
        )
    if mode and segments_per_scene < 2:
        raise UserError("--segments-per-scene must be at least 2 for a contrast within a scene")
    return Plan(iterations, segments_per_scene, lr or DEFAULTS.lr, mode)


def losses(net, batch, scene_labels, mode, run) -> dict:
    """{name: loss over the whole batch}, "total" among them: the contrast is between the segments of all ranks."""
    from scene_aware_ae import model

    with run.autocast():
        out = net(batch.data)
    out = {k: run.all_gather_batch(v.float(), len(batch)) for k, v in out.items()}
    return model.losses(out, run.all_gather_batch(batch.data, len(batch)), scene_labels, mode=mode)


def train_one_epoch(net, loader, optimizer, plan, scene_labels, epoch, run, meter):
    """An epoch is the steps between two lines of the log."""
    net.train()
    for batch, _ in meter.batches(loader, epoch):  # this rank's part of the batch
        meter.set_lr(optimizer, plan.lr)
        loss_parts = run.data_parallel(losses, net)(batch, scene_labels, plan.mode, run)
        optimizer.zero_grad(set_to_none=True)
        loss_parts["total"].backward()
        optimizer.step()
        meter.update(loss_parts)
    run.sync(*net.buffers())  # such as running statistics of batch norms
    meter.end_epoch(loader)


def train(dataset, *, out, run, variational=False, seed=0, resume=True, save_minutes=5, **plan_flags) -> Path:
    """dataset: preprocess.EncodedVideos; plan_flags: for make_plan(). -> path of the finished checkpoint"""
    import torch

    from common import training
    from common.distributed import seed_everything
    from common.draw_loader import DrawLoader
    from scene_aware_ae import scoring
    from scene_aware_ae.data import Segments

    data = dataset.data
    out = run.open_output_dir(out)
    if not dataset.train:
        raise UserError(f"{data.name} has no training videos under {data.root}: put normal videos into train/")
    segments = Segments(dataset, run)
    scenes = len(segments.scenes)
    plan = make_plan(scenes, segments.frames, **plan_flags)
    encoder = dataset.encoder.describe()
    model_args = {"input_dim": encoder["width"], **MODEL, "num_scenes": max(2, scenes), "variational": variational}
    identity = {
        "model_args": model_args,
        "dataset": data.name,
        "features": encoder,
        "frames": segments.frames,
        "seed": seed,
        "precision": run.precision,
        "processes": run.world_size,
        **asdict(plan),
    }
    if plan.iterations % DrawLoader.LOG_STEPS == 0:
        identity["iterations"] = (
            f"a multiple of {DrawLoader.LOG_STEPS}"  # may be raised: the last epoch was a whole one
        )
    run.print(
        f"{data.name}: {len(dataset.train)} training videos of {scenes} scenes, {segments.frames} frames, mode "
        f"{plan.mode}"
        f"{', variational' if variational else ''}, {run.device}, {run.precision}"
    )
    seed_everything(seed)
    net = scoring.build_model(model_args).to(run.device)
    net.classifier.requires_grad_(plan.mode == 2)  # the other modes do not use it
    optimizer = torch.optim.Adam(net.parameters(), lr=plan.lr, fused=True)
    batch_size = scenes * plan.segments_per_scene
    loader = DrawLoader(
        segments, batch_size, seed, run, lambda rng: segments.draw(rng, plan.segments_per_scene), plan.iterations
    )
    path, log = out / "scene_aware_ae.pt", training.Log(out / "log.jsonl")

    def save():
        training.save_training(
            path,
            "scene_aware_ae",
            meter,
            net,
            optimizer,
            done=meter.epoch >= loader.epochs,
            model_args=model_args,
            plan=asdict(plan),
            identity=identity,
            scenes=segments.scenes,
            encoder={**encoder, "flag": dataset.encoder.flag},
        )

    meter = training.EpochMeter(
        run,
        "train",
        loader.epochs,
        log=log,
        save=save,
        unit="segment",
        save_minutes=save_minutes,
        print_epochs=False,
        log_steps=loader.LOG_STEPS,
    )
    state = training.previous_run(path, "scene_aware_ae", identity, resume)
    training.resume(state, path, meter, net, optimizer)
    scene_labels = segments.scene_labels(plan.segments_per_scene)
    for epoch in range(meter.epoch, loader.epochs):
        train_one_epoch(net, loader, optimizer, plan, scene_labels, epoch, run, meter)
    run.barrier()
    return path


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    from common.distributed import Run

    with Run(args.device, args.precision) as run:
        source, encoder = cli.DataSource.from_args(args), preprocess.EncoderOptions.from_args(args)
        dataset = preprocess.prepare(source, run, encoder, scenes=args.scenes)
        out = args.out or Path("runs/scene_aware_ae") / dataset.data.name
        checkpoint = train(
            dataset,
            out=out,
            run=run,
            variational=args.variational,
            seed=args.seed,
            resume=args.resume,
            save_minutes=args.save_minutes,
            **cli.given(args, ("iterations", "segments_per_scene", "lr", "mode", "epochs", "batch_size")),
        )
        minutes = (time.perf_counter() - began) / 60
        run.print(f"finished in {minutes:.1f} min including preprocessing; checkpoint {checkpoint}")
        options = cli.ScoreOptions.from_args(args)
        evaluate(dataset, checkpoint, out=out, run=run, options=options, workers=args.workers)


if __name__ == "__main__":
    run_script(main)
