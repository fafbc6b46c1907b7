"""What a whole method is: its own loss of embeddings. The host provides the rest."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class Method(nn.Module):
    """Base of everything that ``host_method`` can make a method of the host.

    A subclass is built as ``Method(config)``. Its state-dict keys must not contain "encoder" or
    "backbone": the host's linear evaluation would take them for the network.

    Attributes:
        name: what it is registered as; its loss is logged as ``train_<name>_loss``.
        momentum: whether it needs the host's momentum network.
        Config: dataclass of ``method_kwargs``; it has ``proj_hidden_dim`` and ``proj_output_dim``.
    """

    name: ClassVar[str]
    momentum: ClassVar[bool] = False
    Config: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(
        self, large: list[Tensor], small: list[Tensor], momentum: list[Tensor], progress: float
    ) -> Tensor:
        """The loss of one batch of B images, a 0-dim tensor.

        Args:
            large: embeddings (B, d) of each large crop.
            small: embeddings (B, d) of each small crop; empty without multi-crop.
            momentum: embeddings (B, d) of each large crop by the momentum network; empty without.
            progress: how much of the training is done, 0 to 1.
        """
        raise NotImplementedError
