"""Evaluation of a pretrained backbone, with the host's own code."""
