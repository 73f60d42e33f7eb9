"""Score videos with a trained scene-aware autoencoder.

python scene_aware_ae/eval.py --dataset shanghaitech-sd --checkpoint runs/scene_aware_ae/shanghaitech-sd/scene_aware_ae.pt
python scene_aware_ae/eval.py --dataset shanghaitech-sd --checkpoint authors.pth --protocol official
python scene_aware_ae/eval.py --video my.mp4 --checkpoint runs/scene_aware_ae/folder/scene_aware_ae.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli, datasets, evaluation, metrics, smoothing
from common import old_training as training
from common.cache import FrameCache
from common.dataset import Dataset
from common.io import UserError, run, safe_filename, writable_folder
from common.late import torch
from common.pool import cores
from common.video import decoded, open_video
from scene_aware_ae import preprocess, scoring

METHOD = "scene-aware AE"

SCORES_VERSION = 1  # raise it when raw scores change: cached ones are then computed again


def add_eval_flags(parser):
    g = cli.add_score_flags(
        parser,
        "strict: every frame, smoothing fixed beforehand; official: as the authors did",
        "gaussian:8",
        "the curve",
    )
    g.add_argument(
        "--tsne",
        type=Path,
        nargs="*",
        default=None,
        metavar="CHECKPOINT",
        help="also draw the scene features of training "
        "and test segments (t-SNE), beside those of the checkpoints named here, such as one of another --mode",
    )


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    g = cli.add_checkpoint_flags(parser, "runs/scene_aware_ae/<dataset>/scene_aware_ae.pt")
    cli.add_shard_flag(g, scoring=True)
    g.add_argument(
        "--scene", default=None, help="with --video: the scene it shows, for the report of how alike they are"
    )
    add_eval_flags(parser)
    return parser.parse_args(argv)


def best_sigma(scores, labels):
    """The authors' choice on the test labels: the Gaussian of 0..19 over all videos as one that gives the highest micro AUC."""
    names = sorted(scores)
    s, y = (np.concatenate([x[k] for k in names]) for x in (scores, labels))
    return max(range(20), key=lambda k: metrics.auc(y, smoothing.gaussian(s, k) if k else s))


def protocol_of(args, scores, labels):
    """official leaves the tails of videos out and picks its filter on the labels, where there are some."""
    if args.protocol == "strict":
        return evaluation.Protocol("strict", args.smoothing)
    kept = {k: len(s) // scoring.LENGTH * scoring.LENGTH for k, s in scores.items()}
    left = sum(len(s) - kept[k] for k, s in scores.items())
    liberties = [
        f"the {left} frames after the last whole segments of their videos are left out",
        "smoothing runs across the borders of videos",
    ]
    sigma = 8
    if labels:
        sigma = best_sigma({k: s[: kept[k]] for k, s in scores.items()}, {k: y[: kept[k]] for k, y in labels.items()})
        liberties.append(f"the filter's deviation, {sigma} frames, is the best of 0..19 on the test labels")
    return evaluation.Protocol(
        "official", f"gaussian:{sigma}" if sigma else "none", 0, liberties, across=True, multiple=scoring.LENGTH
    )


def evaluate(args, ready, checkpoint, r):
    """Score the test set, print and write the results. -> metrics (rank 0)."""
    if not ready.test:
        raise UserError(f"{ready.data.name} has no test videos under {ready.data.root}; score single ones with --video")
    net, state = scoring.load_model(checkpoint)
    net.eval().to(r.device)
    folder = writable_folder(args.out or Path(checkpoint).parent)
    cache = evaluation.ScoreCache(
        folder,
        {"weights": training.weights_hash(net), "precision": r.precision, "version": SCORES_VERSION},
        ready.features.info,
    )
    found = cache.compute(
        ready.test,
        lambda v, tick: {"scores": scoring.score_features(net, ready.features.array(v), r, tick=tick)[0]},
        r,
        size=ready.length,
        unit="frame",
        all_videos=ready.data.test,
        shard=getattr(args, "shard", None),
    )
    if not found:
        return None
    scores = {v.name: found[v.key]["scores"] for v in ready.test}
    labels = evaluation.labels_of(scores, ready.data)
    protocol, out = protocol_of(args, scores, labels), folder / args.protocol
    result = evaluation.evaluate(
        out,
        ready.data,
        scores,
        method=METHOD,
        protocol=protocol,
        baselines=baselines(args, ready),
        extra={
            **training.run_info(checkpoint, state, [net], evaluation.total_seconds(found), ready.skipped, r),
            "encoder": state.get("encoder"),
            "scenes": state.get("scenes"),
        },
    )
    evaluation.show(out, result, pictures=decoded, top=args.top, overlay=args.overlay)
    if args.tsne is not None:
        draw_tsne([Path(checkpoint), *args.tsne], ready, labels, r, out / "tsne.png")
    ready.report_skipped()
    evaluation.print_next_steps(
        "scene_aware_ae/eval.py",
        checkpoint,
        out,
        overlay=args.overlay,
        more="" if args.tsne is not None else "add --tsne for a picture of the scenes; ",
    )
    return result.metrics


def baselines(args, ready):
    cache = FrameCache(ready.features.folder.parent / "frames-small", (120, 180))
    usable, _ = cache.build(ready.test, args.workers or cores())
    return evaluation.frame_baselines(cache, usable, args.workers or cores()) if len(usable) == len(ready.test) else {}


def scene_points(net, ready, labels, r):
    """Scene features of all segments [N, D], their scenes, and their kinds: 0 training, 1 normal test, 2 abnormal test."""
    points, scenes, kinds = [], [], []
    for v in ready.train + ready.test:
        f, y = (
            scoring.score_features(net, ready.features.array(v), r)[1],
            labels.get(v.name) if v.split == "test" else None,
        )
        points.append(f)
        scenes += [v.scene or "scene"] * len(f)
        kinds += [
            0 if v.split == "train" else 1 + int(y is not None and y[a:b].any())
            for a, b, _ in scoring.segments(ready.length(v))
        ]
    return np.concatenate(points), np.array(scenes), np.array(kinds)


def draw_tsne(checkpoints, ready, labels, r, path):
    """Scene features of one or several checkpoints side by side: colours are scenes, crosses abnormal test segments."""
    report = evaluation.report_folder()
    if report is None:
        return print("note: --tsne needs common/report, which is not here")
    panels = {}
    for checkpoint in checkpoints:
        net, state = scoring.load_model(checkpoint)
        if net.output_proj.in_features != ready.features.description["width"]:
            raise UserError(
                f"--tsne {checkpoint} is for features of width {net.output_proj.in_features}, these have "
                f"{ready.features.description['width']}"
            )
        mode = (state.get("plan") or {}).get("mode", "?")
        title = f"{checkpoint.parent.name}, mode {mode}\ndots training, circles normal, crosses abnormal test segments"
        panels[title] = scene_points(net.eval().to(r.device), ready, labels, r)
    if min(len(points) for points, _, _ in panels.values()) < 5:
        return print(f"note: too few segments for {path.name}")
    report.plots.tsne(panels, path)
    print(f"wrote {path}")


def score_video(args, net, state, r):
    """One's own footage: scores.csv, curve.png, overlay.mp4, and which scene it resembles."""
    video = open_video(args.video)
    own = (
        (state.get("encoder") or {}).get("encoder", "").startswith("none:")
    )  # the stand-in lies beside its dataset's features
    home = datasets.find(args.dataset, args.data_root, args.labels) if own else None
    data = Dataset("video", video.path.resolve().parent, [], [video])
    encoder = None
    if home is not None:
        encoder = preprocess.encoder_of(args, home, r, state.get("encoder"))
    ready = preprocess.prepare(args, r, splits=("test",), data=data, trained=state.get("encoder"), encoder=encoder)
    out = writable_folder((args.out or Path(args.checkpoint).parent / "video") / safe_filename(video.name))
    scores, features = scoring.score_features(net, ready.features.array(video), r)
    evaluation.write_own_video(video.name, *decoded(video), scores, args.smoothing, METHOD, out, top=args.top)
    if (state.get("plan") or {}).get("mode") == 2:
        with torch.inference_mode():
            share = net.classifier(torch.from_numpy(features).to(r.device)).softmax(1).mean(0).cpu().numpy()
        best = int(share.argmax())
        print(
            f"it looks like scene {state['scenes'][best]} ({100 * share[best]:.0f} %)"
            + (f", said to be {args.scene}" if args.scene else "")
        )
    if args.scene and state.get("scenes") and args.scene not in state["scenes"]:
        print(f"note: the model was not trained on scene {args.scene}; it knows {', '.join(state['scenes'])}")


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    r = training.Run.from_args(args)
    name = datasets.canonical(args.dataset)
    args.checkpoint = args.checkpoint or Path("runs/scene_aware_ae") / name / "scene_aware_ae.pt"
    net, state = scoring.load_model(args.checkpoint)  # a wrong file is refused before any work
    if args.video:
        score_video(args, net.eval().to(r.device), state, r)
        return
    ready = preprocess.prepare(
        args, r, splits=("train", "test") if args.tsne is not None else ("test",), trained=state.get("encoder")
    )
    evaluate(args, ready, args.checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
