"""Clips of unlabeled videos for pre-training: read from the frame cache, cropped and flipped on the device, with their depth."""

import numpy as np
from tqdm import tqdm

from common.cache import VideoFiles
from common.io import UserError, first_line, load_array
from common.late import torch
from common.loader import prefetch, take_rows
from common.pictures import read_image, resize

DEPTHS = "perspective, a folder of maps, or midas"


class Clips:
    """Clips of `frames` frames, `stride` apart, of videos decoded at one size.

    arrays: uint8 [T_i, H, W, C] memory maps, grey or BGR; depth: Depth. A video gives T / (frames · stride) clips per epoch, at
    least one, from random places; a shorter one repeats its last frame. `waited` sums what iterate()'s consumer waited.
    """

    def __init__(self, arrays, depth, frames, stride, device):
        self.arrays, self.depth, self.frames, self.device, self.waited = (
            arrays,
            depth,
            frames,
            torch.device(device),
            0.0,
        )
        self.length = np.array([len(a) for a in arrays])
        self.starts = np.concatenate([[0], np.cumsum(self.length)])
        self.size, self.channels = arrays[0].shape[1:3], max(a.shape[3] for a in arrays)
        self.steps = stride * np.arange(frames)
        self.video = np.repeat(np.arange(len(arrays)), np.maximum(1, self.length // (frames * stride)))

    def __len__(self):
        return len(self.video)

    def epoch(self, seed, epoch):
        """(video, first frame) of every clip in this epoch's order: int64 [n, 2]."""
        rng = np.random.default_rng([seed, epoch])
        room = np.maximum(1, self.length[self.video] - self.steps[-1])
        first = (rng.random(len(self)) * room).astype(np.int64)
        return np.stack([self.video, first], axis=1)[rng.permutation(len(self))]

    def read(self, samples):
        """-> uint8 [n, frames, H, W, C] and nearness uint8 [n, H, W] of samples int [n, 2]."""
        video, first = samples[:, 0], samples[:, 1]
        inside = np.minimum(first[:, None] + self.steps, self.length[video][:, None] - 1)
        rows = (self.starts[video][:, None] + inside).reshape(-1)
        frames = take_rows(self.arrays, self.starts, rows, (*self.size, self.channels), np.uint8)
        near = np.stack([self.depth.map(v, t) for v, t in zip(video, inside[:, self.frames // 2])])
        return frames.reshape(len(samples), self.frames, *self.size, self.channels), near

    def to_device(self, read):
        tensors = [torch.from_numpy(x) for x in read]
        if self.device.type == "cuda":
            return [x.pin_memory().to(self.device, non_blocking=True) for x in tensors]
        return tensors

    def iterate(self, parts):
        """Yield (samples, frames, nearness) of each of `parts`; the next part is read meanwhile."""
        for samples, read, waited in prefetch(parts, self.read):
            self.waited += waited
            yield samples, *self.to_device(read)


class Depth:
    """Nearness of every pixel, 0 (far) to 255 (near), at the size of the cached frames.

    source: `perspective`, a ramp by image row (the ground of a surveillance camera is nearer further down); a folder with
    <video>.npy ([h, w] or [T, h, w], larger is nearer, any unit) or <video>.png; or `midas`, run once on the middle frame of every
    video by torch.hub (a camera that stands still) and kept in `folder`.
    """

    def __init__(self, source, videos, arrays, folder, device):
        h, w = arrays[0].shape[1:3]
        self.size, self.maps = (h, w), None
        self.ramp = np.repeat(np.round(255 * np.arange(h) / max(1, h - 1)).astype(np.uint8)[:, None], w, axis=1)
        if source == "perspective":
            return
        made = midas(videos, arrays, folder / "midas", device) if source == "midas" else None
        self.maps = [self.load(made.path(v) if made else given(source, v), len(a)) for v, a in zip(videos, arrays)]

    def load(self, path, frames):
        if path.suffix == ".npy":
            x = load_array(path, "depth map", mmap=True)
        else:
            x = read_image(path)
            if x is None:
                raise UserError(f"depth map {path} cannot be read")
            x = x if x.ndim == 2 else x[:, :, 0]
        if x.ndim == 2:
            x = x[None]
        if (
            x.ndim != 3
            or len(x) not in (1, frames)
            or not x.size
            or x.dtype.kind not in "biuf"
            or not np.isfinite(x).all()
        ):
            raise UserError(
                f"depth map {path}: expected finite numbers, [h, w] or [{frames}, h, w], got shape {x.shape}"
            )
        low, high = float(x.min()), float(x.max())
        scaled = (np.round(255 * (m.astype(np.float32) - low) / max(high - low, 1e-9)).astype(np.uint8) for m in x)
        return np.stack([resize(m[:, :, None], self.size)[:, :, 0] for m in scaled])

    def map(self, video, frame):
        """uint8 [H, W] at a frame of the video with this number."""
        if self.maps is None:
            return self.ramp
        own = self.maps[video]
        return own[frame if len(own) > 1 else 0]


def given(folder, video):
    """The file of a video's depth in a folder of maps made elsewhere; by split where a training and a test video have one name."""
    places = (folder / video.split, folder)
    path = next(
        (p for p in (place / f"{video.name}{s}" for place in places for s in (".npy", ".png")) if p.exists()), None
    )
    if path is None:
        raise UserError(f"--depth {folder}: there is no {video.name}.npy or .png for the video {video.name}")
    return path


def midas(videos, arrays, folder, device):
    """Write MiDaS's inverse depth [1, h, w] of every video's middle frame into `folder`. -> its common.cache.VideoFiles"""
    files = VideoFiles(folder)
    missing = [(v, a) for v, a in zip(videos, arrays) if files.info(v) is None]
    if not missing:
        return files
    try:
        net = torch.hub.load("intel-isl/MiDaS", "MiDaS_small", trust_repo=True).eval().to(device)
    except Exception as e:  # the hub and the network raise many kinds
        raise UserError(
            f"--depth midas could not be loaded from torch.hub ({first_line(e)}); where there is no network use --depth "
            "perspective, or a folder of maps made elsewhere"
        ) from None
    for video, array in tqdm(missing, desc="depth by MiDaS", unit="video", dynamic_ncols=True):
        x = torch.from_numpy(np.array(array[len(array) // 2])).to(device).permute(2, 0, 1)[None].float() / 255
        x = torch.nn.functional.interpolate(x.expand(-1, 3, -1, -1).flip(1), (256, 256), mode="bilinear")
        mean, std = (
            torch.tensor(v, device=device).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        with torch.inference_mode():
            near = net((x - mean) / std)[0].float().cpu().numpy()
        files.write(video, iter([near[None]]), lambda shape: {})
    return files


def random_crops(n, size, rng, area=(0.5, 1.0), aspect=(3 / 4, 4 / 3)):
    """Crops as in torchvision's RandomResizedCrop, and mirror images for half of them.

    -> float32 [n, 4]: centre (x, y) and half extent (x, y), all in -1..1 of the frame, the latter negative in x where mirrored.
    """
    h, w = size
    ratio = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1]), n))
    whole = rng.uniform(*area, n) * h * w
    width, height = np.minimum(1.0, np.sqrt(whole * ratio) / w), np.minimum(1.0, np.sqrt(whole / ratio) / h)
    x, y = (rng.uniform(-1, 1, n) * (1 - s) for s in (width, height))
    mirror = rng.choice([-1.0, 1.0], n)
    return np.stack([x, y, width * mirror, height], axis=1).astype(np.float32)


WHOLE = np.array([[0, 0, 1, 1]], np.float32)


def cut(frames, near, crops, size):
    """Crops of clips, resized on the device.

    frames uint8 [n, T, H, W, C] BGR or grey, near uint8 [n, H, W], crops float32 [n, 4] -> RGB float32 [n, 3, T, size, size] and
    nearness [n, size, size], both in [0, 1].
    """
    n, t, h, w, c = frames.shape
    crops = torch.from_numpy(crops).to(frames.device)
    theta = torch.zeros(n, 2, 3, device=frames.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = crops[:, 2], crops[:, 3], crops[:, :2]
    grid = torch.nn.functional.affine_grid(theta, (n, 1, size, size), align_corners=False)
    x = frames.permute(0, 1, 4, 2, 3).reshape(n, t * c, h, w)
    x = torch.cat([x, near[:, None]], dim=1).float() / 255
    x = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    clips = x[:, :-1].view(n, t, c, size, size).transpose(1, 2)
    clips = clips.flip(1) if c == 3 else clips.expand(-1, 3, -1, -1, -1)
    return clips.contiguous(), x[:, -1]
