"""Boxes, flow and cubes: what the methods that look at objects (hf2vad, spr_uvad) share."""
