"""From a config block as a person writes it to an objective's checked dataclass, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from iecl_solo.errors import IECLError, unknown_key

# ``lambda`` is the paper's name and a Python keyword
_TO_FIELD = {"lambda": "lambda_"}
_TO_KEY = {field: key for key, field in _TO_FIELD.items()}


def _keys(config_class: Any, path: list[str]) -> list[str]:
    """The keys allowed under ``path`` of a config class, as a person writes them."""
    for part in path:
        (config_class,) = [f.default_factory for f in fields(config_class) if f.name == part]
    return [_TO_KEY.get(f.name, f.name) for f in fields(config_class)]


def _explain(name: str, config_class: type, error: OmegaConfBaseException) -> IECLError:
    path = [p for p in str(error.full_key or error.key or "").split(".") if p]
    *blocks, key = [name, *(_TO_KEY.get(p, p) for p in path)]
    above = "".join(f"{block}." for block in blocks)
    if isinstance(error, ConfigKeyError):
        return unknown_key(above, key, _keys(config_class, path[:-1]))
    reason = str(error.msg or error).splitlines()[0]
    return IECLError(f"{above}{key}: {reason}")


def parse_block(name: str, config_class: type[Any], block: Mapping[str, Any] | None) -> Any:
    """Check a config block against its dataclass.

    Args:
        name: the block's name, which begins every path in an error.
        config_class: dataclass with a default for each field.
        block: the block as written; None for all defaults.

    Returns:
        An instance of ``config_class``.

    Raises:
        IECLError: unknown key, wrong type or impossible value: the key's full path, what was
            given, what is allowed, the nearest valid name.

    Example:
        >>> from iecl_solo.objectives.iecl import IECLConfig
        >>> parse_block("iecl", IECLConfig, {"lambda": 0.1, "saib": {"patch_size": 8}}).lambda_
        0.1
        >>> parse_block("iecl", IECLConfig, {"saib": {"patchsize": 8}})
        Traceback (most recent call last):
        iecl_solo.errors.IECLError: unknown key iecl.saib.patchsize: did you mean 'patch_size'? ...
    """
    given = {} if block is None else plain(block)
    if not isinstance(given, Mapping):
        raise IECLError(f"{name}: {given!r} is not a block of keys")
    for f in fields(config_class):
        if is_dataclass(f.default_factory) and not isinstance(given.get(f.name, {}), Mapping):
            raise IECLError(f"{name}.{f.name}: {given[f.name]!r} is not a block of keys")
    as_fields = {_TO_FIELD.get(str(k), str(k)): v for k, v in given.items()}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), as_fields))
    except OmegaConfBaseException as error:
        raise _explain(name, config_class, error) from None


def flatten(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; an empty block is a value.

    Example:
        >>> flatten({"method": "iecl_byol", "iecl": {"beta": 0.1}})
        {'method': 'iecl_byol', 'iecl.beta': 0.1}
    """
    found: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def plain(value: Any) -> Any:
    """An OmegaConf container as plain dicts and lists, interpolations resolved; else itself."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def dump_block(config: Any) -> dict[str, Any]:
    """The inverse of ``parse_block``: plain containers, keys as a person writes them."""
    assert is_dataclass(config) and not isinstance(config, type)
    return {_TO_KEY.get(k, k): v for k, v in asdict(config).items()}
