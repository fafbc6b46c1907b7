"""``with_objective``: the class that gives a host's method an objective, its step untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from iecl_solo.errors import IECLError
from iecl_solo.lipschitz import parametrize_spectral
from iecl_solo.objectives.protocol import Objective, Side, Views, total
from iecl_solo.solo import checkpoint as ckpt
from iecl_solo.solo.config import dump_block, parse_block
from iecl_solo.solo.host import Host, find_host

#: Host classes that cannot have an objective added, and why.
REFUSED = {
    "BaseMethod": "it is the base of all methods and has no loss of its own",
    "LinearModel": "it evaluates a frozen backbone and does not pretrain",
    "MAE": "it reconstructs one masked view and has no embedding of a pair to work on",
}

# Where hosts keep the last layer before the embedding their loss sees. DINO's head ends in
# prototypes; what they are compared with is the output of its mlp.
_EMBEDDERS = {
    "online": ("projector", "head.mlp"),
    "momentum": ("momentum_projector", "momentum_head.mlp"),
}


class _NetworkTap(nn.Module):
    """Stands for a network during one training step: transforms the large crops, in crop order.

    Small crops follow the large ones and pass as they are.
    """

    def __init__(
        self, network: nn.Module, num_views: int, transform: Callable[[Tensor, int], Tensor]
    ) -> None:
        super().__init__()
        self.network, self.num_views, self.transform = network, num_views, transform
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        view = len(self.features)
        if view < self.num_views:
            x = self.transform(x, view)
        out = self.network(x)
        self.features.append(out)
        return out


class _EmbeddingTap(nn.Module):
    """Stands for a projector during one training step: keeps the embedding of each large crop.

    A crop is known by its feature tensor, not by counting calls: hosts project in different
    orders, and some project other things too.
    """

    def __init__(self, projector: nn.Module, network: _NetworkTap) -> None:
        super().__init__()
        self.projector = projector
        self.network = network
        self.embeddings: dict[int, Tensor] = {}

    def forward(self, features: Tensor) -> Tensor:
        out = self.projector(features)
        for view, known in enumerate(self.network.features[: self.network.num_views]):
            if known is features:
                self.embeddings.setdefault(view, out)
        return out


class _Taps:
    """The taps of one training step: put in on entry, taken out on exit whatever happens.

    The modules are swapped rather than hooked: a hook on a compiled module is compiled with it.
    """

    def __init__(self, model: nn.Module, networks: Mapping[Side, str], objective: Objective):
        self.swapped: list[tuple[nn.Module, str, nn.Module]] = []
        self.embeddings: dict[Side, dict[int, Tensor]] = {}
        self.model, self.networks, self.objective = model, networks, objective

    def _swap(self, parent: nn.Module, attribute: str, tap: nn.Module, original: nn.Module) -> None:
        setattr(parent, attribute, tap)
        self.swapped.append((parent, attribute, original))

    def __enter__(self) -> _Taps:
        for side, attribute in self.networks.items():
            network = getattr(self.model, attribute)

            def transform(x: Tensor, view: int, side: Side = side) -> Tensor:
                return self.objective.transform(x, view, side)

            tap = _NetworkTap(network, self.objective.views.num_views, transform)
            self._swap(self.model, attribute, tap, network)
            path = find_embedder(self.model, side)
            if path is None:
                continue
            parent_path, _, name = path.rpartition(".")
            parent = self.model.get_submodule(parent_path)
            projector = getattr(parent, name)
            embedder = _EmbeddingTap(projector, tap)
            self.embeddings[side] = embedder.embeddings
            self._swap(parent, name, embedder, projector)
        return self

    def __exit__(self, *_: object) -> None:
        for parent, attribute, original in reversed(self.swapped):
            setattr(parent, attribute, original)


def find_embedder(model: nn.Module, side: Side) -> str | None:
    """Dotted name of the module whose output is the embedding, None if the host has none."""
    for path in _EMBEDDERS[side]:
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None


def _divide(host: Host, model: nn.Module, query_views: list[int] | None) -> Views:
    num_views = int(model.num_large_crops)  # type: ignore[arg-type]
    if num_views < 2:
        raise IECLError(f"{num_views} large crop: a query and an anchor need at least 2")
    momentum = hasattr(model, host.momentum)
    if query_views is None:
        query_views = list(range(num_views)) if momentum else [1]
    wrong = [v for v in query_views if not 0 <= v < num_views]
    if wrong or not query_views:
        raise IECLError(f"query_views: {query_views} given, allowed are 0 to {num_views - 1}")
    if not momentum and len(set(query_views)) == num_views:
        raise IECLError(
            f"query_views: {query_views} leaves no anchor; this host has no momentum network, "
            f"so at most {num_views - 1} of its {num_views} views can be the query"
        )
    return Views(num_views, momentum, tuple(sorted(set(query_views))))


def with_objective(host_class: Any, objective_class: type[Objective]) -> type:
    """The host's method with an objective added to its loss.

    The host's ``training_step`` runs as it is. During it, the online network (and the momentum
    network where there is one) is handed the transformed views, and the embeddings it makes are
    kept; the objective's terms are then logged by name and added to the loss. Outside the
    training step the model is the host's own: evaluation never sees the transform.

    Args:
        host_class: a class of ``solo.methods.METHODS``.
        objective_class: what to add, e.g. ``iecl_solo.objectives.iecl.IECL``.

    Returns:
        A subclass of ``host_class`` that takes the same arguments, and reads the objective's
        options from the block named ``objective_class.name``: ``cfg.iecl`` where methods take a
        ``cfg``, the keyword argument ``iecl`` where they take keyword arguments. On the latter
        host ``crop_size`` is read too (the images' size; 224 if it is not given).

    Raises:
        IECLError: for a host class that cannot have it, with the reason.

    Example:
        >>> from iecl_solo.objectives.iecl import IECL
        >>> from iecl_solo.solo.host import find_host
        >>> with_objective(find_host().methods["simclr"], IECL).__name__
        'IECLSimCLR'
    """
    if host_class.__name__ in REFUSED:
        raise IECLError(
            f"{objective_class.name}: {host_class.__name__} is refused: "
            f"{REFUSED[host_class.__name__]}"
        )
    host = find_host()
    block_name = objective_class.name

    class WithObjective(host_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if host.takes_cfg:
                super().__init__(*args, **kwargs)
                block = self.cfg[block_name]
                crop_size = OmegaConf.select(self.cfg, "augmentations[0].crop_size", default=224)
            else:
                block, crop_size = kwargs.pop(block_name, None), kwargs.get("crop_size", 224)
                super().__init__(*args, **kwargs)
            image_size = crop_size if isinstance(crop_size, int) else crop_size[0]
            config = parse_block(block_name, objective_class.Config, block)
            views = _divide(host, self, config.query_views)
            if find_embedder(self, "online") is None:
                raise IECLError(
                    f"{block_name}: {host_class.__name__} is refused: "
                    "it has neither a projector nor a head whose output is an embedding"
                )
            # the host's own random stream must not move: with the objective weighing nothing,
            # every later draw (data order, dropout) has to be the host's
            with torch.random.fork_rng(devices=[]):
                objective = objective_class(config, image_size, views, self._network("online"))
                if objective.parametrizes:
                    for network in self._networks:
                        parametrize_spectral(getattr(self, self._networks[network]))
            setattr(self, block_name, objective)

        @staticmethod
        def add_and_assert_specific_cfg(cfg: Any) -> Any:
            cfg = host_class.add_and_assert_specific_cfg(cfg)
            config = parse_block(block_name, objective_class.Config, cfg.get(block_name))
            cfg[block_name] = dump_block(config)
            return cfg

        @property
        def _networks(self) -> dict[Side, str]:
            both: dict[Side, str] = {"online": host.online, "momentum": host.momentum}
            return {side: name for side, name in both.items() if hasattr(self, name)}

        def _network(self, side: Side) -> nn.Module:
            return getattr(self, self._networks[side])

        @property
        def _objective(self) -> Objective:
            return getattr(self, block_name)

        @property
        def learnable_params(self) -> list[dict[str, Any]]:
            groups = super().learnable_params
            params = list(self._objective.parameters())
            if not params:
                return groups
            # decay is the objective's own business, see R(g_phi)
            group = {
                "name": block_name,
                "params": params,
                "weight_decay": 0.0,
                "lr": self.lr * self._objective.lr_multiplier,
            }
            return [*groups, group]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            objective = self._objective
            with _Taps(self, self._networks, objective) as taps:
                loss = super().training_step(batch, batch_idx)
            query, anchor = self._query_and_anchor(taps.embeddings)
            terms = objective.terms(query, anchor, self._network("online"), self._epoch(batch_idx))
            self.log_dict(
                {f"train_{block_name}_{k}": term.value.detach() for k, term in terms.items()},
                on_epoch=True,
                sync_dist=True,
            )
            added = total(terms)
            return loss if added is None else loss + added

        def _query_and_anchor(
            self, embeddings: dict[Side, dict[int, Tensor]]
        ) -> tuple[Tensor, Tensor]:
            views = self._objective.views
            side: Side = "momentum" if views.momentum else "online"
            # some hosts embed only one of their crops on one of the sides (ReSSL on 1.0.2)
            query = [z for v, z in embeddings["online"].items() if v in views.query]
            anchor = [z for v, z in embeddings.get(side, {}).items() if v in views.anchor]
            if not query or not anchor:
                raise IECLError(
                    f"{block_name}: {host_class.__name__} made no embedding of its "
                    f"{'query' if not query else 'anchor'} views in this step"
                )
            return torch.cat(query), torch.cat(anchor)

        def _epoch(self, batch_idx: int) -> float:
            return self.current_epoch + batch_idx / max(1, self.trainer.num_training_batches)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            ckpt.to_plain(checkpoint["state_dict"], self, self._networks.values(), block_name)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            ckpt.from_plain(checkpoint["state_dict"], self, self._networks.values(), block_name)

    WithObjective.__name__ = WithObjective.__qualname__ = (
        f"{objective_class.__name__}{host_class.__name__}"
    )
    WithObjective.__doc__ = f"{host_class.__name__} with {objective_class.__name__} added."
    return WithObjective
