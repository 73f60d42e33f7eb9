"""Clip features and CLIP: for the methods that do not look at pixels (scene_aware_ae, frd_uvad, svmae)."""
