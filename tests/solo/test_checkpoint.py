"""What a run saves: readable by any of the host's scripts, resumable, exportable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from support import (
    HOST,
    assert_resumes,
    batches,
    build,
    config,
    online,
    raw_config,
    same_tensors,
    train_on,
)

from iecl_solo.cli.main import main as cli
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.load import load_backbone, load_method, read_pretrained
from iecl_solo.files import write_json
from iecl_solo.saib import load_saib
from iecl_solo.solo.build import build_model
from iecl_solo.solo.checkpoint import backbone_state, read_checkpoint
from iecl_solo.solo.config import plain
from iecl_solo.train.fit import pretrain

PLAIN = {"eta": 0.01}
PARAMETRIZED = {"eta": 1.0, "regularizer": {"mode": "parametrize"}}


def _saved(method: str, images: Path, to: Path, iecl: dict) -> tuple[torch.nn.Module, Path]:
    model = build(method, images, iecl=iecl, backbone__name="resnet18")
    path = to / "run.ckpt"
    trainer_kwargs = {"max_epochs": 1, "enable_checkpointing": False}
    train_on(model, batches(2), **trainer_kwargs)
    model.trainer.save_checkpoint(path)
    return model, path


@pytest.mark.parametrize("iecl", [PLAIN, PARAMETRIZED], ids=["penalty", "parametrize"])
@pytest.mark.parametrize("method", ["iecl_simclr", "iecl_byol", "iecl_simsiam"])
def test_backbone_stands_under_the_hosts_plain_names(
    method: str, iecl: dict, images: Path, tmp_path: Path
):
    """The rewriting that main_linear.py does to every key must find each tensor of the network."""
    import torchvision

    model, path = _saved(method, images, tmp_path, iecl)
    state = torch.load(path, weights_only=True)["state_dict"]
    # as main_linear.py rewrites names: "encoder" becomes "backbone", the rest is dropped
    seen = {}
    for key, value in state.items():
        key = key.replace("encoder", "backbone")
        if "backbone" in key:
            seen[key.replace("backbone.", "")] = value
    plain = torchvision.models.resnet18()
    plain.fc = torch.nn.Identity()
    result = plain.load_state_dict(seen, strict=False)
    assert result.missing_keys == []
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), online(model.eval())(x))


@pytest.mark.parametrize("iecl", [PLAIN, PARAMETRIZED], ids=["penalty", "parametrize"])
def test_resumed_run_is_the_uninterrupted_one(iecl: dict, images: Path, tmp_path: Path):
    assert_resumes("iecl_byol", images, tmp_path / "half.ckpt", iecl=iecl, max_epochs=2)


def test_compiled_backbone_saves_plain_names(images: Path, tmp_path: Path):
    model = build("iecl_simclr", images)
    setattr(model, HOST.online, torch.compile(online(model), backend="eager"))
    train_on(model, batches(1))
    model.trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = backbone_state(read_checkpoint(tmp_path / "run.ckpt"))
    bare = build("iecl_simclr", images)
    assert set(state) == set(online(bare).state_dict())


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of the command itself."""
    cfg = OmegaConf.create(
        raw_config(
            "iecl_simclr",
            images,
            data__val_path=str(images),
            max_epochs=1,
            checkpoint__dir=str(tmp_path_factory.mktemp("runs")),
        )
    )
    return pretrain(cfg)


def test_export_loads_into_plain_timm(run, tmp_path: Path, capsys):
    out = tmp_path / "backbone.safetensors"
    assert cli(["export", str(run.folder), "--to", str(out)]) == 0
    _, *recipe = capsys.readouterr().out.splitlines()
    pretrained = read_pretrained(run.checkpoint)
    assert same_tensors(load_file(out), load_backbone(pretrained, HOST).state_dict()) == []
    # in a process of its own: nothing of this package may be needed
    script = "\n".join([*recipe, "import sys; assert 'iecl_solo' not in sys.modules; print('ok')"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize("variant", ["convex", "noise"])
def test_every_variant_of_saib_is_exported(variant: str, images: Path, tmp_path: Path):
    cfg = config("iecl_simclr", images, iecl={"saib": {"variant": variant}})
    model = build_model(cfg, HOST)
    train_on(model, batches(1))
    model.trainer.save_checkpoint(tmp_path / "run.ckpt")
    write_json(tmp_path / "args.json", plain(cfg))
    out = tmp_path / "saib.safetensors"
    assert cli(["export", str(tmp_path), "--saib", "--to", str(out)]) == 0
    assert same_tensors(model.iecl.saib.state_dict(), load_saib(out).state_dict()) == []
    with safe_open(out, "pt") as file:  # what its input was
        about = file.metadata()
    assert json.loads(about["mean"]) == [0.485, 0.456, 0.406] and about["method"] == "iecl_simclr"


def test_learned_saib_comes_back_on_its_own(run, tmp_path: Path):
    out = tmp_path / "saib.safetensors"
    assert cli(["export", str(run.folder), "--saib", "--to", str(out)]) == 0
    saib = load_saib(out)
    learned = load_method(read_pretrained(run.folder), HOST).iecl.saib
    assert same_tensors(learned.state_dict(), saib.state_dict()) == []
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(saib(x), learned(x))


def test_checkpoint_of_another_backbone_is_refused(run):
    pretrained = read_pretrained(run.folder)
    pretrained.cfg.backbone.name = "resnet18"
    with pytest.raises(IECLError, match="of another backbone"):
        load_backbone(pretrained, HOST)


def test_finished_run_is_not_trained_again(run, images: Path, capsys):
    before = run.checkpoint.stat().st_mtime_ns
    cfg = OmegaConf.create({k: v for k, v in run.args.items() if k != "versions"})
    raw = raw_config("iecl_simclr", images, data__val_path=str(images), max_epochs=1)
    raw["checkpoint"] = cfg.checkpoint
    pretrain(OmegaConf.create(raw))
    assert "trained already" in capsys.readouterr().out
    assert run.checkpoint.stat().st_mtime_ns == before


def test_another_run_of_that_name_is_not_overwritten(run, images: Path):
    raw = raw_config("iecl_simclr", images, data__val_path=str(images), max_epochs=3)
    raw["checkpoint"] = OmegaConf.create(run.args).checkpoint
    with pytest.raises(IECLError, match=r"other settings \(max_epochs: 1 there, 3 here\)"):
        pretrain(OmegaConf.create(raw))


def test_run_that_fails_before_its_first_checkpoint_leaves_nothing(images: Path, tmp_path: Path):
    folder = images.parent / "broken"
    for source in images.glob("*/*.png"):
        to = folder / source.parent.name / source.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(source.read_bytes())
    (folder / "class1" / "0.png").write_bytes(b"not an image")
    raw = raw_config("iecl_simclr", folder, checkpoint__dir=str(tmp_path / "runs"))
    with pytest.raises(IECLError, match=r"0\.png: it does not decode"):
        pretrain(OmegaConf.create(raw))
    assert list(tmp_path.rglob("*.*")) == []


def test_config_is_kept_beside_the_result(run):
    args = read_pretrained(run.folder).cfg
    assert args.method == "iecl_simclr" and args.iecl["lambda"] >= 0
    assert set(args.versions) >= {"torch", "solo-learn", "iecl-solo"}
    again = config("iecl_simclr", Path(args.data.train_path), data__val_path=args.data.val_path)
    assert again.optimizer.lr == args.optimizer.lr
