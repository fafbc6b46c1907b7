"""``with_objective``: the class that gives a host's method objectives, its step untouched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iecl_solo.errors import IECLError
from iecl_solo.lipschitz import evaluating, parametrize_spectral
from iecl_solo.objectives.protocol import Made, Objective, Side, Space, Views, total
from iecl_solo.solo import checkpoint as ckpt
from iecl_solo.solo.config import dump_block, parse_block
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.infonce import use_blocked_infonce

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
_PROTOTYPES = "head"


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
    """Stands for a projector during one training step: keeps what it makes of each large crop.

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

    def __init__(
        self,
        model: nn.Module,
        networks: Mapping[Side, str],
        objectives: Collection[Objective],
    ) -> None:
        self.swapped: list[tuple[nn.Module, str, nn.Module]] = []
        self.embeddings: dict[Side, dict[int, Tensor]] = {}
        self.scores: dict[int, Tensor] = {}
        self.model, self.networks, self.objectives = model, networks, objectives

    @property
    def made(self) -> Made:
        embeddings = self.embeddings
        return Made(embeddings.get("online", {}), embeddings.get("momentum", {}), self.scores)

    def _swap(self, parent: nn.Module, attribute: str, tap: nn.Module, original: nn.Module) -> None:
        setattr(parent, attribute, tap)
        self.swapped.append((parent, attribute, original))

    def _keep_outputs(self, path: str, network: _NetworkTap) -> dict[int, Tensor]:
        """Tap the module at ``path``; its outputs by large crop, as they come."""
        parent_path, _, name = path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        module = getattr(parent, name)
        tap = _EmbeddingTap(module, network)
        self._swap(parent, name, tap, module)
        return tap.embeddings

    def __enter__(self) -> _Taps:
        for side, attribute in self.networks.items():
            network = getattr(self.model, attribute)

            def transform(x: Tensor, view: int, side: Side = side) -> Tensor:
                for objective in self.objectives:
                    x = objective.transform(x, view, side)
                return x

            tap = _NetworkTap(network, int(self.model.num_large_crops), transform)  # type: ignore[arg-type]
            self._swap(self.model, attribute, tap, network)
            path = find_embedder(self.model, side)
            if path is None:
                continue
            self.embeddings[side] = self._keep_outputs(path, tap)
            if side == "online" and find_prototypes(self.model) is not None:
                self.scores = self._keep_outputs(_PROTOTYPES, tap)
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


def find_prototypes(model: nn.Module) -> str | None:
    """Dotted name of the module that scores prototypes, None if the host has none (or others)."""
    embedder = find_embedder(model, "online")
    return _PROTOTYPES if embedder is not None and embedder.startswith(_PROTOTYPES) else None


def objectives(model: nn.Module) -> dict[str, Objective]:
    """The objectives that a model carries, by name; none for a host's own method.

    >>> objectives(nn.Identity())
    {}
    """
    return getattr(model, "objectives", {})


def transforming(model: nn.Module) -> Objective | None:
    """The first of a model's objectives that learns a transform of the views, if one does.

    >>> transforming(nn.Identity())
    """
    return next((o for o in objectives(model).values() if o.transformer is not None), None)


def _space(model: nn.Module) -> Space:
    """Dimensions of what the host makes of its features, found by making some."""
    embedder, prototypes = find_embedder(model, "online"), find_prototypes(model)
    assert embedder is not None
    features = torch.zeros(1, int(model.features_dim))  # type: ignore[arg-type]

    def width(path: str) -> int:
        module = model.get_submodule(path)
        with evaluating(module), torch.no_grad():
            return module(features).shape[1]

    if prototypes is None:
        return Space(width(embedder))
    temperature = float(model.dino_loss_func.student_temp)  # type: ignore[union-attr, arg-type]
    return Space(width(embedder), width(prototypes), temperature)


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


def with_objective(host_class: Any, *objective_classes: type[Objective]) -> type:
    """The host's method with one or more objectives added to its loss.

    The host's ``training_step`` runs as it is. During it, the online network (and the momentum
    network where there is one) is handed the transformed views, and the embeddings it makes are
    kept; the objectives' terms are then logged by name and added to the loss. Outside the
    training step the model is the host's own: evaluation never sees the transform.

    Args:
        host_class: a class of ``solo.methods.METHODS``.
        objective_classes: what to add, e.g. ``iecl_solo.objectives.iecl.IECL``. Views go through
            the transforms in this order.

    Returns:
        A subclass of ``host_class`` that takes the same arguments, or one completed configuration
        on any host, and reads the options of each objective from the block of its name: a block
        of ``cfg`` where methods take a ``cfg``, a keyword argument where they take keyword
        arguments. On the latter host ``crop_size`` is read too (the images' size; 224 if it is
        not given). Its property ``objectives`` holds them by name.

    Raises:
        IECLError: for a host class that cannot have it, with the reason.

    Example:
        >>> from iecl_solo.objectives.iecl import IECL
        >>> from iecl_solo.solo.host import find_host
        >>> with_objective(find_host().methods["simclr"], IECL).__name__
        'IECLSimCLR'
    """
    classes = {c.name: c for c in objective_classes}
    names = "_".join(classes)
    if host_class.__name__ in REFUSED:
        raise IECLError(
            f"{names}: {host_class.__name__} is refused: {REFUSED[host_class.__name__]}"
        )
    host = find_host()

    class WithObjective(host_class):
        #: Names of the configuration's blocks that are the objectives'.
        blocks = tuple(classes)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = host.unpack(type(self), args, kwargs, dict.fromkeys(classes))
            super().__init__(*given.args, **given.kwargs)
            if find_embedder(self, "online") is None:
                raise IECLError(
                    f"{names}: {host_class.__name__} is refused: "
                    "it has neither a projector nor a head whose output is an embedding"
                )
            space = _space(self)
            for name, objective_class in classes.items():
                config = parse_block(name, objective_class.Config, given.blocks[name])
                views = _divide(host, self, getattr(config, "query_views", None))
                # the host's own random stream must not move: with the objective weighing nothing,
                # every later draw (data order, dropout) has to be the host's
                with torch.random.fork_rng(devices=[]):
                    objective = objective_class(
                        config, given.image_size, views, self._network("online"), space
                    )
                    if objective.parametrizes:
                        for network in self._networks:
                            parametrize_spectral(getattr(self, self._networks[network]))
                setattr(self, name, objective)
            # of a host's own script; elsewhere build_model does it
            cfg = getattr(self, "cfg", None)
            if cfg is not None and OmegaConf.select(cfg, "performance.blocked_infonce"):
                use_blocked_infonce(self, host)

        @staticmethod
        def add_and_assert_specific_cfg(cfg: Any) -> Any:
            cfg = host_class.add_and_assert_specific_cfg(cfg)
            for name, objective_class in classes.items():
                cfg[name] = dump_block(parse_block(name, objective_class.Config, cfg.get(name)))
            return cfg

        @property
        def objectives(self) -> dict[str, Objective]:
            return {name: getattr(self, name) for name in classes}

        @property
        def _networks(self) -> dict[Side, str]:
            both: dict[Side, str] = {"online": host.online, "momentum": host.momentum}
            return {side: name for side, name in both.items() if hasattr(self, name)}

        def _network(self, side: Side) -> nn.Module:
            return getattr(self, self._networks[side])

        @property
        def learnable_params(self) -> list[dict[str, Any]]:
            # decay is the objective's own business, see IE-CL's R(g_phi)
            groups = [
                {
                    "name": name,
                    "params": list(objective.parameters()),
                    "weight_decay": 0.0,
                    "lr": self.lr * objective.lr_multiplier,
                }
                for name, objective in self.objectives.items()
            ]
            return [*super().learnable_params, *(g for g in groups if g["params"])]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # a parametrised weight is made once a step, not once a view and a term
            with parametrize.cached():
                return self._training_step(batch, batch_idx)

        def _training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # before the host's forward pass, so that their gradients come last, when the
            # activations are gone: no second set of gradients at the height of a step's memory
            of_weights = {
                name: objective.weight_terms(self._network("online"))
                for name, objective in self.objectives.items()
            }
            with _Taps(self, self._networks, self.objectives.values()) as taps:
                loss = super().training_step(batch, batch_idx)
            epoch = self._epoch(batch_idx)
            for name, objective in self.objectives.items():
                terms = objective.terms(taps.made, epoch) | of_weights[name]
                self.log_dict(
                    {
                        f"train_{name}_{k}": term.value.detach()
                        for k, term in terms.items()
                        if term.logged
                    },
                    on_epoch=True,
                    sync_dist=True,
                )
                added = total(terms)
                loss = loss if added is None else loss + added
            return loss

        def _epoch(self, batch_idx: int) -> float:
            return self.current_epoch + batch_idx / max(1, self.trainer.num_training_batches)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            super().on_before_optimizer_step(optimizer)
            for objective in self.objectives.values():
                objective.before_optimizer_step()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            ckpt.to_plain(checkpoint["state_dict"], self, self._networks.values(), first)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            ckpt.from_plain(checkpoint["state_dict"], self, self._networks.values(), first)

    first = next(iter(classes))  # the checkpoint keeps what belongs to no plain network under it
    added_names = [c.__name__ for c in objective_classes]
    WithObjective.__name__ = WithObjective.__qualname__ = (
        f"{''.join(added_names)}{host_class.__name__}"
    )
    WithObjective.__doc__ = f"{host_class.__name__} with {' and '.join(added_names)} added."
    return WithObjective
