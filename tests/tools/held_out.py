"""A labelled validation set without test labels: half of a dataset's training videos, with objects pasted into the
other half, as a folder for --dataset folder.

    python tests/tools/held_out.py --dataset ped2 --data-root data --out data/ped2-held-out
    python sdmae/train.py --dataset folder --data-root data/ped2-held-out

train/ holds every second training video as it is. In the others, test/, objects cut out of these same videos move for
at most 60 frames at a time, at another speed, in another direction, or at another size (sdmae/pseudo.py, KINDS). So
constants can be chosen here, and a dataset's test videos looked at once. labels/ and masks/ say where the objects are.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
from tqdm import tqdm

from common.io import UserError, atomic_write, run_script
from common.readers.datasets import find
from common.readers.pictures import write_image
from common.readers.video import Decoder
from sdmae.pseudo import KINDS, LENGTH, moving_objects, subsample

PAUSE, STAY = (20, 60), (15, 60)  # frames without an object, and with one unless it leaves before


def decode(video):
    """A video's frames, uint8 [T, H, W, C]."""
    return np.stack(list(Decoder(video)))


def draw_path(steps, frames, size, rng):
    """How one object moves: centres [frames, 2] (row, column) px, enlargement, mirrored or not.

    steps: the object's LENGTH steps (crop, mask, (height, width), (row, column)); size: height, width of the frame.
    """
    speed, turn, grow, bend = list(KINDS.values())[rng.integers(len(KINDS))]
    mirrored = bool(rng.integers(2))
    places = np.array([step[3] for step in steps])
    velocity = (places[-1] - places[0]) / (LENGTH - 1) * rng.uniform(*speed) * (1, -1 if mirrored else 1)
    # a bent path turns by up to 10 degrees a frame
    angle = np.deg2rad(rng.uniform(*turn)) * rng.choice([-1, 1]) + rng.uniform(-bend, bend) / 3 * np.arange(frames)
    rows = np.cos(angle) * velocity[0] - np.sin(angle) * velocity[1]
    columns = np.sin(angle) * velocity[0] + np.cos(angle) * velocity[1]
    start = places.mean(0) if rng.random() < 0.5 else rng.uniform((0.1, 0.05), (0.95, 0.95)) * size
    return start + np.cumsum(np.stack([rows, columns], axis=1), axis=0), rng.uniform(*grow), mirrored


def paste_object(frame, step, centre, grow, mirrored):
    """Blend one step of an object into frame uint8 [H, W, C], in place. -> bool [H, W] where it is; None where less
    than half of it would be seen."""
    crop, mask, sides, _ = step
    height, width = (max(2, round(side * grow)) for side in sides)
    top, left = round(centre[0] - height / 2), round(centre[1] - width / 2)
    inside = tuple(
        slice(min(max(0, first), whole), max(0, min(first + side, whole)))
        for first, side, whole in zip((top, left), (height, width), frame.shape)
    )
    over = cv2.resize(crop.transpose(1, 2, 0), (width, height), interpolation=cv2.INTER_AREA).reshape(height, width, -1)
    opacity = cv2.resize(mask[0], (width, height), interpolation=cv2.INTER_AREA) / 255
    if mirrored:
        over, opacity = over[:, ::-1], opacity[:, ::-1]
    part = slice(inside[0].start - top, inside[0].stop - top), slice(inside[1].start - left, inside[1].stop - left)
    if opacity[part].sum() <= 0.5 * opacity.sum():
        return None
    below, a = frame[inside].astype(np.float32), opacity[part][..., None]
    frame[inside] = np.round(below + a * (over[part] - below)).astype(np.uint8)
    where = np.zeros(frame.shape[:2], bool)
    where[inside] = opacity[part] > 0.5
    return where


def paste_video(frames, objects, rng):
    """Paste objects into a video, uint8 [T, H, W, C], in place, one after the other. -> masks bool [T, H, W]."""
    masks = np.zeros(frames.shape[:3], bool)
    t = int(rng.integers(*PAUSE))
    while t < len(frames):
        steps = objects[rng.integers(len(objects))]
        stay = min(int(rng.integers(*STAY)), len(frames) - t)
        centres, grow, mirrored = draw_path(steps, stay, frames.shape[1:3], rng)
        there_and_back = [*range(LENGTH), *range(LENGTH - 2, 0, -1)]
        for i, centre in enumerate(centres):
            step = steps[there_and_back[i % len(there_and_back)]]
            where = paste_object(frames[t], step, centre, grow, mirrored)
            if where is None:  # it has left the frame
                break
            masks[t] = where
            t += 1
        t += int(rng.integers(*PAUSE))
    return masks


def build(data, out, seed=0):
    """Write train/, test/, labels/ and masks/ under `out` from the training videos of a Dataset. -> (training videos,
    test videos, abnormal frames, frames of test videos). Raises UserError."""
    if len(data.train) < 2:
        raise UserError(f"{data.root} has {len(data.train)} training videos; two are needed, one for each half")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; give a new folder")
    rng = np.random.default_rng(seed)
    kept, changed = data.train[::2], data.train[1::2]
    objects = subsample((steps for video in changed for steps in moving_objects([decode(video)])), seed)
    if not objects:
        raise UserError(f"nothing that moves was found in every second training video of {data.root}")
    for video in kept:
        place = out / "train" / (video.name if video.files else video.name + video.path.suffix)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(video.path.resolve(), target_is_directory=video.path.is_dir())
    abnormal = total = 0
    for video in tqdm(changed, desc="paste objects", unit="video"):
        frames = decode(video)
        masks = paste_video(frames, objects, rng)
        for t, frame in enumerate(frames):
            write_image(out / "test" / video.name / f"{t:05d}.png", frame)
        for folder, array in (("labels", masks.any((1, 2)).astype(np.uint8)), ("masks", masks)):
            with atomic_write(out / folder / f"{video.name}.npy") as tmp:
                np.save(tmp, array)
        abnormal, total = abnormal + int(masks.any((1, 2)).sum()), total + len(frames)
    return len(kept), len(changed), abnormal, total


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ped2", help="(default: %(default)s)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train, test, abnormal, total = build(find(args.dataset, args.data_root), args.out, args.seed)
    print(f"{train} training and {test} test videos in {args.out}; {abnormal} of {total} test frames hold an object")
    print(f"next: python sdmae/train.py --dataset folder --data-root {args.out}")


if __name__ == "__main__":
    run_script(main)
