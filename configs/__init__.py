"""Hydra configurations, in solo-learn's schema: pkg://iecl_solo.configs.

A variant's, ``pretrain/cifar/iecl_simclr``, is no file: it is its baseline's and the objective's
defaults, and says itself of which. An objective's folder is one that has a ``default.yaml`` and a
``none.yaml``, in which nothing is added. A preset with the name of a set, ``iecl/minimal`` for
``pretrain/minimal``, stands there in place of the default.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parent
_FOLDER = "pretrain"


@cache
def objectives() -> tuple[str, ...]:
    """Names of the objectives that have presets.

    >>> objectives()
    ('climb', 'iecl')
    """
    found = (path.parent for path in _ROOT.glob("*/none.yaml"))
    return tuple(sorted(f.name for f in found if (f / "default.yaml").is_file()))


def variant(name: str) -> tuple[str, str] | None:
    """A variant's objective and what it is added to; None for any other configuration.

    >>> variant("pretrain/cifar/iecl_simclr"), variant("pretrain/cifar/iecl_climb_simclr")
    (('iecl', 'simclr'), ('iecl', 'climb_simclr'))
    >>> variant("pretrain/cifar/simclr"), variant("linear/iecl_simclr")
    (None, None)
    """
    folder, _, method = name.removesuffix(".yaml").rpartition("/")
    for objective in objectives():
        baseline = method.removeprefix(f"{objective}_")
        if baseline == method or not folder.startswith(f"{_FOLDER}/"):
            continue
        file = _ROOT / folder / f"{baseline}.yaml"
        if (file.is_file() and baseline != "base") or variant(f"{folder}/{baseline}"):
            return objective, baseline
    return None


def text(name: str) -> str:
    """What a variant's file would hold.

    >>> print(text("pretrain/cifar/iecl_simclr"))
    # @package _global_
    defaults:
      - simclr
      - /iecl: default
      - _self_
    method: iecl_simclr
    """
    found = variant(name)
    assert found is not None, name
    objective, baseline = found
    folder = name.split("/")[-2]
    preset = folder if (_ROOT / objective / f"{folder}.yaml").is_file() else "default"
    return "\n".join(
        [
            "# @package _global_",
            "defaults:",
            f"  - {baseline}",
            f"  - /{objective}: {preset}",
            "  - _self_",
            f"method: {objective}_{baseline}",
        ]
    )


def names(folder: str) -> list[str]:
    """Names of the configurations in a folder, below it, with one variant for each objective.

    >>> "cifar/iecl_simclr" in names("pretrain"), names("linear")[:2]
    (True, ['cifar', 'custom'])
    """
    root = _ROOT / folder
    written = [p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml")]
    written = [name for name in written if name.rpartition("/")[2] != "base"]
    if folder != _FOLDER:
        return sorted(written)
    split = [name.rpartition("/") for name in written]
    added = [f"{where}/{o}_{method}" for where, _, method in split for o in objectives()]
    return sorted([*written, *added])
