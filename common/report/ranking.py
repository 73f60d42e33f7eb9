"""For footage without labels: the most abnormal moments as ranking.csv, thumbnails and one contact sheet."""

import cv2
import numpy as np

from common.container import Clock
from common.io import writing_table
from common.pictures import as_channels, write_image
from common.report.plots import contact_sheet, heat
from common.video import select_frames


def moments(smoothed, *, top=20, share=0.5, gap=25):
    """The highest peaks of smoothed scores {video: [T]} -> [(video, first, last, peak frame, peak score)], highest first.

    A moment reaches as far around its peak as the score stays above `share` of the way from the median over all videos to
    the peak; after it, `gap` frames around it are taken by no other moment.
    """
    if not smoothed or top < 1:
        return []
    left = {k: np.where(np.isfinite(s), s, -np.inf).astype(np.float64) for k, s in smoothed.items() if len(s)}
    everything = np.concatenate(list(left.values())) if left else np.zeros(0)
    finite = everything[np.isfinite(everything)]
    if not len(finite):
        return []
    middle, out = float(np.median(finite)), []
    while len(out) < top:
        video = max(left, key=lambda k: left[k].max())
        s = left[video]
        t = int(np.argmax(s))
        if not np.isfinite(s[t]) or (s[t] <= middle and out):
            break
        limit = middle + share * (s[t] - middle)
        first, last = t, t
        while first > 0 and s[first - 1] >= limit:
            first -= 1
        while last + 1 < len(s) and s[last + 1] >= limit:
            last += 1
        out.append((video, first, last, t, float(s[t])))
        s[max(0, first - gap) : last + gap + 1] = -np.inf
    return out


def picture(frame, boxes, span, width=480):
    """uint8 [h, width, 3] with boxes [n, 6] (frame, x1, y1, x2, y2, score) from green at span[0] to red at span[1], the highest thick."""
    image = as_channels(frame, 3)
    scale = width / image.shape[1]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.resize(image, (width, max(1, round(image.shape[0] * scale))), interpolation=way)
    for i, (_, x1, y1, x2, y2, s) in enumerate(boxes[np.argsort(boxes[:, 5])]):
        cv2.rectangle(
            image,
            (int(x1 * scale), int(y1 * scale)),
            (int((x2 + 1) * scale), int((y2 + 1) * scale)),
            heat((s - span[0]) / max(1e-12, span[1] - span[0])),
            3 if i == len(boxes) - 1 else 1,
            cv2.LINE_AA,
        )
    return image


def boxes_at(detections, name, t):
    """The boxes of one frame, [n, 6]; none where nothing was detected."""
    if not detections or detections.get(name) is None:
        return np.zeros((0, 6), np.float32)
    return detections[name][detections[name][:, 0] == t]


def write_ranking(smoothed, out, *, pictures=None, detections=None, span=(0.0, 1.0), top=20, sheet=12):
    """ranking.csv and, with pictures(video name) -> (frames, Clock), thumbnails/ and contact_sheet.png in `out`; the first moments on
    the terminal. smoothed {video: [T]}; detections {video: [n, 6]}, coloured over `span`. -> the moments."""
    found, images, clocks = moments(smoothed, top=top), {}, {}
    for name in {m[0] for m in found} if pictures else ():
        frames, clocks[name] = pictures(name)
        for t, frame in select_frames(frames, {m[3] for m in found if m[0] == name}) if frames is not None else ():
            images[name, t] = picture(frame, boxes_at(detections, name, t), span)
    tiles = []
    with writing_table(out / "ranking.csv") as table:
        table.writerow(
            [
                "rank",
                "video",
                "start_frame",
                "end_frame",
                "start_seconds",
                "end_seconds",
                "peak_frame",
                "score",
                "thumbnail",
            ]
        )
        for rank, (name, first, last, t, score) in enumerate(found, 1):
            thumbnail, clock = "", clocks.get(name, Clock())
            if (name, t) in images:
                thumbnail, seconds = f"thumbnails/{rank:02d}.jpg", f"  {clock.text(t, 1)} s" if clock.text(t, 1) else ""
                write_image(out / thumbnail, images[name, t])
                tiles.append((images[name, t], f"{rank}. {name}  frame {t}{seconds}  score {score:.3g}"))
            table.writerow(
                [rank, name, first, last, clock.text(first, 2), clock.text(last, 2), t, f"{score:.6g}", thumbnail]
            )
    contact_sheet(out / "contact_sheet.png", tiles[:sheet])
    print("most abnormal moments:")
    for rank, (name, first, last, _, score) in enumerate(found[:5], 1):
        since, until = (clocks.get(name, Clock()).text(t, 1) for t in (first, last))
        when = f", {since}..{until} s" if since else ""
        print(f"  {rank:2d}. {score:9.4g}  {name}, frames {first}..{last}{when}")
    print(f"wrote {out}/ranking.csv" + (", thumbnails/, contact_sheet.png" if tiles else ""))
    return found
