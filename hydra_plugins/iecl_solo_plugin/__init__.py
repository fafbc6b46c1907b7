"""Hydra finds this by itself: the methods are registered and the packaged configs are on its path.

It is what lets solo-learn's own unmodified ``main_pretrain.py`` run ``method: iecl_simclr``.
"""

from __future__ import annotations

import builtins

import iecl_solo.configs  # importing the package registers the methods
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

_VARIANTS = "iecl-variants"


class IECLSearchPathPlugin(SearchPathPlugin):
    """Appends ``pkg://iecl_solo.configs``, and the variants, to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="iecl-solo", path="pkg://iecl_solo.configs")
        search_path.append(provider="iecl-solo", path=f"{_VARIANTS}://")


class VariantSource(ConfigSource):
    """The variants' configurations, which are no files: ``pretrain/cifar/iecl_simclr``."""

    @staticmethod
    def scheme() -> str:
        return _VARIANTS

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return bool(self._below(config_path))

    def is_config(self, config_path: str) -> bool:
        return iecl_solo.configs.variant(config_path) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {config_path}")
        text = iecl_solo.configs.text(config_path)
        return ConfigResult(
            provider=self.provider,
            path=f"{self.scheme()}://{config_path}",
            config=OmegaConf.create(text),
            header=self._get_header_dict(text),
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return [] if results_filter == ObjectType.GROUP else self._below(config_path)

    @staticmethod
    def _below(folder: str) -> builtins.list[str]:
        split = [f"pretrain/{name}".rpartition("/") for name in iecl_solo.configs.names("pretrain")]
        here = [name for where, _, name in split if where == folder.strip("/")]
        return [name for name in here if iecl_solo.configs.variant(f"{folder}/{name}")]
