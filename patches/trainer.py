"""Command lines of solo-learn 1.0.2, whose Trainer arguments Lightning 2 no longer parses."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage

# gpus scales the host's learning rate; one device is the number that leaves it as it is
_OLD_ARGUMENTS = {"gpus": "0", "distributed_backend": None, "checkpoint_callback": True}
_OLD_STRATEGIES = ("dp", "ddp", "ddp2", "ddp_spawn", "ddp_sharded", "deepspeed")


def _trainer() -> Any:
    return importlib.import_module("lightning.pytorch").Trainer


def _arguments(trainer: Any) -> dict[str, Any]:
    """The arguments of Trainer(...) that a command line can give, with their defaults."""
    parameters = list(inspect.signature(trainer.__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def literal(text: str) -> Any:
    """What a word of the command line stands for.

    Example:
        >>> [literal(word) for word in ("16", "0.5", "None", "true", "0,1")]
        [16, 0.5, None, True, '0,1']
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def modern(given: dict[str, Any], cuda: bool) -> dict[str, Any]:
    """Arguments of Lightning 1's Trainer by the names that Lightning 2 gives them.

    Example:
        >>> modern({"gpus": [0, 1], "accelerator": "ddp", "checkpoint_callback": False}, cuda=True)
        {'accelerator': 'gpu', 'devices': [0, 1], 'strategy': 'ddp', 'enable_checkpointing': False}
        >>> modern({"gpus": [0]}, cuda=False)
        {'devices': 1}
    """
    new = dict(given)
    gpus, strategy = new.pop("gpus", None), new.pop("distributed_backend", None)
    checkpoints = new.pop("checkpoint_callback", None)
    if new.get("accelerator") in _OLD_STRATEGIES:
        strategy = new.pop("accelerator")
    if gpus is not None:
        # a list names GPUs; without any, what is left of it is how many devices were meant
        new.update({"accelerator": "gpu", "devices": gpus} if cuda else {"devices": len(gpus)})
    if strategy is not None:
        new["strategy"] = strategy
    if checkpoints is not None:
        new["enable_checkpointing"] = checkpoints
    return new


def _add_argparse_args(cls: Any, parent_parser: ArgumentParser, **_: Any) -> ArgumentParser:
    """Adds the arguments of Trainer(...) to a parser, as Lightning 1 did."""
    group = parent_parser.add_argument_group("pl.Trainer")
    for name, default in {**_arguments(cls), **_OLD_ARGUMENTS}.items():
        group.add_argument(f"--{name}", nargs="?", const=True, default=default, type=literal)
    return parent_parser


def _from_argparse_args(cls: Any, args: Namespace, **kwargs: Any) -> Any:
    """A Trainer from parsed arguments, as Lightning 1 made one; ``kwargs`` win."""
    import torch

    given = modern({**vars(args), **kwargs}, torch.cuda.is_available())
    return cls(**{name: given[name] for name in _arguments(cls) if name in given})


def _arguments_are_not_parsed(_: Path) -> bool:
    setup = importlib.util.find_spec("solo.args.setup")
    if setup is None or setup.origin is None or hasattr(_trainer(), "add_argparse_args"):
        return False
    return "add_argparse_args" in Path(setup.origin).read_text("utf-8")


def _parse_arguments() -> None:
    trainer = _trainer()
    trainer.add_argparse_args = classmethod(_add_argparse_args)
    trainer.from_argparse_args = classmethod(_from_argparse_args)


TRAINER_ARGUMENTS = Patch(
    name="trainer-arguments",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2",
    symptom="parse_args_pretrain and parse_args_linear fail: Trainer has lost add_argparse_args",
    remedy="Trainer has it and from_argparse_args again; gpus= and the like are translated",
    present=_arguments_are_not_parsed,
    apply=_parse_arguments,
)
