"""Videos -> space-time cubes on disk. train.py and eval.py run it if it is missing.

python hf2vad/preprocess.py --dataset ped2 --data-root data --boxes file:boxes.npz
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.io import run_script
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
    cli.add_data_flags(parser)
    pipeline.add_difference_flags(pipeline.add_foreground_flags(parser))


def prepare(source: cli.DataSource, run, **options) -> pipeline.CubeVideos:
    """Do what is missing of decoding, detection, flow and cubes; options: see common.objects.pipeline.prepare."""
    return pipeline.prepare(source, PUBLISHED, run, **options)


def main(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_shard_flag(cli.add_run_flags(parser, out="not used here"))
    pipeline.preprocess(prepare, parser.parse_args(argv), cli.next_command("hf2vad/train.py", argv, "--shard"))


if __name__ == "__main__":
    run_script(main)
