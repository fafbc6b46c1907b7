"""``host_method``: the class by which a whole method is one of the host's, on either solo-learn."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from iecl_solo.methods.protocol import Method
from iecl_solo.solo.config import dump_block, parse_block
from iecl_solo.solo.host import find_host

_BLOCK = "method_kwargs"


def _projector(features_dim: int, config: Any) -> nn.Sequential:
    """BYOL's, which the host gives most of its methods."""
    return nn.Sequential(
        nn.Linear(features_dim, config.proj_hidden_dim),
        nn.BatchNorm1d(config.proj_hidden_dim),
        nn.ReLU(),
        nn.Linear(config.proj_hidden_dim, config.proj_output_dim),
    )


def _flag(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is not allowed, true or false is")
    return word.lower() == "true"


def _argument(hint: Any) -> dict[str, Any]:
    """How argparse reads an option of this type.

    >>> _argument(float | None), _argument(list[int])
    ({'type': <class 'float'>}, {'type': <class 'int'>, 'nargs': '*'})
    """
    given = [kind for kind in get_args(hint) if kind is not type(None)]
    if get_origin(hint) is list:
        return {"type": given[0], "nargs": "*"}
    if given:  # X | None
        return _argument(given[0])
    return {"type": _flag if hint is bool else hint}


def host_method(method_class: type[Method]) -> type:
    """A whole method as a class of the host.

    The host brings networks, crops, online classifier, optimisers, schedules and the momentum
    update; the method its loss. The projector and its copy have the host's own names, so that an
    objective can be added to it as to any other.

    Args:
        method_class: what it computes, e.g. ``iecl_solo.methods.minc.MINC``.

    Returns:
        A subclass of the host's ``BaseMethod``, or ``BaseMomentumMethod``, that takes what the
        host's methods take, and its options from ``method_kwargs`` (as keyword arguments where
        methods take those). To build one raises an IECLError, one line, for whatever these get
        wrong.

    Example:
        >>> from iecl_solo.methods.spectral import Spectral
        >>> host_method(Spectral).__name__
        'Spectral'
    """
    host = find_host()
    bases = host.import_module("methods.base")
    base: Any = bases.BaseMomentumMethod if method_class.momentum else bases.BaseMethod
    name, options = method_class.name, fields(method_class.Config)

    class HostMethod(base):
        Config = method_class.Config

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = host.unpack(type(self), args, kwargs, {_BLOCK: [f.name for f in options]})
            super().__init__(*given.args, **given.kwargs)
            config = parse_block(_BLOCK, method_class.Config, given.blocks[_BLOCK])
            self.projector = _projector(self.features_dim, config)
            if method_class.momentum:
                self.momentum_projector = _projector(self.features_dim, config)
                initialize = host.import_module("utils.momentum").initialize_momentum_params
                initialize(self.projector, self.momentum_projector)
            setattr(self, name, method_class(config))

        @staticmethod
        def add_and_assert_specific_cfg(cfg: Any) -> Any:
            cfg = base.add_and_assert_specific_cfg(cfg)
            cfg[_BLOCK] = dump_block(parse_block(_BLOCK, method_class.Config, cfg[_BLOCK]))
            return cfg

        @staticmethod
        def add_model_specific_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = base.add_model_specific_args(parser)
            group = parser.add_argument_group(name)
            hints, defaults = get_type_hints(method_class.Config), method_class.Config()
            for option in options:
                group.add_argument(
                    f"--{option.name}",
                    default=getattr(defaults, option.name),
                    **_argument(hints[option.name]),
                )
            return parser

        @property
        def learnable_params(self) -> list[dict[str, Any]]:
            group = {"name": "projector", "params": self.projector.parameters()}
            return [*super().learnable_params, group]

        if method_class.momentum:

            @property
            def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
                return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            out = super().forward(*args, **kwargs)
            return {**out, "z": self.projector(out["feats"])}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out = super().training_step(batch, batch_idx)
            # what the host's own step has not embedded: the small crops on main, all on 1.0.2
            z = list(out.get("z", ()))
            z += [self.projector(features) for features in out["feats"][len(z) :]]
            with torch.no_grad():
                momentum = [self.momentum_projector(f) for f in out.get("momentum_feats", ())]
            large, small = z[: self.num_large_crops], z[self.num_large_crops :]
            loss = getattr(self, name)(large, small, momentum, self._progress)
            self.log(f"train_{name}_loss", loss, on_epoch=True, sync_dist=True)
            return loss + out["loss"]

        @property
        def _progress(self) -> float:
            return self.trainer.global_step / self.trainer.estimated_stepping_batches

    HostMethod.__name__ = HostMethod.__qualname__ = method_class.__name__
    HostMethod.__doc__ = f"{method_class.__name__} on the host's networks."
    return HostMethod
