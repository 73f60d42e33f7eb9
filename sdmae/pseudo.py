"""Pseudo anomalies: objects cut out of videos, pasted into training frames with a motion that is not theirs.

`self`: moving objects of the training videos, by motion masks. `ubnormal`: abnormal objects of UBnormal's training
videos, by its masks (the paper's source). A bank holds sequences of crops; pasting is done on the device for a whole
batch at once.
"""

import copy
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.io import UserError
from common.readers.pictures import as_channels, resize
from common.readers.video import Decoder

SIDE = 64  # crops are kept at this size, px
LENGTH = 7  # frames of a sequence: what one sample sees, t-3..t+3
MOVING = 15  # grey levels by which a moving pixel differs from the video's median frame
OBJECTS = 2000  # at most, per bank
STRETCH = 2.0  # largest enlargement
# Of objects cut out of training videos something must be unusual: (speed factor, turn in degrees, enlargement, bend).
KINDS = {
    "fast": ((2.0, 5.0), (-15, 15), (0.9, 1.2), 0.0),
    "turned": ((1.0, 3.0), (45, 135), (0.9, 1.2), 0.0),
    "large": ((1.0, 3.0), (-30, 30), (1.4, STRETCH), 0.0),
    "small": ((1.5, 4.0), (-30, 30), (0.4, 0.7), 0.0),
    "bent": ((1.0, 3.0), (-90, 90), (0.8, 1.3), 0.5),
}


@dataclass
class ObjectBank:
    """Sequences of cut-out objects. n of them, LENGTH frames each."""

    crops: torch.Tensor  # uint8 [n, LENGTH, C, SIDE, SIDE]
    masks: torch.Tensor  # uint8 [n, LENGTH, 1, SIDE, SIDE], 0 or 255
    sizes: torch.Tensor  # float32 [n, LENGTH, 2]: height and width in the frame, px
    places: torch.Tensor  # float32 [n, LENGTH, 2]: centre, row and column, px
    source: str

    def __post_init__(self):
        self.largest = self.sizes.amax((1, 2)).numpy()  # side of each, px
        self.middle = self.places[:, LENGTH // 2].numpy()  # where each is seen

    def to(self, device):
        """The same on a device; what choose() needs stays on the host."""
        bank = copy.copy(self)
        for name in ("crops", "masks", "sizes", "places"):
            setattr(bank, name, getattr(self, name).to(device))
        return bank

    def __len__(self):
        return len(self.crops)


# ----------------------------------------------------------------------------------------------------------- cutting


def crop(frame, mask, box):
    """-> crop [C, SIDE, SIDE], mask [1, SIDE, SIDE], (height, width), (row, column) of one object. mask: its box's
    part; box x, y, w, h."""
    x, y, w, h = box
    part = cv2.resize(frame[y : y + h, x : x + w], (SIDE, SIDE)).reshape(SIDE, SIDE, -1)
    shape = cv2.resize(mask.astype(np.uint8) * 255, (SIDE, SIDE))
    return part.transpose(2, 0, 1), shape[None], (h, w), (y + (h - 1) / 2, x + (w - 1) / 2)


def components(mask, least, most):
    """[(box, bool mask inside it)] of the connected parts of a bool [H, W] with `least` to `most` pixels."""
    n, ids, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    boxes = [(i, stats[i, :4].tolist()) for i in range(1, n) if least <= stats[i, cv2.CC_STAT_AREA] <= most]
    return [((x, y, w, h), ids[y : y + h, x : x + w] == i) for i, (x, y, w, h) in boxes]


def common_pixels(a, b):
    """Number of pixels that two components share; each is (box, mask inside it)."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a[0], b[0]
    x1, y1 = max(ax, bx), max(ay, by)
    x2, y2 = min(ax + aw, bx + bw), min(ay + ah, by + bh)
    if x1 >= x2 or y1 >= y2:
        return 0
    return int((a[1][y1 - ay : y2 - ay, x1 - ax : x2 - ax] & b[1][y1 - by : y2 - by, x1 - bx : x2 - bx]).sum())


def moving_masks(frames):
    """Yield per frame the bool [H, W] of pixels that differ from the median frame. uint8 [T, H, W, C]."""
    background = np.median(frames[:: max(1, len(frames) // 50)], axis=0).astype(np.int16)
    for f in frames:
        moving = (np.abs(f - background).max(axis=2) > MOVING).astype(np.uint8)
        moving = cv2.morphologyEx(cv2.medianBlur(moving, 3), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
        yield moving > 0


def sequences(frames, masks, least, most):
    """Yield sequences of LENGTH crops of one object, followed by overlap from frame to frame and not repeated.

    frames: iterable of uint8 [H, W, C]; masks: of bool [H, W].
    """
    alive = []  # [(component in the last frame, crops so far)]
    for frame, mask in zip(frames, masks):
        parts, following = components(mask, least, most), []
        for part in parts:
            box, pixels = part
            before = [
                k
                for k, (old, _) in enumerate(alive)
                if common_pixels(old, part) > 0.3 * max(old[1].sum(), pixels.sum())
            ]
            sequence = (
                [*alive[before[0]][1], crop(frame, pixels, box)] if len(before) == 1 else [crop(frame, pixels, box)]
            )
            if len(sequence) == LENGTH:
                yield sequence
                sequence = []
            following.append((part, sequence))
        alive = following


def make_bank(objects, source):
    fields = [
        torch.from_numpy(np.stack([np.stack([np.asarray(step[i]) for step in s]) for s in objects])) for i in range(4)
    ]
    return ObjectBank(fields[0], fields[1], fields[2].float(), fields[3].float(), source)


def subsample(objects, seed):
    """At most OBJECTS of an iterable, in their order, each with the same probability; no more are kept in memory."""
    rng, kept = np.random.default_rng(seed), []  # [(number, object)]
    for i, x in enumerate(objects):
        if i < OBJECTS:
            kept.append((i, x))
        elif (place := rng.integers(i + 1)) < OBJECTS:
            kept[place] = i, x
    return [x for _, x in sorted(kept, key=lambda pair: pair[0])]


def from_training(arrays, seed=0):
    """Bank of the moving objects of the training videos themselves: uint8 [T, H, W, C] each.

    None where nothing moves.
    """
    objects = subsample(moving_objects(arrays), seed)
    return make_bank(objects, "self") if objects else None


def moving_objects(arrays):
    """Yield sequences of what moves by more than a pixel and keeps about its size."""
    h, w = arrays[0].shape[1:3]
    channels = max(a.shape[3] for a in arrays)  # as FrameDataset has them
    # objects of 1/1000 to 1/12 of the frame; a larger minimum would keep only groups where people are small
    least, most = max(h * w // 1000, 32), h * w // 12
    for frames in tqdm(arrays, desc="cut objects", unit="video", dynamic_ncols=True, mininterval=5):
        # long videos are sampled in stretches, so that memory and time stay what they are
        for first in np.linspace(0, max(0, len(frames) - 300), max(1, min(8, len(frames) // 300))).astype(int):
            part = np.ascontiguousarray(
                np.broadcast_to(frames[first : first + 300], (*frames[first : first + 300].shape[:3], channels))
            )
            for s in sequences(part, moving_masks(part), least, most):
                moved = np.hypot(*(np.array(s[-1][3]) - s[0][3]))
                if moved > 1 and all(0.5 < step[2][i] / max(1, s[0][2][i]) < 2 for step in s for i in (0, 1)):
                    yield s


def from_ubnormal(data, size, channels, seed=0):
    """Bank of the abnormal objects of UBnormal's training videos (800 to 5000 px at `size`), grey and blurred as
    published."""
    if not data.abnormal_train:
        raise UserError(
            f"--pseudo ubnormal: {data.root} has no abnormal_training_video_names.txt; put the dataset's lists of "
            "video names there"
        )
    objects = subsample(abnormal_objects(data, size, channels), seed)
    if not objects:
        raise UserError(
            f"--pseudo ubnormal: no object of 800 to 5000 px at {size[0]}×{size[1]} lasts for {LENGTH} frames in "
            f"{data.root}"
        )
    return make_bank(objects, "ubnormal")


def abnormal_objects(data, size, channels):
    """Yield sequences of what the masks of UBnormal's abnormal training videos mark."""
    videos = data.abnormal_train
    for video in tqdm(videos, desc="cut UBnormal objects", unit="video", dynamic_ncols=True, mininterval=5):
        ids, masks = data.tracks(video), data.masks(video)
        if not len(ids):
            continue
        frames = (np.repeat(blurred(f, size), channels, axis=2) for f in Decoder(video))
        small = (cv2.resize(m.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST) > 0 for m in masks)
        yield from sequences(frames, small, 800, 5000)


def blurred(frame, size):
    """Grey, blurred by 3 × 3 pixels at `size`: uint8 [h, w, 1]."""
    return cv2.blur(resize(as_channels(frame, 1), size), (3, 3)).reshape(*size, 1)


# ----------------------------------------------------------------------------------------------------------- pasting


def choose(bank, n, share, size, rng):
    """Draw which of n samples of (height, width) `size` get an object, and how it moves.

    Objects cut out of the training videos get one of KINDS; UBnormal's, which are abnormal, move as they did.
    -> dict of arrays [m], with `span`, the side of the square that each of them fits in, px; or None.
    """
    samples = np.flatnonzero(rng.random(n) < share)
    if not len(samples) or bank is None:
        return None
    m, kinds = len(samples), list(KINDS.values())
    if bank.source == "self":
        ranges = [kinds[i] for i in rng.integers(0, len(kinds), m)]
    else:
        ranges = [((1, 1), (0, 0), (1, 1), 0.0)] * m

    def draw(i):
        return np.array([rng.uniform(*r[i]) for r in ranges])

    speed, turn = draw(0), np.deg2rad(draw(1)) * rng.choice([-1, 1], m)
    grow = draw(2)
    bend = np.array([rng.uniform(-r[3], r[3]) for r in ranges])
    # half of them go where objects are seen, the others anywhere
    seen = bank.middle[rng.integers(0, len(bank), m)]
    place = np.where(rng.random((m, 1)) < 0.5, seen, rng.uniform((0.1, 0.05), (0.95, 0.95), (m, 2)) * size)
    whole = {"sample": samples, "object": rng.integers(0, len(bank), m)}
    real = {
        "speed": speed,
        "turn": turn,
        "grow": grow,
        "bend": bend,
        "mirror": rng.integers(0, 2, m),
        "row": place[:, 0],
        "column": place[:, 1],
    }
    return {
        # the square of the bank's largest object would be many times as large
        "span": int(np.ceil((bank.largest[whole["object"]] * grow).max())) + 2,
        **whole,
        **{k: v.astype(np.float32) for k, v in real.items()},
    }


def of_part(chosen, part, run):
    """What was chosen for the samples of a slice of the batch, with their numbers in the slice, on the device; or
    None."""
    if chosen is None:
        return None
    numbers = np.full(chosen["sample"].max() + 1, -1)
    numbers[part] = np.arange(len(numbers[part]))
    sample = numbers[chosen["sample"]]
    inside = sample >= 0
    if not inside.any():
        return None
    return {k: v if k == "span" else run.to_device(v[inside]) for k, v in {**chosen, "sample": sample}.items()}


def frames_at(steps, offsets):
    """The frames at `offsets` from the middle of sequences [m, LENGTH, …] -> [m, k, …]."""
    return torch.stack([steps[:, offset + LENGTH // 2] for offset in offsets], dim=1)


def trajectories(bank, chosen, offsets):
    """Centres and sizes of the chosen objects, float32 [m, k, 2] (rows, columns; px): their own mean velocity, made
    faster, turned and bent. offsets: of k frames from t."""
    objects, steps = chosen["object"], torch.arange(LENGTH, device=bank.places.device) - LENGTH // 2
    t = frames_at(steps[None].float(), offsets)[0]
    velocity = (bank.places[objects, -1] - bank.places[objects, 0]) / (LENGTH - 1)
    velocity[:, 1] *= 1 - 2 * chosen["mirror"]
    cos, sin = chosen["turn"].cos(), chosen["turn"].sin()
    turned = [cos * velocity[:, 0] - sin * velocity[:, 1], sin * velocity[:, 0] + cos * velocity[:, 1]]
    velocity = chosen["speed"][:, None] * torch.stack(turned, dim=1)
    sideways = torch.stack([-velocity[:, 1], velocity[:, 0]], dim=1)
    start = torch.stack([chosen["row"], chosen["column"]], dim=1)[:, None]
    bend = (chosen["bend"][:, None] * t**2 / 3)[..., None]
    centre = start + t[:, None] * velocity[:, None] + bend * sideways[:, None]
    return centre, frames_at(bank.sizes[objects], offsets) * chosen["grow"][:, None, None]


def draw_objects(bank, chosen, offsets, centre, size, corner, span, channels):
    """Resample every object onto its square [span, span] whose first pixel is `corner` [m, k, 2].

    -> colours [m, k, span, span, C] and opacity [m, k, 1, span, span] in 0..1.
    """
    crops, masks = (frames_at(x[chosen["object"]], offsets) for x in (bank.crops, bank.masks))
    m, k = corner.shape[:2]
    pixel = torch.arange(span, device=corner.device, dtype=torch.float32)
    y, x = (2 * (pixel + corner[..., i, None] - centre[..., i, None]) / size[..., i, None] for i in (0, 1))
    x = x * (1 - 2 * chosen["mirror"])[:, None, None]
    grid = torch.stack([x[..., None, :].expand(m, k, span, span), y[..., None].expand(m, k, span, span)], dim=-1)
    grid = grid.flatten(0, 1)
    over = F.grid_sample(crops.flatten(0, 1).float(), grid, padding_mode="border", align_corners=False)
    over = over.view(m, k, -1, span, span).expand(-1, -1, channels, -1, -1).movedim(2, -1)
    opacity = F.grid_sample(masks.flatten(0, 1).float() / 255, grid, align_corners=False)
    return over, opacity.view(m, k, 1, span, span)


def paste(frames, bank, chosen, offsets):
    """Paste objects into frames uint8 [n, k, C, H, W], whose distances from t are `offsets` [k]. chosen: of_part()

    -> (such frames, mask [n, 1, H, W] of frame t, 0 or 255).
    """
    n, k, c, h, w = frames.shape
    mask = frames.new_zeros(n, 1, h, w)
    if chosen is None:
        return frames, mask
    device, span = frames.device, chosen["span"]
    middle = list(offsets).index(0)
    samples, m = chosen["sample"], len(chosen["sample"])
    centre, size = trajectories(bank, chosen, offsets)
    # every object on a square of its own around the whole pixel nearest to its centre
    corner = (centre - span / 2).round().clamp(min=-span, max=0x7FFF)
    corner = torch.stack([corner[..., 0].clamp(max=h), corner[..., 1].clamp(max=w)], dim=-1)
    over, opacity = draw_objects(bank, chosen, offsets, centre, size, corner, span, c)
    # blended into frames with a border as wide as a square, so that no square is cut off
    wide = F.pad(frames[samples], (span, span, span, span))
    first, inside = corner.long() + span, torch.arange(span, device=device)
    rows, columns = first[..., 0, None] + inside, first[..., 1, None] + inside
    objects = torch.arange(m, device=device)
    steps = torch.arange(k, device=device).view(1, k, 1, 1)
    index = objects.view(m, 1, 1, 1), steps, slice(None), rows[..., None], columns[..., None, :]
    below = wide[index].float()  # [m, k, span, span, C]
    wide[index] = (below + opacity.movedim(2, -1) * (over - below)).round().clamp(0, 255).to(wide.dtype)
    full = frames.new_zeros(m, h + 2 * span, w + 2 * span)
    covered = ((opacity[:, middle, 0] > 0.5) * 255).to(full.dtype)
    full[objects.view(m, 1, 1), rows[:, middle, :, None], columns[:, middle, None, :]] = covered
    frames = frames.clone()
    frames[samples] = wide[..., span : span + h, span : span + w]
    mask[samples, 0] = full[:, span : span + h, span : span + w]
    return frames, mask
