"""Every test of the host runs on whichever solo-learn is imported (SOLO_LEARN names a checkout)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are too small for more


def pytest_report_header() -> str:
    from iecl_solo.solo.host import find_host

    host = find_host()
    return f"host: {host.describe()}"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes of 8 random images."""
    from support import image_folder

    return image_folder(tmp_path_factory.mktemp("images") / "train")
