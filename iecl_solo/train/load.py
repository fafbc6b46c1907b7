"""From a name and overrides to a model, a loader and a trainer, on either solo-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from iecl_solo.order import seed_all, seeded
from iecl_solo.solo.batched import BatchedLoader
from iecl_solo.solo.build import build_model
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import find_host
from iecl_solo.train.callbacks.seed import StepSeed
from iecl_solo.train.complete import complete
from iecl_solo.train.compose import compose_pretrain
from iecl_solo.train.fit import make_trainer, trainer_arguments


class Loaded(NamedTuple):
    """What ``load`` gives: ``trainer.fit(model, loader)`` trains.

    Attributes:
        model: the method, as the host builds it.
        loader: batches ``[index, views, label]``.
        trainer: Lightning's, as the configuration has it.
    """

    model: LightningModule
    loader: DataLoader | BatchedLoader
    trainer: Trainer


def configure(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A pretraining configuration, composed, checked and completed.

    ``solo.methods.METHODS[cfg.method](cfg)`` is a model of it (on solo-learn 1.0.2, of the methods
    that this package adds).

    Args:
        name: of a packaged configuration, e.g. ``cifar/iecl_byol``, or the path of a YAML.
        overrides: in Hydra's grammar, as on a command line.

    Raises:
        IECLError: one line for whatever is wrong with it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from iecl_solo.digits import write_digits
        >>> root = write_digits(Path(tempfile.mkdtemp()) / "digits")
        >>> data = [f"data.train_path={root}/train", "data.val_path=null"]
        >>> cfg = configure("digits/iecl_simclr", [*data, "iecl.beta=0.5"])
        >>> cfg.method, cfg.iecl.beta, cfg.data.num_classes
        ('iecl_simclr', 0.5, 10)
    """
    if name.endswith((".yaml", ".yml")):
        cfg = compose_pretrain(name, "", list(overrides))
    else:
        folder, _, method = name.removeprefix("pretrain/").partition("/")
        cfg = compose_pretrain(folder, method, list(overrides))
    return complete(cfg, find_host())


def load(name: str, overrides: Sequence[str] = (), **trainer: Any) -> Loaded:
    """A model, its loader and a trainer; nothing is trained and no file is written.

    To fit them gives the weights that ``iecl-solo pretrain`` gives.

    Args:
        name: of a packaged configuration, e.g. ``cifar/iecl_byol``, or the path of a YAML.
        overrides: in Hydra's grammar, as on a command line.
        trainer: more arguments of Lightning's Trainer, such as ``logger`` and ``callbacks``; by
            itself it logs and saves nothing.

    Raises:
        IECLError: one line for whatever is wrong with it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from iecl_solo.digits import write_digits
        >>> root = write_digits(Path(tempfile.mkdtemp()) / "digits")
        >>> data = [f"data.train_path={root}/train", "data.val_path=null"]
        >>> model, loader, trainer = load("digits/iecl_simclr", [*data, "max_epochs=1"])
        >>> type(model).__name__, len(loader), trainer.max_epochs
        ('IECLSimCLR', 11, 1)
    """
    host = find_host()
    cfg = configure(name, overrides)
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build_model(cfg, host)
    loader, _ = seeded(pretrain_loader(cfg, host), cfg.seed)
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        **trainer_arguments(cfg),
        **trainer,
    }
    settings["callbacks"] = [StepSeed(cfg.seed), *(trainer.get("callbacks") or [])]
    made = make_trainer(**settings)
    seed_all(cfg.seed, 0)
    return Loaded(model, loader, made)
