"""Configurations by name: the packaged ones, or a YAML of one's own, composed by Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from iecl_solo import checks
from iecl_solo.configs import names
from iecl_solo.errors import IECLError
from iecl_solo.train.packaged import check_packaged

# what the commands know and a YAML need not have: blocks, keys of solo-learn's blocks
_BLOCKS = (
    *("objectives=", "monitor.", "evaluation.", "compare.", "settings.", "axes.", "arms."),
    *("backbone.kwargs.", "checkpoint.every_n_steps=", "checkpoint.keep=", "data.no_labels="),
    *("data.views=", "data.shuffle_shards=", "data.on_error=", "num_nodes="),
    *("performance.blocked_infonce=", "performance.compile="),
)


@contextmanager
def own_hydra() -> Iterator[None]:
    """Hydra anew within one of Hydra's own jobs."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


def optional(overrides: Sequence[str]) -> list[str]:
    """Overrides of blocks that a YAML need not have, so that KEY=VALUE works without Hydra's "+".

    They are the objectives' own, those of the commands, and single keys of solo-learn's blocks.

    >>> optional(["iecl.beta=1", "seed=3"])
    ['++iecl.beta=1', 'seed=3']

    Raises:
        IECLError: one line, for a group that is given what names no file; Hydra says less.
    """
    for override in overrides:
        group, _, chosen = override.partition("=")
        if chosen.isdigit() or chosen in ("null", ""):
            presets = names(group)
            if presets and "/" not in group:
                checks.one_of(group, chosen, presets)
    from iecl_solo.solo.registry import OBJECTIVES

    blocks = (*(f"{objective.name}." for objective in OBJECTIVES), *_BLOCKS)
    return [f"++{o}" if o.startswith(blocks) else o for o in overrides]


def own_yaml(config: str) -> Path | None:
    """The file of a configuration that is a YAML of one's own, None for a packaged one.

    >>> own_yaml("cifar"), own_yaml("/own/mine.yaml").name
    (None, 'mine.yaml')
    """
    path = Path(config).expanduser().resolve()
    return path if path.suffix in (".yaml", ".yml") else None


def compose_pretrain(config: str, method: str, overrides: list[str]) -> DictConfig:
    """A pretraining configuration, as composed by Hydra; also from within one of Hydra's jobs.

    Args:
        config: a folder of packaged pretraining configurations ("cifar"), or the path of a YAML.
        method: picks one in that folder; a YAML names its own.
        overrides: in Hydra's grammar.

    Raises:
        IECLError: one line, when there is no such configuration or file.
    """
    path = own_yaml(config)
    source: initialize_config_dir | initialize_config_module
    with own_hydra():
        if path is not None:
            if not path.is_file():
                raise IECLError(f"{config}: no such file")
            source, name = initialize_config_dir(str(path.parent), version_base="1.3"), path.stem
        else:
            check_packaged("pretrain", f"{config}/{method}")
            source = initialize_config_module("iecl_solo.configs", version_base="1.3")
            name = f"pretrain/{config}/{method}"
        with source:
            return compose(name, overrides=optional(overrides))
