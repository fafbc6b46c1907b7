"""The bridge to solo-learn. Nothing outside this folder imports ``solo``."""
