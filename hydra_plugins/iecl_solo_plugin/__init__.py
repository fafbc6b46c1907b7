"""Hydra finds this by itself: the methods are registered and the packaged configs are on its path.

It is what lets solo-learn's own unmodified ``main_pretrain.py`` run ``method: iecl_simclr``.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

import iecl_solo  # noqa: F401  (importing it registers the methods)


class IECLSearchPathPlugin(SearchPathPlugin):
    """Appends ``pkg://iecl_solo.configs`` to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="iecl-solo", path="pkg://iecl_solo.configs")
