"""Losses of whole methods, as plain torch: usable without solo-learn."""

from iecl_solo.losses.infonce import info_nce
from iecl_solo.losses.minc import MINCLoss
from iecl_solo.losses.spectral import spectral_contrastive_loss

__all__ = ["MINCLoss", "info_nce", "spectral_contrastive_loss"]
