"""Segmentation probes: heads on frozen patch tokens, scored on pixels."""
