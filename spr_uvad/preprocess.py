"""Videos -> space-time cubes on disk. train.py and eval.py run it if it is missing.

python spr_uvad/preprocess.py --dataset ped2 --data-root data --boxes file:boxes.npz
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.flow import sources
from common.io import run_script
from common.objects import pipeline

SHARED = dict(
    min_score=0.2,
    covered=0.6,
    frames=(-2, -1, 0, 1, 2),
    flows=(-2, -1, 0, 1, 2),
    motion="flow",
    motion_threshold=1.0,
    first_pair=(0, 1),
)
# Constants of the paper's configuration; areas in square pixels, the same for detections and motion boxes.
PUBLISHED = {
    name: {**SHARED, "min_area": area, "motion_area": area}
    for name, area in {
        "ped1": 10**2,
        "ped2": 10**2,
        "avenue": 40**2,
        "shanghaitech": 30**2,
        "folder": 10**2,
        "demo": 10**2,
    }.items()
}


def add_data_flags(parser):
    cli.add_data_flags(parser)
    g = pipeline.add_foreground_flags(parser)
    g.add_argument("--motion-threshold", type=float, help="least squared flow of a moving pixel, px² (default: 1)")
    g.add_argument(
        "--flow",
        nargs="?",
        const="dis",
        help=f"with motion: predict the cube's optical flow too. {sources.HELP} "
        "(--flow by itself: dis). Without it only appearance is scored; motion boxes use dis then",
    )


def prepare(source: cli.DataSource, run, **options) -> pipeline.CubeVideos:
    """Do what is missing of decoding, detection, flow and cubes; options: see common.objects.pipeline.prepare."""
    return pipeline.prepare(source, PUBLISHED, run, **options)


def main(argv=None):
    parser = cli.make_parser(__doc__)
    add_data_flags(parser)
    cli.add_shard_flag(cli.add_run_flags(parser, out="not used here"))
    pipeline.preprocess(prepare, parser.parse_args(argv), cli.next_command("spr_uvad/train.py", argv, "--shard"))


if __name__ == "__main__":
    run_script(main)
