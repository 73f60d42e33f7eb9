"""Frames -> scores: error maps, frame scores, boxes of thresholded maps; checkpoints, ours and the authors'."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import cv2
import numpy as np
import torch
from tqdm import tqdm

from common import training
from common.io import UserError
from sdmae import model
from sdmae.data import NOISE_ROWS, FrameDataset, noise_table

IMAGE_SIZES = {16: (320, 640), 8: (160, 320), 4: (96, 144)}  # of the authors' files, by their patch
SCORES_VERSION = 1  # raise it when raw scores change: cached ones are then computed again
QUANTILE = 0.999  # of the token errors of normal training frames: tokens above it count as detected
PARTS = ("distillation", "reconstruction")


@dataclass
class ScoreConfig:
    """How errors become frame scores."""

    norm: str  # of the pixel errors: L1 or L2
    parts: tuple  # errors that are summed
    filter: str  # of frame scores, protocol official
    minmax: bool  # protocol official scales each video to [0, 1]
    tokens: str = "all"  # that the student's error counts on: all (as published) or the removed ones

    def state_dict(self) -> dict:
        return {**asdict(self), "parts": list(self.parts)}


# Avenue and ShanghaiTech as published. Not published: Ped1, Ped2 and your own videos are scored as Avenue, UBnormal as
# ShanghaiTech (the authors use one size and patch for both).
AVENUE = ScoreConfig("L2", PARTS, "aedmae:38:11", minmax=False)
SHANGHAITECH = ScoreConfig("L1", ("reconstruction",), "aedmae:302:21", minmax=True)
PUBLISHED = {"shanghaitech": SHANGHAITECH, "ubnormal": SHANGHAITECH}


def score_config(dataset: str, norm: str | None = None, parts: str | None = None, tokens: str = "all") -> ScoreConfig:
    """The published configuration of a dataset; norm, parts ("both" or one of PARTS) and tokens override it."""
    config = replace(PUBLISHED.get(dataset.removesuffix("-sd"), AVENUE), tokens=tokens)
    if norm:
        config.norm = norm
    if parts:
        config.parts = PARTS if parts == "both" else (parts,)
    return config


def sum_parts(errors: np.ndarray, config: ScoreConfig) -> np.ndarray:
    """Distillation and reconstruction errors [N, 2, …] -> the sum of the configured ones [N, …]."""
    return errors[:, [i for i, part in enumerate(PARTS) if part in config.parts]].sum(1)


def fold(net: torch.nn.Module, dtype=None) -> torch.nn.Module:
    """A folded copy of a network."""
    return copy.deepcopy(net).fold(dtype)


def to_host(tensors: Iterable[torch.Tensor], run) -> Iterator[np.ndarray]:
    """Yield every tensor as an array; each is copied while the device makes the next one."""
    copies = []
    for x in tensors:
        copies.append(run.copy_to_host(x))
        if len(copies) == 2:
            yield copies.pop(0)()
    for last in copies:
        yield last()


class Scorer:
    """A network ready to score: frames t-3, t, t+3 in, errors per token out. draws: masks averaged over; compiled:
    by torch.compile, on a GPU with CUDA graphs."""

    def __init__(self, net, config: ScoreConfig, run, *, draws: int = 1, compiled: bool = False):
        self.run, self.config = run, config
        self.compiled = compiled
        self.patch, self.grid = net.patch_size, net.grid
        self.net = fold(net.to(run.device), torch.bfloat16 if run.precision == "bf16" else torch.float32)
        if compiled:  # "reduce-overhead" captures CUDA graphs
            self.net.compile(mode="reduce-overhead" if run.device.type == "cuda" else None)
        self.student = "distillation" in config.parts
        self.tables = torch.stack([noise_table(net.tokens, draw=i) for i in range(draws)]).to(run.device)

    @torch.inference_mode()
    def errors(self, seen: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        """seen uint8 [n, 3, C, H, W], numbers [n]: of the frames in their videos.

        -> errors [n, 2, tokens]: distillation (0 without it) and reconstruction.
        """
        rows = self.run.to_device(np.asarray(numbers) % NOISE_ROWS)
        distilled = reconstructed = 0
        removed = 0
        for table in self.tables:
            out = self.net(seen, table[rows], student=self.student)
            d, r = model.pixel_errors(out, seen[:, 1], self.patch, self.config.norm)
            if self.config.tokens == "removed":
                d = d * out["mask"]
                removed = removed + out["mask"]
            distilled = distilled + d
            reconstructed = reconstructed + r
        draws = removed.clamp(min=1) if self.config.tokens == "removed" else len(self.tables)
        return torch.stack([distilled / draws, reconstructed / len(self.tables)], dim=1)

    def token_errors(self, frames: np.ndarray, numbers) -> np.ndarray:
        """Frames t-3, t, t+3 uint8 [n, 3, H, W, C], numbers t [n] -> the configured error of every token, float32 [n,
        rows, columns]."""
        seen = self.run.to_device(frames).permute(0, 1, 4, 2, 3)
        return sum_parts(self.errors(seen, numbers), self.config).view(-1, *self.grid).float().cpu().numpy()

    def score_frames(self, frames: FrameDataset, rows: np.ndarray, batch_size: int = 64, tick=None) -> np.ndarray:
        """Errors of the frames `rows`: float32 [n, 2, tokens], see errors(). tick(n) is called after every n frames."""
        count, done = len(rows), 0
        if self.compiled and count:  # one size of batches: every other one would be captured too
            rows = np.append(rows, np.repeat(rows[-1], -count % batch_size))
        errors = np.empty((len(rows), 2, self.grid[0] * self.grid[1]), np.float32)
        batches = (self.errors(seen, frames.number[part]) for part, seen in frames.batches(rows, batch_size))
        for part in to_host(batches, self.run):
            errors[done : done + len(part)] = part
            if tick:
                tick(max(0, min(len(part), count - done)))
            done += len(part)
        return errors[:count]


def score_video(scorer: Scorer, frames: np.ndarray, batch_size: int = 64, tick=None) -> dict:
    """uint8 [T, H, W, C] at the network's size, C = 1 grey or 3 BGR.

    -> {"scores": float32 [T], "maps": errors of tokens, float16 [T, rows, columns]}.
    """
    data = FrameDataset([frames], scorer.run, once=True)
    errors = scorer.score_frames(data, np.arange(len(frames)), batch_size, tick)
    tokens = sum_parts(errors, scorer.config)
    return {"scores": tokens.mean(1), "maps": tokens.reshape(-1, *scorer.grid).astype(np.float16)}


def boxes_of_maps(maps: np.ndarray, threshold: float, source_size: tuple) -> np.ndarray:
    """Connected tokens above `threshold` -> detections float32 [n, 6]: frame, x1, y1, x2, y2 (px of the source),
    peak."""
    out = []
    rows, columns = maps.shape[1:]
    sy, sx = source_size[0] / rows, source_size[1] / columns
    for t, m in enumerate(maps):
        n, ids, stats, _ = cv2.connectedComponentsWithStats((m > threshold).astype(np.uint8), connectivity=8)
        for i in range(1, n):
            x, y, w, h = stats[i, :4]
            out.append((t, x * sx, y * sy, (x + w) * sx - 1, (y + h) * sy - 1, float(m[ids == i].max())))
    return np.array(out, np.float32).reshape(-1, 6)


def statistics(scorer: Scorer, frames: FrameDataset, most: int = 2000) -> dict:
    """What scoring needs of normal frames: quantiles of token errors, and frame scores of the training videos in order.

    At most `most` training frames are scored, in stretches of consecutive ones; every rank scores a part.
    """
    rows, run = np.arange(len(frames)), scorer.run
    if len(rows) > most:
        stretch = 100
        first = np.linspace(0, len(rows) - stretch, most // stretch).astype(int)
        rows = (first[:, None] + np.arange(stretch)).reshape(-1)
    share = run.contiguous_share(len(rows))
    with tqdm(
        total=len(share), desc="training statistics", unit="frame", disable=not run.is_main, mininterval=2
    ) as bar:
        errors = scorer.score_frames(frames, rows[share.start : share.stop], tick=bar.update)
    config = scorer.config
    tokens = sum_parts(run.all_gather_array(errors), config)
    return {
        "token_quantiles": {str(q): float(np.quantile(tokens, q)) for q in (0.5, 0.9, 0.99, QUANTILE, 0.9999)},
        "frame_scores": [float(x) for x in tokens.mean(1)],
        "norm": config.norm,
        "parts": list(config.parts),
        "tokens": config.tokens,
        "draws": len(scorer.tables),
    }


# ------------------------------------------------------------------------------------------------------- checkpoints

STUDENT = "student"
KERNELS = ("erosion", "dilation")  # fixed morphology kernels in the authors' files that scoring never uses


def authors_weights(path) -> dict:
    """State-dict of one of the authors' files {"model": ...}, or of a bare one."""
    state = training.load_checkpoint(path, "sdmae")
    weights = state.get("model", state)
    if not isinstance(weights, dict) or not any("decoder" in str(k) for k in weights):
        raise UserError(
            f"checkpoint {path} is not one of AED-MAE's: it has no decoder weights (keys such as "
            f"{', '.join(list(map(str, weights))[:3]) if isinstance(weights, dict) else 'none'})"
        )
    return {k: v for k, v in weights.items() if not str(k).startswith(KERNELS)}


def build_model(model_args: dict) -> model.SDMAE:
    return model.SDMAE(**{**model_args, "image_size": tuple(model_args["image_size"])})


def load_model(path, student=None, size: tuple | None = None) -> tuple[model.SDMAE, dict]:
    """-> (SDMAE, checkpoint dict with "model_args"). Raises UserError for any other file.

    Ours in one file; or the authors' two: teacher in `path`, student in `student`, which do not say their size (height,
    width): it is `size`, else the published one for their patch.
    """
    state = training.load_checkpoint(path, "sdmae")
    if "model_state_dict" in state:
        if student is not None:
            raise UserError(
                f"--student: {path} is our checkpoint and holds its student already; --student belongs to the authors' "
                "two files"
            )
        model_args, weights = state["model_args"], state["model_state_dict"]
    else:
        weights = authors_weights(path)
        if student is not None:
            student_weights = {k: v for k, v in authors_weights(student).items() if STUDENT in k}
            if not student_weights:
                raise UserError(f"--student {student} holds no student weights")
            weights = {**{k: v for k, v in weights.items() if STUDENT not in k}, **student_weights}
        try:
            patch = int(weights["patch_embed.proj.weight"].shape[2])
        except (KeyError, AttributeError, IndexError):
            raise UserError(f"checkpoint {path} is not one of AED-MAE's: it has no patch_embed.proj.weight") from None
        model_args, state = dict(patch_size=patch, image_size=list(size or IMAGE_SIZES[patch])), {}
    net = training.load_weights(lambda: build_model(model_args), weights, path)
    return net, {**state, "model_args": model_args}
