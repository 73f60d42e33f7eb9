"""Optical flow between consecutive frames, in pixels: OpenCV's DIS on the CPU, torchvision's RAFT on the device."""
import cv2
import numpy as np

from common.files import UserError

METHODS = ("dis", "dis-fast", "dis-fine", "raft-small", "raft-large")


def gray(frame):
    """uint8 [H, W, C] -> uint8 [H, W]."""
    return frame[:, :, 0] if frame.shape[2] == 1 else cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)


def uses_device(method):
    return method.startswith("raft")


def make_flow(method="dis", device="cpu"):
    """-> function(pairs) of a list of (previous, next) uint8 [H, W, C] giving a list of float32 [H, W, 2]."""
    if method not in METHODS:
        raise UserError(f"--flow {method} is not known; choose one of {', '.join(METHODS)}")
    return _raft(method, device) if uses_device(method) else _dis(method)


def _dis(method):
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST if method == "dis-fast"
                                    else cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    if method == "dis-fine":  # down to full resolution instead of half: for objects of a few dozen pixels
        dis.setFinestScale(0)

    def one(a, b):
        if min(a.shape[:2]) < 16:  # below DIS's patch pyramid
            return np.zeros((*a.shape[:2], 2), np.float32)
        return dis.calc(np.ascontiguousarray(gray(a)), np.ascontiguousarray(gray(b)), None)

    return lambda pairs: [one(a, b) for a, b in pairs]


def _raft(method, device):
    import torch
    import torch.nn.functional as F
    from torchvision.models import optical_flow
    small = method == "raft-small"
    weights = (optical_flow.Raft_Small_Weights if small else optical_flow.Raft_Large_Weights).DEFAULT
    try:
        net = (optical_flow.raft_small if small else optical_flow.raft_large)(weights=weights)
    except OSError as e:
        raise UserError(f"--flow {method}: its weights could not be downloaded ({e}); fetch {weights.url} where there "
                        "is a network, put it into ~/.cache/torch/hub/checkpoints, or use --flow dis") from None
    net = net.to(device).eval()

    @torch.inference_mode()
    def run(pairs):
        out = []
        for i in range(0, len(pairs), 8):
            part = pairs[i:i + 8]
            h, w = part[0][0].shape[:2]
            a, b = (torch.from_numpy(np.stack([p[k] for p in part])).to(device) for k in (0, 1))
            both = torch.cat([a, b]).permute(0, 3, 1, 2).flip(1).float() / 127.5 - 1  # BGR -> RGB, [-1, 1]
            both = both.expand(-1, 3, -1, -1)
            bottom, right = max(0, 128 - h, -h % 8), max(0, 128 - w, -w % 8)  # RAFT wants multiples of 8, at least 128
            bottom, right = bottom + (-(h + bottom)) % 8, right + (-(w + right)) % 8
            both = F.pad(both, (0, right, 0, bottom), mode="replicate")
            flow = net(*both.chunk(2))[-1][:, :, :h, :w]
            out += list(flow.permute(0, 2, 3, 1).float().cpu().numpy())
        return out

    return run
