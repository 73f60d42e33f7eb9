"""Pre-train a video masked autoencoder on any folder of unlabeled videos; decoding runs first if it is missing.

python frd_uvad/svmae/pretrain.py --dataset folder --data-root my_videos --preset vit_s --size 112
python frd_uvad/svmae/pretrain.py --dataset ped2 --masking tube --loss mse                      # VideoMAE's own recipe
python frd_uvad/svmae/pretrain.py --dataset demo --preset tiny --size 64 --frames 8 --epochs 20 --preview
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common import cli
from common.cache import FrameCache
from common.io import UserError, run_script
from common.readers import datasets
from common.readers.dataset import UsableVideos, report_skipped
from common.readers.video import Decoder
from frd_uvad.svmae.preprocess import DEPTHS, PRESETS

# torch is imported inside functions: --help answers at once, and decoding processes never load it.

# VideoMAE's recipe; lr is that of 256 clips a step
DEFAULTS = dict(epochs=800, batch_size=64, lr=1.5e-4, size=224)
DEMO = dict(epochs=40, batch_size=8, lr=8 * 1.5e-4, size=64)
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.05
OTHER_SHAPE = 0.05  # a video whose aspect ratio differs by more is reported as squeezed


@dataclass
class Plan:
    epochs: int
    batch_size: int
    lr: float
    warmup: float  # epochs
    size: int
    frames: int = 16
    stride: int = 2
    masking: str = "scene"
    mask_ratio: float = 0.9
    space: float = 0.5
    time: float = 0.5
    loss: str = "perspective"
    layer_decay: float = 1.0

    def lr_at(self, epoch: float) -> float:
        """Warm-up in a line, then half a cosine to zero; epoch may be a fraction."""
        if epoch < self.warmup:
            return self.lr * (epoch / self.warmup)
        progress = (epoch - self.warmup) / max(1e-9, self.epochs - self.warmup)
        return self.lr * (0.5 * (1 + math.cos(math.pi * progress)))


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/svmae/<dataset>")
    cli.add_optimisation_flags(
        parser,
        epochs="800; on demo 40",
        batch_size="64; on demo 8",
        lr=f"{DEFAULTS['lr']} · batch / 256; on demo {DEMO['lr']} · batch / 256",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset", choices=PRESETS, help="size; tiny is for the demo and tests (default: vit_b, on demo tiny)"
    )
    group.add_argument(
        "--size", type=cli.positive_int, help="side of the crops, px, a multiple of 16 (default: 224, on demo 64)"
    )
    group.add_argument("--frames", type=cli.positive_int, help=f"frames of a clip, even (default: {Plan.frames})")
    group.add_argument("--stride", type=cli.positive_int, help=f"frames between two of a clip (default: {Plan.stride})")
    group.add_argument(
        "--init", type=Path, help="VideoMAE's published weights, or a checkpoint of this script, to start from"
    )
    group = parser.add_argument_group("method")
    group.add_argument(
        "--videos",
        choices=["train", "all"],
        default="train",
        help="training videos, or test videos too (default: train, if there are any)",
    )
    group.add_argument("--masking", choices=["scene", "random", "tube"], help=f"(default: {Plan.masking})")
    group.add_argument(
        "--mask-ratio", type=cli.share, help=f"share of tokens that are masked (default: {Plan.mask_ratio})"
    )
    group.add_argument(
        "--space-weight",
        dest="space",
        type=cli.natural_float,
        help=f"of nearness in the scene-aware probability (default: {Plan.space})",
    )
    group.add_argument(
        "--time-weight", dest="time", type=cli.natural_float, help=f"of the cube difference (default: {Plan.time})"
    )
    group.add_argument("--loss", choices=["perspective", "mse"], help=f"(default: {Plan.loss})")
    group.add_argument("--depth", default="perspective", help=f"{DEPTHS} (default: %(default)s)")
    group.add_argument(
        "--warmup", type=cli.natural_int, help="epochs of rising learning rate (default: a twentieth of --epochs)"
    )
    group.add_argument(
        "--layer-decay",
        type=cli.number(float, 1e-3),
        help="with --init: factor of the learning rate from each encoder block to the one before it (default: "
        f"{Plan.layer_decay})",
    )
    group.add_argument(
        "--preview",
        action="store_true",
        help="draw input, depth, cube difference, probability, mask and reconstruction of four clips with the newest "
        "checkpoint, and stop",
    )
    return parser.parse_args(argv)


def make_plan(dataset: str, **flags) -> Plan:
    """The published constants, or the demo's; flags {name of a Plan field: value} override them. Raises UserError."""
    from frd_uvad.svmae.model import PATCH, TUBELET

    values = {**(DEMO if dataset == "demo" else DEFAULTS), **flags}
    if "lr" not in flags:
        values["lr"] *= values["batch_size"] / 256
    plan = Plan(**{"warmup": values["epochs"] / 20, **values})
    if plan.frames % TUBELET or plan.size % PATCH:
        raise UserError(f"--frames {plan.frames} must be even, and --size {plan.size} a multiple of {PATCH}")
    if not 0 < plan.mask_ratio < 1:
        raise UserError(f"--mask-ratio {plan.mask_ratio} must be between 0 and 1")
    return plan


def prepare(source: cli.DataSource, size: int, run, *, with_test=False) -> tuple[UsableVideos, FrameCache]:
    """Decode the training videos, with 8/7 · size along their shorter side. with_test: and the test videos; without
    training videos they are taken in any case. Raises UserError."""
    with run.main_first():
        data = datasets.find(source.dataset, source.data_root, source.labels)
    videos = data.train + data.test if with_test or not data.train else data.train
    if not videos:
        raise UserError(f"{data.name} has no videos under {data.root}")
    h, w = first_shape(videos)
    scale = size * 8 / 7 / min(h, w)
    shape = round(h * scale), round(w * scale)
    cache = FrameCache(data.cache_folder(source.cache) / f"frames-{shape[0]}x{shape[1]}", shape)
    usable, failed = cache.prepare(videos, run, workers=source.workers)
    ratios = [(v, np.divide(*cache.info(v)["source_size"][::-1])) for v in usable]
    squeezed = [v.name for v, ratio in ratios if abs(ratio * h / w - 1) > OTHER_SHAPE]
    if squeezed:
        text = f"{len(squeezed)} videos of another shape than {w}×{h}, such as {squeezed[0]}, are squeezed to it"
        run.print(f"note: {text}")
    dataset = UsableVideos(data, usable, failed)
    if run.is_main:
        report_skipped(dataset.skipped)
    return dataset, cache


def first_shape(videos: list) -> tuple[int, int]:
    """(height, width) of the first video that can be decoded. Raises UserError where none can."""
    for v in videos:
        try:
            return next(iter(Decoder(v))).shape[:2]
        except UserError as e:  # named when all are decoded
            error = e
    raise error


def make_clips(dataset: UsableVideos, cache: FrameCache, plan: Plan, depth: str, run):
    """The training set, a clips.Clips. depth: see clips.Depth."""
    from frd_uvad.svmae.clips import Clips, Depth

    videos = dataset.train + dataset.test
    arrays = [cache.frames(v) for v in videos]
    maps = Depth(depth, videos, arrays, cache.folder.parent, run.device)
    return Clips(arrays, maps, plan.frames, plan.stride, run)


def parameter_groups(net, layer_decay: float) -> list[dict]:
    """AdamW's groups: norms, biases and tokens do not decay; `scale` falls from each block to the one before it."""
    depth, groups = len(net.encoder.blocks), {}
    for name, p in net.named_parameters():
        level = depth + 1
        if name.startswith("encoder.patch_embed"):
            level = 0
        elif name.startswith("encoder.blocks."):
            level = int(name.split(".")[2]) + 1
        decay = 0.0 if p.ndim <= 1 or name.endswith("token") else WEIGHT_DECAY
        groups.setdefault((level, decay), []).append(p)
    return [
        {"params": parameters, "weight_decay": decay, "scale": layer_decay ** (depth + 1 - level)}
        for (level, decay), parameters in groups.items()
    ]


def load_init(net, path: Path, run) -> None:
    """Start from other weights: all of ours, the encoder of VideoMAE's. Says what did not fit. Raises UserError."""
    from common import training
    from frd_uvad.svmae import encoder, model

    state = training.load_checkpoint(path)
    weights = encoder.bare_weights(state)
    unexpected, missing = model.load_encoder(net.encoder, weights)
    entries = len(net.encoder.state_dict())
    if len(missing) == entries:
        raise UserError(f"--init {path}: none of its weights fits the encoder; is it of another size than --preset?")
    if state.get("method") == encoder.PRETRAINED:
        try:
            net.load_state_dict(weights)
            unexpected = []
        except RuntimeError:  # a decoder of another size
            pass
    text = f"--init {path}: {entries - len(missing)} of {entries} entries of the encoder are set"
    if missing:
        text += f"; stayed as they were: {', '.join(missing[:6])}"
    if unexpected:
        text += f"; left out of the file: {', '.join(unexpected[:6])}{' …' if len(unexpected) > 6 else ''}"
    run.print(text)


def random_input(batch, grid, plan, run):
    """This rank's clips, cropped and masked at random -> tokens [n, L, 3, 512], nearness [n, L], mask bool [n, L].

    Random choices are made for the whole batch, so that they do not depend on the number of ranks.
    """
    from frd_uvad.svmae import model
    from frd_uvad.svmae.clips import crop_clips, random_crops

    frames, near = batch.data
    crops = run.to_device(random_crops(len(batch), frames.shape[2:4], batch.rng)[batch.part])
    clips, near = crop_clips(frames, near, crops, plan.size)
    tokens, near = model.tokenize(clips), model.pool(near, grid)
    noise = run.to_device(batch.rng.random((len(batch), tokens.shape[1]), np.float32)[batch.part])
    mask = model.make_mask(plan.masking, tokens, near, grid, noise, plan.mask_ratio, space=plan.space, time=plan.time)
    return tokens, near, mask


def losses(net, tokens, near, mask, plan, run) -> dict:
    """{name: mean loss over this rank's masked tokens}"""
    from frd_uvad.svmae import model

    slices = net.grid[0] if plan.masking == "tube" else 1  # a tube hides the same places at all times
    masked = slices * model.masked_tokens(plan.mask_ratio, net.tokens // slices)
    with run.autocast():
        prediction, hidden = net(tokens, mask, masked)
    weights = model.perspective_weights(near) if plan.loss == "perspective" else None
    return {"loss": model.reconstruction_loss(prediction, tokens, hidden, weights)}


def train_one_epoch(net, loader, optimizer, plan, epoch, run, meter):
    net.train()
    for batch, weight in meter.batches(loader, epoch):  # this rank's part, and its weight in the batch mean
        meter.set_lr(optimizer, plan.lr_at(epoch + meter.progress))
        tokens, near, mask = random_input(batch, net.grid, plan, run)
        loss_parts = run.data_parallel(losses, net)(tokens, near, mask, plan, run)
        optimizer.zero_grad(set_to_none=True)
        (loss_parts["loss"] * weight).backward()
        optimizer.step()
        meter.update(loss_parts, weight)
    clips = loader.samples - meter.first_step * loader.batch_size
    meter.end_epoch(loader, tokens_per_second=clips * net.tokens / (time.perf_counter() - meter.began))


def train(net, clips, plan, identity, *, out, run, init=None, seed=0, resume=True, save_minutes=5) -> Path:
    """Train a model.SVMAE on clips.Clips from where its checkpoint is. -> checkpoint path

    identity: settings that a resumed run must share, `model_args` among them; init: file of weights to start from.
    """
    import torch

    from common import training
    from common.loader import Loader
    from frd_uvad.svmae.encoder import PRETRAINED
    from frd_uvad.svmae.preview import draw_preview

    path = out / "pretrain.pt"
    optimizer = torch.optim.AdamW(parameter_groups(net, plan.layer_decay), lr=plan.lr, betas=BETAS, fused=True)

    def save():
        training.save_training(
            path,
            PRETRAINED,
            meter,
            net,
            optimizer,
            done=meter.epoch >= plan.epochs,
            model_args=identity["model_args"],
            plan=asdict(plan),
            identity=identity,
        )

    meter = training.EpochMeter(
        run,
        "pretrain",
        plan.epochs,
        log=training.Log(out / "log.jsonl"),
        save=save,
        unit="clip",
        save_minutes=save_minutes,
        print_epochs=False,
    )
    state = training.previous_run(path, PRETRAINED, identity, resume)
    if init and not state:
        load_init(net, init, run)
    training.resume(state, path, meter, net, optimizer)

    def order(epoch):
        return clips.epoch_samples(seed, epoch)

    loader = Loader(clips, plan.batch_size, seed, run, order=order)
    for epoch in range(meter.epoch, plan.epochs):
        train_one_epoch(net, loader, optimizer, plan, epoch, run, meter)
    run.barrier()
    if run.is_main:
        draw_preview(net, clips, plan, run, out / "preview.png", seed)
    return path


def preview(net, clips, plan, identity, *, out, run, seed=0) -> None:
    """The picture that train() draws at its end, with the newest checkpoint, if there is one."""
    from common import training
    from frd_uvad.svmae.encoder import PRETRAINED
    from frd_uvad.svmae.preview import draw_preview

    path = out / "pretrain.pt"
    if path.exists():
        state = training.load_checkpoint(path, PRETRAINED)
        training.check_identity(path, state.get("identity"), identity)
        net.load_state_dict(state["model_state_dict"])
    draw_preview(net, clips, plan, run, out / "preview.png", seed)


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    name = cli.dataset_name(args)
    plan = make_plan(name, **cli.given(args, [field.name for field in fields(Plan)]))
    preset = args.preset or ("tiny" if name == "demo" else "vit_b")
    from common.distributed import Run, seed_everything
    from frd_uvad.svmae import model

    with Run(args.device, args.precision) as run:
        dataset, cache = prepare(cli.DataSource.from_args(args), plan.size, run, with_test=args.videos == "all")
        clips = make_clips(dataset, cache, plan, args.depth, run)
        identity = {
            "model_args": {**model.PRESETS[preset], "frames": plan.frames, "size": plan.size},
            "dataset": name,
            "clips": len(clips),
            "precision": run.precision,
            "processes": run.world_size,
            "init": str(args.init) if args.init else None,
            "depth": args.depth,
            "seed": args.seed,
            **asdict(plan),
        }
        out = run.open_output_dir(args.out or Path("runs/svmae") / name)
        seed_everything(args.seed)
        net = model.SVMAE(**identity["model_args"]).to(run.device)
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        run.print(
            f"{name}: {len(clips.arrays)} videos, {len(clips)} clips of {plan.frames} frames an epoch, "
            f"{clips.size[0]}×{clips.size[1]} cut to {plan.size}², {net.tokens} tokens, {parameters:.1f} M parameters "
            f"({preset}), masking {plan.masking}, loss {plan.loss}, {run.device}, {run.precision}"
        )
        if args.preview:
            return preview(net, clips, plan, identity, out=out, run=run, seed=args.seed)
        checkpoint = train(
            net,
            clips,
            plan,
            identity,
            out=out,
            run=run,
            init=args.init,
            seed=args.seed,
            resume=args.resume,
            save_minutes=args.save_minutes,
        )
        minutes = (time.perf_counter() - began) / 60
        run.print(f"pre-trained in {minutes:.1f} min including preprocessing; checkpoint {checkpoint}")
        run.print(f"next: python frd_uvad/svmae/preprocess.py --dataset {args.dataset} --checkpoint {checkpoint}")


if __name__ == "__main__":
    run_script(main)
