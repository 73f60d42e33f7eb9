"""What a run shows: page, plots, ranking, overlays, comparison. Evaluation works where this folder is missing."""

from common.report.results import write_own_video, write_results

__all__ = ["write_own_video", "write_results"]
