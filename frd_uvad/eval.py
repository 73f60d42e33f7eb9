"""Score clip features, or your own video, with the scorer of a trained FRD-UVAD.

python frd_uvad/eval.py --dataset demo --checkpoint runs/frd_uvad/demo/frd.pt
python frd_uvad/eval.py --dataset_name ucfcrime --features data/UCF-Crime --ckpt_path authors.pkl --protocol official
python frd_uvad/eval.py --video my.mp4 --checkpoint runs/frd_uvad/folder/frd.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli, evaluation, metrics, score_cache, smoothing
from common.cache import FrameCache
from common.io import UserError, optional_module, run_script, safe_filename, writable_folder, write_json
from common.readers.video import Video, frames_and_clock, open_video
from frd_uvad import preprocess
from frd_uvad.features.data import CLIP_FRAMES, FeatureVideo, canonical_features, frames_of_clips

# torch is imported inside functions: --help answers at once.

METHOD = "FRD-UVAD"
BATCH = 128  # the authors' code treats every 128 clips as one video


def add_eval_flags(parser, training=False):
    cli.add_score_flags(
        parser,
        "official also prints the published measures, which take batches of 128 clips for videos",
        "none",
        "the curve",
        training,
    )


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    cli.add_shard_flag(cli.add_checkpoint_flags(parser, "runs/frd_uvad/<dataset>/frd.pt"), scoring=True)
    add_eval_flags(parser)
    return parser.parse_args(cli.with_synonyms(argv, preprocess.SYNONYMS))


def make_protocol(options: cli.ScoreOptions) -> evaluation.Protocol:
    liberties = []
    if options.protocol == "official":
        liberties.append(
            "the published AUC and false-alarm rate of abnormal videos take batches of 128 clips for videos; both are "
            "printed below the table"
        )
    return evaluation.Protocol(options.protocol, options.smoothing, 0, liberties, probabilities=True)


def published_measures(scores: dict, labels: dict) -> dict:
    """Measures of the authors' code: a batch of 128 clips counts as an abnormal video when it holds an abnormal
    frame."""
    s, y = (np.concatenate([x[k] for k in sorted(scores)]) for x in (scores, labels))
    size = BATCH * CLIP_FRAMES
    batches = [slice(i, i + size) for i in range(0, len(y), size)]
    abnormal = [part for part in batches if y[part].any()]
    if not abnormal:
        return {}
    s, y = (np.concatenate([x[part] for part in abnormal]) for x in (s, y))
    if y.all():
        return {}
    return {"auc_abnormal_batches": metrics.auc(y, s), "far_abnormal_batches": metrics.false_alarm_rate(y, s, 0.5)}


def further_measures(scores, errors, labels, options) -> dict:
    """What the paper reports beside AUC and AP, for metrics.json."""
    extra, smooth = {}, smoothing.parse(options.smoothing)
    abnormal = [k for k in labels if labels[k].any()]
    if any((labels[k] == 0).any() for k in abnormal):
        y, s = (np.concatenate(x) for x in ([labels[k] for k in abnormal], [smooth(scores[k]) for k in abnormal]))
        extra["far_at_0.5_abnormal_videos"] = metrics.false_alarm_rate(y, s, 0.5)
    if labels and options.protocol == "official":
        extra.update(published_measures(scores, labels))
    if errors and labels:  # the column of the table has the baselines' filter
        result, _ = evaluation.measure(errors, labels, evaluation.Protocol("strict", options.smoothing))
        extra["reconstruction_micro_auc"] = result.get("micro_auc")
    return extra


def print_further_measures(extra, options):
    if extra.get("reconstruction_micro_auc"):
        value = f"{100 * extra['reconstruction_micro_auc']:.2f}"
        print(f"reconstruction error with the scorer's smoothing ({options.smoothing}): micro AUC {value}")
    if "far_at_0.5_abnormal_videos" in extra:
        print(f"false alarms at 0.5 in abnormal videos: {100 * extra['far_at_0.5_abnormal_videos']:.2f} %")
    if "auc_abnormal_batches" in extra:
        print(
            f"as published, by batches of {BATCH} clips: AUC {100 * extra['auc_abnormal_batches']:.2f}, false alarms "
            f"{100 * extra['far_abnormal_batches']:.2f} %"
        )


def trivial_baselines(data, source) -> dict:
    """Trivial scores on small frames of labelled test videos; {} for features made elsewhere, or if a video cannot be
    decoded."""
    if not data.has_labels or not data.videos:
        return {}
    cache = FrameCache(data.dataset.cache_folder(source.cache) / "frames-small", (120, 180))
    usable, failed = cache.build([data.videos["test", v.name] for v in data.test], source.workers)
    return {} if failed else evaluation.frame_baselines(cache, usable, source.workers)


def evaluate(data, checkpoint, *, out, run, options, source, loaded=None):
    """Score the test videos (all videos where there are none), print and write the results. -> metrics on rank 0, else
    None.

    data: FeatureData that preprocess.prepare(source, …) gave; loaded: what scoring.load_model(checkpoint) gave, if it
    was called before.
    """
    from common.training import run_info, weights_hash
    from frd_uvad import scoring

    net, state = loaded or scoring.load_model(checkpoint)
    check_width(net, checkpoint, data.width, "these")
    net.eval().to(run.device)
    videos = data.test or data.train
    settings = {
        "weights": weights_hash(net),
        "precision": run.precision,
        "device": run.device.type,
        "version": scoring.SCORES_VERSION,
    }
    arrays = score_cache.ScoreCache(writable_folder(out), settings, FeatureVideo.fingerprint).compute(
        videos,
        lambda video, tick: scoring.score_video(net, video, run, tick=tick),
        run,
        size=len,
        unit="clip",
        all_videos=data.all_videos,
        shard=source.shard,
    )
    if not arrays:
        return None
    scores, errors = (
        {v.name: data.frame_scores(v, arrays[v.key][name]) for v in videos if name in arrays[v.key]}
        for name in ("scores", "errors")
    )
    dataset = data.as_dataset()
    if not data.test:
        dataset.test = [Video(v.name, v.path or data.root) for v in videos]
    extra = further_measures(scores, errors, evaluation.labels_of(scores, dataset), options)
    folder = Path(out) / options.protocol
    result = evaluation.evaluate(
        folder,
        dataset,
        scores,
        method=METHOD,
        protocol=make_protocol(options),
        extra={
            **run_info(checkpoint, state, [net], score_cache.total_seconds(arrays), data.skipped, run),
            "auxiliary": state.get("identity", {}).get("auxiliary"),
            **extra,
        },
        baselines={**({"reconstruction error": errors} if errors else {}), **trivial_baselines(data, source)},
    )
    print_further_measures(extra, options)
    clip_scores = {v.name: [round(float(x), 5) for x in scores[v.name][::CLIP_FRAMES]] for v in videos}
    write_json(folder / "clip_scores.json", clip_scores)
    sources = {
        name: v for (_, name), v in sorted(data.videos.items(), reverse=True)
    }  # test videos before training ones
    evaluation.finish(
        folder,
        result,
        script="frd_uvad/eval.py",
        checkpoint=checkpoint,
        options=options,
        skipped=data.skipped,
        pictures=(lambda v: frames_and_clock(sources[v.name])) if sources else None,
        more=f"python frd_uvad/train.py --auxiliary frd:{checkpoint} --out {out}-2, with --dataset and features as "
        "here, trains a second round; ",
    )
    return result.metrics


def check_width(net, checkpoint, width, what):
    expected = net.scorer.fc1.in_features
    if expected != width:
        raise UserError(f"checkpoint {checkpoint} is for features of width {expected}, {what} have {width}")


def score_own_video(video, checkpoint, *, out, run, options, features=None, loaded=None):
    """scores.csv, curve.png, overlay.mp4 and report.html of one video. video: readers.video.Video; out: folder for it;
    features: preprocess.FeatureOptions, where they differ from how the checkpoint was trained."""
    from frd_uvad import scoring

    own_video = optional_module("common.own_video", "--video", "score a dataset")
    net, state = loaded or scoring.load_model(checkpoint)
    if not state.get("features"):
        raise UserError(
            f"{checkpoint} was trained on features made elsewhere: make those of {video.path} in the same way, and "
            "score them with --features"
        )
    features = (features or preprocess.FeatureOptions()).trained_as(state["features"])
    features, frames = preprocess.encode_own_video(video, features, run, state["features"])
    check_width(net, checkpoint, features.shape[2], f"those of {video.path}")
    out = writable_folder(out / safe_filename(video.name))
    if not run.is_main:
        return
    clips = FeatureVideo(video.name, "test", [features], path=video.path)
    scores = scoring.score_video(net.eval().to(run.device), clips, run)["scores"]
    own_video.write(
        video.name,
        *frames_and_clock(video),
        frames_of_clips(scores, frames),
        options.smoothing,
        METHOD,
        out,
        top=options.top,
    )


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    features = preprocess.FeatureOptions.from_args(args)
    name = canonical_features(args.dataset) or (args.dataset if features.features else cli.dataset_name(args))
    checkpoint = args.checkpoint or Path("runs/frd_uvad") / name / "frd.pt"
    from common.distributed import Run
    from frd_uvad import scoring

    with Run(args.device, args.precision) as run:
        loaded = scoring.load_model(checkpoint)  # a wrong file is refused before any work
        how = dict(run=run, options=cli.ScoreOptions.from_args(args), loaded=loaded)
        if args.video:
            video, out = open_video(args.video), args.out or checkpoint.parent / "video"
            score_own_video(video, checkpoint, out=out, features=features, **how)
        else:
            source = cli.DataSource.from_args(args)
            data = preprocess.prepare(source, run, features, trained=loaded[1].get("features"))
            evaluate(data, checkpoint, out=args.out or checkpoint.parent, source=source, **how)


if __name__ == "__main__":
    run_script(main)
