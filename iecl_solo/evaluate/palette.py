"""The colours of every figure: a baseline is grey, what is compared with it takes the others.

Each is distinct to a colour-blind eye, and in grey by its lightness.
"""

from __future__ import annotations

BASELINE = "#5f6a74"
OTHERS = ("#0b6e76", "#c2571b", "#6a51a3", "#9a6b12", "#b8326f", "#3b7d2e", "#2b6cb0")
