"""Arrange the videos of UCF-Crime (Sultani et al., CVPR 2018) as --dataset folder reads them, by links.

python tests/tools/ucf_crime.py --source UCF_Crimes --out data/ucf-crime

--source: where the archives were unpacked, in any folders, together with the temporal annotations. The videos that
these name are tested; the others, or those of Anomaly_Train.txt if it is there, are trained on. labels.csv, and
normal.txt and abnormal.txt (which training videos are what, for SVMAE's detector) are written beside them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.io import UserError, atomic_write, read_text, run_script, writing_table
from common.readers.video import VIDEOS, open_video
from frd_uvad.features.labels import read_annotations


def build(source: Path, out: Path) -> tuple[int, int]:
    """-> numbers of training and test videos. Raises UserError."""
    files = sorted(p for p in source.rglob("*") if p.is_file())
    videos = {}
    for p in files:
        if p.suffix.lower() in VIDEOS:
            videos.setdefault(p.stem, p)  # Normal_Videos_event repeats some
    events = read_annotations(found(files, "temporal", source))
    train_list = found(files, "anomaly_train", source, needed=False)
    lines = read_text(train_list, "list of videos").split() if train_list else []
    listed = {Path(line).stem for line in lines} or set(videos)
    names = {"train": sorted(listed & set(videos) - set(events)), "test": sorted(set(events) & set(videos))}
    absent = sorted((set(events) | (listed if train_list else set())) - set(videos))
    if absent:
        print(f"note: {len(absent)} videos of the lists are not in {source}, such as {absent[0]}", flush=True)
    if not names["test"]:
        raise UserError(f"{source} holds none of the videos that the annotations name, such as {min(events)}")
    for link in (p for split in names for p in (out / split).glob("*") if p.is_symlink()):  # of an earlier run
        link.unlink()
    for split, those in names.items():
        for name in those:
            place = out / split / videos[name].name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(videos[name].resolve())
    with writing_table(out / "labels.csv") as table:
        table.writerow(["video", "start", "end"])
        for name in names["test"]:
            frames = open_video(videos[name]).expected_frames()
            ranges = [(first, min(last + 1, frames or last + 1)) for first, last in events[name]]
            table.writerows((name, first, end) for first, end in ranges if first < end)
    for kind, is_normal in (("normal", True), ("abnormal", False)):
        with atomic_write(out / f"{kind}.txt") as tmp:
            tmp.write_text("".join(f"{n}\n" for n in names["train"] if n.startswith("Normal") == is_normal))
    return len(names["train"]), len(names["test"])


def found(files: list[Path], start: str, source: Path, needed: bool = True) -> Path | None:
    """The text whose name begins like `start`, in any case."""
    path = next((p for p in files if p.suffix == ".txt" and p.name.lower().startswith(start)), None)
    if path is None and needed:
        name = "Temporal_Anomaly_Annotation_for_Testing_Videos.txt"
        raise UserError(f"--source {source} holds no {name}: put it there, it comes with the dataset")
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the unpacked archives and annotations")
    parser.add_argument("--out", type=Path, default=Path("data/ucf-crime"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        raise UserError(f"--source {args.source} does not exist")
    train, test = build(args.source, args.out)
    print(f"{train} training and {test} test videos are linked in {args.out}")
    print(f"next: python frd_uvad/train.py --dataset folder --data-root {args.out}, or another method")


if __name__ == "__main__":
    run_script(main)
