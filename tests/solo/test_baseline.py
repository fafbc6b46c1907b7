"""The baseline is sacred: with the add-on there, the host trains as it does alone, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import HOST, OFF, batches, build, config, same_tensors, train_on

from iecl_solo.solo.config import plain

ROOT = Path(__file__).parents[2]
METHODS = [m for m in ("simclr", "mocov2plus", "byol", "simsiam", "mocov3") if m in HOST.methods]
NET = {"backbone__name": "resnet18"}

# Nothing of the add-on but, on a host that today's stack cannot import, its patches: they are
# reached past iecl_solo/__init__.py, which would register.
ALONE = """
import sys, types, torch
from pathlib import Path
root, work = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
runs = torch.load(work / "runs.pt", weights_only=False)
if not runs["takes_cfg"]:
    bare = types.ModuleType("iecl_solo")
    bare.__path__ = [str(root / "iecl_solo"), str(root)]
    sys.modules["iecl_solo"] = bare
    import importlib.util
    import iecl_solo.patches as patches
    patches.before_import(Path(importlib.util.find_spec("solo").origin).parent)
    import solo
    patches.after_import()
import lightning.pytorch as pl
from omegaconf import OmegaConf
from solo.methods import METHODS
assert not any(name.startswith("iecl") for name in METHODS)

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return len(runs["batches"])
    def __getitem__(self, i):
        return runs["batches"][i]

for method, given in runs["given"].items():
    pl.seed_everything(3, verbose=False)
    if runs["takes_cfg"]:
        from solo.utils.misc import make_contiguous
        model = METHODS[method](OmegaConf.create(given))
        make_contiguous(model)
        model = model.to(memory_format=torch.channels_last)
    else:
        model = METHODS[method](**given)
    pl.seed_everything(7, verbose=False)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, torch.utils.data.DataLoader(Items(), batch_size=None))
    torch.save(model.state_dict(), work / f"{method}.pt")
"""


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Weights of each method after 5 steps in a process without the add-on."""
    work = tmp_path_factory.mktemp("alone")
    given = {}
    for method in METHODS:
        cfg = config(method, images, **NET)
        given[method] = (
            plain(cfg) if HOST.name == "main" else HOST.arguments(cfg, HOST.methods[method])
        )
    torch.save(
        {"takes_cfg": HOST.name == "main", "given": given, "batches": batches(5)}, work / "runs.pt"
    )
    (work / "alone.py").write_text(ALONE)
    done = subprocess.run(
        [sys.executable, "alone.py", str(ROOT), str(work)],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(HOST.path.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {m: torch.load(work / f"{m}.pt", weights_only=True) for m in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_host_with_the_add_on_is_the_host_alone(method: str, alone: dict, images: Path):
    host = train_on(build(method, images, **NET), batches(5)).state_dict()
    assert list(host) == list(alone[method])
    assert same_tensors(alone[method], host) == []


@pytest.mark.parametrize("method", METHODS)
def test_variant_without_weight_is_the_host_alone(method: str, alone: dict, images: Path):
    variant = train_on(build(f"iecl_{method}", images, iecl=OFF, **NET), batches(5)).state_dict()
    assert list(variant) == list(alone[method])
    assert same_tensors(alone[method], variant) == []


@pytest.mark.parametrize("method", METHODS)
def test_building_a_variant_draws_no_random_number_of_the_host(method: str, images: Path):
    host, state = build(method, images), torch.get_rng_state()
    variant, state_of_variant = build(f"iecl_{method}", images), torch.get_rng_state()
    assert torch.equal(state, state_of_variant)
    shared = {k: v for k, v in variant.state_dict().items() if not k.startswith("iecl.")}
    assert same_tensors(host.state_dict(), shared) == []
