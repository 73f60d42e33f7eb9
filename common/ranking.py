"""For footage without labels: the most abnormal moments as ranking.csv, thumbnails and one contact sheet."""
import csv

import cv2
import numpy as np

from common.files import replacing
from common.plots import contact_sheet, heat, write_image
from common.video import as_channels


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
        s[max(0, first - gap):last + gap + 1] = -np.inf
    return out


def picture(frames, t, boxes, red, width=480):
    """Frame t as uint8 [h, width, 3], its boxes [n, 6] coloured by score, the highest one thick."""
    image = as_channels(frames[t], 3)
    scale = width / image.shape[1]
    image = cv2.resize(image, (width, max(1, round(image.shape[0] * scale))), interpolation=cv2.INTER_AREA)
    now = boxes[boxes[:, 0] == t]
    for i, (_, x1, y1, x2, y2, s) in enumerate(now[np.argsort(now[:, 5])]):
        cv2.rectangle(image, (int(x1 * scale), int(y1 * scale)), (int((x2 + 1) * scale), int((y2 + 1) * scale)),
                      heat(s / red), 3 if i == len(now) - 1 else 1, cv2.LINE_AA)
    return image


def write_ranking(ready, videos, smoothed, detections, red, out, *, top=20, sheet=12):
    """ranking.csv, thumbnails/ and contact_sheet.png in `out`; the first moments on the terminal. -> the moments."""
    by_name, found, tiles = {v.name: v for v in videos}, moments(smoothed, top=top), []
    with replacing(out / "ranking.csv") as tmp, open(tmp, "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["rank", "video", "start_frame", "end_frame", "start_seconds", "end_seconds", "peak_frame", "score",
                        "thumbnail"])
        for rank, (name, first, last, t, score) in enumerate(found, 1):
            video = by_name[name]
            fps, frames = ready.cache.info(video)["fps"], ready.cache.frames(video)
            image = picture(frames, t, detections[name], red)
            thumbnail = out / "thumbnails" / f"{rank:02d}.jpg"
            write_image(thumbnail, image)
            table.writerow([rank, name, first, last, *(f"{x / fps:.2f}" if fps else "" for x in (first, last)), t, f"{score:.4f}",
                            thumbnail.relative_to(out)])
            if rank <= sheet:
                tiles.append((image, f"{rank}. {name}  frame {t}" + (f"  {t / fps:.1f} s" if fps else "") + f"  score {score:.2f}"))
    contact_sheet(out / "contact_sheet.png", tiles)
    print(f"\nmost abnormal moments ({len(found)}):")
    for rank, (name, first, last, _, score) in enumerate(found[:10], 1):
        fps = ready.cache.info(by_name[name])["fps"]
        when = f", {first / fps:.1f}..{last / fps:.1f} s" if fps else ""
        print(f"  {rank:2d}. {score:8.3f}  {name}, frames {first}..{last}{when}")
    print(f"wrote {out}/ranking.csv, thumbnails/" + (", contact_sheet.png" if tiles else ""))
    return found
