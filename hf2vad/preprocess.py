"""Videos -> space-time cubes on disk. Run by train.py and eval.py where it is missing, or alone:

python hf2vad/preprocess.py --dataset ped2 --data-root data --boxes file:boxes.npz
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import datasets
from common.io import run
from common.objects import pipeline

# Constants of the paper's configuration: areas in square pixels, the rest as in common.objects.cubes.Settings.
PUBLISHED = {
    "ped1": dict(min_score=0.5, min_area=10**2, covered=0.6, motion_blur=3, motion_threshold=18, motion_area=10**2),
    "ped2": dict(min_score=0.5, min_area=10**2, covered=0.6, motion_blur=3, motion_threshold=18, motion_area=10**2),
    "avenue": dict(min_score=0.25, min_area=40**2, covered=0.6, motion_blur=5, motion_threshold=18, motion_area=40**2),
    "shanghaitech": dict(
        min_score=0.5, min_area=8**2, covered=0.65, motion_blur=5, motion_threshold=15, motion_area=40**2
    ),
    "folder": dict(min_score=0.5, min_area=10**2, covered=0.6, motion_blur=5, motion_threshold=18, motion_area=20**2),
    "demo": dict(
        min_score=0.5,
        min_area=10**2,
        covered=0.6,
        motion_blur=5,
        motion_threshold=10,
        motion_area=10**2,
        motion_close=9,
    ),
}


def add_data_flags(parser):
    datasets.add_flags(parser)
    pipeline.add_difference_flags(pipeline.add_foreground_flags(parser))


def prepare(args, r, **how):
    """-> common.objects.pipeline.Prepared; what is missing of decoding, detection, flow and cubes is done first."""
    return pipeline.prepare(args, PUBLISHED, r, **how)


def main(argv=None):
    pipeline.preprocess_alone(prepare, add_data_flags, argv, __doc__, "hf2vad/train.py")


if __name__ == "__main__":
    run(main)
