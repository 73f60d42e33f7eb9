"""Score clip features with a trained FRD-UVAD: the scorer alone runs.

python frd_uvad/eval.py --dataset demo --checkpoint runs/frd_uvad/demo/frd.pt
python frd_uvad/eval.py --dataset_name ucfcrime --features data/UCF-Crime --ckpt_path authors.pkl --protocol official
python frd_uvad/eval.py --video my.mp4 --checkpoint runs/frd_uvad/folder/frd.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli, evaluation, metrics, smoothing
from common import old_training as training
from common.dataset import report_skipped
from common.features.data import CLIP_FRAMES, FeatureVideo, frames_of_clips
from common.features.folders import canonical_features
from common.io import UserError, run, safe_filename, writable_folder, write_json
from common.late import torch
from common.video import decoded, open_video
from frd_uvad import preprocess, scoring

BATCH = 128  # clips by which the published evaluation parts normal from abnormal videos

SCORES_VERSION = 1  # raise it when raw scores change: cached ones are then computed again


def add_eval_flags(parser):
    cli.add_score_flags(
        parser,
        "official also prints the published measures, which take batches of 128 clips for videos",
        "none",
        "the curve",
    )


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="the checkpoint's folder")
    cli.add_shard_flag(cli.add_checkpoint_flags(parser, "runs/frd_uvad/<dataset>/frd.pt"), scoring=True)
    add_eval_flags(parser)
    return parser.parse_args(cli.with_synonyms(argv, preprocess.SYNONYMS))


def score(net, video, r, batch_size=1024, tick=lambda n: None):
    """{"scores": of a video's clips, float32 [clips], "errors": reconstruction errors of single clips [clips], where there is a
    reconstructor}. tick(n) after every n clips."""
    scores, errors = [], []
    for i in range(0, len(video), batch_size):
        x = torch.from_numpy(video.clips(range(i, min(i + batch_size, len(video))))).to(r.device).float().unsqueeze(2)
        if not torch.isfinite(x).all():
            raise UserError(
                f"features of video {video.name} ({video.path}) hold NaN or infinite numbers: encode it again, or take it "
                "away"
            )
        with r.autocast():
            scores.append(scoring.clip_scores(net, x)[:, 0].float().cpu().numpy())
            if net.reconstructor is not None:
                with torch.inference_mode():
                    errors.append(net.error(x)[:, 0].float().cpu().numpy())
        tick(len(x))
    return {"scores": np.concatenate(scores), **({"errors": np.concatenate(errors)} if errors else {})}


def published_measures(scores, labels):
    """Of the authors' code: a batch of 128 clips counts as an abnormal video when it holds an abnormal frame."""
    s, y = (np.concatenate([x[k] for k in sorted(scores)]) for x in (scores, labels))
    size = BATCH * CLIP_FRAMES
    parts = [slice(i, i + size) for i in range(0, len(y), size)]
    own = [p for p in parts if y[p].any()]
    if not own:
        return {}
    sa, ya = np.concatenate([s[p] for p in own]), np.concatenate([y[p] for p in own])
    out = {}
    try:
        out["auc_abnormal_batches"] = metrics.auc(ya, sa)
        out["far_abnormal_batches"] = metrics.false_alarm_rate(ya, sa, 0.5)
    except ValueError:
        pass
    return out


def evaluate(args, data, checkpoint, r):
    """Score the test videos, print and write the results. -> metrics (rank 0)."""
    videos = data.test or data.train
    net, state = scoring.load_model(checkpoint)
    if net.scorer.fc1.in_features != data.width:
        raise UserError(
            f"checkpoint {checkpoint} is for features of width {net.scorer.fc1.in_features}, these have {data.width}"
        )
    net.eval().to(r.device)
    folder = writable_folder(args.out or Path(checkpoint).parent)
    dataset = data.as_dataset()
    cache = evaluation.ScoreCache(
        folder,
        {"weights": training.weights_hash(net), "precision": r.precision, "version": SCORES_VERSION},
        FeatureVideo.fingerprint,
    )
    found = cache.compute(
        videos,
        lambda v, tick: score(net, v, r, tick=tick),
        r,
        size=len,
        unit="clip",
        all_videos=data.all_videos,
        shard=getattr(args, "shard", None),
    )
    if not found:
        return None
    scores, errors = {}, {}
    for v in videos:
        s, e = found[v.key]["scores"], found[v.key].get("errors")
        scores[v.name] = data.frame_scores(v, s)
        if e is not None:
            errors[v.name] = data.frame_scores(v, e)
    if not data.test:
        from common.video import Video

        dataset.test = [Video(v.name, v.path or data.root) for v in videos]
    sources = {
        name: v for (_, name), v in sorted(data.videos.items(), reverse=True)
    }  # a test video replaces a training one of its name
    labels = evaluation.labels_of(scores, dataset)
    extra = {
        **training.run_info(checkpoint, state, [net], evaluation.total_seconds(found), data.skipped, r),
        "auxiliary": state.get("identity", {}).get("auxiliary"),
    }
    liberties = []
    if labels:
        abnormal = [k for k in labels if labels[k].any()]
        apply = smoothing.parse(args.smoothing)
        if abnormal and any((labels[k] == 0).any() for k in abnormal):
            extra["far_at_0.5_abnormal_videos"] = metrics.false_alarm_rate(
                np.concatenate([labels[k] for k in abnormal]), np.concatenate([apply(scores[k]) for k in abnormal]), 0.5
            )
        if args.protocol == "official":
            extra.update(published_measures(scores, labels))
            liberties.append(
                "the published AUC and false-alarm rate of abnormal videos take batches of 128 clips for videos; both are "
                "printed below the table"
            )
    out = folder / args.protocol
    protocol = evaluation.Protocol(args.protocol, args.smoothing, 0, liberties, probabilities=True)
    if errors and labels:  # the column beside it has the baselines' filter
        alone, _ = evaluation.measure(errors, labels, evaluation.Protocol("strict", args.smoothing))
        extra["reconstruction_micro_auc"] = alone.get("micro_auc")
    result = evaluation.evaluate(
        out,
        dataset,
        scores,
        method="FRD-UVAD",
        protocol=protocol,
        extra=extra,
        baselines={"reconstruction error": errors} if errors else {},
    )
    evaluation.show(
        out,
        result,
        pictures=(lambda v: decoded(sources[v.name])) if sources else None,
        top=args.top,
        overlay=args.overlay,
    )
    if extra.get("reconstruction_micro_auc"):
        print(
            f"reconstruction error with the scorer's smoothing ({args.smoothing}): micro AUC "
            f"{100 * extra['reconstruction_micro_auc']:.2f}"
        )
    if "far_at_0.5_abnormal_videos" in extra:
        print(f"false alarms at 0.5 in abnormal videos: {100 * extra['far_at_0.5_abnormal_videos']:.2f} %")
    if "auc_abnormal_batches" in extra:
        print(
            f"as published, by batches of {BATCH} clips: AUC {100 * extra['auc_abnormal_batches']:.2f}, false alarms "
            f"{100 * extra['far_abnormal_batches']:.2f} %"
        )
    write_json(
        out / "clip_scores.json", {v.name: [round(float(x), 5) for x in scores[v.name][::CLIP_FRAMES]] for v in videos}
    )
    report_skipped(data.skipped)
    evaluation.print_next_steps(
        "frd_uvad/eval.py",
        checkpoint,
        out,
        overlay=args.overlay,
        more=f"python frd_uvad/train.py --dataset {args.dataset} --auxiliary "
        f"frd:{checkpoint} --out {folder}-2 trains a second round; ",
        pictures=bool(sources),
    )
    return result.metrics


def score_video(args, r):
    """One's own footage: scores.csv, curve.png, overlay.mp4."""
    video, (net, state) = open_video(args.video), scoring.load_model(args.checkpoint)
    if not state.get("features"):
        raise UserError(
            f"{args.checkpoint} was trained on features made elsewhere: make those of {args.video} alike, and score them with "
            "--features"
        )
    features, frames = preprocess.features_of_video(video, state["features"], r)
    if features.shape[2] != net.scorer.fc1.in_features:
        raise UserError(
            f"checkpoint {args.checkpoint} is for features of width {net.scorer.fc1.in_features}, those of {args.video} have "
            f"{features.shape[2]}"
        )
    out = writable_folder((args.out or Path(args.checkpoint).parent / "video") / safe_filename(video.name))
    scores = score(net.eval().to(r.device), FeatureVideo(video.name, "test", [features], path=video.path), r)["scores"]
    evaluation.write_own_video(
        video.name, *decoded(video), frames_of_clips(scores, frames), args.smoothing, "FRD-UVAD", out, top=args.top
    )


def main(argv=None):
    args = parse(argv)
    smoothing.parse(args.smoothing)
    r = training.Run.from_args(args)
    name = canonical_features(args.dataset) or args.dataset
    args.checkpoint = args.checkpoint or Path("runs/frd_uvad") / name / "frd.pt"
    scoring.load_model(args.checkpoint)  # a wrong file is refused before any work
    if args.video:
        return score_video(args, r)
    evaluate(args, preprocess.prepare(args, r), args.checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
