"""The dataset that needs no download: three fixed cameras, people walking, and events that do not belong there.

    python common/demo.py --out data/demo        # done by itself when --dataset demo is first used

Same files on every run of one OpenCV version. An ordinary folder layout: train/*.avi, test/*.avi, labels/<video>.npy,
masks/<video>.npz, tracks/<video>.csv, events.csv (which event is where). Scenes: `plaza`, where global_batch walks along
two crossing ways; `arcade`, a one-way passage; `park`, where cyclists are as normal as walkers.
"""

import argparse
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np

from common.io import UserError, atomic_write, opencv_path, read_json, run, writable_folder, write_json, writing_table
from common.pool import cores, map_videos, tick

VERSION = 1
WIDTH, HEIGHT, FPS = 320, 192, 12.5
TRAIN, TEST, TRAIN_FRAMES, TEST_FRAMES = 5, 4, 120, 160  # videos per scene and their lengths

# A camera looks along +z from `height` metres; a point (x, z) on the ground is seen at scale f / z pixels per metre.
# Ways are (start, end, both directions?) in metres; `crowd` is the mean number of people in view.
SCENES = {
    "plaza": dict(
        height=4.6,
        horizon=6,
        f=300,
        ways=[((-9, 14), (9, 11), False), ((-3.5, 22), (2.0, 10.2), False)],
        crowd=5.0,
        ground=(118, 128, 134),
        tile=1.3,
        wall=(96, 110, 138),
        cyclists=0.0,
    ),
    "arcade": dict(
        height=3.8,
        horizon=18,
        f=260,
        ways=[((-8, 10.5), (8, 9.5), False), ((-11, 15.5), (11, 14.5), False)],
        crowd=4.5,
        ground=(140, 134, 122),
        tile=0.7,
        wall=(70, 84, 104),
        cyclists=0.0,
    ),
    "park": dict(
        height=5.2,
        horizon=-4,
        f=320,
        ways=[((-10, 18), (9, 10.5), False), ((-8.5, 13), (8, 21), False)],
        crowd=4.0,
        ground=(72, 112, 88),
        tile=0.0,
        wall=(48, 84, 62),
        cyclists=0.4,
    ),
}
# events of the test videos, one list per video: (kind, first frame)
EVENTS = {
    "plaza": [[("cart", 50)], [("runner", 30), ("thrown", 110)], [("cyclist", 100)], [("thrown", 40), ("cart", 80)]],
    "arcade": [[("wrong way", 70)], [("cart", 45)], [("runner", 25), ("thrown", 105)], [("cart", 70)]],
    "park": [[("cart", 45)], [("thrown", 30), ("runner", 85)], [], [("wrong way", 90), ("thrown", 50)]],
}
SPEED = {"walker": (0.9, 1.5), "cyclist": (2.2, 3.0), "cart": (1.6, 2.1), "runner": (2.6, 3.4), "wrong way": (1.0, 1.5)}


@dataclass
class Actor:
    kind: str
    start: np.ndarray  # metres on the ground
    velocity: np.ndarray  # metres per frame
    first: int  # frame of appearance
    last: int
    size: float  # body height in metres
    colors: list  # BGR: upper body, legs, skin, thing
    phase: float
    abnormal: bool

    def at(self, t):
        return self.start + self.velocity * (t - self.first)


class Scene:
    def __init__(self, name):
        self.name, self.c = name, SCENES[name]
        self.background = self._paint(np.random.default_rng(zlib.crc32(name.encode())))

    def project(self, p):
        """Ground point (x, z) in metres -> image x, y and pixels per metre there."""
        scale = self.c["f"] / max(p[1], 0.5)
        return WIDTH / 2 + p[0] * scale, self.c["horizon"] + self.c["height"] * scale, scale

    def _paint(self, rng):
        c = self.c
        ys, xs = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
        scale = np.maximum((ys - c["horizon"]) / c["height"], 1e-3)
        z, x = c["f"] / scale, (xs - WIDTH / 2) / scale
        ground = np.array(c["ground"], np.float32) * (0.82 + 0.3 * _texture(rng, HEIGHT, WIDTH)[..., None])
        if c["tile"]:
            joint = (np.abs((x / c["tile"]) % 1 - 0.5) > 0.46) | (np.abs((z / c["tile"]) % 1 - 0.5) > 0.46)
            ground[joint & (z < 30)] *= 0.86
        else:  # paths through grass
            ground *= 0.9 + 0.25 * rng.random((HEIGHT, WIDTH, 1), np.float32)
            for a, b, _ in c["ways"]:
                a, b = np.array(a, np.float32), np.array(b, np.float32)
                d = (b - a) / np.linalg.norm(b - a)
                off = np.abs((x - a[0]) * d[1] - (z - a[1]) * d[0])
                path = np.array((128, 146, 158), np.float32) * (0.9 + 0.15 * _texture(rng, HEIGHT, WIDTH)[..., None])
                ground = np.where((off < 1.5)[..., None], path, ground)
        top = int(c["horizon"] + c["height"] * c["f"] / 27)
        wall = np.array(c["wall"], np.float32) * (0.75 + 0.4 * _texture(rng, HEIGHT, WIDTH)[..., None])
        image = np.where((ys < top)[..., None], wall, ground)
        for _ in range(7):  # windows, doors, bushes along the wall
            w, h = int(rng.integers(14, 34)), int(rng.integers(12, 26))
            px, shade = int(rng.integers(0, WIDTH - w)), rng.uniform(0.5, 1.35)
            image[max(0, top - h - 4) : max(0, top - 4), px : px + w] *= shade
        image[max(0, top - 2) : top + 1] *= 0.7
        return cv2.GaussianBlur(np.clip(image, 0, 255), (3, 3), 0)


def _texture(rng, h, w):
    """Smooth noise of several octaves in [0, 1]."""
    out = np.zeros((h, w), np.float32)
    for step, weight in ((4, 0.2), (10, 0.3), (32, 0.5)):
        out += weight * cv2.resize(
            rng.random((h // step + 2, w // step + 2), np.float32), (w, h), interpolation=cv2.INTER_CUBIC
        )
    return np.clip(out, 0, 1)


# ---------------------------------------------------------------------------------------------------------- drawing


def _limb(image, a, b, color, thick):
    cv2.line(
        image,
        (int(a[0] * 8), int(a[1] * 8)),
        (int(b[0] * 8), int(b[1] * 8)),
        color,
        max(1, int(round(thick))),
        cv2.LINE_AA if image.ndim == 3 else cv2.LINE_8,
        3,
    )


def _oval(image, center, rx, ry, color, angle=0):
    cv2.ellipse(
        image,
        (int(center[0] * 8), int(center[1] * 8)),
        (max(8, int(rx * 8)), max(8, int(ry * 8))),
        angle,
        0,
        360,
        color,
        -1,
        cv2.LINE_AA if image.ndim == 3 else cv2.LINE_8,
        3,
    )


def _person(image, x, y, h, swing, bob, lean, colors, arms=0.75):
    """A figure of h pixels with its feet at (x, y); swing in [-1, 1] moves legs and arms against each other."""
    upper, legs, skin, _ = colors
    hip, shoulder = (x + lean * 0.05 * h, y - 0.47 * h - bob), (x + lean * 0.16 * h, y - 0.80 * h - bob)
    for side in (1, -1):
        knee = (hip[0] + side * swing * 0.13 * h, y - 0.24 * h - bob)
        foot = (hip[0] + side * swing * 0.24 * h, y - max(0.0, -side * swing) * 0.05 * h)
        _limb(image, hip, knee, legs, 0.13 * h)
        _limb(image, knee, foot, legs, 0.10 * h)
    _limb(image, (shoulder[0], shoulder[1] + 0.02 * h), hip, upper, 0.24 * h)
    if image.ndim == 3:  # a striped shirt: cloth is never one flat colour
        for k in (0.2, 0.5, 0.8):
            y = shoulder[1] + k * (hip[1] - shoulder[1])
            _limb(image, (shoulder[0] - 0.10 * h, y), (shoulder[0] + 0.10 * h, y), [0.62 * v for v in upper], 0.05 * h)
    for side in (1, -1):
        hand = (shoulder[0] - side * swing * arms * 0.2 * h, shoulder[1] + 0.33 * h)
        _limb(image, shoulder, hand, upper, 0.08 * h)
    _oval(image, (shoulder[0] + lean * 0.04 * h, shoulder[1] - 0.11 * h), 0.075 * h, 0.09 * h, skin)


def _cyclist(image, x, y, h, swing, side, colors):
    upper, legs, skin, thing = colors
    r = 0.19 * h
    wheels = [(x - 0.3 * h, y - r), (x + 0.3 * h, y - r)]
    for w in wheels:
        cv2.ellipse(
            image,
            (int(w[0] * 8), int(w[1] * 8)),
            (int(r * 8), int(r * 8)),
            0,
            0,
            360,
            thing,
            max(1, int(0.035 * h)),
            cv2.LINE_AA if image.ndim == 3 else cv2.LINE_8,
            3,
        )
    seat, bars = (x - side * 0.12 * h, y - 0.50 * h), (x + side * 0.24 * h, y - 0.54 * h)
    _limb(image, wheels[0], seat, thing, 0.04 * h)
    _limb(image, wheels[1], bars, thing, 0.04 * h)
    _limb(image, seat, bars, thing, 0.04 * h)
    pedal = (x + 0.06 * h * np.cos(swing), y - r + 0.06 * h * np.sin(swing))
    knee = ((seat[0] + pedal[0]) / 2 + side * 0.10 * h, (seat[1] + pedal[1]) / 2)
    _limb(image, seat, knee, legs, 0.11 * h)
    _limb(image, knee, pedal, legs, 0.09 * h)
    shoulder = (x + side * 0.08 * h, y - 0.82 * h)
    _limb(image, seat, shoulder, upper, 0.2 * h)
    _limb(image, shoulder, bars, upper, 0.07 * h)
    _oval(image, (shoulder[0] + side * 0.05 * h, shoulder[1] - 0.11 * h), 0.075 * h, 0.09 * h, skin)


def _cart(image, x, y, h, spin, side, colors):
    """A small delivery cart with a cabin, h pixels high."""
    upper, _, skin, thing = colors
    w = 1.15 * h
    body = np.array(
        [(x - w / 2, y - 0.16 * h), (x + w / 2, y - 0.16 * h), (x + w / 2, y - 0.55 * h), (x - w / 2, y - 0.55 * h)]
    )
    cabin = np.array(
        [
            (x + side * 0.08 * w, y - 0.55 * h),
            (x + side * 0.5 * w, y - 0.55 * h),
            (x + side * 0.40 * w, y - h),
            (x + side * 0.08 * w, y - h),
        ]
    )
    flat = image.ndim == 2
    line = cv2.LINE_8 if flat else cv2.LINE_AA
    for part, color in ((body, thing), (cabin, upper)):
        cv2.fillPoly(image, [(part * 8).astype(np.int32)], color, line, 3)
    if not flat:
        _limb(image, (x - w / 2, y - 0.36 * h), (x + w / 2, y - 0.36 * h), skin, 0.08 * h)
    for k in (-0.3, 0.3):
        center = (x + k * w, y - 0.14 * h)
        _oval(image, center, 0.14 * h, 0.14 * h, thing if flat else (30, 30, 30))
        if not flat:
            _limb(
                image,
                center,
                (center[0] + 0.1 * h * np.cos(spin), center[1] + 0.1 * h * np.sin(spin)),
                (150, 150, 150),
                2,
            )


def draw(image, scene, actor, t, value=None):
    """The actor at frame t: in its colours on a BGR image, or as `value` on an index map."""
    colors = actor.colors if value is None else [value] * 4
    x, y, scale = scene.project(actor.at(t))
    h, age = actor.size * scale, t - actor.first
    vx = scene.project(actor.at(t + 1))[0] - x
    side = 1 if vx >= 0 else -1
    speed = np.linalg.norm(actor.velocity)
    if actor.kind == "thrown":
        lift = max(0.0, 1.5 + 0.34 * age - 0.022 * age * age) * scale
        for k in (0.0, 1.6):
            tip = (
                np.cos(actor.phase + 0.9 * age + k) * 0.24 * scale,
                np.sin(actor.phase + 0.9 * age + k) * 0.24 * scale,
            )
            _limb(image, (x - tip[0], y - lift - tip[1]), (x + tip[0], y - lift + tip[1]), colors[3], 0.3 * scale)
        return
    if value is None:
        ground = scene.background[min(HEIGHT - 1, max(0, int(y))), min(WIDTH - 1, max(0, int(x)))]
        _oval(image, (x, y - 0.01 * h), 0.22 * h, 0.05 * h, tuple(0.6 * float(v) for v in ground))  # contact shadow
    if actor.kind == "cyclist":
        _cyclist(image, x, y, h, actor.phase + age * speed * 2.2, side, colors)
    elif actor.kind == "cart":
        _cart(image, x, y, h, actor.phase + age * speed * 2.5, side, colors)
    else:
        stride = actor.phase + age * speed * (3.9 if actor.kind == "runner" else 4.4) / max(actor.size, 1) * 1.7
        running = actor.kind == "runner"
        bob = abs(np.cos(stride)) * (0.05 if running else 0.015) * h
        _person(
            image,
            x,
            y,
            h,
            np.sin(stride) * (1.5 if running else 1.0),
            bob,
            side * (0.9 if running else 0.1),
            colors,
            1.5 if running else 0.75,
        )


# ---------------------------------------------------------------------------------------------------------- actors


def make_actor(rng, scene, kind, first, frames, abnormal, way=None, progress=0.0):
    """An actor entering one of the scene's ways at frame `first`, already `progress` of the way along it."""
    ways = scene.c["ways"]
    a, b, both = ways[int(rng.integers(len(ways))) if way is None else way]
    a, b = np.array(a, float), np.array(b, float)
    if (both and rng.random() < 0.5) or (kind == "wrong way"):
        a, b = b, a
    d = (b - a) / np.linalg.norm(b - a)
    shift = np.array([-d[1], d[0]]) * rng.uniform(-0.9, 0.9)
    length = np.linalg.norm(b - a)
    color = lambda lo, hi: tuple(int(v) for v in rng.integers(lo, hi, 3))
    skin = (int(rng.integers(90, 160)), int(rng.integers(120, 190)), int(rng.integers(160, 230)))
    colors = [color(30, 235), color(20, 110), skin, color(20, 90)]
    if kind == "thrown":
        start = a + (b - a) * rng.uniform(0.3, 0.45) + shift
        colors[3] = (int(rng.integers(0, 60)), int(rng.integers(60, 160)), int(rng.integers(190, 250)))
        last = min(frames, first + 18)
        return Actor(
            kind, start, d * rng.uniform(3.0, 4.0) / FPS, first, last, 0.4, colors, rng.uniform(0, 6), abnormal
        )
    if kind == "cart":
        colors = [color(150, 230), colors[1], color(170, 250), tuple(int(v) for v in rng.permutation([40, 90, 200]))]
    speed = rng.uniform(*SPEED[kind]) / FPS
    size = {"cart": rng.uniform(1.75, 2.0), "cyclist": rng.uniform(1.65, 1.85)}.get(kind, rng.uniform(1.5, 1.9))
    last = min(frames, first + int(length * (1 - progress) / speed))
    return Actor(
        kind, a + (b - a) * progress + shift, d * speed, first, last, size, colors, rng.uniform(0, 6), abnormal
    )


def cast(rng, scene, frames, events):
    """All actors of one video, normal ones arriving at random, abnormal ones as listed."""
    actors = []
    rate = (
        rng.uniform(0.5, 1.5) * scene.c["crowd"] / (16 / 1.2 * FPS)
    )  # arrivals per frame: a walk takes about 16 m / 1.2 m/s
    for t in range(frames):
        for _ in range(rng.poisson(rate) if t else int(rng.integers(1, scene.c["crowd"]))):
            kind = "cyclist" if rng.random() < scene.c["cyclists"] else "walker"
            leader = make_actor(rng, scene, kind, t, frames, False, progress=rng.uniform(0, 0.8) if t == 0 else 0.0)
            actors.append(leader)
            for _ in range(int(rng.integers(0, 3)) if kind == "walker" and rng.random() < 0.4 else 0):  # company
                friend = make_actor(rng, scene, kind, t, frames, False)
                friend.start, friend.velocity = leader.start + rng.uniform(-1.3, 1.3, 2), leader.velocity
                friend.last = leader.last
                actors.append(friend)
    for kind, first in events:
        actors.append(make_actor(rng, scene, kind, first, frames, True, progress=0.0 if kind == "thrown" else 0.12))
    return actors


def render(name, index, split, path):
    """Write one video (and for test videos labels, masks, tracks). Deterministic in its arguments."""
    scene = Scene(name)
    rng = np.random.default_rng([VERSION, zlib.crc32(f"{name}/{split}/{index}".encode())])
    frames = TRAIN_FRAMES if split == "train" else TEST_FRAMES
    events = EVENTS[name][index] if split == "test" else []
    actors = cast(rng, scene, frames, events)
    grain = [rng.normal(0, 2.6, (HEIGHT + 16, WIDTH + 16, 3)).astype(np.float32) for _ in range(6)]
    light, period, gain = rng.uniform(0, 6), rng.uniform(80, 160), rng.uniform(0, 6)
    tint = rng.uniform(0.97, 1.03, 3).astype(np.float32)
    masks, tracks = np.zeros((frames, HEIGHT, WIDTH), bool), []
    with atomic_write(path) as tmp:
        writer = cv2.VideoWriter(opencv_path(tmp), cv2.VideoWriter_fourcc(*"MJPG"), FPS, (WIDTH, HEIGHT))
        writer.set(cv2.VIDEOWRITER_PROP_QUALITY, 90)
        if not writer.isOpened():
            raise UserError(f"{path} cannot be written: this OpenCV has no MJPG encoder, or the folder refuses it")
        for t in range(frames):
            image = scene.background.copy()
            here = sorted((a for a in actors if a.first <= t < a.last), key=lambda a: -a.at(t)[1])
            for a in here:
                draw(image, scene, a, t)
            if any(a.abnormal for a in here):
                index_map = np.zeros((HEIGHT, WIDTH), np.uint8)
                for i, a in enumerate(here, 1):
                    draw(index_map, scene, a, t, i)
                for i, a in enumerate(here, 1):
                    visible = index_map == i
                    if a.abnormal and visible.sum() >= 40:
                        masks[t] |= visible
                        ys, xs = np.nonzero(visible)
                        tracks.append((actors.index(a), t, xs.min(), ys.min(), xs.max(), ys.max()))
            image *= tint * (1 + 0.05 * np.sin(light + 2 * np.pi * t / period))
            dy, dx = rng.integers(0, 16, 2)
            noise = grain[int(rng.integers(6))][dy : dy + HEIGHT, dx : dx + WIDTH]
            image += (1 + 0.7 * np.sin(gain + 4 * t / period)) * noise  # a camera's automatic gain
            writer.write(np.clip(cv2.GaussianBlur(image, (3, 3), 0.6), 0, 255).astype(np.uint8))
            tick()
        writer.release()
    if split == "test":
        root = path.parent.parent
        with atomic_write(root / "labels" / f"{path.stem}.npy") as tmp:
            np.save(tmp, masks.any((1, 2)).astype(np.uint8))
        with atomic_write(root / "masks" / f"{path.stem}.npz") as tmp:
            np.savez_compressed(tmp, masks=masks)
        with atomic_write(root / "tracks" / f"{path.stem}.csv") as tmp:
            tmp.write_text("# id,frame,x1,y1,x2,y2\n" + "".join(",".join(map(str, row)) + "\n" for row in tracks))
    spans = [
        (a.kind, min(f), max(f) + 1)
        for i, a in enumerate(actors)
        if a.abnormal and (f := [row[1] for row in tracks if row[0] == i])
    ]
    return path.stem, spans


def _job(job):
    return render(*job)


def ensure_demo(root, workers=None):
    """Generate the dataset at `root` unless it is there. -> root."""
    root = Path(root)
    marker = root / "demo.json"
    if marker.exists() and read_json(marker, "demo marker").get("version") == VERSION:
        return root
    if root.exists() and any(root.iterdir()) and not marker.exists() and not (root / "unfinished").exists():
        raise UserError(f"{root} holds other files: move them away, or choose another --data-root for the demo")
    writable_folder(root)
    (root / "unfinished").touch()
    jobs = [
        (s, i, split, root / split / f"{s}_{i + 1:02d}.avi")
        for s in SCENES
        for split, n in (("train", TRAIN), ("test", TEST))
        for i in range(n)
    ]
    total = sum(TRAIN_FRAMES if j[2] == "train" else TEST_FRAMES for j in jobs)
    print(f"generating the demo dataset in {root}", flush=True)
    results, errors = map_videos(_job, jobs, workers=workers or cores(), total=total, label="demo")
    if errors:
        raise UserError(errors[0][1])
    with writing_table(root / "events.csv") as table:
        table.writerow(["video", "event", "start", "end"])
        for stem, spans in results:
            table.writerows((stem, *span) for span in spans)
    write_json(marker, {"version": VERSION, "scenes": list(SCENES), "fps": FPS})
    (root / "unfinished").unlink()
    return root


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    print(f"the demo dataset is in {ensure_demo(args.out)}")


if __name__ == "__main__":
    run(main)
