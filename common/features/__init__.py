"""Image networks as encoders, the image half of CLIP, and videos decoded ahead: for methods that train on features."""
