"""The dataset that needs no download: three fixed cameras, people walking, and events that do not belong there.

--dataset demo makes it when it is first used, the same files on every run of one OpenCV version: train/*.avi,
test/*.avi, labels/<video>.npy, masks/<video>.npz, tracks/<video>.csv, events.csv (which event is where). Scenes:
`plaza`, two crossing ways; `arcade`, a one-way passage; `park`, where cyclists are as normal as walkers.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from common import io
from common.pool import cores, map_videos, tick
from common.readers import folder
from common.readers.dataset import Dataset

VERSION = 1
WIDTH, HEIGHT = 320, 192
FPS = 12.5
TRAIN, TEST = 5, 4  # videos per scene
TRAIN_FRAMES, TEST_FRAMES = 120, 160  # of each video

# A camera looks along +z from `height` metres, with the horizon in row `horizon`: a point (x, z) on the ground is seen
# at focal / z pixels per metre. crowd: mean number of people in view; cyclists: their share among them; tile: side of
# the paving in metres, 0 for paths through grass; colours are BGR.
SCENES = {
    "plaza": dict(
        height=4.6, horizon=6, focal=300, crowd=5.0, cyclists=0.0, tile=1.3, ground=(118, 128, 134), wall=(96, 110, 138)
    ),
    "arcade": dict(
        height=3.8, horizon=18, focal=260, crowd=4.5, cyclists=0.0, tile=0.7, ground=(140, 134, 122), wall=(70, 84, 104)
    ),
    "park": dict(
        height=5.2, horizon=-4, focal=320, crowd=4.0, cyclists=0.4, tile=0.0, ground=(72, 112, 88), wall=(48, 84, 62)
    ),
}
WAYS = {  # start and end of the ways that people walk, (x, z) in metres
    "plaza": [((-9, 14), (9, 11)), ((-3.5, 22), (2.0, 10.2))],
    "arcade": [((-8, 10.5), (8, 9.5)), ((-11, 15.5), (11, 14.5))],
    "park": [((-10, 18), (9, 10.5)), ((-8.5, 13), (8, 21))],
}
# events of the test videos, one list per video: (kind, first frame)
EVENTS = {
    "plaza": [[("cart", 50)], [("runner", 30), ("thrown", 110)], [("cyclist", 100)], [("thrown", 40), ("cart", 80)]],
    "arcade": [[("wrong way", 70)], [("cart", 45)], [("runner", 25), ("thrown", 105)], [("cart", 70)]],
    "park": [[("cart", 45)], [("thrown", 30), ("runner", 85)], [], [("wrong way", 90), ("thrown", 50)]],
}
# metres per second, from and to
SPEED = {"walker": (0.9, 1.5), "cyclist": (2.2, 3.0), "cart": (1.6, 2.1), "runner": (2.6, 3.4), "wrong way": (1.0, 1.5)}


@dataclass
class Actor:
    kind: str
    start: np.ndarray  # metres on the ground
    velocity: np.ndarray  # metres per frame
    first: int  # frame of appearance
    last: int  # one after the last frame
    size: float  # height in metres
    colors: list  # BGR: upper body, legs, skin, thing
    phase: float  # of its steps, radians
    abnormal: bool

    def at(self, t: int) -> np.ndarray:
        """Where it is in frame t: (x, z) in metres."""
        return self.start + self.velocity * (t - self.first)


class Scene:
    """A place that a fixed camera sees. background: float32 [HEIGHT, WIDTH, 3]"""

    def __init__(self, name: str):
        self.settings, self.ways = SCENES[name], WAYS[name]
        self.background = self._paint(np.random.default_rng(zlib.crc32(name.encode())))

    def project(self, point) -> tuple[float, float, float]:
        """Ground point (x, z) in metres -> image x, y and pixels per metre there."""
        scale = self.settings["focal"] / max(point[1], 0.5)
        return WIDTH / 2 + point[0] * scale, self.settings["horizon"] + self.settings["height"] * scale, scale

    def _paint(self, rng):
        settings = self.settings
        horizon, height = settings["horizon"], settings["height"]
        focal, tile = settings["focal"], settings["tile"]
        ys, xs = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
        scale = np.maximum((ys - horizon) / height, 1e-3)
        z, x = focal / scale, (xs - WIDTH / 2) / scale
        ground = _textured(rng, settings["ground"], 0.82, 0.3)
        if tile:
            joint = (np.abs((x / tile) % 1 - 0.5) > 0.46) | (np.abs((z / tile) % 1 - 0.5) > 0.46)
            ground[joint & (z < 30)] *= 0.86
        else:
            ground *= 0.9 + 0.25 * rng.random((HEIGHT, WIDTH, 1), np.float32)
            for way in self.ways:
                a, b = np.array(way, np.float32)
                d = (b - a) / np.linalg.norm(b - a)
                off = np.abs((x - a[0]) * d[1] - (z - a[1]) * d[0])
                ground = np.where((off < 1.5)[..., None], _textured(rng, (128, 146, 158), 0.9, 0.15), ground)
        top = int(horizon + height * focal / 27)
        image = np.where((ys < top)[..., None], _textured(rng, settings["wall"], 0.75, 0.4), ground)
        for _ in range(7):  # windows, doors, bushes along the wall
            w, h = int(rng.integers(14, 34)), int(rng.integers(12, 26))
            left, shade = int(rng.integers(0, WIDTH - w)), rng.uniform(0.5, 1.35)
            image[max(0, top - h - 4) : max(0, top - 4), left : left + w] *= shade
        image[max(0, top - 2) : top + 1] *= 0.7
        return cv2.GaussianBlur(np.clip(image, 0, 255), (3, 3), 0)


def _textured(rng, color, darkest, contrast):
    """`color` times smooth noise of several octaves: float32 [HEIGHT, WIDTH, 3]"""
    noise = np.zeros((HEIGHT, WIDTH), np.float32)
    for step, weight in ((4, 0.2), (10, 0.3), (32, 0.5)):
        coarse = rng.random((HEIGHT // step + 2, WIDTH // step + 2), np.float32)
        noise += weight * cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.array(color, np.float32) * (darkest + contrast * np.clip(noise, 0, 1)[..., None])


class Brush:
    """Draws on an image or an index map, with lengths in units of `unit` pixels: (right, up) from the point (x, y)."""

    def __init__(self, image, x, y, unit):
        self.image, self.x = image, x
        self.y, self.unit = y, unit
        self.line = cv2.LINE_AA if image.ndim == 3 else cv2.LINE_8

    def pixels(self, right: float, up: float) -> tuple[int, int]:
        """In eighths of a pixel, as OpenCV takes them with shift=3."""
        return int((self.x + right * self.unit) * 8), int((self.y - up * self.unit) * 8)

    def limb(self, a, b, color: tuple, width: float) -> None:
        width = max(1, int(round(width * self.unit)))
        cv2.line(self.image, self.pixels(*a), self.pixels(*b), color, width, self.line, 3)

    def oval(self, center, rx: float, ry: float, color: tuple, outline: int = -1) -> None:
        axes = max(8, int(rx * self.unit * 8)), max(8, int(ry * self.unit * 8))
        cv2.ellipse(self.image, self.pixels(*center), axes, 0, 0, 360, color, outline, self.line, 3)

    def polygon(self, points, color: tuple) -> None:
        cv2.fillPoly(self.image, [np.array([self.pixels(*p) for p in points], np.int32)], color, self.line, 3)


def _person(brush, colors, swing, bob, lean, arms):
    """swing in [-1, 1] moves legs and arms against each other."""
    upper, legs, skin, _ = colors
    hip, shoulder = (lean * 0.05, 0.47 + bob), (lean * 0.16, 0.80 + bob)
    for side in (1, -1):
        knee = (hip[0] + side * swing * 0.13, 0.24 + bob)
        foot = (hip[0] + side * swing * 0.24, max(0.0, -side * swing) * 0.05)
        brush.limb(hip, knee, legs, 0.13)
        brush.limb(knee, foot, legs, 0.10)
    brush.limb((shoulder[0], shoulder[1] - 0.02), hip, upper, 0.24)
    if brush.image.ndim == 3:  # a striped shirt: cloth is never one flat colour
        for k in (0.2, 0.5, 0.8):
            up = shoulder[1] + k * (hip[1] - shoulder[1])
            stripe = [0.62 * v for v in upper]
            brush.limb((shoulder[0] - 0.10, up), (shoulder[0] + 0.10, up), stripe, 0.05)
    for side in (1, -1):
        hand = (shoulder[0] - side * swing * arms * 0.2, shoulder[1] - 0.33)
        brush.limb(shoulder, hand, upper, 0.08)
    brush.oval((shoulder[0] + lean * 0.04, shoulder[1] + 0.11), 0.075, 0.09, skin)


def _cyclist(brush, colors, turn, side):
    upper, legs, skin, thing = colors
    wheels = [(-0.3, 0.19), (0.3, 0.19)]
    for wheel in wheels:
        brush.oval(wheel, 0.19, 0.19, thing, max(1, int(0.035 * brush.unit)))
    seat, bars = (-side * 0.12, 0.50), (side * 0.24, 0.54)
    for a, b in ((wheels[0], seat), (wheels[1], bars), (seat, bars)):
        brush.limb(a, b, thing, 0.04)
    pedal = (0.06 * np.cos(turn), 0.19 - 0.06 * np.sin(turn))
    knee = ((seat[0] + pedal[0]) / 2 + side * 0.10, (seat[1] + pedal[1]) / 2)
    brush.limb(seat, knee, legs, 0.11)
    brush.limb(knee, pedal, legs, 0.09)
    shoulder = (side * 0.08, 0.82)
    brush.limb(seat, shoulder, upper, 0.2)
    brush.limb(shoulder, bars, upper, 0.07)
    brush.oval((shoulder[0] + side * 0.05, 0.93), 0.075, 0.09, skin)


def _cart(brush, colors, turn, side):
    """A small delivery cart with a cabin."""
    upper, _, stripe, thing = colors
    in_color, half = brush.image.ndim == 3, 0.575
    front, back = side * half, side * 0.08 * 2 * half
    brush.polygon([(-half, 0.16), (half, 0.16), (half, 0.55), (-half, 0.55)], thing)
    brush.polygon([(back, 0.55), (front, 0.55), (0.8 * front, 1), (back, 1)], upper)
    if in_color:
        brush.limb((-half, 0.36), (half, 0.36), stripe, 0.08)
    for x in (-0.6 * half, 0.6 * half):
        brush.oval((x, 0.14), 0.14, 0.14, (30, 30, 30) if in_color else thing)
        if in_color:
            spoke = (x + 0.1 * np.cos(turn), 0.14 - 0.1 * np.sin(turn))
            brush.limb((x, 0.14), spoke, (150, 150, 150), 2 / brush.unit)


def draw(image, scene: Scene, actor: Actor, t: int, value: int | None = None) -> None:
    """The actor in frame t: in its colours on a BGR image [H, W, 3], or as `value` on an index map [H, W]."""
    colors = actor.colors if value is None else [value] * 4
    x, y, scale = scene.project(actor.at(t))
    age, running = t - actor.first, actor.kind == "runner"
    if actor.kind == "thrown":
        brush = Brush(image, x, y, scale)
        lift = max(0.0, 1.5 + 0.34 * age - 0.022 * age * age)
        for k in (0.0, 1.6):
            angle = actor.phase + 0.9 * age + k
            right, up = 0.24 * np.cos(angle), 0.24 * np.sin(angle)
            brush.limb((-right, lift + up), (right, lift - up), colors[3], 0.3)
        return
    brush = Brush(image, x, y, actor.size * scale)
    side = 1 if scene.project(actor.at(t + 1))[0] >= x else -1
    distance = age * np.linalg.norm(actor.velocity)
    if value is None:
        ground = scene.background[min(HEIGHT - 1, max(0, int(y))), min(WIDTH - 1, max(0, int(x)))]
        brush.oval((0, 0.01), 0.22, 0.05, tuple(0.6 * float(v) for v in ground))  # contact shadow
    if actor.kind == "cyclist":
        _cyclist(brush, colors, actor.phase + distance * 2.2, side)
    elif actor.kind == "cart":
        _cart(brush, colors, actor.phase + distance * 2.5, side)
    else:
        stride = actor.phase + distance * (3.9 if running else 4.4) / max(actor.size, 1) * 1.7
        swing, bob = np.sin(stride) * (1.5 if running else 1.0), abs(np.cos(stride)) * (0.05 if running else 0.015)
        _person(brush, colors, swing, bob, side * (0.9 if running else 0.1), 1.5 if running else 0.75)


def _color(rng, low, high):
    """BGR between low and high, numbers or triples."""
    return tuple(int(v) for v in rng.integers(np.full(3, low), np.full(3, high)))


def make_actor(rng, scene: Scene, kind, first, frames, abnormal, way=None, progress=0.0) -> Actor:
    """An actor entering one of the scene's ways at frame `first`, already `progress` of the way along it."""
    a, b = np.array(scene.ways[int(rng.integers(len(scene.ways))) if way is None else way], float)
    if kind == "wrong way":
        a, b = b, a
    length = np.linalg.norm(b - a)
    d = (b - a) / length
    shift = np.array([-d[1], d[0]]) * rng.uniform(-0.9, 0.9)
    skin = _color(rng, (90, 120, 160), (160, 190, 230))
    colors = [_color(rng, 30, 235), _color(rng, 20, 110), skin, _color(rng, 20, 90)]
    if kind == "thrown":
        progress = rng.uniform(0.3, 0.45)
        colors[3] = _color(rng, (0, 60, 190), (60, 160, 250))
        speed, size = rng.uniform(3.0, 4.0) / FPS, 0.4
        last = first + 18
    else:
        if kind == "cart":
            cabin, stripe = _color(rng, 150, 230), _color(rng, 170, 250)
            colors = [cabin, colors[1], stripe, tuple(int(v) for v in rng.permutation([40, 90, 200]))]
        speed = rng.uniform(*SPEED[kind]) / FPS
        sizes = {"cart": rng.uniform(1.75, 2.0), "cyclist": rng.uniform(1.65, 1.85), "person": rng.uniform(1.5, 1.9)}
        size = sizes.get(kind, sizes["person"])
        last = first + int(length * (1 - progress) / speed)
    start = a + (b - a) * progress + shift
    return Actor(kind, start, d * speed, first, min(frames, last), size, colors, rng.uniform(0, 6), abnormal)


def cast(rng, scene: Scene, frames: int, events) -> list[Actor]:
    """All actors of one video: normal ones arrive at random, abnormal ones as listed in `events`, [(kind, frame)]."""
    actors = []
    walk = 16 / 1.2 * FPS  # frames: about 16 m at 1.2 m/s
    arrivals = rng.uniform(0.5, 1.5) * scene.settings["crowd"] / walk  # per frame
    for t in range(frames):
        for _ in range(rng.poisson(arrivals) if t else int(rng.integers(1, scene.settings["crowd"]))):
            kind = "cyclist" if rng.random() < scene.settings["cyclists"] else "walker"
            leader = make_actor(rng, scene, kind, t, frames, False, progress=0.0 if t else rng.uniform(0, 0.8))
            actors.append(leader)
            for _ in range(int(rng.integers(0, 3)) if kind == "walker" and rng.random() < 0.4 else 0):  # company
                friend = make_actor(rng, scene, kind, t, frames, False)
                friend.start, friend.velocity = leader.start + rng.uniform(-1.3, 1.3, 2), leader.velocity
                friend.last = leader.last
                actors.append(friend)
    for kind, first in events:
        actors.append(make_actor(rng, scene, kind, first, frames, True, progress=0.0 if kind == "thrown" else 0.12))
    return actors


def visible_abnormal(scene: Scene, actors: list[Actor], t: int) -> list[tuple[Actor, np.ndarray]]:
    """[(abnormal actor, bool [H, W] of its pixels)] of those with at least 40 pixels. actors: the farthest first."""
    index_map = np.zeros((HEIGHT, WIDTH), np.uint8)
    for i, actor in enumerate(actors, 1):
        draw(index_map, scene, actor, t, i)
    pixels = [(actor, index_map == i) for i, actor in enumerate(actors, 1) if actor.abnormal]
    return [(actor, mask) for actor, mask in pixels if mask.sum() >= 40]


def render(job: tuple[str, int, str, Path]) -> tuple[str, list]:
    """Write one video, and for test videos labels, masks, tracks. job: scene, number, split, path; it decides all.

    -> (name of the video, [(kind of event, first frame, end)]). Raises UserError where OpenCV cannot write it.
    """
    name, index, split, path = job
    scene = Scene(name)
    rng = np.random.default_rng([VERSION, zlib.crc32(f"{name}/{split}/{index}".encode())])
    frames = TRAIN_FRAMES if split == "train" else TEST_FRAMES
    actors = cast(rng, scene, frames, EVENTS[name][index] if split == "test" else [])
    grain = [rng.normal(0, 2.6, (HEIGHT + 16, WIDTH + 16, 3)).astype(np.float32) for _ in range(6)]
    light, period, gain = rng.uniform([0, 80, 0], [6, 160, 6])
    tint = rng.uniform(0.97, 1.03, 3).astype(np.float32)
    masks, tracks = np.zeros((frames, HEIGHT, WIDTH), bool), []
    with io.atomic_write(path) as tmp:
        writer = cv2.VideoWriter(io.opencv_path(tmp), cv2.VideoWriter_fourcc(*"MJPG"), FPS, (WIDTH, HEIGHT))
        writer.set(cv2.VIDEOWRITER_PROP_QUALITY, 90)
        if not writer.isOpened():
            raise io.UserError(f"{path} cannot be written: this OpenCV has no MJPG encoder, or the folder refuses it")
        for t in range(frames):
            image = scene.background.copy()
            present = sorted((a for a in actors if a.first <= t < a.last), key=lambda a: -a.at(t)[1])
            for actor in present:
                draw(image, scene, actor, t)
            for actor, mask in visible_abnormal(scene, present, t):
                masks[t] |= mask
                ys, xs = np.nonzero(mask)
                tracks.append((actors.index(actor), t, xs.min(), ys.min(), xs.max(), ys.max()))
            image *= tint * (1 + 0.05 * np.sin(light + 2 * np.pi * t / period))
            dy, dx = rng.integers(0, 16, 2)
            noise = grain[int(rng.integers(6))][dy : dy + HEIGHT, dx : dx + WIDTH]
            image += (1 + 0.7 * np.sin(gain + 4 * t / period)) * noise  # a camera's automatic gain
            writer.write(np.clip(cv2.GaussianBlur(image, (3, 3), 0.6), 0, 255).astype(np.uint8))
            tick()
        writer.release()
    if split == "test":
        root = path.parent.parent
        io.stream_npy(root / "labels" / f"{path.stem}.npy", [masks.any((1, 2)).astype(np.uint8)])
        with io.atomic_write(root / "masks" / f"{path.stem}.npz") as tmp:
            np.savez_compressed(tmp, masks=masks)
        with io.atomic_write(root / "tracks" / f"{path.stem}.csv") as tmp:
            tmp.write_text("# id,frame,x1,y1,x2,y2\n" + "".join(",".join(map(str, row)) + "\n" for row in tracks))
    frames_of = {i: [t for track, t, *_ in tracks if track == i] for i in range(len(actors))}
    return path.stem, [(actors[i].kind, min(f), max(f) + 1) for i, f in frames_of.items() if f]


def read_dataset(name: str, data_root: Path) -> Dataset:
    """Made first where it is missing. Raises UserError."""
    return folder.read_dataset(name, ensure_demo(data_root / "demo"))


def ensure_demo(root) -> Path:
    """Generate the dataset at `root` unless it is there. -> root. Raises UserError where `root` holds other files."""
    root = Path(root)
    marker, unfinished = root / "demo.json", root / "unfinished"
    if marker.exists() and io.read_json(marker, "demo marker").get("version") == VERSION:
        return root
    if root.exists() and any(root.iterdir()) and not marker.exists() and not unfinished.exists():
        raise io.UserError(f"{root} holds other files: move them away, or choose another --data-root for the demo")
    io.writable_folder(root)
    unfinished.touch()
    indexes = [("train", i) for i in range(TRAIN)] + [("test", i) for i in range(TEST)]
    jobs = [(name, i, split, root / split / f"{name}_{i + 1:02d}.avi") for name in SCENES for split, i in indexes]
    total = len(SCENES) * (TRAIN * TRAIN_FRAMES + TEST * TEST_FRAMES)
    print(f"generating the demo dataset in {root}", flush=True)
    results, errors = map_videos(render, jobs, workers=cores(), total=total, label="demo")
    if errors:
        raise io.UserError(errors[0][1])
    with io.writing_table(root / "events.csv") as table:
        table.writerow(["video", "event", "start", "end"])
        for stem, spans in results:
            table.writerows((stem, *span) for span in spans)
    io.write_json(marker, {"version": VERSION, "scenes": list(SCENES), "fps": FPS})
    unfinished.unlink(missing_ok=True)  # two first runs at once
    return root
