"""Train the scene-aware autoencoder on features of normal videos; encoding runs first where it is missing.

python scene_aware_ae/train.py --dataset demo                                   # a stand-in encoder, no download
python scene_aware_ae/train.py --dataset shanghaitech-sd --pretrained ViT-L-14-quickgelu.pt
python scene_aware_ae/train.py --dataset ped2 --mode 0                          # one scene: reconstruction alone
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common import old_training as training
from common.io import UserError, run
from common.late import Late, torch
from common.loader import take_rows
from common.steps import StepTrainer
from scene_aware_ae import preprocess, scoring

model = Late("scene_aware_ae.model")

ITERATIONS, PER_SCENE, LR = 5000, 30, 1e-4
HIDDEN = LATENT = 256


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/scene_aware_ae/<dataset>")
    g = cli.add_optimisation_flags(
        parser,
        lr=LR,
        epochs="as many as --iterations make; given, it sets them: passes over the training frames",
        batch_size="--segments-per-scene times scenes; given, it sets them: segments of a step",
    )
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g = parser.add_argument_group("method")
    g.add_argument(
        "--mode",
        "--training_mode",
        type=int,
        choices=[0, 1, 2],
        default=None,
        help="0: reconstruction; 1: and contrast between scenes; 2: and a classifier of scenes (default: 1; with one "
        "scene 0)",
    )
    g.add_argument("--iterations", type=int, default=None, help=f"training steps (default: {ITERATIONS})")
    g.add_argument("--segments-per-scene", type=int, default=None, help=f"in each step (default: {PER_SCENE})")
    g.add_argument("--variational", action="store_true", help="a variational autoencoder instead")
    from scene_aware_ae.eval import add_eval_flags

    add_eval_flags(parser)
    return parser.parse_args(argv)


class Segments:
    """Training features, on the device where they fit (else read from disk), and where segments may start in each scene.

    draw(rng, part) -> features of `per_scene` segments of every scene, or of a slice of them, float32 [scenes · per_scene, LENGTH, D].
    """

    def __init__(self, ready, r, per_scene):
        arrays = ready.arrays(ready.train)
        self.scenes = sorted({v.scene for v in ready.train})
        starts = {s: [] for s in self.scenes}
        total = 0
        for v, a in zip(ready.train, arrays):
            if len(a) >= scoring.LENGTH:
                starts[v.scene].append(np.arange(total, total + len(a) - scoring.LENGTH + 1))
            total += len(a)
        empty = [s for s in self.scenes if not starts[s]]
        if empty:
            raise UserError(
                f"scene {empty[0] or '(unnamed)'} has no training video of at least {scoring.LENGTH} frames"
            )
        self.starts, self.per_scene = [np.concatenate(starts[s]) for s in self.scenes], per_scene
        self.arrays, self.frames, self.begin, self.features = arrays, total, np.cumsum([0, *map(len, arrays)]), None
        limit = 2**30 if r.device.type == "cpu" else 0.5 * torch.cuda.mem_get_info(r.device)[0]
        if sum(a.nbytes for a in arrays) < limit:
            self.features = torch.from_numpy(np.concatenate(arrays)).to(r.device)
        self.labels = torch.arange(len(self.scenes), device=r.device).repeat_interleave(per_scene)
        self.around = np.arange(scoring.LENGTH)
        self.device = r.device

    def draw(self, rng, part=slice(None)):
        first = np.concatenate([s[rng.integers(0, len(s), self.per_scene)] for s in self.starts])[part]
        rows = first[:, None] + self.around
        if self.features is not None:
            return self.features[torch.from_numpy(rows).to(self.device, non_blocking=True)].float()
        x = take_rows(self.arrays, self.begin, rows.reshape(-1), self.arrays[0].shape[1:], self.arrays[0].dtype)
        return torch.from_numpy(x).view(*rows.shape, -1).to(self.device, non_blocking=True).float()


class Trainer(StepTrainer):
    method = "scene_aware_ae"

    def __init__(self, plan, model_args, segments, r, path, identity, encoder=None):
        training.seed_everything(plan["seed"])
        net, self.segments = model.SceneAwareAE(**model_args).to(r.device), segments
        super().__init__(
            net,
            torch.optim.Adam(net.parameters(), lr=plan["lr"], fused=True),
            plan,
            model_args,
            r,
            path,
            identity,
            {"scenes": segments.scenes, "encoder": encoder},
        )

    def one(self, rng):
        began, r, n = time.perf_counter(), self.run, len(self.segments.labels)
        batch = self.segments.draw(rng, r.batch_slice(n)[0])
        self.waited += time.perf_counter() - began
        with r.autocast():
            out = self.net(batch)
        out = {k: r.all_gather_batch(v.float(), n) for k, v in out.items()}  # the contrast is between all segments
        parts = model.losses(out, r.all_gather_batch(batch, n), self.segments.labels, mode=self.plan["mode"])
        self.descend(parts["total"])
        return {k: v.detach() for k, v in parts.items()}


def train(args, ready, encoder, r):
    """-> path of the finished checkpoint."""
    dataset = ready.data.name
    folder = r.open_output_dir(args.out or Path("runs/scene_aware_ae") / dataset)
    if not ready.train:
        raise UserError(f"{dataset} has no training videos under {ready.data.root}: put normal videos into train/")
    for key in ("iterations", "segments_per_scene", "epochs", "batch_size"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} must be at least 1")
    if args.lr is not None and args.lr <= 0:
        raise UserError("--lr must be above 0")
    scenes = len({v.scene for v in ready.train})
    per_scene = args.segments_per_scene or (max(1, args.batch_size // scenes) if args.batch_size else PER_SCENE)
    segments = Segments(ready, r, per_scene)
    iterations = args.iterations or (
        -(-args.epochs * segments.frames // (len(segments.labels) * scoring.LENGTH)) if args.epochs else ITERATIONS
    )
    mode = args.mode if args.mode is not None else (1 if scenes > 1 else 0)
    if mode and scenes < 2:
        raise UserError(
            f"--mode {mode} contrasts scenes, and {dataset} has one: use --mode 0, or name the scenes with "
            "--scenes FILE.csv (lines video,scene)"
        )
    if mode and per_scene < 2:
        raise UserError("--segments-per-scene must be at least 2 for a contrast within a scene")
    plan = {
        "iterations": iterations,
        "segments_per_scene": per_scene,
        "lr": args.lr or LR,
        "mode": mode,
        "seed": args.seed,
    }
    model_args = dict(
        input_dim=encoder.width,
        hidden_dim=HIDDEN,
        latent_dim=LATENT,
        num_scenes=max(2, scenes),
        variational=args.variational,
    )
    identity = {
        "model_args": model_args,
        "dataset": dataset,
        "features": encoder.describe(),
        "frames": segments.frames,
        "precision": r.precision,
        "processes": r.world_size,
        **{k: v for k, v in plan.items() if k != "iterations"},
    }
    trainer = Trainer(plan, model_args, segments, r, folder / "scene_aware_ae.pt", identity, encoder.describe())
    trainer.start(
        args,
        training.Log(folder / "log.jsonl"),
        f"{dataset}: {len(ready.train)} training videos of {scenes} scenes, "
        f"{segments.frames} frames, mode {mode}{', variational' if args.variational else ''}",
    )
    return trainer.path


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    r = training.Run.from_args(args)
    ready, encoder = preprocess.prepare(args, r, with_encoder=True)
    checkpoint = train(args, ready, encoder, r)
    r.print(f"trained in {(time.perf_counter() - began) / 60:.1f} min with everything before; checkpoint {checkpoint}")
    from scene_aware_ae.eval import evaluate

    evaluate(args, ready, checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
