"""Frames -> scores: error maps, frame scores, boxes of thresholded maps; checkpoints, ours and the authors'."""

import copy

import cv2
import numpy as np
from tqdm import tqdm

from common import old_training as training
from common.batches import parts_of
from common.io import UserError, first_line
from common.kept import Kept
from common.late import Late, torch
from common.video import Video
from sdmae.frames import NOISE_ROWS, Frames, noise_table

model = Late("sdmae.model")

# How frames are scored. Avenue and ShanghaiTech as published; the others are not published: Ped1, Ped2 and one's own footage as
# Avenue, UBnormal as ShanghaiTech (the authors use one size and patch for both).
AVENUE = dict(norm="L2", parts=("distillation", "reconstruction"), filter="aedmae:38:11", minmax=False)
SHANGHAI = dict(norm="L1", parts=("reconstruction",), filter="aedmae:302:21", minmax=True)
PUBLISHED = {
    "avenue": AVENUE,
    "ped1": AVENUE,
    "ped2": AVENUE,
    "folder": AVENUE,
    "demo": AVENUE,
    "video": AVENUE,
    "shanghaitech": SHANGHAI,
    "ubnormal": SHANGHAI,
}
SIZES = {"full": {}, "small": dict(embed_dim=64, decoder_dim=32, depth=2, decoder_depth=2)}
QUANTILE = 0.999  # of the token errors of normal training frames: what is above counts as detected


def rule_of(dataset, norm=None, parts=None, tokens="all"):
    """How frames of a dataset are scored; tokens: those that the student's error counts on, all of them or the removed ones."""
    rule = {**PUBLISHED.get(dataset, AVENUE), "tokens": tokens}
    if norm:
        rule["norm"] = norm
    if parts:
        rule["parts"] = ("distillation", "reconstruction") if parts == "both" else (parts,)
    return rule


def picked(errors, rule):
    """Distillation and reconstruction errors [N, 2, …] -> the sum of those that the rule scores by, [N, …]."""
    return errors[:, [i for i, k in enumerate(("distillation", "reconstruction")) if k in rule["parts"]]].sum(1)


def fold(net, dtype=None):
    """A folded copy of a network."""
    return copy.deepcopy(net).fold(dtype)


class Scorer:
    """A network ready to score: frames t-3, t, t+3 in, errors per token out. draws: masks averaged over."""

    def __init__(self, net, rule, r, *, draws=1, compiled=False):
        self.run, self.rule, self.patch, self.grid = r, rule, net.patch_size, net.grid
        self.net = fold(net.to(r.device), torch.bfloat16 if r.precision == "bf16" else torch.float32)
        if compiled:
            self.net.compile()
        self.student = "distillation" in rule["parts"]
        self.tables = torch.stack([noise_table(net.tokens, draw=i) for i in range(draws)]).to(r.device)

    @training.inference
    def errors(self, seen, numbers):
        """seen uint8 [n, 3, C, H, W], numbers: of the frames in their videos -> errors [n, 2, tokens] (distillation or 0, and
        reconstruction)."""
        rows = torch.as_tensor(np.asarray(numbers) % NOISE_ROWS, device=seen.device)
        distilled = reconstructed = removed = 0
        for table in self.tables:
            out = self.net(seen, table[rows], student=self.student)
            d, r = model.pixel_errors(out, seen[:, 1], self.patch, self.rule["norm"])
            if self.rule["tokens"] == "removed":
                d, removed = d * out["mask"], removed + out["mask"]
            distilled, reconstructed = distilled + d, reconstructed + r
        draws = removed.clamp(min=1) if self.rule["tokens"] == "removed" else len(self.tables)
        return torch.stack([distilled / draws, reconstructed / len(self.tables)], dim=1)


def score(scorer, frames, rows, batch_size=64, tick=lambda n: None):
    """Errors of the frames in `rows`: float32 [n, 2, tokens]. tick(n) after every n frames."""
    out, done = np.empty((len(rows), 2, scorer.grid[0] * scorer.grid[1]), np.float32), 0
    for part, seen in frames.iterate(parts_of(rows, batch_size)):
        out[done : done + len(part)] = scorer.errors(seen, frames.number[part]).cpu().numpy()
        done += len(part)
        tick(len(part))
    return out


def shared_score(scorer, frames, rows, label):
    """score() of which torchrun's processes compute a part each."""
    r, share = scorer.run, scorer.run.contiguous_share(len(rows))
    with tqdm(
        total=len(share), desc=label, unit="frame", disable=not r.is_main, dynamic_ncols=True, mininterval=2
    ) as bar:
        return r.gather(score(scorer, frames, rows[share.start : share.stop], tick=bar.update))


def kept_score(scorer, net, ready, videos, folder, batch_size=64, among=None, shard=None):
    """Frame scores float32 [T] and the rule's token errors float16 [T, rows, columns] of every video, kept in `folder`.

    One video at a time. -> {video key: {"scores", "maps", "seconds"}}; None where common.kept says so
    """
    kept = Kept(
        folder,
        {
            "weights": training.weights_hash(net),
            "rule": scorer.rule,
            "draws": len(scorer.tables),
            "size": ready.cache.size,
            "precision": scorer.run.precision,
        },
        Video.fingerprint,
        __file__,
    )

    def own(v, tick):
        frames = Frames([ready.cache.frames(v)], scorer.run.device)
        tokens = picked(score(scorer, frames, np.arange(len(frames)), batch_size, tick), scorer.rule)
        return {"scores": tokens.mean(1), "maps": tokens.reshape(-1, *scorer.grid).astype(np.float16)}

    return kept.make(videos, own, scorer.run, size=ready.length, unit="frame", among=among, shard=shard)


def boxes_of_maps(maps, threshold, source_size):
    """Connected tokens above `threshold` -> detections float32 [n, 6]: frame, x1, y1, x2, y2 (px of the source), peak."""
    out = []
    rows, columns = maps.shape[1:]
    sy, sx = source_size[0] / rows, source_size[1] / columns
    for t, m in enumerate(maps):
        n, ids, stats, _ = cv2.connectedComponentsWithStats((m > threshold).astype(np.uint8), connectivity=8)
        for i in range(1, n):
            x, y, w, h = stats[i, :4]
            out.append((t, x * sx, y * sy, (x + w) * sx - 1, (y + h) * sy - 1, float(m[ids == i].max())))
    return np.array(out, np.float32).reshape(-1, 6)


def statistics(scorer, frames, most=2000):
    """What scoring needs to know of normal frames: quantiles of token errors, and frame scores of the training videos in order.

    At most `most` training frames are scored, in stretches of consecutive ones.
    """
    rows = np.arange(len(frames))
    if len(rows) > most:
        stretch = 100
        first = np.linspace(0, len(rows) - stretch, most // stretch).astype(int)
        rows = (first[:, None] + np.arange(stretch)).reshape(-1)
    tokens = picked(shared_score(scorer, frames, rows, "training statistics"), scorer.rule)
    return {
        "token_quantiles": {str(q): float(np.quantile(tokens, q)) for q in (0.5, 0.9, 0.99, QUANTILE, 0.9999)},
        "frame_scores": [float(x) for x in tokens.mean(1)],
        "norm": scorer.rule["norm"],
        "parts": list(scorer.rule["parts"]),
        "tokens": scorer.rule["tokens"],
    }


# ------------------------------------------------------------------------------------------------------- checkpoints

STUDENT = "student"
KERNELS = ("erosion", "dilation")  # fixed morphology kernels in the authors' files that scoring never uses


def authors_weights(path):
    """State-dict of one of the authors' files {"model": ...}, or of a bare one."""
    state = training.load_checkpoint(path, "sdmae")
    weights = state.get("model", state)
    if not isinstance(weights, dict) or not any("decoder" in str(k) for k in weights):
        raise UserError(
            f"checkpoint {path} is not of this method: it has no decoder weights (keys such as "
            f"{', '.join(list(map(str, weights))[:3]) if isinstance(weights, dict) else 'none'})"
        )
    return {k: v for k, v in weights.items() if not str(k).startswith(KERNELS)}


def load_model(path, student=None, size=None):
    """-> (SDMAE, state). Ours in one file; or the authors' two: teacher in `path`, student in `student`.

    size: (height, width) for files that do not say theirs.
    """
    state = training.load_checkpoint(path, "sdmae")
    if "model_state_dict" in state:
        if student is not None:
            raise UserError(
                f"--student: {path} is our checkpoint and holds its student already; --student belongs to "
                "the authors' two files"
            )
        args, weights = state["model_args"], state["model_state_dict"]
    else:
        weights = authors_weights(path)
        if student is not None:
            own = {k: v for k, v in authors_weights(student).items() if STUDENT in k}
            if not own:
                raise UserError(f"--student {student} holds no student weights")
            weights = {**{k: v for k, v in weights.items() if STUDENT not in k}, **own}
        try:
            patch = weights["patch_embed.proj.weight"].shape[2]
        except (KeyError, AttributeError, IndexError):
            raise UserError(f"checkpoint {path} is not of this method: it has no patch_embed.proj.weight") from None
        args, state = dict(patch_size=int(patch), image_size=list(size or SIZE_OF_PATCH[int(patch)])), {}
    try:
        net = model.SDMAE(**{**args, "image_size": tuple(args["image_size"])})
        net.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"checkpoint {path} does not fit this model ({first_line(e)}…)") from None
    return net, {**state, "model_args": args}


SIZE_OF_PATCH = {16: (320, 640), 8: (160, 320), 4: (96, 144)}
