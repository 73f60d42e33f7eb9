"""Videos and what is known of them: where they lie, their frames, labels, masks and tracks."""
