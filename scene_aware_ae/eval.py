"""Score test videos, or your own video, with a trained scene-aware autoencoder.

python scene_aware_ae/eval.py --dataset demo --checkpoint runs/scene_aware_ae/demo/scene_aware_ae.pt
python scene_aware_ae/eval.py --dataset shanghaitech-sd --checkpoint authors.pth --protocol official
python scene_aware_ae/eval.py --video my.mp4 --checkpoint runs/scene_aware_ae/folder/scene_aware_ae.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli, evaluation, metrics, score_cache, smoothing
from common.cache import FrameCache
from common.io import UserError, optional_module, run_script, safe_filename, writable_folder
from common.readers import datasets
from common.readers.dataset import Dataset
from common.readers.video import frames_and_clock, open_video
from scene_aware_ae import preprocess
from scene_aware_ae.encoder import EncoderOptions, make_encoder

# torch is imported inside functions: --help answers at once.

METHOD = "scene-aware AE"


def add_eval_flags(parser, training=False):
    group = cli.add_score_flags(
        parser,
        "strict: every frame, smoothing fixed beforehand; official: as the authors did",
        "gaussian:8",
        "the curve",
        training,
    )
    if not training:
        group.add_argument(
            "--tsne",
            type=Path,
            nargs="*",
            metavar="CHECKPOINT",
            help="also draw the scene features of training and test segments (t-SNE), beside those of the checkpoints "
            "named here, such as one of another --mode",
        )


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    group = cli.add_checkpoint_flags(parser, "runs/scene_aware_ae/<dataset>/scene_aware_ae.pt")
    cli.add_shard_flag(group, scoring=True)
    group.add_argument(
        "--scene", help="with --video, after --mode 2: the scene it shows, to print beside what it is taken for"
    )
    add_eval_flags(parser)
    return parser.parse_args(argv)


def best_sigma(scores: dict, labels: dict) -> int:
    """The authors' choice on the test labels: the Gaussian of 0..19 frames, over all videos joined, of highest micro
    AUC."""
    names = sorted(scores)
    s, y = (np.concatenate([x[k] for k in names]) for x in (scores, labels))
    return max(range(20), key=lambda sigma: metrics.auc(y, smoothing.gaussian(s, sigma) if sigma else s))


def make_protocol(options: cli.ScoreOptions, scores: dict, labels: dict) -> evaluation.Protocol:
    """official leaves the last frames of videos out and chooses its filter on the labels, if there are any."""
    from scene_aware_ae.scoring import LENGTH

    if options.protocol == "strict":
        return evaluation.Protocol("strict", options.smoothing)
    lengths = {k: len(s) // LENGTH * LENGTH for k, s in scores.items()}
    left_out = sum(len(s) - lengths[k] for k, s in scores.items())
    liberties = [
        f"the {left_out} frames after the last whole segments of their videos are left out",
        "smoothing runs across the borders of videos",
    ]
    sigma = 8
    if labels:
        sigma = best_sigma(
            {k: s[: lengths[k]] for k, s in scores.items()}, {k: y[: lengths[k]] for k, y in labels.items()}
        )
        liberties.append(f"the filter's deviation, {sigma} frames, is the best of 0..19 on the test labels")
    smoothing_filter = f"gaussian:{sigma}" if sigma else "none"
    return evaluation.Protocol("official", smoothing_filter, 0, liberties, across=True, multiple=LENGTH)


def evaluate(dataset, checkpoint, *, out, run, options, shard=None, tsne=None, workers=None, loaded=None):
    """Score the test set, print and write the results. -> metrics on rank 0, else None.

    dataset: preprocess.EncodedVideos; tsne: other checkpoints to draw scene features of, [] for this one only, None for
    no drawing; loaded: what scoring.load_model(checkpoint) gave, if it was called before.
    """
    from common.training import run_info, weights_hash
    from scene_aware_ae import scoring

    net, state = loaded or scoring.load_model(checkpoint)
    net.eval().to(run.device)

    def score(video, tick):
        return {"scores": scoring.score_video(net, dataset.features.array(video), run, tick=tick)["scores"]}

    arrays = score_cache.score_test_set(
        dataset,
        score,
        run,
        out=out,
        settings={"weights": weights_hash(net), "precision": run.precision, "version": scoring.SCORES_VERSION},
        source=dataset.features.info,
        size=dataset.frames,
        unit="frame",
        shard=shard,
    )
    if not arrays:
        return None
    scores = {v.name: arrays[v.key]["scores"] for v in dataset.test}
    labels = evaluation.labels_of(scores, dataset.data)
    out = Path(out) / options.protocol
    result = evaluation.evaluate(
        out,
        dataset.data,
        scores,
        method=METHOD,
        protocol=make_protocol(options, scores, labels),
        baselines=baselines(dataset, workers),
        extra={
            **run_info(checkpoint, state, [net], score_cache.total_seconds(arrays), dataset.skipped, run),
            "encoder": dataset.encoder.describe(),
            "scenes": state.get("scenes"),
        },
    )
    if tsne is not None:
        draw_tsne([Path(checkpoint), *tsne], dataset, labels, run, out / "tsne.png")
    evaluation.finish(
        out,
        result,
        script="scene_aware_ae/eval.py",
        checkpoint=checkpoint,
        options=options,
        skipped=dataset.skipped,
        pictures=frames_and_clock,
        more="" if tsne is not None else "add --tsne for a picture of the scenes; ",
    )
    return result.metrics


def baselines(dataset, workers=None):
    """Trivial scores on small frames; {} where a video cannot be decoded, as its features were made elsewhere."""
    cache = FrameCache(dataset.features.folder.parent / "frames-small", (120, 180))
    usable, _ = cache.build(dataset.test, workers)
    return evaluation.frame_baselines(cache, usable, workers) if len(usable) == len(dataset.test) else {}


def scene_points(net, dataset, labels, run):
    """Scene features of all segments [N, D], their scenes, and their kinds: 0 training, 1 normal test, 2 abnormal
    test."""
    from scene_aware_ae import scoring

    points, scenes = [], []
    kinds = []
    for video in dataset.train + dataset.test:
        features = scoring.score_video(net, dataset.features.array(video), run)["scene_features"]
        abnormal = labels.get(video.name, np.zeros(dataset.frames(video)))
        points.append(features)
        scenes += [video.scene or "scene"] * len(features)
        for first, end, _ in scoring.segments(dataset.frames(video)):
            kinds.append(0 if video.split == "train" else 1 + int(abnormal[first:end].any()))
    return np.concatenate(points), np.array(scenes), np.array(kinds)


def draw_tsne(checkpoints, dataset, labels, run, path):
    """Scene features of one or several checkpoints side by side: colours are scenes, crosses abnormal test segments."""
    from scene_aware_ae import scoring

    report = optional_module("common.report")
    if report is None:
        return print("note: --tsne needs common/report, which is not here")
    panels, width = {}, dataset.features.description["width"]
    for checkpoint in checkpoints:
        net, state = scoring.load_model(checkpoint)
        if net.output_proj.in_features != width:
            raise UserError(
                f"--tsne {checkpoint} is for features of width {net.output_proj.in_features}, these have {width}"
            )
        mode = (state.get("plan") or {}).get("mode", "?")
        title = f"{checkpoint.parent.name}, mode {mode}\ndots training, circles normal, crosses abnormal test segments"
        panels[title] = scene_points(net.eval().to(run.device), dataset, labels, run)
    if min(len(points) for points, _, _ in panels.values()) < 5:
        return print(f"note: too few segments for {path.name}")
    report.plots.tsne(panels, path)
    print(f"wrote {path}")


def score_own_video(video, checkpoint, source, encoder_options, *, out, run, options, scene=None, loaded=None):
    """scores.csv, curve.png, overlay.mp4 and report.html of one video; with --mode 2 also which scene it resembles.

    video: readers.video.Video; source: its dataset is that of the checkpoint, beside whose features a stand-in encoder
    lies.
    """
    import torch

    from scene_aware_ae import scoring

    own_video = optional_module("common.own_video", "--video", "score a dataset")
    net, state = loaded or scoring.load_model(checkpoint)
    net.eval().to(run.device)
    trained = state.get("encoder") or {}
    data = Dataset("video", video.path.resolve().parent, [], [video])
    home = data
    if trained.get("encoder", "").startswith("none:"):
        cli.need_training_set(checkpoint, state, source.dataset)
        home = datasets.find(source.dataset, source.data_root, source.labels)
    with run.main_first():
        encoder = make_encoder(encoder_options, home, source.cache, run, trained=trained, only_features=False)
    dataset = preprocess.prepare(source, run, encoder_options, splits=("test",), data=data, encoder=encoder)
    out = writable_folder(out / safe_filename(video.name))
    if not run.is_main:
        return
    result = scoring.score_video(net, dataset.features.array(video), run)
    own_video.write(
        video.name,
        *frames_and_clock(video),
        result["scores"],
        options.smoothing,
        METHOD,
        out,
        top=options.top,
    )
    if (state.get("plan") or {}).get("mode") == 2:
        with torch.inference_mode():
            logits = net.classifier(torch.from_numpy(result["scene_features"]).to(run.device))
        shares = logits.softmax(1).mean(0).cpu().numpy()
        best = int(shares.argmax())
        compared = f"; --scene says {scene}" if scene else ""
        print(f"most similar scene: {state['scenes'][best]} ({100 * shares[best]:.0f} %){compared}")
    if scene and state.get("scenes") and scene not in state["scenes"]:
        print(f"note: the model was not trained on scene {scene}; it was on {', '.join(state['scenes'])}")


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    checkpoint = args.checkpoint or Path("runs/scene_aware_ae") / cli.dataset_name(args) / "scene_aware_ae.pt"
    from common.distributed import Run
    from scene_aware_ae import scoring

    with Run(args.device, args.precision) as run:
        loaded = scoring.load_model(checkpoint)  # a wrong file is refused before any work
        source, encoder = cli.DataSource.from_args(args), EncoderOptions.from_args(args)
        if not loaded[1].get("encoder"):  # the authors' file, whose frames were prepared in their way
            encoder.preprocess = encoder.preprocess or "paper"
        how = dict(run=run, options=cli.ScoreOptions.from_args(args), loaded=loaded)
        if args.video:
            video, out = open_video(args.video), args.out or checkpoint.parent / "video"
            score_own_video(video, checkpoint, source, encoder, out=out, scene=args.scene, **how)
        else:
            splits = ("train", "test") if args.tsne is not None else ("test",)
            trained = loaded[1].get("encoder")
            dataset = preprocess.prepare(source, run, encoder, splits=splits, scenes=args.scenes, trained=trained)
            out = args.out or checkpoint.parent
            evaluate(dataset, checkpoint, out=out, shard=args.shard, tsne=args.tsne, workers=args.workers, **how)


if __name__ == "__main__":
    run_script(main)
