"""Train FRD-UVAD on clip features of training and test videos, without any label; encoding runs first where it is
missing.

    python frd_uvad/train.py --dataset demo                                     # stand-in features, no download
    python frd_uvad/train.py --dataset folder --data-root my_videos --encoder timm:tf_efficientnet_lite0
    python frd_uvad/train.py --dataset_name ucfcrime --feature_pretrain_model i3d --feature_modal rgb --cross_clip 4 \\
        --lab False --lab_type wlab --beta 0.1 --delta 0.5 --Vitblock_num 8 --max_seqlen 320 --max_epoch 5 \\
        --Lambda 1_1_1
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.io import UserError, optional_module, run_script
from common.readers.pictures import as_channels, resize
from common.readers.video import Decoder
from frd_uvad import preprocess
from frd_uvad.eval import add_eval_flags, evaluate
from frd_uvad.features.data import CLIP_FRAMES

# torch is imported inside functions: --help answers at once, and decoding processes never load it.


@dataclass
class Plan:
    """The schedule and the settings of the method; by default the published ones."""

    epochs: int = 5
    batch_size: int = 320  # windows
    lr: float = 1e-3
    cross_clip: int = 4  # clips of a window
    loss_weights: tuple = (1.0, 1.0, 1.0)  # of reconstruction, disruption and scorer
    bank: str = "wlab"  # or slab, none
    beta: float = 0.1  # size of the bank, in batches
    delta: float = 0.5  # deviations above the mean score from which a window may join the bank


DEFAULTS = Plan()
# The published schedule makes some ten thousand steps of UCF-Crime's clips. Where it would make fewer than FEW, as of a
# few videos, smaller batches make STEPS: in fewer the reconstructor does not even learn the features' mean.
FEW = 1000
STEPS = 5000
SMALL_BATCH = 16
SELF = "self"  # --auxiliary: two rounds
BETAS = (0.9, 0.95)
HEADS = 16


def parse_bool(text):
    """True or False, as the published command line writes them."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def loss_weights(text):
    """ "1_1_1" -> (1.0, 1.0, 1.0)"""
    weights = tuple(cli.natural_float(x) for x in text.split("_"))
    if len(weights) != 3:
        raise argparse.ArgumentTypeError(f"expected three numbers, such as 1_1_1, not {text}")
    return weights


def bank_settings(text):
    """ "wlab:0.1:0.5" -> {"bank": "wlab", "beta": 0.1, "delta": 0.5}; what is left out keeps its default"""
    kind, *numbers = text.split(":")
    if kind not in ("wlab", "slab", "none") or len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"expected wlab, slab or none, or such as wlab:0.1:0.5, not {text}")
    kinds = {"beta": cli.natural_float, "delta": cli.number(float, -math.inf)}
    return {"bank": kind, **{name: kinds[name](x) for name, x in zip(kinds, numbers)}}


def parse(argv=None):
    parser = cli.make_parser(__doc__)
    preprocess.add_data_flags(parser)
    cli.add_run_flags(parser, out="runs/frd_uvad/<dataset>")
    cli.add_optimisation_flags(
        parser,
        epochs=f"{DEFAULTS.epochs}; of few clips as many as make {STEPS} steps, unless --batch-size is given",
        batch_size=f"{DEFAULTS.batch_size} windows; of few clips {SMALL_BATCH}, unless --epochs is given",
        lr=DEFAULTS.lr,
    )
    group = parser.add_argument_group("method")
    group.add_argument(
        "--videos",
        choices=["all", "train"],
        default="all",
        help="training and test videos, or training videos only (default: %(default)s)",
    )
    group.add_argument(
        "--cross-clip",
        "--cross_clip",
        type=cli.positive_int,
        help=f"clips of a window (default: {DEFAULTS.cross_clip})",
    )
    group.add_argument(
        "--num-blocks",
        "--Vitblock_num",
        type=cli.natural_int,
        default=8,
        help="transformer blocks; 0: a two-layer autoencoder (default: %(default)s)",
    )
    group.add_argument(
        "--loss-weights",
        "--Lambda",
        type=loss_weights,
        metavar="A_B_C",
        help="of reconstruction, disruption and scorer (default: 1_1_1)",
    )
    group.add_argument(
        "--bank",
        "--lab_type",
        type=bank_settings,
        default="wlab",
        metavar="KIND[:SIZE[:DELTA]]",
        help="latent anomaly bank, whose clips the reconstructor is pushed not to reconstruct. KIND: a window joins it "
        "when one of its clips is abnormal (wlab), or all are (slab), or none does; SIZE in batches; DELTA: deviations "
        f"above the mean score for a pseudo label to join (default: wlab:{DEFAULTS.beta}:{DEFAULTS.delta})",
    )
    # of the published command line
    group.add_argument("--lab", type=parse_bool, help=argparse.SUPPRESS)
    group.add_argument("--beta", type=cli.natural_float, help=argparse.SUPPRESS)
    group.add_argument("--delta", type=float, help=argparse.SUPPRESS)
    group.add_argument(
        "--auxiliary",
        default="none",
        help="a scorer that must agree: none, c2fpl:FILE, frd:FILE, labels:FILE.npz, or self: train again with the "
        "first scorer as auxiliary (default: %(default)s)",
    )
    add_eval_flags(parser, training=True)
    args = parser.parse_args(cli.with_synonyms(argv, preprocess.SYNONYMS))
    vars(args).update({**args.bank, **cli.given(args, ("beta", "delta"))})
    if args.lab is False:
        args.bank = "none"
    return args


def make_plan(clips: int | None = None, **flags) -> Plan:
    """The published settings, with a schedule for few clips where their number is given; flags {name of a Plan field:
    value} override both."""
    if clips and not flags.keys() & {"epochs", "batch_size"}:
        if clips * DEFAULTS.epochs < FEW * DEFAULTS.batch_size:
            steps = math.ceil(clips / SMALL_BATCH)
            flags |= {"batch_size": SMALL_BATCH, "epochs": max(DEFAULTS.epochs, math.ceil(STEPS / steps))}
    return Plan(**flags)


def make_auxiliary_scorer(auxiliary, windows, feature_size, run):
    """-> function(batch) giving the auxiliary scores of its windows [n, T]; None without an auxiliary.

    auxiliary: scoring.Auxiliary, or None. Raises UserError.
    """
    import torch

    if auxiliary is None:
        return None
    if auxiliary.labels is not None:
        labels = run.to_device(labels_of_clips(auxiliary, windows.videos))
    elif auxiliary.net.fc1.in_features != feature_size:
        raise UserError(
            f"--auxiliary {auxiliary.source} scores features of width {auxiliary.net.fc1.in_features}, these have "
            f"{feature_size}"
        )
    else:
        auxiliary.net.to(run.device)

    @torch.no_grad()
    def score_auxiliary(batch):
        if auxiliary.labels is not None:
            return labels[run.to_device(windows.clips(batch.rows))]
        return run.all_gather_batch(auxiliary.net(batch.data)[..., 0], len(batch))

    return score_auxiliary


def labels_of_clips(auxiliary, videos) -> np.ndarray:
    """One number per clip of every video, from a file of pseudo labels: by split/name, or by name where only one
    video has it."""
    parts, names = [], [v.name for v in videos]
    for v in videos:
        labels = auxiliary.labels.get(v.key, auxiliary.labels.get(v.name))
        if labels is None:
            raise UserError(f"--auxiliary {auxiliary.source} has no entry for the video {v.name}")
        if v.key not in auxiliary.labels and names.count(v.name) > 1:
            raise UserError(
                f"--auxiliary {auxiliary.source}: a training and a test video are called {v.name}: name their entries "
                f"train/{v.name} and test/{v.name}"
            )
        if len(labels) != len(v):
            raise UserError(
                f"--auxiliary {auxiliary.source}: {len(labels)} numbers for video {v.name}, which has {len(v)} clips"
            )
        parts.append(labels)
    return np.concatenate(parts)


def losses(net, batch, plan, bank, score_auxiliary, run):
    """-> {name: loss over the whole batch}, pseudo labels [n, T], scores [n, T]: the threshold is that of all ranks'
    windows. score_auxiliary: function(batch) -> [n, T], or None."""
    from frd_uvad import model

    with run.autocast():
        out = net(batch.data)
        bank_error = net.error(bank.windows) if len(bank) else None
    error = run.all_gather_batch(out["error"], len(batch))
    score = run.all_gather_batch(out["score"].float(), len(batch))
    extra_scores = score_auxiliary(batch) if score_auxiliary else None
    parts = model.losses({"error": error, "score": score}, extra_scores, bank_error, plan.loss_weights)
    loss_parts = {name: parts[name] for name in ("total", "reconstruction", "disruption", "scorer")}
    return loss_parts, parts["pseudo"], score[..., 0].detach()


def choose_for_bank(bank, batch, pseudo, scores, plan, windows, run):
    """Windows that look abnormal are to join the bank, the same ones on every rank."""
    from frd_uvad import model

    if plan.bank != "none":
        joins = model.select_for_bank(pseudo, scores, plan.bank, plan.delta)
        run.sync(joins)  # dropout may differ
        bank.choose(joins, batch, windows)


def train_one_epoch(net, loader, optimizer, plan, epoch, run, meter, bank, score_auxiliary, pseudo_labels):
    """pseudo_labels: float32 [windows] on the device; those of the windows' first clips are written into it."""
    net.train()
    for batch, _ in meter.batches(loader, epoch):  # this rank's part of the batch
        meter.set_lr(optimizer, plan.lr)
        bank.update()  # on a GPU this overlaps with the backward pass of the step before
        loss_parts, pseudo, scores = run.data_parallel(losses, net)(batch, plan, bank, score_auxiliary, run)
        choose_for_bank(bank, batch, pseudo, scores, plan, loader.dataset, run)
        optimizer.zero_grad(set_to_none=True)
        loss_parts["total"].backward()
        optimizer.step()
        pseudo_labels[run.to_device(batch.rows)] = pseudo[:, 0]
        meter.update(loss_parts)
    bank.update()
    run.sync(*net.buffers())  # such as running statistics of batch norms


def train(
    data,
    plan,
    *,
    out,
    run,
    videos="all",
    title="round 1",
    num_blocks=8,
    auxiliary="none",
    seed=0,
    resume=True,
    save_minutes=5,
) -> Path:
    """One round, without labels. data: FeatureData; videos: see training_videos(); auxiliary: see
    scoring.load_auxiliary().

    -> path of the finished checkpoint
    """
    import torch

    from common import training
    from common.distributed import seed_everything
    from common.loader import Loader
    from frd_uvad import scoring
    from frd_uvad.data import AnomalyBank, Windows

    preprocess.check_width(data.width)
    out = run.open_output_dir(out)
    chosen = training_videos(data, videos)
    windows = Windows(chosen, plan.cross_clip, run)
    model_args = {"feature_size": data.width, "num_blocks": num_blocks, "heads": HEADS}
    identity = {
        "model_args": model_args,
        "dataset": data.name,
        "clips": len(windows),
        "seed": seed,
        "precision": run.precision,
        "processes": run.world_size,
        "auxiliary": auxiliary.split(":")[0],
        **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(plan).items() if k != "epochs"},
    }
    loaded = scoring.load_auxiliary(auxiliary)
    if loaded:
        identity["auxiliary_content"] = loaded.content()
    if data.settings and data.settings["flag"] != str(preprocess.STAND_IN):  # which runs of older versions do not name
        identity["features"] = {k: v for k, v in data.settings.items() if not k.endswith("flag")}
    if videos != "all":
        identity["videos"] = videos
    place = "on the device" if windows.features is not None else "read from disk"
    run.print(
        f"{title}: {len(chosen)} videos, {len(windows)} windows of {plan.cross_clip} clips, {data.crops} crops of "
        f"width {data.width}, {plan.epochs} epochs in batches of {plan.batch_size}, auxiliary {auxiliary}, {place}, "
        f"{run.device}, {run.precision}"
    )
    seed_everything(seed)
    net = scoring.build_model(model_args).to(run.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.lr, betas=BETAS, fused=True)
    score_auxiliary = make_auxiliary_scorer(loaded, windows, data.width, run)
    bank = AnomalyBank(max(1, int(plan.beta * plan.batch_size)))
    pseudo_labels = torch.zeros(len(windows), device=run.device)
    path, log = out / "frd.pt", training.Log(out / "log.jsonl")

    def save():
        training.save_training(
            path,
            "frd_uvad",
            meter,
            net,
            optimizer,
            done=meter.epoch >= plan.epochs,
            model_args=model_args,
            plan={**asdict(plan), "loss_weights": list(plan.loss_weights)},
            identity=identity,
            features=data.settings,
            pseudo_labels=pseudo_labels.cpu(),
            **bank.state_dict(),
        )

    meter = training.EpochMeter(run, "train", plan.epochs, log=log, save=save, unit="window", save_minutes=save_minutes)
    state = training.previous_run(path, "frd_uvad", identity, resume)
    if state:
        bank.load_state_dict(state, run.device)
        pseudo_labels.copy_(state["pseudo_labels"])
    training.resume(state, path, meter, net, optimizer)
    test_labels = labels_of_test_clips(data, windows)
    loader = Loader(windows, plan.batch_size, seed, run)
    for epoch in range(meter.epoch, plan.epochs):
        train_one_epoch(net, loader, optimizer, plan, epoch, run, meter, bank, score_auxiliary, pseudo_labels)
        measures = measure_pseudo_labels(pseudo_labels.cpu().numpy() > 0, test_labels)
        meter.end_epoch(loader, **measures, bank_size=len(bank))
        if epoch == 0 and not measures["pseudo_share"] and run.is_main:
            reason = " (the auxiliary scorer must give a clip 0.5 or more)" if loaded else ""
            meter.bar.write(f"note: no clip has a pseudo label{reason}: the scorer learns that everything is normal")
    if run.is_main and data.has_labels:
        plot_pseudo_labels(log.path, test_labels, out / "pseudo_labels.png")
    if run.is_main and data.videos:
        draw_bank(bank, windows, data, out / "bank.png")
    run.barrier()
    return path


def training_videos(data, videos: str) -> list:
    """Those of a FeatureData that are trained on: "all", test videos too, or "train". Raises UserError if there are
    none."""
    if videos == "train" and not data.train:
        raise UserError(f"--videos train: {data.name} has no training videos; leave it out to train on test videos")
    return data.train if videos == "train" else data.train + data.test


def labels_of_test_clips(data, windows) -> np.ndarray:
    """For looking only: int8 [windows], 1 = the first clip is abnormal, 0 = normal, -1 = unknown or a training
    video's."""
    labels = np.full(len(windows), -1, np.int8)
    tests = {id(v) for v in data.test} if data.has_labels else ()
    for video, start in zip(windows.videos, windows.starts):
        if id(video) in tests:
            y = data.labels(video)
            abnormal = np.bincount(data.rows_of_frames(video, len(y)), weights=y, minlength=len(video))
            labels[start : start + len(abnormal)] = abnormal > 0
    return labels


def measure_pseudo_labels(predicted: np.ndarray, labels: np.ndarray) -> dict:
    """Share of clips that are labelled; precision and recall on test clips, where some are abnormal."""
    measures = {"pseudo_share": float(predicted.mean())}
    if (labels == 1).any():
        hits = (predicted & (labels == 1)).sum()
        measures["pseudo_precision"] = float(hits / max(1, (predicted & (labels >= 0)).sum()))
        measures["pseudo_recall"] = float(hits / (labels == 1).sum())
    return measures


def draw_bank(bank, windows, data, path, most=24):
    """The middle frame of what the bank holds, if there is a common/report."""
    report = optional_module("common.report")
    if report is None:
        return
    clips_of_video, tiles = {}, []
    for first in np.unique(bank.first)[:most]:
        number, clip = windows.locate(first)
        video = windows.videos[number]
        clips_of_video.setdefault((video.split, video.name), []).append(clip)
    for key, clips in clips_of_video.items():
        title, frame = "/".join(key), None
        clip_at = {clip * CLIP_FRAMES + CLIP_FRAMES // 2: clip for clip in clips}
        for t, frame in enumerate(Decoder(data.videos[key])):
            if t in clip_at:
                tiles.append((thumbnail(frame), f"{title} clip {clip_at.pop(t)}"))
            if not clip_at:
                break
        tiles += [
            (thumbnail(frame), f"{title} clip {clip}") for clip in clip_at.values()
        ]  # a last clip, shorter than half
    report.plots.contact_sheet(path, tiles, 4)


def thumbnail(frame, width=320):
    return resize(as_channels(frame, 3), (max(1, round(frame.shape[0] * width / frame.shape[1])), width))


def plot_pseudo_labels(log, test_labels, path):
    """Precision and recall of pseudo labels over the epochs; the precision of random ones is the share of abnormal
    clips."""
    lines = [x for x in map(json.loads, Path(log).read_text().splitlines()) if "pseudo_precision" in x]
    report = optional_module("common.report")
    if lines and report:
        epochs = [x["epoch"] for x in lines]
        titles = {
            "pseudo_precision": "precision",
            "pseudo_recall": "recall",
            "pseudo_share": "share of clips labelled",
        }
        chance = (test_labels == 1).sum() / (test_labels >= 0).sum()
        report.plots.lines(
            {title: (epochs, [x[key] for x in lines]) for key, title in titles.items()}
            | {"precision by chance": (epochs, [chance] * len(epochs))},
            "pseudo labels of test clips (true labels are used for this plot only)",
            path,
            xlabel="epoch",
            ylim=(0, 1.02),
        )


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    from common.distributed import Run
    from frd_uvad import scoring

    auxiliary = "none" if args.auxiliary == SELF else args.auxiliary
    scoring.load_auxiliary(auxiliary)  # a wrong file is refused before any work
    with Run(args.device, args.precision) as run:
        source = cli.DataSource.from_args(args)
        data = preprocess.prepare(source, run, preprocess.FeatureOptions.from_args(args))
        clips = sum(map(len, training_videos(data, args.videos)))
        plan = make_plan(clips, **cli.given(args, [field.name for field in fields(Plan)]))
        out = args.out or Path("runs/frd_uvad") / data.name
        for i, folder in enumerate([out / "round1", out] if args.auxiliary == SELF else [out], 1):
            checkpoint = train(
                data,
                plan,
                out=folder,
                run=run,
                videos=args.videos,
                title=f"round {i}",
                num_blocks=args.num_blocks,
                auxiliary=auxiliary,
                seed=args.seed,
                resume=args.resume,
                save_minutes=args.save_minutes,
            )
            auxiliary = f"frd:{checkpoint}"
        minutes = (time.perf_counter() - began) / 60
        run.print(f"finished in {minutes:.1f} min including preprocessing; checkpoint {checkpoint}")
        options = cli.ScoreOptions.from_args(args)
        evaluate(data, checkpoint, out=out, run=run, options=options, source=source)


if __name__ == "__main__":
    run_script(main)
