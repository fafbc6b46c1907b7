"""Evaluation of a pretrained backbone; linear layers with augmentations are the host's own."""
