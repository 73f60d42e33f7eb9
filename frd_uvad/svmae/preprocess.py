"""Clip features from videos by a pre-trained SVMAE: one .npy [clips, crops, width] of every 16 frames per video, as the detector here
and frd_uvad read them.

    python frd_uvad/svmae/preprocess.py --dataset folder --data-root data/fights --checkpoint runs/svmae/folder/pretrain.pt
    python frd_uvad/svmae/preprocess.py --dataset ped2 --checkpoint videomae.pth --preset vit_b --crops 10
    python frd_uvad/train.py --dataset features --features features/svmae/ped2       # what frd_uvad makes of them
"""

import argparse
import itertools
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from common import cli, datasets
from common import old_training as training
from common.cache import VideoFiles
from common.dataset import UsableVideos
from common.features.data import CLIP_FRAMES
from common.features.prefetch import VideoPrefetcher
from common.io import UserError, atomic_write, read_json, run, safe_filename, writable_folder, write_json
from common.late import Late, torch
from common.pictures import resize
from common.pool import cores, prepare_videos
from common.video import Decoder, print_warnings
from frd_uvad.preprocess import clips_of, describe
from frd_uvad.svmae.clips import DEPTHS, WHOLE, Depth, cut

m = Late("frd_uvad.svmae.model")
PRESETS = ("tiny", "vit_s", "vit_b", "vit_l")  # of m, which --help need not load

METHOD = "svmae"
SETTINGS = ("preset", "size", "frames", "seed", "pool", "motion_ratio", "alpha", "depth", "crops", "clip", "pretrained")
CORNERS = [(0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1)]  # centre and corners, in -1..1 of what a crop leaves over


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_run_flags(parser, out="features/svmae/<dataset>")
    g = parser.add_argument_group("features")
    g.add_argument(
        "--checkpoint",
        required=True,
        help="of pretrain.py, VideoMAE's weights (with --preset), or random: an untrained encoder to compare with",
    )
    g.add_argument(
        "--preset",
        choices=PRESETS,
        default="vit_b",
        help="size of an encoder that is not of pretrain.py (default: %(default)s)",
    )
    g.add_argument("--size", type=int, default=224, help="side of its input, px (default: %(default)s)")
    g.add_argument("--frames", type=int, default=16, help="frames of its clips (default: %(default)s)")
    g.add_argument(
        "--pool",
        choices=["fusion", "mean"],
        default="fusion",
        help="scene-aware token fusion, or the mean of all tokens (default: %(default)s)",
    )
    g.add_argument(
        "--motion-ratio",
        type=float,
        default=0.5,
        help="share of tokens kept, those that move most (default: %(default)s)",
    )
    g.add_argument("--alpha", type=float, default=0.05, help="how much more far tokens weigh (default: %(default)s)")
    g.add_argument("--depth", default="perspective", help=f"{DEPTHS} (default: %(default)s)")
    g.add_argument(
        "--crops",
        type=int,
        choices=[1, 10],
        default=1,
        help="views of each clip: the whole frame; or corners and centre at "
        "7/8 of it, and their mirror images (default: %(default)s)",
    )
    g.add_argument(
        "--clip",
        default=None,
        metavar="MODEL",
        help="also the mean CLIP_FRAMES embedding of the clip's frames, by this open_clip "
        "model, such as ViT-B-16-quickgelu (default: none)",
    )
    g.add_argument(
        "--pretrained",
        default="openai",
        help="its weights: a name of open_clip's or a local file (default: %(default)s)",
    )
    g.add_argument("--encode-batch", type=int, default=8, help="clips encoded at once (default: %(default)s)")
    cli.add_shard_flag(g)
    return parser.parse_args(argv)


def load_encoder(args, r):
    """-> (SVMAE whose encoder is used, what identifies it)."""
    if args.checkpoint == "random":
        training.seed_everything(args.seed)
        return m.SVMAE(**m.PRESETS[args.preset], frames=args.frames, size=args.size), f"random {args.seed}"
    state = training.load_checkpoint(args.checkpoint)
    if state.get("method") == METHOD:
        try:
            net = m.SVMAE(**state["model_args"])
            net.load_state_dict(state["model_state_dict"])
        except (RuntimeError, TypeError, KeyError) as e:
            raise UserError(
                f"checkpoint {args.checkpoint} does not fit this model ({str(e).splitlines()[0]}…)"
            ) from None
        if not state["done"]:
            r.print(f"note: the pre-training of {args.checkpoint} has not finished")
        return net, training.weights_hash(net.encoder)
    if "method" in state:
        raise UserError(
            f"checkpoint {args.checkpoint} belongs to the method {state['method']}, this script is {METHOD}"
        )
    net = m.SVMAE(**m.PRESETS[args.preset], frames=args.frames, size=args.size)
    lost, kept = m.load_encoder(net.encoder, state.get("model") or state.get("module") or state)
    if kept:
        raise UserError(
            f"checkpoint {args.checkpoint} does not fill the encoder {args.preset} (of {len(net.encoder.state_dict())} entries "
            f"{len(kept)} are missing, such as {kept[0]}): choose its --preset"
        )
    return net, training.weights_hash(net.encoder)


class Encoder:
    """Clips uint8 [n, 16, H, W, C] and nearness [n, H, W] -> features float32 [n, crops, width]."""

    def __init__(self, net, args, r):
        self.net, self.args, self.run = net.eval().requires_grad_(False).to(r.device), args, r
        self.frames, self.size = net.grid[0] * m.TUBELET, net.grid[1] * m.PATCH
        self.crops = WHOLE
        if args.crops == 10:
            s = 7 / 8
            views = [(x * (1 - s), y * (1 - s), s, s) for x, y in CORNERS]
            self.crops = np.array(views + [(x, y, -a, b) for x, y, a, b in views], np.float32)
        from common.features.clip import ClipEncoder

        self.clip = ClipEncoder(args.clip, args.pretrained, "clip", r) if args.clip else None

    def preprocess_frame(self, frame):
        """A frame with 8/7 of the encoder's input along its shorter side, in the reading thread. uint8 [H, W, C] -> alike"""
        scale = self.size * 8 / 7 / min(frame.shape[:2])
        return resize(frame, tuple(round(s * scale) for s in frame.shape[:2]))

    @training.inference
    def __call__(self, clips, near):
        r, n, k = self.run, len(clips), len(self.crops)
        frames = torch.from_numpy(clips[:, np.arange(self.frames) * CLIP_FRAMES // self.frames]).to(r.device)
        near = torch.from_numpy(near).to(r.device)
        out = torch.stack(
            [self.view(*cut(frames, near, np.repeat(crop[None], n, axis=0), self.size)) for crop in self.crops], dim=1
        )
        if self.clip:
            images = np.stack([self.clip.preprocess_frame(f) for clip in clips for f in clip])
            own = (
                torch.cat([self.clip.encode(part) for part in np.array_split(images, -(-len(images) // 64))])
                .view(n, CLIP_FRAMES, -1)
                .mean(1)
            )
            out = torch.cat([out, own[:, None].expand(-1, k, -1)], dim=2)
        return out.cpu().numpy()

    def view(self, clips, near):
        """One crop of clips, float32 [n, 3, T, S, S], and of their nearness [n, S, S] -> features [n, width]."""
        tokens, grid = m.tokenize(clips), self.net.grid
        with self.run.autocast():
            features = self.net.encoder(tokens)
        features = features.float()
        if self.args.pool == "mean":
            return features.mean(1)
        return m.fuse_tokens(
            features, m.cube_difference(tokens, grid), m.pool(near, grid), self.args.motion_ratio, self.args.alpha
        )


class Features(VideoFiles):
    what = "clip features"


def encoded(source, encoder, args, r, folder, count, bar):
    """Yield the features of one video's clips, float16 [n, crops, width]. count[0] counts its frames."""
    depth, waiting, middle = None, [], []

    def encode():
        return encoder(np.stack(waiting), np.stack(middle)).astype(np.float16)

    for clip in clips_of(source, count):
        depth = depth or depth_of(args, source.video, clip.shape[1:3], r, folder)
        begin = CLIP_FRAMES * ((count[0] - 1) // CLIP_FRAMES)
        waiting.append(clip)
        middle.append(depth.map(0, min(begin + CLIP_FRAMES // 2, count[0] - 1)))
        if len(waiting) == args.encode_batch:
            yield encode()
            waiting, middle = [], []
        bar.update(count[0] - begin)
    if waiting:
        yield encode()


def depth_of(args, video, size, r, folder):
    """Nearness of one video's frames at `size`."""
    if args.depth == "perspective":
        return Depth("perspective", [video], [np.zeros((1, *size, 1), np.uint8)], folder, r.device)
    if args.depth == "midas":
        middle = next(itertools.islice(Decoder(video), video.expected_frames() // 2, None))
        return Depth("midas", [video], [resize(middle, size)[None]], folder, r.device)
    shape = np.broadcast_to(
        np.zeros(1, np.uint8), (video.expected_frames(), *size, 1)
    )  # of the frames that the maps belong to
    return Depth(Path(args.depth), [video], [shape], folder, r.device)


def build(videos, workers, show=True, *, files, encoder, args, r):
    """Encode what is missing, the next videos decoded meanwhile. -> (videos that are there, {video key: why} of what failed)"""
    fresh, failed = files.missing(videos)
    with tqdm(
        total=sum(v.expected_frames() for v in fresh),
        desc="features",
        unit="frame",
        dynamic_ncols=True,
        mininterval=5,
        disable=not show,
    ) as bar:
        for v, source in VideoPrefetcher(fresh, encoder.preprocess_frame, max(1, min(workers, 4))):
            count = [0]
            try:
                files.write(
                    v,
                    encoded(source, encoder, args, r, files.folder, count, bar),
                    lambda shape, n=count, d=source.decoder: describe(shape, n, d),
                )
            except UserError as e:
                failed[v.key] = str(e)
    files.report(v for v in videos if v.key not in failed)
    return [v for v in videos if v.key not in failed], failed


def main(argv=None):
    args = parse(argv)
    r = training.Run.from_args(args)
    net, source = load_encoder(args, r)
    with r.main_first():
        data = datasets.find(args.dataset, args.data_root, args.labels)
    encoder = Encoder(net, args, r)
    out = writable_folder(args.out or Path("features/svmae") / data.name)
    check_settings(out, {"encoder": source, **{k: getattr(args, k) for k in SETTINGS}}, args.checkpoint, r)
    files, videos = Features(out), data.train + data.test
    videos, failed = prepare_videos(
        files, videos, partial(build, files=files, encoder=encoder, args=args, r=r), args, r
    )
    if r.is_main:
        finish(out, files, UsableVideos(data, videos, failed), encoder)
    r.close()


def finish(out, files, ready, encoder):
    """What the detector needs beside the features: labels of the test videos, lists of bags."""
    data, videos = ready.data, ready.train + ready.test
    for v in ready.test if data.has_labels else ():
        with atomic_write(out / "labels" / f"{safe_filename(v.name)}.npy") as tmp:
            np.save(tmp, data.labels(v, files.info(v)["frames"]))
    for name in ("normal.txt", "abnormal.txt"):
        if (Path(data.root) / name).exists():
            shutil.copyfile(Path(data.root) / name, out / name)
    width = files.info(videos[0])["width"] if videos else 0
    print(
        f"{len(ready.train)} training and {len(ready.test)} test videos, {len(encoder.crops)} crops of width {width}, in {out}"
    )
    ready.report_skipped()
    print(
        f"next: python frd_uvad/svmae/train.py --features {out}, or python frd_uvad/train.py --dataset features --features {out}"
    )


def features_of_video(video, settings, args, r):
    """One's own footage, encoded as `settings` say. -> features [clips, crops, width], number of frames"""
    lost = {"encoder", "checkpoint", *SETTINGS} - set(settings)
    if lost:
        raise UserError(
            f"the settings.json of the features that {args.checkpoint} was trained on lacks {', '.join(sorted(lost))}: make "
            "the features by preprocess.py, and train again"
        )
    checkpoint = args.encoder or settings["checkpoint"]
    said = argparse.Namespace(**{k: settings[k] for k in SETTINGS}, checkpoint=str(checkpoint), encode_batch=8)
    net, source = load_encoder(said, r)
    if source != settings["encoder"]:
        raise UserError(f"--encoder {checkpoint} is not the one that made the detector's features: name that file")
    encoder, count = Encoder(net, said, r), [0]
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=video.expected_frames(), desc="features", unit="frame", dynamic_ncols=True, mininterval=2) as bar,
    ):
        for _, source in VideoPrefetcher([video], encoder.preprocess_frame, args.workers or cores()):
            parts = list(encoded(source, encoder, said, r, Path(folder), count, bar))
            print_warnings(video, source.decoder.warnings)
    return np.concatenate(parts), count[0]


def settings_of(folder):
    """How the features of a folder were made, or None where they were made elsewhere."""
    path = folder / "settings.json"
    return read_json(path, "settings of the features") if path.exists() else None


def check_settings(out, said, checkpoint, r):
    """Features of one folder are all made alike."""
    known = settings_of(out)
    if known:
        for k, v in said.items():
            if known.get(k) != v:
                raise UserError(f"{out} holds features with {k} = {known.get(k)}, now it is {v}: choose another --out")
    elif r.is_main:
        write_json(out / "settings.json", {**said, "checkpoint": str(checkpoint)})
    r.barrier()


if __name__ == "__main__":
    run(main)
