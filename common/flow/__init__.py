"""Optical flow between consecutive frames: OpenCV's DIS, RAFT, or from files."""
