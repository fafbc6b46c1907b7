"""Which solo-learn is here, and what any generation of it must offer: the class ``Host``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from iecl_solo.errors import HostNotFound, IECLError

if TYPE_CHECKING:  # importing the package imports this file, and takes no torch
    from lightning.pytorch import LightningModule
    from omegaconf import DictConfig
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, Dataset

MISSING = "solo-learn is not installed; install it with: iecl-solo install-host"


@dataclass(frozen=True)
class Given:
    """What the constructor of a method was given.

    Attributes:
        args: positional arguments left for the host's own constructor.
        kwargs: keyword arguments left for it.
        blocks: by name, the blocks of the configuration that were asked for; None for one that
            was not given.
        image_size: height and width of the large crops.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    blocks: dict[str, Any]
    image_size: int


class Host(ABC):
    """The solo-learn that this process imports: what it calls things, and how it does them.

    One subclass a generation, each in a file ``solo/host_<name>.py`` which nothing else knows:
    whoever adds one adds that file.

    Args:
        version: as its distribution or its setup.py says.
        path: folder of the package ``solo``.
        methods: the host's own registry, ``solo.methods.METHODS``.
        base_method: ``solo.methods.base.BaseMethod``.

    Attributes:
        name: of the generation.
        online: attribute of a method that holds its online network.
        momentum: attribute that holds its moving average.
        loaders: package of the host that has its data loaders.
        finetunes: whether its linear evaluation can train the whole network.
    """

    name: ClassVar[str]
    loaders: ClassVar[str]
    online: ClassVar[str]
    momentum: ClassVar[str]
    finetunes: ClassVar[bool] = True

    def __init__(
        self, version: str, path: Path, methods: dict[str, type], base_method: type
    ) -> None:
        self.version, self.path = version, path
        self.methods, self.base_method = methods, base_method

    @classmethod
    @abstractmethod
    def recognises(cls, base_method: type) -> bool:
        """Whether the solo-learn with this ``BaseMethod`` is of this generation."""

    @abstractmethod
    def register(self, objectives: Sequence[str]) -> None:
        """Make ``timm/<name>`` a backbone, and ``saib:`` an augmentation, of the host's own.

        Args:
            objectives: prefixes of methods' names that must not change the choice of a network.
        """

    @abstractmethod
    def complete(self, cfg: DictConfig) -> DictConfig:
        """Derive what the host's pretraining script derives: rates, crops, classes, defaults."""

    @abstractmethod
    def complete_linear(self, cfg: DictConfig) -> DictConfig:
        """The same for linear evaluation."""

    @abstractmethod
    def build(self, cfg: DictConfig) -> LightningModule:
        """The method that a completed configuration names, as the host's script builds it."""

    @abstractmethod
    def build_linear(self, cfg: DictConfig, backbone: nn.Module) -> LightningModule:
        """The host's ``LinearModel`` on a frozen backbone."""

    @abstractmethod
    def unpack(
        self,
        method: type,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        blocks: Mapping[str, Sequence[str] | None],
    ) -> Given:
        """Take the blocks that are not the host's out of the arguments of a constructor.

        Args:
            method: the class that is built.
            args: its positional arguments. One completed configuration is taken on any host.
            kwargs: its keyword arguments.
            blocks: names of the blocks. Where methods take keyword arguments one of that name
                holds the block, or, if options are listed, each option is one.
        """

    @abstractmethod
    def blocked_infonce(self, model: LightningModule) -> Callable[..., Tensor]:
        """InfoNCE in blocks of pairs, to be called as the host's SimCLR calls its loss.

        Raises:
            IECLError: when this model forms all pairs before it calls its loss.
        """

    def apart(self, method: str) -> bool:
        """Whether a method compares with the images of its own process alone.

        Several processes are then not the one that has their joint batch: there are fewer
        negatives.
        """
        return False

    @abstractmethod
    def options(self, method: str) -> set[str] | None:
        """The ``method_kwargs`` that a method of the host's reads; None if that is not known."""

    @property
    @abstractmethod
    def backbones(self) -> Mapping[str, Any]:
        """Backbone names this host accepts."""

    @abstractmethod
    def network(self, name: str, method: str, *, cifar: bool, **kwargs: Any) -> nn.Module:
        """One of the host's own backbones, its last layer and stem as the library built them."""

    @abstractmethod
    def pipelines(self, cfg: DictConfig) -> list[Any]:
        """The host's transform of one image, for each entry of ``augmentations``."""

    @abstractmethod
    def pretrain_set(self, cfg: DictConfig, transform: Any) -> Dataset:
        """The images of a pretraining configuration, as ``(index, views, label)``."""

    def crops(self, pipelines: list[Any], copies: list[int]) -> Any:
        """One transform that makes so many views of an image by each pipeline."""
        module = self.import_module(f"{self.loaders}.pretrain_dataloader")
        return module.prepare_n_crop_transform(pipelines, copies)

    def pretrain_loader(self, cfg: DictConfig, dataset: Dataset) -> DataLoader:
        """Batches of a data set, shuffled, without one that is not full."""
        return self.import_module(f"{self.loaders}.pretrain_dataloader").prepare_dataloader(
            dataset, batch_size=cfg.optimizer.batch_size, num_workers=cfg.data.num_workers
        )

    def evaluation_transforms(self, dataset: str) -> tuple[Any, Any]:
        """The host's transforms of a data set's training and test images."""
        module = self.import_module(f"{self.loaders}.classification_dataloader")
        return module.prepare_transforms(dataset)

    @abstractmethod
    def evaluation_sets(
        self,
        dataset: str,
        transforms: tuple[Any, Any],
        paths: tuple[str, str],
        data_format: str,
    ) -> tuple[Dataset, Dataset]:
        """Training and test set for evaluation."""

    def import_module(self, name: str) -> Any:
        """``solo.<name>``, e.g. ``utils.knn``."""
        return importlib.import_module(f"solo.{name}")

    def describe(self) -> str:
        """One line for logs and reports."""
        return f"solo-learn {self.version}"


def generations() -> list[type[Host]]:
    """Every ``host_<name>.py`` beside this file, as the class it defines."""
    import iecl_solo.solo as here

    names = [m.name for m in pkgutil.iter_modules(here.__path__) if m.name.startswith("host_")]
    found = []
    for name in sorted(names):
        module = importlib.import_module(f"{here.__name__}.{name}")
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Host)
            and value.__module__ == module.__name__
        ]
    return found


def _checkout() -> Path | None:
    """The checkout named by the environment variable SOLO_LEARN.

    Raises:
        IECLError: when it is set to something that is not a solo-learn checkout.
    """
    given = os.environ.get("SOLO_LEARN")
    if not given:
        return None
    root = Path(given).expanduser().resolve()
    if not (root / "solo" / "__init__.py").is_file():
        raise IECLError(f"SOLO_LEARN={given}: not a solo-learn checkout (it has no solo/)")
    return root


def use_checkout() -> None:
    """Put the checkout named by SOLO_LEARN first on the path.

    A name that is no checkout is left for ``find_host`` to refuse: importing the package, for its
    mathematics say, does not need a host.
    """
    with suppress(IECLError):
        root = _checkout()
        if root is not None and str(root) not in sys.path:
            sys.path.insert(0, str(root))


def locate() -> Path | None:
    """Folder of the package ``solo`` that would be imported, without importing it."""
    spec = importlib.util.find_spec("solo")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _version(path: Path) -> str:
    # a checkout's own setup.py comes first: another solo-learn may be installed beside it
    setup = path.parent / "setup.py"
    if setup.is_file():
        found = re.search(r"version\s*=\s*[\"']([^\"']+)[\"']", setup.read_text())
        return found.group(1) if found else "unknown"
    try:
        return importlib.metadata.version("solo-learn")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def find_version() -> tuple[str, Path]:
    """Version and folder of the solo-learn that would be imported, without importing it.

    Raises:
        HostNotFound, IECLError: as ``find_host``.
    """
    _checkout()
    path = locate()
    if path is None:
        raise HostNotFound(MISSING)
    return _version(path), path


def find_host() -> Host:
    """Import solo-learn and say what it is.

    Raises:
        HostNotFound: one line, with the command that installs it.
        IECLError: when SOLO_LEARN names something that is not a solo-learn checkout, or the
            solo-learn is of no known generation.

    Example:
        >>> find_host().online in ("backbone", "encoder")
        True
    """
    _checkout()
    if locate() is None and "solo" not in sys.modules:
        raise HostNotFound(MISSING)
    import solo.methods
    import solo.methods.base as base

    path = Path(solo.__file__).parent
    for generation in generations():
        if generation.recognises(base.BaseMethod):
            return generation(_version(path), path, solo.methods.METHODS, base.BaseMethod)
    raise IECLError(
        f"solo-learn {_version(path)} in {path}: of no generation that is known "
        f"({', '.join(generation.name for generation in generations())})"
    )
