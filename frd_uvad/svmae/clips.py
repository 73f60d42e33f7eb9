"""Clips of unlabeled videos for pre-training: read from the frame cache, cropped on the device, with their depth."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.cache import VideoFiles
from common.io import UserError, first_line, load_array
from common.loader import take_rows
from common.readers.pictures import read_image, resize

DEPTH_SIZE = 256  # side of MiDaS's input, px
DEPTH_MEAN, DEPTH_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of its RGB input
WHOLE_FRAME = np.array([[0, 0, 1, 1]], np.float32)


class Clips:
    """Clips of `frames` frames, `stride` apart, of videos decoded at one size.

    arrays: uint8 [T_i, H, W, C] memory maps, grey or BGR; depth: Depth. A video gives T / (frames · stride) clips per
    epoch, at least one, from random places; a video shorter than a clip repeats its last frame.
    A sample is (video, first frame).
    """

    def __init__(self, arrays: list, depth: "Depth", frames: int, stride: int, run):
        self.arrays, self.depth = arrays, depth
        self.frames, self.run = frames, run
        self.lengths = np.array([len(a) for a in arrays])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.size = arrays[0].shape[1:3]
        self.channels = max(a.shape[3] for a in arrays)
        self.offsets = stride * np.arange(frames)
        self.video = np.repeat(np.arange(len(arrays)), np.maximum(1, self.lengths // (frames * stride)))

    def __len__(self):
        return len(self.video)

    def epoch_samples(self, seed: int, epoch: int) -> np.ndarray:
        """(video, first frame) of every clip in the order of this epoch: int64 [n, 2]."""
        rng = np.random.default_rng([seed, epoch])
        places = np.maximum(1, self.lengths[self.video] - self.offsets[-1])
        first = (rng.random(len(self)) * places).astype(np.int64)
        return np.stack([self.video, first], axis=1)[rng.permutation(len(self))]

    def read(self, samples: np.ndarray):
        """Samples int [n, 2] -> uint8 [n, frames, H, W, C] and nearness uint8 [n, H, W], in pinned memory for a GPU."""
        video, first = samples[:, 0], samples[:, 1]
        numbers = np.minimum(first[:, None] + self.offsets, self.lengths[video][:, None] - 1)
        rows = (self.starts[video][:, None] + numbers).reshape(-1)
        frames = take_rows(self.arrays, self.starts, rows, (*self.size, self.channels), np.uint8)
        near = np.stack([self.depth.map(v, t) for v, t in zip(video, numbers[:, self.frames // 2])])
        shape = len(samples), self.frames, *self.size, self.channels
        return self.run.pin(frames.reshape(shape)), self.run.pin(near)

    def to_device(self, arrays) -> tuple[torch.Tensor, torch.Tensor]:
        frames, near = arrays
        return frames.to(self.run.device, non_blocking=True), near.to(self.run.device, non_blocking=True)


class Depth:
    """Nearness of every pixel, 0 (far) to 255 (near), at the size of the cached frames.

    source: `perspective`, a ramp by image row (the ground that a surveillance camera sees is nearer further down); a
    folder with <video>.npy ([h, w] or [T, h, w], larger is nearer, any unit) or <video>.png; or `midas`, which is asked
    once, through torch.hub, about the middle frame of every video (the camera stands still), and kept in `folder`.
    Raises UserError for maps that are missing or do not fit.
    """

    def __init__(self, source, videos, arrays, folder, device):
        h, w = arrays[0].shape[1:3]
        self.size, self.maps = (h, w), None
        self.ramp = np.repeat(np.round(255 * np.arange(h) / max(1, h - 1)).astype(np.uint8)[:, None], w, axis=1)
        if source == "perspective":
            return
        if source == "midas":
            files = estimate_depth(videos, arrays, Path(folder) / "midas", device)
            paths = [files.path(v) for v in videos]
        else:
            paths = [depth_file(Path(source), v) for v in videos]
        self.maps = [self.load(path, len(a)) for path, a in zip(paths, arrays)]

    def load(self, path: Path, frames: int) -> np.ndarray:
        """uint8 [1 or frames, H, W]"""
        if path.suffix == ".npy":
            x = load_array(path, "depth map", mmap=True)
        else:
            x = read_image(path)
            if x is None:
                raise UserError(f"depth map {path} cannot be read")
            x = x if x.ndim == 2 else x[:, :, 0]
        x = x[None] if x.ndim == 2 else x
        is_map = x.ndim == 3 and len(x) in (1, frames) and x.size and x.dtype.kind in "biuf"
        if not is_map or not np.isfinite(x).all():
            shapes = f"[h, w] or [{frames}, h, w]"
            raise UserError(f"depth map {path}: expected finite numbers, {shapes}, got shape {x.shape}")
        low, high = float(x.min()), float(x.max())
        scaled = (np.round(255 * (m.astype(np.float32) - low) / max(high - low, 1e-9)).astype(np.uint8) for m in x)
        return np.stack([resize(m[:, :, None], self.size)[:, :, 0] for m in scaled])

    def map(self, video: int, frame: int) -> np.ndarray:
        """uint8 [H, W] at a frame of the video with this number."""
        if self.maps is None:
            return self.ramp
        maps = self.maps[video]
        return maps[frame if len(maps) > 1 else 0]


def depth_file(folder: Path, video) -> Path:
    """The file with a video's depth, in a folder for its split if a training and a test video have the same name."""
    places = [
        place / f"{video.name}{suffix}" for place in (folder / video.split, folder) for suffix in (".npy", ".png")
    ]
    path = next((p for p in places if p.exists()), None)
    if path is None:
        raise UserError(f"--depth {folder}: there is no {video.name}.npy or .png for the video {video.name}")
    return path


def estimate_depth(videos, arrays, folder: Path, device) -> VideoFiles:
    """Write MiDaS's inverse depth [1, h, w] of every video's middle frame into `folder`. Raises UserError."""
    files = VideoFiles(folder)
    missing = [(v, a) for v, a in zip(videos, arrays) if files.info(v) is None]
    if not missing:
        return files
    try:
        net = torch.hub.load("intel-isl/MiDaS", "MiDaS_small", trust_repo=True).eval().to(device)
    except Exception as e:  # the hub and the network raise many kinds
        raise UserError(
            f"--depth midas could not be loaded from torch.hub ({first_line(e)}); where there is no network use "
            "--depth perspective, or a folder of maps made elsewhere"
        ) from None
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (DEPTH_MEAN, DEPTH_STD))
    for video, array in tqdm(missing, desc="depth by MiDaS", unit="video", dynamic_ncols=True):
        x = torch.from_numpy(np.array(array[len(array) // 2])).to(device).permute(2, 0, 1)[None].float() / 255
        x = torch.nn.functional.interpolate(x.expand(-1, 3, -1, -1).flip(1), (DEPTH_SIZE,) * 2, mode="bilinear")
        with torch.inference_mode():
            near = net((x - mean) / std)[0].float().cpu().numpy()
        files.write(video, iter([near[None]]), lambda shape: {})
    return files


def random_crops(n: int, size: tuple, rng, area=(0.5, 1.0), aspect=(3 / 4, 4 / 3)) -> np.ndarray:
    """Crops as in torchvision's RandomResizedCrop, half of them mirrored. size: height and width of the frames.

    -> float32 [n, 4]: centre (x, y) and half extent (x, y), in -1..1 of the frame; a negative one in x mirrors.
    """
    h, w = size
    ratio = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1]), n))
    pixels = rng.uniform(*area, n) * h * w
    width = np.minimum(1.0, np.sqrt(pixels * ratio) / w)
    height = np.minimum(1.0, np.sqrt(pixels / ratio) / h)
    x, y = (rng.uniform(-1, 1, n) * (1 - extent) for extent in (width, height))
    mirror = rng.choice([-1.0, 1.0], n)
    return np.stack([x, y, width * mirror, height], axis=1).astype(np.float32)


def crop_clips(frames: torch.Tensor, near: torch.Tensor, crops: torch.Tensor, size: int):
    """Crops of clips, resized on the device, where they all lie.

    frames uint8 [n, T, H, W, C] BGR or grey, near uint8 [n, H, W], crops float32 [n, 4]: see random_crops()
    -> RGB float32 [n, 3, T, size, size] and nearness [n, size, size], both in [0, 1].
    """
    n, t, h, w, c = frames.shape
    theta = torch.zeros(n, 2, 3, device=frames.device)
    theta[:, 0, 0] = crops[:, 2]
    theta[:, 1, 1] = crops[:, 3]
    theta[:, :, 2] = crops[:, :2]
    grid = torch.nn.functional.affine_grid(theta, (n, 1, size, size), align_corners=False)
    x = frames.permute(0, 1, 4, 2, 3).reshape(n, t * c, h, w)
    x = torch.cat([x, near[:, None]], dim=1).float() / 255
    x = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    clips = x[:, :-1].view(n, t, c, size, size).transpose(1, 2)
    clips = clips.flip(1) if c == 3 else clips.expand(-1, 3, -1, -1, -1)
    return clips.contiguous(), x[:, -1]
