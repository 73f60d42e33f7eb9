"""Score test videos, or one's own, with a trained HF2-VAD.

    python hf2vad/eval.py --dataset ped2 --checkpoint runs/hf2vad/ped2/cvae.pt --protocol official --overlay
    python hf2vad/eval.py --video my.mp4 --checkpoint runs/hf2vad/ped2/cvae.pt
    python hf2vad/eval.py --dataset demo --benchmark
"""
import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from common import evaluation, metrics, plots, smoothing, training  # noqa: E402
from common.datasets import Dataset  # noqa: E402
from common.files import UserError, load_array, replacing, run, writable_folder  # noqa: E402
from common.video import open_video  # noqa: E402
from hf2vad import preprocess, scoring  # noqa: E402

SKIPPED = 4  # frames without full history, which the authors leave out
# w_r (flow) and w_p (frame). How the published values were found is unknown, so strict weighs both errors alike.
STRICT_WEIGHTS = (1.0, 1.0)
OFFICIAL_WEIGHTS = {"ped2": (1.0, 0.1)}


def add_eval_flags(parser):
    g = parser.add_argument_group("scores")
    g.add_argument("--protocol", choices=["strict", "official"], default="strict",
                   help="strict: every frame, nothing chosen on test labels; official: as the authors computed it "
                   "(default: %(default)s)")
    g.add_argument("--w-flow", type=float, default=None, help="weight of the flow error w_r (default: 1)")
    g.add_argument("--w-frame", type=float, default=None,
                   help="weight of the frame error w_p (default: 1; official on ped2: 0.1)")
    g.add_argument("--smoothing", default="median:17", help="filter inside each video (default: %(default)s)")
    g.add_argument("--overlay", action="store_true", help="also write an mp4 per video with scored boxes and the curve")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preprocess.add_data_flags(parser)
    training.add_flags(parser, out="the checkpoint's folder")
    g = parser.add_argument_group("what to score")
    g.add_argument("--checkpoint", "--ckpt_path", "--model_path", type=Path, default=None,
                   help="our checkpoint or the authors' (default: the newest of runs/hf2vad/<dataset>)")
    g.add_argument("--video", type=Path, default=None,
                   help="a video file or a folder of frames instead of the dataset's test set")
    g.add_argument("--batch-size", type=int, default=256, help="cubes at once; scores do not depend on it (default: %(default)s)")
    g.add_argument("--benchmark", action="store_true", help="measure speed and memory of every step and stop")
    add_eval_flags(parser)
    return parser.parse_args(argv)


def weights_of(args, dataset):
    default = OFFICIAL_WEIGHTS.get(dataset, STRICT_WEIGHTS) if args.protocol == "official" else STRICT_WEIGHTS
    return (default[0] if args.w_flow is None else args.w_flow, default[1] if args.w_frame is None else args.w_frame)


def protocol_of(args, dataset):
    if args.protocol == "strict":
        return evaluation.Protocol("strict", args.smoothing)
    liberties = [f"the first {SKIPPED} frames of every video are left out"]
    if dataset in OFFICIAL_WEIGHTS:
        liberties.append("the weights of the two errors are the authors' for this dataset; how they were chosen is unknown")
    return evaluation.Protocol("official", args.smoothing, SKIPPED, liberties)


def cube_errors(scorer, ready, videos, tag, folder, r, batch_size):
    """[N, 2] flow and frame errors of all cubes of `videos`; kept in `folder`, so that a second protocol costs nothing."""
    path = folder / f"errors-{tag}-{ready.store.s.key()}.npy"
    records = ready.records(videos)
    count = sum(map(len, records))
    known = path.exists()
    r.barrier()
    if known:
        errors = load_array(path, "cube errors")
        if errors.shape == (count, 2):
            return errors
    errors = scorer.score_records(records, "score cubes", batch_size)
    if r.main:
        with replacing(path) as tmp:
            np.save(tmp, errors)
    return errors


def per_video(ready, videos, errors, stats, weights):
    """-> {video: frame scores [T]}, {video: detections [n, 6] frame, x1, y1, x2, y2, score}."""
    scores, detections, start = {}, {}, 0
    for v in videos:
        rec = ready.store.records(v)
        s = scoring.combine(errors[start:start + len(rec)], stats, *weights)
        start += len(rec)
        frames = np.array(rec["frame"])
        scores[v.name] = scoring.frame_scores(frames, s, ready.frames(v), scoring.empty_score(stats, *weights))
        detections[v.name] = np.column_stack([frames, np.array(rec["box"]).reshape(-1, 4), s]).astype(np.float32)
    return scores, detections


def baselines(ready, videos):
    """The two trivial scores that every result is shown beside."""
    difference, fastest = {}, {}
    for v in tqdm(videos, desc="trivial baselines", unit="video", dynamic_ncols=True, mininterval=5):
        rec = ready.store.records(v)
        difference[v.name] = evaluation.frame_difference(ready.cache.frames(v))
        fastest[v.name] = evaluation.fastest_box(np.array(rec["frame"]), np.array(rec["speed"]), ready.frames(v))
    return {"frame difference": difference, "fastest box": fastest}


def training_statistics(state, net, scorer, args, r, checkpoint):
    """The checkpoint's own statistics, or those of the dataset's training cubes where it has none."""
    if state.get("statistics"):
        return state["statistics"]
    r.say(f"{checkpoint} has no training statistics: scoring the training cubes of {args.dataset}")
    ready = preprocess.prepare(args, r.device, splits=("train",), trained=state.get("foreground"))
    if not ready.train:
        raise UserError(f"{checkpoint} has no training statistics and {args.dataset} no training videos: the scores cannot "
                        "be normalised")
    return scoring.statistics(cube_errors(scorer, ready, ready.train, "train-" + scoring.weights_hash(net), ready.store.folder,
                                          r, args.batch_size))


def evaluate(args, ready, checkpoint, r):
    """Score the test set, print and write the results. -> metrics (rank 0)."""
    if not ready.test:
        raise UserError(f"{ready.data.name} has no test videos under {ready.data.root}; score single ones with --video")
    net, state = scoring.load_model(checkpoint)
    scorer = scoring.Scorer(net, r)
    args.batch_size = getattr(args, "batch_size", None) or 256
    stats = training_statistics(state, net, scorer, args, r, checkpoint)
    folder = writable_folder(args.out or Path(checkpoint).parent)
    errors = cube_errors(scorer, ready, ready.test, scoring.weights_hash(net), folder, r, args.batch_size)
    if not r.main:
        return None
    weights = weights_of(args, ready.data.name)
    if state.get("done") is False:
        print(f"note: the training of {checkpoint} has not finished (stage {state['stage']}, {state['epoch']} whole epochs)")
    if not scorer.whole:
        print("this checkpoint is stage one alone: scores are flow errors")
    scores, detections = per_video(ready, ready.test, errors, stats, weights)
    out = folder / args.protocol
    report = evaluation.evaluate(
        out, ready.data, scores, method="HF2-VAD", protocol=protocol_of(args, ready.data.name), detections=detections,
        baselines=baselines(ready, ready.test),
        extra={"checkpoint": str(checkpoint), "weights": weights, "statistics": stats,
               "seed": state.get("identity", {}).get("seed"), "stage": state.get("stage"),
               "epochs": state.get("epoch"), "foreground": vars(ready.store.s),
               "training_seconds": state.get("seconds"), "skipped_videos": ready.skipped,
               "parameters": sum(p.numel() for p in net.parameters()), "peak_memory_mib": round(training.peak_memory())})
    if args.overlay:
        write_overlays(ready, scores, detections, args.smoothing, weights, out)
    preprocess.report_skipped(ready.skipped)
    if not args.overlay:
        print("next: add --overlay for videos with scored boxes; "
              f"python hf2vad/eval.py --video FILE --checkpoint {checkpoint} scores your own footage")
    return report


def ranges(smoothed, weights):
    """What the overlay's colours and curve span: red is three deviations of the training cubes above their mean."""
    red = 3 * float(np.hypot(*weights)) or 1.0
    return (0.0, red), (float(min(0.0, smoothed.min(initial=0))), float(max(red, np.percentile(smoothed, 98))))


def write_overlays(ready, scores, detections, filter_, weights, out):
    labels = evaluation.labels_of(scores, ready.data)
    apply = smoothing.parse(filter_)
    smoothed = {k: apply(s) for k, s in scores.items()}
    box_range, score_range = ranges(np.concatenate(list(smoothed.values())), weights)
    for v in tqdm(ready.test, desc="overlay", unit="video", dynamic_ncols=True):
        path = out / "overlay" / f"{evaluation.safe(v.name)}.mp4"
        plots.overlay(ready.cache.frames(v), detections[v.name], smoothed[v.name], labels.get(v.name), path,
                      ready.cache.info(v)["fps"], box_range, score_range)
    print(f"wrote {len(ready.test)} videos into {out}/overlay")


def quick_auc(net, ready, picked, every, args, r):
    """AUC of unsmoothed scores on every N-th test frame; normalised by the picked cubes themselves. For looking only."""
    scorer = scoring.Scorer(net, r)
    errors = scorer.score_records(picked, "monitor")
    stats, start, ss, ys = scoring.statistics(errors), 0, [], []
    for v, rec in zip(ready.test, picked):
        frames = ready.frames(v)
        s = scoring.combine(errors[start:start + len(rec)], stats, *weights_of(args, ready.data.name))
        start += len(rec)
        ss.append(scoring.frame_scores(rec["frame"], s, frames, float(s.min(initial=0)))[::every])
        ys.append(ready.data.labels(v, frames)[::every])
    return {f"auc_every_{every}": metrics.micro_auc(ys, ss)}


def score_video(args, r):
    """One's own footage: scores.csv, curve.png, overlay.mp4."""
    video = open_video(args.video)
    net, state = scoring.load_model(args.checkpoint)
    trained = dict(state.get("foreground") or {})
    scorer = scoring.Scorer(net, r)
    stats = training_statistics(state, net, scorer, args, r, args.checkpoint)
    if str(trained.get("boxes")).startswith("file:") and args.boxes is None:
        r.say(f"note: trained with boxes from {trained['boxes']}, which knows nothing of this video: motion boxes are used; the "
              "same detector (--boxes) would score best")
        trained["boxes"] = "motion"
    data = Dataset("video", video.path.resolve().parent, [], [video])
    ready = preprocess.prepare(args, r.device, data=data, trained=trained)
    name = evaluation.safe(video.name)
    out = writable_folder((args.out or Path(args.checkpoint).parent / "video") / name)
    errors = scorer.score_records(ready.records(ready.test), "score cubes", args.batch_size)
    if not r.main:
        return
    weights = weights_of(args, state.get("identity", {}).get("dataset"))
    scores, detections = per_video(ready, ready.test, errors, stats, weights)
    s, d = scores[video.name], detections[video.name]
    smoothed, fps = smoothing.parse(args.smoothing)(s), ready.cache.info(video)["fps"]
    counts = np.bincount(d[:, 0].astype(int), minlength=len(s))
    with replacing(out / "scores.csv") as tmp, open(tmp, "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["frame", "seconds", "score", "smoothed", "boxes"])
        for t in range(len(s)):
            table.writerow([t, f"{t / fps:.3f}" if fps else "", f"{s[t]:.4f}", f"{smoothed[t]:.4f}", counts[t]])
    plots.curve(s, smoothed, None, f"HF2-VAD · {video.name}", out / "curve.png")
    plots.overlay(ready.cache.frames(video), d, smoothed, None, out / "overlay.mp4", fps, *ranges(smoothed, weights))
    print(f"{video.name}: {len(s)} frames, {len(d)} objects; most abnormal moments (smoothed score):")
    left = smoothed.copy()
    for _ in range(5):
        t = int(np.argmax(left))
        if not np.isfinite(left[t]):
            break
        print(f"  {left[t]:9.3f}  frame {t}" + (f"  {t / fps:8.2f} s" if fps else ""))
        left[max(0, t - 50):t + 51] = -np.inf
    print(f"wrote {out}/scores.csv, curve.png, overlay.mp4")
    preprocess.report_skipped(ready.skipped)


def newest_checkpoint(folder):
    for stage in ("finetune", "cvae", "memae"):
        path = Path(folder) / f"{stage}.pt"
        if path.exists():
            return path
    raise UserError(f"no checkpoint in {folder}: name one with --checkpoint, or train first with hf2vad/train.py")


def main(argv=None):
    args = parse(argv)
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    smoothing.parse(args.smoothing)
    r = training.Run(args.device, args.precision)
    if args.benchmark:
        from hf2vad.benchmark import benchmark_evaluation
        return benchmark_evaluation(args, r)
    from common.datasets import canonical
    args.checkpoint = args.checkpoint or newest_checkpoint(args.out or Path("runs/hf2vad") / canonical(args.dataset))
    if args.video:
        return score_video(args, r)
    trained = scoring.load_model(args.checkpoint)[1].get("foreground")  # a wrong file is refused before any work
    if r.main:
        ready = preprocess.prepare(args, r.device, splits=("test",), trained=trained)
    r.barrier()
    if not r.main:
        ready = preprocess.prepare(args, r.device, splits=("test",), trained=trained)
    evaluate(args, ready, args.checkpoint, r)
    r.close()


if __name__ == "__main__":
    run(main)
