"""Solo-learn's own unmodified scripts, on checkpoints of ours; and the plugin that lets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support import HOST, image_folder

from iecl_solo.devices import choose_precision
from iecl_solo.evaluate.load import load_method, read_pretrained
from iecl_solo.saib import save_saib
from iecl_solo.solo.checkpoint import backbone_state, read_checkpoint
from iecl_solo.train.packaged import packaged_configs

ROOT = Path(__file__).parents[2]
SCRIPTS = HOST.path.parent  # GitHub main keeps them at the checkout's root; 1.0.2 ships none
PATH = f"{ROOT}{os.pathsep}{SCRIPTS}"

PLUGIN_PROBE = """
import hydra
from omegaconf import DictConfig
from solo.methods import METHODS

@hydra.main(version_base="1.2")
def main(cfg: DictConfig):
    print("method", cfg.method, cfg.method in METHODS, cfg.iecl["lambda"])

if __name__ == "__main__":
    main()
"""


def run_python(arguments: list[str], cwd: Path, **env: str) -> str:
    """Output of a Python process; its error output if it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, **env},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def regular_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a plain ``pip install`` lays it out."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, ROOT],
        check=True,
        capture_output=True,
    )
    return target


@pytest.mark.parametrize("install", [pytest.param("editable", marks=pytest.mark.robust), "regular"])
def test_hydra_finds_the_plugin(install: str, tmp_path: Path, request: pytest.FixtureRequest):
    """A script of the host's, which imports nothing of ours, has the methods and the configs."""
    path = [str(ROOT), str(SCRIPTS)]
    if install == "regular":
        path[0] = str(request.getfixturevalue("regular_install"))
    (tmp_path / "probe.py").write_text(PLUGIN_PROBE)
    probe = ["probe.py", "--config-path", "pkg://iecl_solo.configs"]
    probe += ["--config-name", "pretrain/digits/iecl_simclr"]
    # 1.0.2 cannot even be imported unpatched, so there the launcher runs the script
    if HOST.name != "main":
        probe = ["-m", "iecl_solo", *probe]
    out = run_python(probe, tmp_path, PYTHONPATH=os.pathsep.join(path))
    assert "method iecl_simclr True 0." in out


@pytest.mark.any_host
def test_regular_install_holds_all_it_needs(regular_install: Path, tmp_path: Path):
    code = (
        "import iecl_solo, iecl_solo.patches, iecl_solo.train.packaged as app;"
        "print(iecl_solo.__file__); print(len(app.packaged_configs('pretrain')))"
    )
    out = run_python(["-c", code], tmp_path, PYTHONPATH=str(regular_install)).splitlines()
    assert Path(out[0]).is_relative_to(regular_install)
    assert int(out[1]) == len(packaged_configs("pretrain"))


if (SCRIPTS / "main_pretrain.py").is_file():
    # strategy and sync_batchnorm as in the host's own YAML
    CPU = ["accelerator=cpu", "precision=auto", "data.num_workers=0"]
    CPU += ["strategy=ddp", "sync_batchnorm=true"]
    KEEP_LINEAR = """
import runpy, sys, torch, lightning.pytorch as pl
fit = pl.Trainer.fit
def keep(self, model, *args, **kwargs):
    torch.save({k: v.clone() for k, v in model.backbone.state_dict().items()}, "held.pt")
    return fit(self, model, *args, **kwargs)
pl.Trainer.fit = keep
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

    COUNT_SAIB = """
import runpy, sys
from iecl_solo.augment import FrozenSAIB
calls, forward = [0], FrozenSAIB.__call__
def counted(self, image):
    calls[0] += 1
    return forward(self, image)
FrozenSAIB.__call__ = counted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("saib calls", calls[0])
"""

    @pytest.fixture(scope="module")
    def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """What the unmodified main_pretrain.py leaves of ``method: iecl_simclr``."""
        work = tmp_path_factory.mktemp("work")
        image_folder(work / "train", images=6)
        run_python(
            [
                str(SCRIPTS / "main_pretrain.py"),
                *("--config-path", "pkg://iecl_solo.configs"),
                *("--config-name", "pretrain/digits/iecl_simclr"),
                *CPU,
                *("data.train_path=train", "data.val_path=train"),
                *("backbone.name=resnet18", "~backbone.kwargs"),
                *("optimizer.batch_size=6", "max_epochs=1"),
                "++knn_eval.enabled=true",
            ],
            work,
        )
        (checkpoint,) = work.rglob("*.ckpt")
        return checkpoint

    def test_main_pretrain_runs_the_variant(pretrained: Path):
        args = json.loads((pretrained.parent / "args.json").read_text())
        assert args["method"] == "iecl_simclr"
        assert args["precision"] == choose_precision("auto", cpu=True)
        # the whole block is saved, defaults included
        assert args["iecl"]["entropy"]["estimator"] == "coding_rate"
        assert any(k.startswith("iecl.saib") for k in read_checkpoint(pretrained)["state_dict"])

    def test_main_pretrain_takes_a_frozen_saib(pretrained: Path, tmp_path: Path):
        """Another method, trained by the unmodified script on views that a learned SAIB made."""
        cfg, folder = read_pretrained(pretrained).cfg, pretrained.parents[3]
        model = load_method(read_pretrained(pretrained), HOST)
        save_saib(model.iecl.saib, tmp_path / "saib.safetensors")
        (tmp_path / "count.py").write_text(COUNT_SAIB)
        for augmentation in cfg.augmentations:
            augmentation.saib = {"file": f"{tmp_path}/saib.safetensors", "prob": 1.0}
        own = {"defaults": ["/pretrain/digits/byol", "_self_"], "augmentations": cfg.augmentations}
        OmegaConf.save(OmegaConf.create(own), tmp_path / "frozen.yaml")
        out = run_python(
            [
                *("count.py", str(SCRIPTS / "main_pretrain.py")),
                *("--config-path", str(tmp_path), "--config-name", "frozen"),
                *CPU,
                *(f"data.train_path={folder / 'train'}", "data.val_path=null"),
                *("backbone.name=resnet18", "~backbone.kwargs"),
                *("optimizer.batch_size=6", "max_epochs=1", "checkpoint.enabled=false"),
            ],
            tmp_path,
        )
        views = sum(a.num_crops for a in cfg.augmentations)
        images = sum(1 for _ in (folder / "train").rglob("*.png"))
        assert f"saib calls {views * images}" in out

    def test_main_linear_holds_the_trained_backbone(pretrained: Path, tmp_path: Path):
        (tmp_path / "keep.py").write_text(KEEP_LINEAR)
        data = pretrained.parents[3] / "train"
        run_python(
            [
                "keep.py",
                str(SCRIPTS / "main_linear.py"),
                *("--config-path", "pkg://iecl_solo.configs", "--config-name", "linear/digits"),
                *CPU,
                f"data.train_path={data}",
                f"data.val_path={data}",
                f"pretrained_feature_extractor='{pretrained}'",
                *("backbone.name=resnet18", "~backbone.kwargs"),
                *("optimizer.batch_size=6", "max_epochs=1"),
                "pretrain_method=iecl_simclr",
            ],
            tmp_path,
        )
        held = torch.load(tmp_path / "held.pt", weights_only=True)
        trained = backbone_state(read_checkpoint(pretrained))
        assert held.keys() == trained.keys()
        assert [k for k in held if not torch.equal(held[k], trained[k])] == []

    def test_main_knn_classifies(pretrained: Path, tmp_path: Path):
        data = pretrained.parents[3] / "train"
        out = run_python(
            [
                *("-m", "iecl_solo", str(SCRIPTS / "main_knn.py")),
                *("--dataset", "custom", "--train_data_path", str(data)),
                *("--val_data_path", str(data), "--num_workers", "0", "--batch_size", "6"),
                *("--pretrained_checkpoint_dir", str(pretrained.parent)),
                *("--k", "1", "--temperature", "0.07"),
                *("--distance_function", "cosine", "euclidean", "--feature_type", "backbone"),
            ],
            tmp_path,
        )
        # its own training images, one neighbour: each finds itself
        assert out.count("Result: acc@1=100.0") == 2
