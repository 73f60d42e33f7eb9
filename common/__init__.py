"""What every method needs to read videos and to report scores. Nothing here knows a model."""
