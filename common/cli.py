"""Flags that mean the same in every script, and their values. Imports no torch, so that --help answers at once."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from subprocess import list2cmdline
from typing import NoReturn

from common.io import UserError
from common.readers.datasets import ALIASES, canonical


@dataclass
class DataSource:
    """Which dataset, and how its videos are prepared."""

    dataset: str
    data_root: Path = Path("data")
    cache: Path = Path("cache")
    labels: Path | None = None  # frame labels instead of the dataset's own
    workers: int | None = None  # decoding processes; None: one per core
    shard: str | None = None  # "I/N": only every N-th video, from number I

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "DataSource":
        return cls(args.dataset, args.data_root, args.cache, args.labels, args.workers, getattr(args, "shard", None))


@dataclass
class ScoreOptions:
    """How scores become results."""

    protocol: str = "strict"
    smoothing: str = "median:17"
    top: int = 20  # peaks in ranking.csv
    overlay: bool = False  # write an mp4 per video

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "ScoreOptions":
        return cls(args.protocol, args.smoothing, args.top, args.overlay)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, as for every other error of a user; exit code 2."""
        self.exit(2, f"error: {message} (--help shows all flags)\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def with_synonyms(argv: list | None, synonyms: dict) -> list:
    """A published command line (None: the script's own) with our names of its flags: {"--max_epoch": "--epochs"}."""
    out = []
    for word in map(str, sys.argv[1:] if argv is None else argv):
        flag, equals, value = word.partition("=")
        out.append(synonyms.get(flag, flag) + equals + value)
    return out


def number(kind: type, least: float, most: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: a number of at least `least`, or `above` it, and at most `most`."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not math.isfinite(value) or not (value > least if above else value >= least) or value > most:
            limits = f"{'above' if above else 'of at least'} {least}" + f", at most {most}" * (most < math.inf)
            raise argparse.ArgumentTypeError(f"must be a number {limits}, not {text}")
        return value

    return read


positive_int = number(int, 1)
natural_int = number(int, 0)
positive_float = number(float, 0, above=True)
natural_float = number(float, 0)
share = number(float, 0, 1)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="demo",
        help=f"one of {', '.join(ALIASES)}; the papers' spellings are understood (default: %(default)s)",
    )
    group.add_argument(
        "--data-root", type=Path, default=Path("data"), help="folder that holds the dataset (default: %(default)s)"
    )
    group.add_argument(
        "--cache", type=Path, default=Path("cache"), help="folder for decoded frames and cubes (default: %(default)s)"
    )
    group.add_argument(
        "--labels",
        type=Path,
        help="frame labels to use instead of the dataset's own: an .npz of video name -> 0/1 per frame, an .npy of all "
        "test frames, a csv of video,start,end, or a folder of one .npy or .txt, or of pixel masks, per video",
    )


def add_run_flags(parser: argparse.ArgumentParser, out: str):
    """out: the default folder, in words. -> the argument group"""
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help=f"folder of this run (default: {out})")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bf16 autocast on a GPU that has it, fp32 elsewhere (CPUs with AMX gain from bf16 too)",
    )
    group.add_argument("--seed", type=natural_int, default=0)
    group.add_argument(
        "--workers", type=positive_int, help="processes that read and crop videos (default: one per core)"
    )
    return group


def add_optimisation_flags(
    parser: argparse.ArgumentParser, epochs, batch_size, lr, types: tuple = (positive_int, positive_int, positive_float)
):
    """epochs, batch_size, lr: the defaults, in words; types: what reads them."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=types[0], help=f"(default: {epochs})")
    group.add_argument("--batch-size", type=types[1], help=f"(default: {batch_size})")
    group.add_argument("--lr", type=types[2], help=f"(default: {lr})")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue an interrupted run of the same settings",
    )
    # minutes between checkpoints inside an epoch: for tests and for clusters that stop jobs early
    group.add_argument("--save-minutes", type=natural_float, default=5, help=argparse.SUPPRESS)
    return group


def add_checkpoint_flags(
    parser: argparse.ArgumentParser, checkpoint: str, whose: str = "ours or the authors'", video: bool = True
):
    """What scores, and what is scored. checkpoint: the default, in words. -> the argument group"""
    group = parser.add_argument_group("what to score")
    group.add_argument("--checkpoint", type=Path, help=f"{whose} (default: {checkpoint})")
    if video:
        text = "a video file or a folder of frames instead of the dataset's test set"
        group.add_argument("--video", type=Path, help=text)
    return group


def add_score_flags(
    parser: argparse.ArgumentParser,
    protocol: str,
    smoothing: str = "median:17",
    overlay: str = "scored boxes and the curve",
    training: bool = False,
):
    """protocol, overlay: help texts; training: only the flags that a train.py needs. -> the argument group"""
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--protocol", choices=["strict", "official"], default="strict", help=f"{protocol} (default: %(default)s)"
    )
    parser.set_defaults(smoothing=smoothing, top=ScoreOptions.top, overlay=ScoreOptions.overlay)
    if not training:
        group.add_argument(
            "--smoothing",
            default=smoothing,
            help="filter of frame scores, unless the protocol has its own (default: %(default)s)",
        )
        group.add_argument("--top", type=positive_int, default=20, help="peaks in ranking.csv (default: %(default)s)")
        group.add_argument("--overlay", action="store_true", help=f"also write an mp4 per video with {overlay}")
    return group


def add_shard_flag(group, scoring: bool = False) -> None:
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="only every N-th video, from number I (array jobs)"
        + ("; the same command without it then shows the results" if scoring else ""),
    )


def given(args: argparse.Namespace, names: Iterable[str]) -> dict:
    """{name: value} of those flags that the user gave (whose default is None)."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def parse_size(flag: str, text: str, most: int, example: str) -> tuple[int, int]:
    """ "4x1" -> (4, 1): both at least 1 and at most `most`."""
    try:
        size = tuple(int(x) for x in text.lower().split("x"))
    except ValueError:
        size = ()
    if len(size) != 2 or not all(0 < x <= most for x in size):
        raise UserError(f"{flag} {text}: expected {example}")
    return size


def dataset_name(args: argparse.Namespace) -> str:
    return canonical(args.dataset)


def need_training_set(checkpoint, state: dict, dataset: str) -> None:
    """Raises UserError if --dataset is still the default, demo, but the checkpoint was trained on other videos.

    state: of the checkpoint.
    """
    if dataset == "demo" and state.get("identity", {}).get("dataset") != "demo":
        raise UserError(
            f"{checkpoint} needs normal videos to compare scores with: give --dataset and --data-root of those that it "
            "was trained on"
        )


def next_command(script: str, argv: list | None, *without: str) -> str:
    """Another script's command with this one's flags. argv: this one's (None: sys.argv); without: flags left out, with
    their values."""
    words, is_kept = ["python", script], True
    for word in map(str, sys.argv[1:] if argv is None else argv):
        if word.startswith("--"):
            is_kept = word.partition("=")[0] not in without
        words += [word] * is_kept
    return list2cmdline(words) if os.name == "nt" else shlex.join(words)
