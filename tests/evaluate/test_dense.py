"""The dense probe: feature maps of each kind of network, masks, mIoU by a slow count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from support import raw_config
from torch import nn
from torchvision import transforms

from iecl_solo.cli.main import main
from iecl_solo.digits import write_digits
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.dense import (
    IGNORED,
    Masked,
    dense_miou,
    feature_map,
    masked_sets,
    square,
)
from iecl_solo.evaluate.protocol import DenseProtocol, EvaluationConfig
from iecl_solo.evaluate.run import evaluate
from iecl_solo.files import read_json
from iecl_solo.solo.config import parse_block
from iecl_solo.train.fit import pretrain


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, their strokes as masks: 0 the ground, 1 a digit 3, 2 a digit 8."""
    digits = write_digits(tmp_path_factory.mktemp("digits") / "d", classes=[3, 8])
    root = tmp_path_factory.mktemp("dense")
    for part, ours in (("train", "train"), ("test", "val")):
        for label in ("3", "8"):
            for path in sorted((digits / part / label).glob("*.png"))[:12]:
                for kind in ("images", "masks"):
                    (root / ours / kind / label).mkdir(parents=True, exist_ok=True)
                image = Image.open(path).convert("RGB")
                image.save(root / ours / "images" / label / path.name)
                ink = np.asarray(image.convert("L")) > 120
                mask = np.where(ink, 1 if label == "3" else 2, 0).astype(np.uint8)
                mask[0] = IGNORED
                Image.fromarray(mask).save(root / ours / "masks" / label / path.name)
    return root


class _Brightness(nn.Module):
    """A backbone whose feature map is the mean brightness of places of 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


TO_TENSOR = transforms.Compose([transforms.ToTensor()])


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: torchvision.models.resnet18(num_classes=10), (512, 2, 2)),
        (lambda: timm.create_model("test_resnet", num_classes=0), None),
        (lambda: timm.create_model("test_vit", num_classes=0, img_size=64), None),
        (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224", num_classes=0, img_size=64, embed_dim=24
            ),
            (192, 2, 2),
        ),
    ],
)
def test_feature_map(network, shape):
    backbone = network().eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = feature_map(backbone, x)
    assert found.dim() == 4 and found.shape[2] == found.shape[3] >= 2
    if shape:
        assert found.shape[1:] == shape
    if isinstance(backbone, torchvision.models.ResNet):
        pooled = backbone.fc(found.mean((2, 3)))
        torch.testing.assert_close(pooled, backbone(x))
    assert not any(module._forward_hooks for module in backbone.modules())


def test_map_of_one_place_is_refused():
    with pytest.raises(IECLError, match=r"32 x 32 pixels is one place; give a larger dense.size"):
        feature_map(
            timm.create_model("test_resnet", num_classes=0).eval(), torch.zeros(1, 3, 32, 32)
        )


def test_linear_head_finds_what_is_linear(root: Path):
    protocol = DenseProtocol(root=str(root), max_epochs=60, lr=0.05)
    train, test = masked_sets(protocol, square(TO_TENSOR, 32), 32)
    for part in (train, test):
        part.relabel = {0: 0, 1: 1, 2: 1}  # stroke or ground: a matter of brightness alone
    assert len(train) == 24 and test[0][1].shape == (32, 32)
    found = dense_miou(_Brightness(), train, test, protocol)
    assert found > 80
    assert found == dense_miou(_Brightness(), train, test, protocol)  # seeded
    # which digit a place belongs to cannot be told from its brightness
    hard = masked_sets(protocol, square(TO_TENSOR, 32), 32)
    assert dense_miou(_Brightness(), *hard, protocol) < found - 15


def test_miou_is_the_mean_over_classes(root: Path, monkeypatch: pytest.MonkeyPatch):
    protocol = DenseProtocol(root=str(root), max_epochs=1)
    train, test = masked_sets(protocol, square(TO_TENSOR, 32), 32)
    seen = []
    update = torch.argmax
    monkeypatch.setattr(
        torch.Tensor, "argmax", lambda self, *a: seen.append(update(self, *a)) or seen[-1]
    )
    found = dense_miou(_Brightness(), train, test, protocol)
    monkeypatch.undo()
    guess, truth = torch.cat(seen), torch.stack([test[i][1] for i in range(len(test))])
    ious = []
    for c in range(3):
        told = truth != IGNORED
        both = ((guess == c) & (truth == c) & told).sum()
        either = (((guess == c) | (truth == c)) & told).sum()
        ious.append(float(both / either))
    assert found == pytest.approx(100 * np.mean(ious), abs=1e-4)


def test_what_is_missing_is_said(root: Path, tmp_path: Path):
    with pytest.raises(IECLError, match=r"dense\.root: no value"):
        masked_sets(DenseProtocol(), TO_TENSOR, 32)
    with pytest.raises(IECLError, match="did you mean 'VOCSegmentation'"):
        DenseProtocol(torchvision="VOCSegmentatoin")
    with pytest.raises(IECLError, match="torchvision's VOCSegmentation: Dataset not found"):
        masked_sets(DenseProtocol(str(tmp_path), "VOCSegmentation"), TO_TENSOR, 32)
    image = next((root / "train" / "images").rglob("*.png"))
    folder = tmp_path / "train" / "images"
    folder.mkdir(parents=True)
    Image.open(image).save(folder / "a.png")
    with pytest.raises(IECLError, match=r"a\.png has no mask"):
        masked_sets(DenseProtocol(str(tmp_path)), TO_TENSOR, 32)
    with pytest.raises(IECLError, match="mode RGB, one class a pixel"):
        Masked([(image, image)], TO_TENSOR, 32)[0]


def test_of_a_run_by_the_command_and_as_a_measure(
    root: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = raw_config(
        "simclr",
        images,
        data__val_path=str(images),
        max_epochs=1,
        monitor__every_n_epochs=0,
        checkpoint__dir=str(tmp_path),
    )
    run = pretrain(OmegaConf.create(given))
    capsys.readouterr()
    arguments = ["dense", str(run.folder), "--root", str(root), "--epochs", "3"]
    assert main(arguments) == 2
    assert "one place; give a larger dense.size" in capsys.readouterr().err
    assert main([*arguments, "--size", "96"]) == 0
    found = read_json(run.folder / "dense.json")["dense_miou"]
    assert f"mIoU {found:.2f} %" in capsys.readouterr().out and 0 < found < 100
    block = {
        "linear": {"max_epochs": 0},
        "measures": ["dense_miou"],
        "dense": {"root": str(root), "max_epochs": 3, "size": 96},
    }
    protocol = parse_block("evaluation", EvaluationConfig, block)
    assert evaluate(run, protocol)["dense_miou"] == pytest.approx(found)
    with pytest.raises(IECLError, match=r"evaluation\.dense\.root"):
        EvaluationConfig(measures=["dense_miou"])
