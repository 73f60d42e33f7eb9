"""Peak memory of every script on N videos and on four times as many: they must differ by less than a tenth. Not part of
the suite.

python tests/tools/scale.py --videos 6                    # all scripts
python tests/tools/scale.py --videos 6 --only hf2vad spr_uvad/train.py
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from tests.helpers import save_video, walkers
from tests.tools.faults import command_of, jobs, start

FRAMES, SIZE = 100, (240, 320)


def dataset(root, videos):
    """`videos` training and as many test videos with labels; half of the training videos are abnormal bags."""
    for i in range(videos):
        save_video(root / "train" / f"a{i}.avi", walkers(FRAMES, SIZE, seed=i))
        save_video(root / "test" / f"b{i}.avi", walkers(FRAMES, SIZE, speed=4, seed=100 + i))
        (root / "labels").mkdir(exist_ok=True)
        np.save(root / "labels" / f"b{i}.npy", (np.arange(FRAMES) >= FRAMES // 2).astype(np.uint8))
    (root / "normal.txt").write_text("".join(f"a{i}\n" for i in range(0, videos, 2)))
    (root / "abnormal.txt").write_text("".join(f"a{i}\n" for i in range(1, videos, 2)))
    return root


def peak(name, flags, place):
    """-> largest resident memory of the script or of a process that it started, MiB; seconds."""
    place.mkdir(parents=True)
    began = time.perf_counter()
    with open(place / "log.txt", "w") as log:
        _, status, used = os.wait4(start(command_of(name, flags, place), log).pid, 0)
    if status != 0:
        raise SystemExit(f"{name} failed:\n{(place / 'log.txt').read_text()[-3000:]}")
    return used.ru_maxrss / 1024, time.perf_counter() - began


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=6, help="N, training and test videos each (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=None, help="methods, or scripts of theirs (those that they need run too)"
    )
    args = parser.parse_args(argv)
    base, grown = Path(tempfile.mkdtemp(prefix="scale ")), []
    found = {}
    for n in (args.videos, 4 * args.videos):
        place = base / str(n)
        for name, flags in jobs(place, dataset(place / "data", n)).items():
            if args.only and not any(
                name.rsplit("/", 1)[0] == x.rsplit("/", 1)[0] if x.endswith(".py") else name.startswith(x + "/")
                for x in args.only
            ):
                continue
            found.setdefault(name, []).append(peak(name, flags, place / "whole" / name.replace("/", "_")))
            if len(found[name]) == 2:
                (a, s), (b, t) = found[name]
                print(
                    f"{name:<34} {a:6.0f} MiB in {s:4.0f} s, {b:6.0f} MiB in {t:4.0f} s: {100 * (b / a - 1):+.1f} %",
                    flush=True,
                )
                grown += [name] if b > 1.1 * a else []
    if grown:
        raise SystemExit(f"memory grows with the number of videos: {', '.join(grown)}; see {base}")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
