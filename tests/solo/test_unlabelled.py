"""A folder of photos that nobody sorted: any nesting, a list of paths, several folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from support import HOST, raw_config

from iecl_solo import configure
from iecl_solo.cli.main import main
from iecl_solo.errors import IECLError
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import pretrain


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(["a.png", "2024/b.JPG", "2024/may/c.jpeg", "2025/d.png"] * 3):
        path = root / f"{i}" / name if i > 3 else root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * i, 100, 200)).save(path)
    (root / "notes.txt").write_text("not an image")
    return root


def config(path: object, **overrides: object) -> object:
    cfg = OmegaConf.create(raw_config("iecl_simclr", Path("."), data__no_labels=True, **overrides))
    cfg.data.train_path = path
    return cfg


def test_any_nesting_and_several_sources(photos: Path, tmp_path: Path):
    (tmp_path / "list.txt").write_text(f"{photos / 'a.png'}\n{photos / '2025/d.png'}\n")
    given = {str(photos): 12, str(tmp_path / "list.txt"): 2}
    for path, images in given.items():
        cfg = complete(config(path, optimizer__batch_size=2), HOST)
        assert len(pretrain_loader(cfg, HOST).dataset) == images
        assert cfg.data.train_path == path and cfg.data.num_classes == 1
    folders = [str(photos / "2024"), str(photos / "2025")]
    cfg = complete(config(folders, optimizer__batch_size=2), HOST)
    assert cfg.data.train_path == folders
    assert len(pretrain_loader(cfg, HOST).dataset) == 3


def test_a_run_is_finite_and_shows_no_accuracy(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cfg = config(str(photos), checkpoint__dir=str(tmp_path / "runs"), max_epochs=1)
    run = pretrain(cfg)
    assert run.result is not None
    printed = capsys.readouterr().out
    assert "epoch 1/1" in printed and "acc" not in printed
    losses = [v for k, v in run.result["metrics"].items() if "loss" in k]
    assert losses and torch.tensor(losses).isfinite().all()
    (logged,) = run.folder.glob("logs/*/metrics.csv")
    shown = {*run.result["metrics"], *logged.read_text().splitlines()[0].split(",")}
    assert "train_nce_loss_epoch" in shown
    assert not [name for name in shown if "acc" in name or "class_loss" in name]
    assert main(["inspect", str(run.folder), "--images", "8", "--probes", "2"]) == 0
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_one_folder_of_photos_has_no_accuracy(images: Path, tmp_path: Path, capsys):
    """Without the key a folder of one folder counts as one class, which is always right."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/2024").symlink_to(images / "class0")
    given = {"checkpoint__dir": str(tmp_path / "runs"), "monitor__every_n_epochs": 0}
    raw = raw_config("simclr", tmp_path / "photos", optimizer__batch_size=4, max_epochs=1, **given)
    run = pretrain(OmegaConf.create(raw))
    assert run.result is not None and not [k for k in run.result["metrics"] if "acc" in k]
    assert "no labels" in (printed := capsys.readouterr().out) and "acc" not in printed


def test_the_packaged_folder_is_what_it_shows(photos: Path, images: Path, tmp_path: Path):
    """Images beside the sub-folders, a list and several folders have no labels; others have."""
    (tmp_path / "list.txt").write_text(f"{photos / 'a.png'}\n{photos / '2025/d.png'}\n")
    several = f"[{photos / '2024'},{photos / '2025'}]"
    given = {str(photos): 12, str(tmp_path / "list.txt"): 2, several: 3, str(images): 0}
    for path, count in given.items():
        size = f"optimizer.batch_size={min(count, 4) or 4}"
        cfg = configure("custom/iecl_simclr", [f"data.train_path={path}", size])
        assert cfg.data.no_labels == (count > 0)
        assert count == 0 or len(pretrain_loader(cfg, HOST).dataset) == count
    typed = [f"data.train_path={photos}", "data.no_labels=false", "optimizer.batch_size=2"]
    with pytest.raises(IECLError, match="it holds no class folders"):
        configure("custom/iecl_simclr", [*typed, f"data.train_path={photos / '2024/may'}"])
    assert not configure("custom/iecl_simclr", typed).data.no_labels


def test_too_few_and_none_are_one_line(photos: Path, tmp_path: Path):
    with pytest.raises(IECLError, match="more than the 12 images"):
        complete(config(str(photos), optimizer__batch_size=64), HOST)
    with pytest.raises(IECLError, match=r"data.train_path: .*nowhere: no such folder"):
        complete(config(str(tmp_path / "nowhere")), HOST)
    with pytest.raises(IECLError, match=r"data.train_path: .*holds no image"):
        complete(config(str(tmp_path)), HOST)
