"""What a run shows: page, plots, ranking, overlay, comparison. Evaluation works where this folder is missing."""
