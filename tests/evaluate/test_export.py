"""Exported backbones, loaded by those they are for, give the trained backbone's features."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors import safe_open
from support import HOST
from torch import Tensor, nn

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.export import export_backbone
from iecl_solo.evaluate.load import Pretrained, load_backbone
from iecl_solo.solo.backbones import build_backbone
from iecl_solo.solo.data import evaluation_transform


def trained(
    name: str, dataset: str = "custom", method: str = "iecl_simclr", **kwargs
) -> Pretrained:
    """A checkpoint of a backbone with random weights, norms' statistics included."""
    cfg = OmegaConf.create(
        {
            "method": method,
            "backbone": {"name": name, "kwargs": kwargs},
            "data": {"dataset": dataset},
            "augmentations": [{"crop_size": 32}],
        }
    )
    assert isinstance(cfg, DictConfig)
    torch.manual_seed(0)
    cifar = dataset == "cifar10"
    backbone = build_backbone(HOST, name, method=method, cifar=cifar, **kwargs)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    return Pretrained(Path("run.ckpt"), cfg, {"state_dict": state})


def features(pretrained: Pretrained, x: Tensor) -> Tensor:
    with torch.no_grad():
        return load_backbone(pretrained, HOST).eval()(x)


def images(seed: int = 0, size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def picture() -> Image.Image:
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(1))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


NETWORKS = [
    ("resnet18", "cifar10", "iecl_simclr", {}),
    ("resnet18", "custom", "simclr", {"zero_init_residual": True}),
    ("timm/resnet18", "custom", "simclr", {"small_stem": True}),
    ("vit_tiny", "custom", "simclr", {"img_size": 32, "patch_size": 8}),
    # GitHub main trains other heads under the same names and shapes
    ("vit_tiny", "custom", "iecl_mocov3", {"img_size": 32, "patch_size": 8}),
]


@pytest.mark.parametrize(("name", "dataset", "method", "kwargs"), NETWORKS)
def test_what_is_printed_gives_the_features_of_an_image(
    name: str, dataset: str, method: str, kwargs: dict, tmp_path: Path
):
    pretrained = trained(name, dataset, method, **kwargs)
    to = tmp_path / "backbone.safetensors"
    space: dict = {}
    exec("\n".join(export_backbone(pretrained, HOST, to)), space)
    image = picture()
    own = evaluation_transform(HOST, dataset, 32)(image)
    assert torch.equal(space["transform"](image), own)
    with torch.no_grad():
        torch.testing.assert_close(space["model"](own[None]), features(pretrained, own[None]))


def test_metadata_say_method_size_and_normalisation(tmp_path: Path):
    to = tmp_path / "backbone.safetensors"
    export_backbone(trained("resnet18", "cifar10"), HOST, to)
    with safe_open(to, "pt") as file:
        about = file.metadata()
    assert about["method"] == "iecl_simclr" and about["backbone"] == "resnet18"
    assert json.loads(about["image_size"]) == 32
    assert json.loads(about["mean"]) == [0.4914, 0.4822, 0.4465]
    assert json.loads(about["std"]) == [0.247, 0.243, 0.261]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"zero_init_residual": True}),
        ("vit_tiny", {"img_size": 32, "patch_size": 8}),
    ],
)
def test_folder_is_read_by_timm_without_a_network(name: str, kwargs: dict, tmp_path: Path):
    pretrained = trained(name, **kwargs)
    lines = export_backbone(pretrained, HOST, tmp_path / "folder", "huggingface")
    assert {p.name for p in (tmp_path / "folder").iterdir()} == {"config.json", "model.safetensors"}
    space: dict = {}
    exec("\n".join(lines), space)
    with torch.no_grad():
        torch.testing.assert_close(space["model"](images()), features(pretrained, images()))
    data = timm.data.resolve_model_data_config(space["model"])
    assert list(data["input_size"]) == [3, 32, 32] and data["crop_pct"] == 1.0
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    image = picture()
    own = evaluation_transform(HOST, "custom", 32)(image)
    torch.testing.assert_close(space["transform"](image), own)
    # as for fine-tuning, with a new last layer
    tuned = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True, num_classes=10)
    assert tuned(images()).shape == (2, 10)


def resnet50_names() -> set[str]:
    """What detectron2's ResNet-50 has, written out from its structure."""

    def convolution(name: str) -> set[str]:
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return {f"{name}.weight", *(f"{name}.norm.{n}" for n in norm)}

    names = convolution("stem.conv1")
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        names |= convolution(f"res{stage}.0.shortcut")
        for block in range(blocks):
            for i in (1, 2, 3):
                names |= convolution(f"res{stage}.{block}.conv{i}")
    return names


def detectron2_resnet(arrays: dict, x: Tensor) -> Tensor:
    """Pooled res5 of a bottleneck ResNet by detectron2's names, strides in 3x3 convolutions."""
    w = {k: torch.as_tensor(v) for k, v in arrays.items()}

    def convolve(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = w[f"{name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        norm = (w[f"{name}.norm.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *norm)

    x = F.max_pool2d(F.relu(convolve("stem.conv1", x, 2)), 3, 2, 1)
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            name, stride = f"res{stage}.{block}", 2 if block == 0 and stage > 2 else 1
            y = F.relu(convolve(f"{name}.conv1", x))
            y = convolve(f"{name}.conv3", F.relu(convolve(f"{name}.conv2", y, stride)))
            x = F.relu(y + (convolve(f"{name}.shortcut", x, stride) if block == 0 else x))
    return x.mean((2, 3))


def test_detectron2_gets_its_own_names_and_the_same_features(tmp_path: Path):
    pretrained = trained("resnet50")
    (line,) = export_backbone(pretrained, HOST, tmp_path / "r50.pkl", "detectron2")
    content = pickle.loads((tmp_path / "r50.pkl").read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"] == "iecl-solo"
    assert set(content["model"]) == resnet50_names()
    assert content["metadata"]["image_size"] == 32
    assert content["metadata"]["method"] == "iecl_simclr"
    x = images()
    torch.testing.assert_close(detectron2_resnet(content["model"], x), features(pretrained, x))
    given: dict = {}

    class Config:
        @staticmethod
        def merge_from_list(options: list) -> None:
            given.update(zip(options[::2], options[1::2], strict=True))

    exec(line, {"cfg": Config})
    assert given["MODEL.RESNETS.DEPTH"] == 50 and given["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    assert given["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert given["MODEL.WEIGHTS"] == str(tmp_path / "r50.pkl")


def test_the_other_files_of_a_resnet(tmp_path: Path):
    """mmdetection's, by torchvision's names; detectron2's of a ResNet without bottlenecks."""
    pretrained = trained("resnet18")
    lines = export_backbone(pretrained, HOST, tmp_path / "r18.pth", "mmdetection")
    assert "depth=18" in lines[0] and "58.395" in lines[1]
    content = torch.load(tmp_path / "r18.pth", weights_only=True)
    assert content["meta"]["std"] == [0.229, 0.224, 0.225]
    network = torchvision.models.resnet18()
    missing, unexpected = network.load_state_dict(content["state_dict"], strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    network.fc = nn.Identity()
    with torch.no_grad():
        found = network.eval()(images())
    torch.testing.assert_close(found, features(pretrained, images()))
    (line,) = export_backbone(trained("timm/resnet18"), HOST, tmp_path / "t.pkl", "detectron2")
    assert "RES2_OUT_CHANNELS', 64" in line


@pytest.mark.parametrize(
    ("pretrained", "to", "form", "words"),
    [
        (("resnet18", "cifar10"), "a.pkl", "detectron2", "resnet18 with CIFAR's stem"),
        (("resnet18", "cifar10"), "a", "huggingface", "stem for small images"),
        (("timm/test_resnet",), "a.pth", "mmdetection", "this backbone is timm/test_resnet"),
        (("resnet18",), "a.pth", "detectron2", "ends in .pkl"),
        (("resnet18",), "a.safetensors", "huggingface", "writes a folder"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    pretrained: tuple, to: str, form: str, words: str, tmp_path: Path
):
    with pytest.raises(IECLError, match=words):
        export_backbone(trained(*pretrained), HOST, tmp_path / to, form)
    assert not list(tmp_path.iterdir())


def test_a_network_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch):
    """The same tensors, another computation: ViTs of other heads."""
    pretrained = trained("vit_tiny", img_size=32, patch_size=8)
    real = build_backbone(HOST, "vit_tiny", method="simclr", cifar=False, img_size=32, patch_size=8)
    for block in real.blocks:
        block.attn.num_heads, block.attn.head_dim = 6, 32
    real.load_state_dict(load_backbone(pretrained, HOST).state_dict())
    monkeypatch.setattr("iecl_solo.evaluate.export.load_backbone", lambda *given: real)
    with pytest.raises(IECLError, match="loads into no plain one"):
        export_backbone(pretrained, HOST, tmp_path / "a.safetensors")
