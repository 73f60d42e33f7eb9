"""Pre-train a video masked autoencoder on any folder of unlabeled videos; decoding runs first where it is missing.

python frd_uvad/svmae/pretrain.py --dataset folder --data-root my_videos --preset vit_s --size 112
python frd_uvad/svmae/pretrain.py --dataset ped2 --masking tube --loss mse                      # VideoMAE's own recipe
python frd_uvad/svmae/pretrain.py --dataset demo --preset tiny --size 64 --frames 8 --epochs 20 --preview
"""

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from common import cli, datasets
from common import old_training as training
from common.batches import parts_of
from common.cache import FrameCache
from common.dataset import UsableVideos
from common.evaluation import report_folder
from common.io import UserError, run
from common.late import Late, torch
from common.pool import prepare_videos
from common.video import Decoder
from frd_uvad.svmae.clips import DEPTHS, WHOLE, Clips, Depth, cut, random_crops
from frd_uvad.svmae.preprocess import PRESETS

m = Late("frd_uvad.svmae.model")

METHOD = "svmae"
EPOCHS, WARMUP, BATCH, LR, BETAS, DECAY = (
    800,
    40,
    64,
    1.5e-4,
    (0.9, 0.95),
    0.05,
)  # VideoMAE's recipe; lr is per 256 clips


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/svmae/<dataset>")
    g = cli.add_optimisation_flags(parser, epochs=EPOCHS, batch_size=BATCH, lr=f"{LR} · batch / 256")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g = parser.add_argument_group("model")
    g.add_argument(
        "--preset",
        choices=PRESETS,
        default=None,
        help="size; tiny is for the demo and tests (default: vit_b, on demo tiny)",
    )
    g.add_argument(
        "--size", type=int, default=None, help="side of the crops, px, a multiple of 16 (default: 224, on demo 64)"
    )
    g.add_argument("--frames", type=int, default=16, help="frames of a clip, even (default: %(default)s)")
    g.add_argument("--stride", type=int, default=2, help="frames between two of a clip (default: %(default)s)")
    g.add_argument(
        "--init",
        type=Path,
        default=None,
        help="VideoMAE's published weights, or a checkpoint of this script, to start from",
    )
    g = parser.add_argument_group("method")
    g.add_argument(
        "--videos",
        choices=["train", "all"],
        default="train",
        help="training videos, or test videos too (default: train, where there are some)",
    )
    g.add_argument("--masking", choices=["scene", "random", "tube"], default="scene", help="(default: %(default)s)")
    g.add_argument(
        "--mask-ratio", type=float, default=0.9, help="share of tokens that are masked (default: %(default)s)"
    )
    g.add_argument(
        "--space-weight",
        type=float,
        default=0.5,
        help="of nearness in the scene-aware probability (default: %(default)s)",
    )
    g.add_argument("--time-weight", type=float, default=0.5, help="of the cube difference (default: %(default)s)")
    g.add_argument("--loss", choices=["perspective", "mse"], default="perspective", help="(default: %(default)s)")
    g.add_argument("--depth", default="perspective", help=f"{DEPTHS} (default: %(default)s)")
    g.add_argument(
        "--warmup", type=int, default=None, help="epochs of rising learning rate (default: a twentieth of --epochs)"
    )
    g.add_argument(
        "--layer-decay",
        type=float,
        default=1.0,
        help="with --init: factor of the learning rate from each encoder block to "
        "the one before it (default: %(default)s)",
    )
    g.add_argument(
        "--preview",
        action="store_true",
        help="draw input, depth, cube difference, probability, mask and reconstruction of "
        "four clips with the newest checkpoint, and stop",
    )
    return parser.parse_args(argv)


def plan_of(args, dataset):
    demo = dataset == "demo"
    plan = {
        "epochs": args.epochs or (40 if demo else EPOCHS),
        "batch_size": args.batch_size or (8 if demo else BATCH),
        "frames": args.frames,
        "stride": args.stride,
        "size": args.size or (64 if demo else 224),
        "masking": args.masking,
        "mask_ratio": args.mask_ratio,
        "space": args.space_weight,
        "time": args.time_weight,
        "loss": args.loss,
        "depth": args.depth,
        "layer_decay": args.layer_decay,
        "seed": args.seed,
    }
    plan["lr"] = args.lr or LR * plan["batch_size"] / 256 * (8 if demo else 1)
    plan["warmup"] = plan["epochs"] / 20 if args.warmup is None else args.warmup
    for key, least in (
        ("epochs", 1),
        ("batch_size", 1),
        ("frames", 2),
        ("stride", 1),
        ("size", 16),
        ("lr", 1e-12),
        ("space", 0),
        ("time", 0),
        ("layer_decay", 1e-3),
    ):
        if plan[key] < least:
            raise UserError(f"--{key.replace('_', '-')} must be at least {least}")
    if plan["frames"] % m.TUBELET or plan["size"] % m.PATCH:
        raise UserError(f"--frames {plan['frames']} must be even, and --size {plan['size']} a multiple of {m.PATCH}")
    if not 0 < plan["mask_ratio"] < 1:
        raise UserError(f"--mask-ratio {plan['mask_ratio']} must be between 0 and 1")
    return plan


def prepare(args, r, size):
    """-> Dataset, the videos to learn from, their frames [T, H, W, C] with a short side of 8/7 · size, the cache's folder."""
    with r.main_first():
        data = datasets.find(args.dataset, args.data_root, args.labels)
    videos = data.train + data.test if args.videos == "all" or not data.train else data.train
    if not videos:
        raise UserError(f"{data.name} has no videos under {data.root}")
    h, w = next(iter(Decoder(videos[0]))).shape[:2]
    scale = size * 8 / 7 / min(h, w)
    shape = round(h * scale), round(w * scale)
    folder = data.cache_folder(args.cache)
    cache = FrameCache(folder / f"frames-{shape[0]}x{shape[1]}", shape)
    usable, failed = prepare_videos(cache, videos, cache.build, args, r)
    ready = UsableVideos(data, videos, failed)
    other = [
        v for v in usable if abs(cache.info(v)["source_size"][1] / cache.info(v)["source_size"][0] * h / w - 1) > 0.05
    ]
    if other:
        r.print(f"note: {len(other)} videos of another shape than {w}×{h}, such as {other[0].name}, are squeezed to it")
    if r.is_main:
        ready.report_skipped()
    return data, usable, [cache.frames(v) for v in usable], folder


class Trainer:
    def __init__(self, plan, model_args, clips, r, path, identity):
        self.plan, self.model_args, self.clips, self.run, self.path, self.identity = (
            plan,
            model_args,
            clips,
            r,
            path,
            identity,
        )
        training.seed_everything(plan["seed"])
        self.net = m.SVMAE(**model_args).to(r.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.net, plan["layer_decay"]), lr=plan["lr"], betas=BETAS, fused=True
        )
        self.at, self.sums, self.seconds, self.done = {"epoch": 0, "step": 0}, {}, 0.0, False

    def save(self):
        if self.run.is_main:
            training.save_checkpoint(
                self.path,
                {
                    "method": METHOD,
                    "done": self.done,
                    "model_args": self.model_args,
                    "plan": self.plan,
                    "identity": self.identity,
                    "model_state_dict": self.net.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "at": self.at,
                    "sums": self.sums,
                    "seconds": self.seconds,
                    "rng": training.get_rng(),
                },
            )

    def load(self):
        if not self.path.exists():
            return False
        state = training.load_checkpoint(self.path, METHOD)
        training.check_identity(self.path, state.get("identity"), self.identity)
        self.net.load_state_dict(state["model_state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.at, self.sums, self.seconds, self.done = state["at"], state["sums"], state["seconds"], state["done"]
        training.set_rng(state["rng"])
        return True

    def lr(self, epoch):
        """Warm-up in a line, then half a cosine to zero; epoch may be a fraction."""
        warm, whole = self.plan["warmup"], self.plan["epochs"]
        if epoch < warm:
            return epoch / warm
        return 0.5 * (1 + math.cos(math.pi * (epoch - warm) / max(1e-9, whole - warm)))

    def input(self, frames, near, rng, global_batch=None):
        """Raw clips -> tokens [n, L, 3, 512], nearness [n, L], mask [n, L]; cropped and masked anew by rng.

        Crops and masks are drawn for the whole batch of `global_batch`'s, so that they do not depend on the number of processes.
        """
        global_batch = global_batch or len(frames)
        part, _ = self.run.batch_slice(global_batch)
        clips, near = cut(frames, near, random_crops(global_batch, frames.shape[2:4], rng)[part], self.plan["size"])
        tokens, near = m.tokenize(clips), m.pool(near, self.net.grid)
        noise = torch.from_numpy(rng.random((global_batch, tokens.shape[1]), np.float32)[part]).to(
            tokens.device, non_blocking=True
        )
        return tokens, near, self.mask(tokens, near, noise)

    def mask(self, tokens, near, noise):
        plan = self.plan
        if plan["masking"] == "random":
            return m.random_mask(plan["mask_ratio"], noise)
        if plan["masking"] == "tube":
            return m.tube_mask(plan["mask_ratio"], noise, self.net.grid)
        p = m.mask_probability(m.cube_difference(tokens, self.net.grid), near, plan["space"], plan["time"])
        return m.draw_mask(p, plan["mask_ratio"], noise)

    def step(self, frames, near, rng, global_batch=None):
        """One step on this process's raw clips, of a batch of `global_batch`'s. -> loss, detached."""
        tokens, near, mask = self.input(frames, near, rng, global_batch)
        with self.run.autocast():
            prediction, hidden = self.net(tokens, mask)
        weights = m.perspective_weights(near) if self.plan["loss"] == "perspective" else None
        loss = (
            m.reconstruction_loss(prediction, tokens, hidden, weights)
            * self.run.batch_slice(global_batch or len(frames))[1]
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.run.average_gradients(self.net)
        self.optimizer.step()
        return loss.detach()

    def train(self, args, log):
        r, plan, at = self.run, self.plan, self.at
        steps = -(-len(self.clips) // plan["batch_size"])
        length = int(np.prod(self.net.grid))
        bar = tqdm(
            total=plan["epochs"] * steps,
            initial=at["epoch"] * steps + at["step"],
            desc="pre-train",
            unit="step",
            disable=not r.is_main,
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
        )
        if args.compile:
            self.net.compile()
        self.net.train()
        saved = time.perf_counter()
        while at["epoch"] < plan["epochs"]:
            order = self.clips.epoch(plan["seed"], at["epoch"])
            began, spent, first = time.perf_counter(), self.seconds, at["step"]
            self.clips.waited = 0.0
            for _, frames, near in self.clips.iterate(parts_of(order, plan["batch_size"], first, r.rank, r.world_size)):
                factor = self.lr(at["epoch"] + at["step"] / steps)
                for g in self.optimizer.param_groups:
                    g["lr"] = plan["lr"] * g["scale"] * factor
                global_batch = min(plan["batch_size"], len(order) - at["step"] * plan["batch_size"])
                loss = self.step(
                    frames, near, np.random.default_rng([plan["seed"], at["epoch"], at["step"], 0]), global_batch
                )
                self.sums["loss"] = self.sums.get("loss", 0.0) + loss
                at["step"] += 1
                bar.update()
                now = time.perf_counter()
                save = now - saved > args.save_minutes * 60 and at["step"] < steps
                if save or at["step"] % 20 == 0 or at["step"] == steps:
                    total = float(self.sums["loss"])
                    training.check_finite(total, f"in epoch {at['epoch'] + 1}, step {at['step']}")
                    bar.set_postfix(loss=f"{total / at['step']:.4f}", epoch=f"{at['epoch'] + 1}/{plan['epochs']}")
                if save:
                    self.seconds = spent + now - began
                    self.save()
                    saved = time.perf_counter()
            now = time.perf_counter()
            self.seconds, mean = (
                spent + now - began,
                r.mean_over_ranks({"loss": float(self.sums["loss"]) / at["step"]})["loss"],
            )
            at["epoch"], at["step"], self.sums = at["epoch"] + 1, 0, {}
            self.done = at["epoch"] == plan["epochs"]
            if self.done or now - saved > 60:
                self.save()
                saved = now
            if r.is_main:
                clips = len(order) - first * plan["batch_size"]
                log.write(
                    stage="pretrain",
                    epoch=at["epoch"],
                    loss=mean,
                    lr=self.optimizer.param_groups[0]["lr"],
                    seconds=self.seconds,
                    clips_per_second=clips / (now - began),
                    tokens_per_second=clips * length / (now - began),
                    waited_share=self.clips.waited / (now - began),
                )
        bar.close()


def parameter_groups(net, layer_decay):
    """AdamW's groups: norms, biases and tokens do not decay; `scale` falls from each encoder block to the one before it."""
    depth, groups = len(net.encoder.blocks), {}
    for name, p in net.named_parameters():
        level = depth + 1
        if name.startswith("encoder.patch_embed"):
            level = 0
        elif name.startswith("encoder.blocks."):
            level = int(name.split(".")[2]) + 1
        plain = p.ndim <= 1 or name.endswith("token")
        groups.setdefault((level, plain), []).append(p)
    return [
        {"params": ps, "weight_decay": 0.0 if plain else DECAY, "scale": layer_decay ** (depth + 1 - level)}
        for (level, plain), ps in groups.items()
    ]


def load_init(net, path, r):
    """Start from other weights: ours whole, VideoMAE's into the encoder. What did not fit is listed."""
    state = training.load_checkpoint(path)
    weights = state.get("model_state_dict") or state.get("model") or state.get("module") or state
    lost, kept = m.load_encoder(net.encoder, weights)
    if len(kept) == len(net.encoder.state_dict()):
        raise UserError(f"--init {path}: none of its weights fits the encoder; is it of another size than --preset?")
    if state.get("method") == METHOD:
        try:
            net.load_state_dict(weights)
            lost, kept = [], []
        except RuntimeError:
            pass
    r.print(
        f"--init {path}: {len(net.encoder.state_dict()) - len(kept)} of {len(net.encoder.state_dict())} entries of the encoder are set"
        + (f"; stayed as they were: {', '.join(kept[:6])}" if kept else "")
        + (f"; left out of the file: {', '.join(lost[:6])}{' …' if len(lost) > 6 else ''}" if lost else "")
    )


def build(args, r):
    """-> Trainer with its data."""
    dataset = datasets.canonical(args.dataset)
    plan = plan_of(args, dataset)
    data, videos, arrays, folder = prepare(args, r, plan["size"])
    source = args.depth if args.depth in ("perspective", "midas") else Path(args.depth)
    clips = Clips(arrays, Depth(source, videos, arrays, folder, r.device), plan["frames"], plan["stride"], r.device)
    preset = args.preset or ("tiny" if dataset == "demo" else "vit_b")
    model_args = {**m.PRESETS[preset], "frames": plan["frames"], "size": plan["size"]}
    identity = {
        "model_args": model_args,
        "dataset": dataset,
        "clips": len(clips),
        "precision": r.precision,
        "processes": r.world_size,
        "init": str(args.init) if args.init else None,
        **plan,
    }
    out = r.open_output_dir(args.out or Path("runs/svmae") / dataset)
    trainer = Trainer(plan, model_args, clips, r, out / "pretrain.pt", identity)
    r.print(
        f"{dataset}: {len(videos)} videos, {len(clips)} clips of {plan['frames']} frames an epoch, {clips.size[0]}×{clips.size[1]} cut "
        f"to {plan['size']}², {int(np.prod(trainer.net.grid))} tokens, {sum(p.numel() for p in trainer.net.parameters()) / 1e6:.1f} M "
        f"parameters ({preset}), masking {plan['masking']}, loss {plan['loss']}, {r.device}, {r.precision}"
    )
    return trainer, out


def pretrain(args, r):
    """-> path of the finished checkpoint."""
    trainer, out = build(args, r)
    log, resumed = training.Log(out / "log.jsonl"), trainer.load() if args.resume else False
    if not resumed:
        if args.init:
            load_init(trainer.net, args.init, r)
        if r.is_main:
            log.path.unlink(missing_ok=True)
    if trainer.done:
        r.print(f"{trainer.plan['epochs']} epochs done before ({trainer.path})")
    else:
        if resumed:
            r.print(f"going on at epoch {trainer.at['epoch'] + 1}, step {trainer.at['step']}")
            if r.is_main:
                log.drop_after("pretrain", trainer.at["epoch"])
        trainer.train(args, log)
    r.barrier()
    if r.is_main:
        preview(trainer, out / "preview.png")
    return trainer.path


@training.inference
def preview(trainer, path, count=4):
    """One picture: for `count` clips the middle frame, its depth, cube difference, mask probability, mask and reconstruction."""
    report = report_folder()
    if report is None:
        return print("note: the preview needs common/report, which is not here")
    plan, net, grid = trainer.plan, trainer.net.eval(), trainer.net.grid
    order = trainer.clips.epoch(plan["seed"], 0)[:count]
    frames, near = trainer.clips.to_device(trainer.clips.read(order))
    clips, near = cut(frames, near, np.repeat(WHOLE, len(frames), axis=0), plan["size"])
    tokens, nearness = m.tokenize(clips), m.pool(near, grid)
    noise = torch.from_numpy(np.random.default_rng(plan["seed"]).random(tokens.shape[:2], np.float32)).to(tokens.device)
    difference = m.cube_difference(tokens, grid)
    probability, mask = (
        m.mask_probability(difference, nearness, plan["space"], plan["time"]),
        trainer.mask(tokens, nearness, noise),
    )
    with trainer.run.autocast():
        prediction, hidden = net(tokens, mask)
    _, mean, std = m.target(tokens)
    filled = prediction.float() * m.take(std, hidden) + m.take(mean, hidden)
    whole = tokens.scatter(1, hidden[:, :, None, None].expand_as(filled), filled.clamp(0, 1))
    seen = torch.where(mask[..., None, None], torch.full_like(tokens, 0.5), tokens)
    t = plan["frames"] // 2

    def picture(x):
        """RGB [n, 3, T, S, S] in [0, 1] -> uint8 BGR [n, S, S, 3] of the middle frame."""
        return (255 * x[:, :, t].flip(1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def map_of(values):
        """[n, L] -> uint8 [n, S, S, 3], each clip's largest value white."""
        x = (values / values.amax(1, keepdim=True).clamp(min=1e-9)).unflatten(1, grid)[:, t // m.TUBELET]
        x = x.repeat_interleave(m.PATCH, 1).repeat_interleave(m.PATCH, 2)
        return (255 * x).round().byte()[..., None].expand(-1, -1, -1, 3).cpu().numpy()

    columns = {
        "input": picture(clips),
        "nearness": (255 * near).round().byte()[..., None].expand(-1, -1, -1, 3).cpu().numpy(),
        "cube difference": map_of(difference),
        "mask probability": map_of(probability),
        f"masked {100 * plan['mask_ratio']:.0f} %": picture(m.untokenize(seen, grid)),
        "reconstruction": picture(m.untokenize(whole, grid)),
    }
    tiles = [(report.plots.enlarged(x[i], 224), name) for i in range(len(frames)) for name, x in columns.items()]
    report.plots.contact_sheet(path, tiles, len(columns))
    net.train()
    print(
        f"wrote {path}: input, nearness, cube difference, mask probability, mask and reconstruction of {len(frames)} clips"
    )


def main(argv=None):
    args = parse(argv)
    r = training.Run.from_args(args)
    if args.preview:
        trainer, out = build(args, r)
        trainer.load()
        return preview(trainer, out / "preview.png")
    began = time.perf_counter()
    path = pretrain(args, r)
    r.print(f"pre-trained in {(time.perf_counter() - began) / 60:.1f} min with everything before; checkpoint {path}")
    r.print(f"next: python frd_uvad/svmae/preprocess.py --dataset {args.dataset} --checkpoint {path}")
    r.close()


if __name__ == "__main__":
    run(main)
