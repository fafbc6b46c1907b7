"""A trained backbone in the files that other libraries read, and the Python that loads them.

Each file says how its images were prepared: normalisation, size and method are in its metadata,
and what this module prints reads them from there.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision import models, transforms

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.load import Pretrained, load_backbone
from iecl_solo.files import replacing, write_json
from iecl_solo.solo.backbones import PREFIX, first_convolution, timm_backbone
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import evaluation_transform
from iecl_solo.solo.host import Host
from iecl_solo.solo.settings import CIFAR

#: The timm model that each of solo-learn's own names is built on.
_TIMM_NAMES = {
    **{f"vit_{s}": f"vit_{s}_patch16_224" for s in ("tiny", "small", "base", "large")},
    **{f"swin_{s}": f"swin_{s}_patch4_window7_224" for s in ("tiny", "small", "base", "large")},
    **{f"convnext_{s}": f"convnext_{s}" for s in ("tiny", "small", "base", "large")},
}

#: Arguments of a ResNet that change how it begins to train, and nothing that it computes.
_INITIAL = {"zero_init_residual", "zero_init_last"}

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Plain:
    """The network of torchvision's or timm's that a trained backbone is.

    Attributes:
        library: ``torchvision`` or ``timm``.
        name: its name there.
        kwargs: its arguments there.
        stem: dotted name of the first convolution where it is a 3x3 one of stride 1, without a
            max-pool after it; None where the library's own stands.
        padding: of that convolution.
    """

    library: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    stem: str | None = None
    padding: int = 1

    def statements(self) -> list[str]:
        """Python that builds it as ``model``, without trained weights or a last layer."""
        given = "".join(f", {k}={v!r}" for k, v in self.kwargs.items())
        if self.library == "torchvision":
            out = [
                "import torch, torchvision",
                f"model = torchvision.models.{self.name}({given[2:]})",
                "model.fc = torch.nn.Identity()",
            ]
        else:
            out = [
                "import torch, timm",
                f"model = timm.create_model({self.name!r}, num_classes=0{given})",
            ]
        if self.stem is not None:
            out.append(
                f"model.{self.stem} = torch.nn.Conv2d(3, model.{self.stem}.out_channels, 3, "
                f"padding={self.padding}, bias=model.{self.stem}.bias is not None)"
            )
            out.append("model.maxpool = torch.nn.Identity()")
        return out

    def build(self) -> nn.Module:
        """What ``statements`` build, whatever the host has put under timm's names."""
        if self.library == "timm":
            return timm_backbone(name=self.name, small_stem=self.stem is not None, **self.kwargs)
        network: Any = getattr(models, self.name)(**self.kwargs)
        network.fc = nn.Identity()
        if self.stem is not None:
            network.conv1 = nn.Conv2d(3, 64, 3, padding=self.padding, bias=False)
            network.maxpool = nn.Identity()
        return network


def plain_network(name: str, *, cifar: bool, kwargs: dict[str, Any]) -> Plain:
    """What a backbone of solo-learn's is in torchvision or timm.

    Args:
        name: the backbone's name in solo-learn.
        cifar: whether it was trained on CIFAR, where ResNets have another stem.
        kwargs: the backbone's own arguments.

    Raises:
        IECLError: for a network that neither library has.

    >>> plain_network("resnet18", cifar=True, kwargs={}).stem
    'conv1'
    """
    if name.startswith("resnet"):
        return Plain("torchvision", name, kwargs, "conv1" if cifar else None, 2)
    timm_name = name.removeprefix(PREFIX) if PREFIX in name else _TIMM_NAMES.get(name)
    if timm_name is None:
        raise _own_network(name)
    kwargs = dict(kwargs)
    if kwargs.pop("small_stem", False):
        stem = first_convolution(timm_backbone(name=timm_name, **kwargs), timm_name)
        return Plain("timm", timm_name, kwargs, stem)
    return Plain("timm", timm_name, kwargs)


def _own_network(name: str) -> IECLError:
    return IECLError(
        f"backbone '{name}': it is solo-learn's own network and loads into no plain one; "
        "keep the checkpoint"
    )


def preparation(cfg: DictConfig, host: Host) -> Metadata:
    """How an image becomes the backbone's input, as in a run's evaluation.

    Args:
        cfg: the run's completed configuration.
        host: the solo-learn in use.

    Returns:
        ``image_size`` in pixels, ``resize`` (what the shorter side, or both, become before the
        crop), and the normalisation's ``mean`` and ``std`` by channel.
    """
    steps = evaluation_transform(host, cfg.data.dataset, cfg.augmentations[0].crop_size).transforms
    of = {type(step): step for step in steps}
    resize = of[transforms.Resize].size
    size = of[transforms.CenterCrop].size[0] if transforms.CenterCrop in of else resize[0]
    normalize = of[transforms.Normalize]
    return {
        "image_size": size,
        "resize": resize if isinstance(resize, int) else list(resize),
        "mean": list(normalize.mean),
        "std": list(normalize.std),
    }


@dataclass(frozen=True)
class Trained:
    """What is written: the weights, the plain network that takes them, and what is said of it.

    Attributes:
        network: in torchvision or timm.
        state: its weights, on the CPU.
        about: ``method``, ``backbone``, and what ``preparation`` gives.
        num_features: d of the features (B, d).
    """

    network: Plain
    state: dict[str, Tensor]
    about: Metadata
    num_features: int


def trained_network(pretrained: Pretrained, host: Host) -> Trained:
    """The plain network of a checkpoint, proved to compute what the trained backbone computes.

    Raises:
        IECLError: one line, for a network that neither torchvision nor timm has.
    """
    cfg = pretrained.cfg
    named = plain_network(
        cfg.backbone.name,
        cifar=cfg.data.dataset in CIFAR,
        kwargs=plain(cfg.backbone.get("kwargs")) or {},
    )
    about = {"method": cfg.method, "backbone": cfg.backbone.name, **preparation(cfg, host)}
    backbone = load_backbone(pretrained, host).eval()
    state = {k: v.contiguous() for k, v in backbone.state_dict().items()}
    size = about["image_size"]
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone(x)
    for network in _candidates(named):
        # names and shapes do not tell a network from another one: its features do
        if _computes(network, state, x, features):
            return Trained(network, state, about, features.shape[-1])
    raise _own_network(cfg.backbone.name)


def _candidates(named: Plain) -> list[Plain]:
    """The network of that name, and what a host may train under the name instead.

    GitHub main gives MoCo v3's ViTs 12 heads, whatever their width.
    """
    if "vit_" in named.name and "num_heads" not in named.kwargs:
        return [named, replace(named, kwargs={**named.kwargs, "num_heads": 12})]
    return [named]


def _computes(network: Plain, state: dict[str, Tensor], x: Tensor, features: Tensor) -> bool:
    """Whether the network takes the weights and then gives these features for ``x``."""
    try:
        with torch.random.fork_rng(devices=[]):  # its initialisation is thrown away
            model = network.build().eval()
        model.load_state_dict(state)
        with torch.no_grad():
            return torch.allclose(features, model(x), rtol=1e-4, atol=1e-5)
    except (IECLError, RuntimeError):  # other arguments, other tensors or other shapes
        return False


def torchvision_resnet(trained: Trained, form: str) -> str:
    """The torchvision ResNet whose names and shapes the weights have.

    Raises:
        IECLError: for every other network, and for a ResNet with CIFAR's stem.
    """
    network = trained.network
    named = network.name.startswith("resnet") and hasattr(models, network.name)
    if named and network.stem is None and set(network.kwargs) <= _INITIAL:
        with torch.device("meta"):
            plain_one: nn.Module = getattr(models, network.name)()
        shapes = {k: v.shape for k, v in plain_one.state_dict().items() if not k.startswith("fc.")}
        if {k: v.shape for k, v in trained.state.items()} == shapes:
            return network.name
    stem = " with CIFAR's stem" if network.stem is not None else ""
    raise IECLError(
        f"--format {form}: it is for torchvision's ResNets (resnet18, resnet50) with their own "
        f"stem; this backbone is {trained.about['backbone']}{stem}"
    )


def detectron2_name(name: str) -> str:
    """The name in detectron2's ResNet of a tensor of torchvision's.

    A block's norms belong to their convolutions there, stages are counted from the stem, which
    is the first, and the shortcut is a convolution with a norm. solo-learn's converter gives the
    same names.

    >>> detectron2_name("layer1.0.downsample.1.weight")
    'res2.0.shortcut.norm.weight'
    >>> detectron2_name("bn1.running_mean")
    'stem.conv1.norm.running_mean'
    """
    stage, *path, tensor = name.split(".")
    if not stage.startswith("layer"):
        stage, path = "stem", [stage, *path]
    else:
        stage = f"res{int(stage.removeprefix('layer')) + 1}"
    parts: list[str] = []
    for part in path:
        if part.startswith("bn"):
            parts += [f"conv{part.removeprefix('bn')}", "norm"]
        else:
            parts.append("shortcut" if part == "downsample" else part)
    if "shortcut" in parts:  # a sequence of the convolution, 0, and its norm, 1
        parts = [*parts[:-1], "norm"] if parts[-1] == "1" else parts[:-1]
    return ".".join([stage, *parts, tensor])


def _strings(about: Metadata) -> dict[str, str]:
    """As safetensors' header takes it: strings; what is none is JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}


def _write_safetensors(trained: Trained, to: Path) -> None:
    from safetensors.torch import save_file

    with replacing(to) as part:
        save_file(trained.state, part, metadata={"format": "pt", **_strings(trained.about)})


def _write_plain(trained: Trained, to: Path) -> list[str]:
    """One safetensors file for plain torchvision or timm."""
    _write_safetensors(trained, to)
    return [
        "; ".join(trained.network.statements()),
        "import json; from safetensors import safe_open; from safetensors.torch import load_file",
        f"model.load_state_dict(load_file({str(to)!r})); model.eval()",
        f"about = safe_open({str(to)!r}, 'pt').metadata(); from torchvision import transforms as T",
        "size, resize, mean, std = (json.loads(about[key]) for key in "
        "('image_size', 'resize', 'mean', 'std'))",
        "transform = T.Compose([T.Resize(resize), T.CenterCrop(size), T.ToTensor(), "
        "T.Normalize(mean, std)])",
    ]


def _write_huggingface(trained: Trained, to: Path) -> list[str]:
    """A folder of ``config.json`` and ``model.safetensors``, for ``timm.create_model``."""
    import timm

    network, about = trained.network, trained.about
    if network.stem is not None or not timm.is_model(network.name):
        raise IECLError(
            "--format huggingface: timm builds its own network from the folder, and has none like "
            f"{about['backbone']} with a stem for small images; --format plain takes it"
        )
    # torchvision's ResNets are timm's, down to the names; how they begin to train is past
    kwargs = {k: v for k, v in network.kwargs.items() if k not in _INITIAL}
    with torch.device("meta"):
        own: Any = timm_backbone(name=network.name, **kwargs)
    resize = about["resize"] if isinstance(about["resize"], int) else about["resize"][0]
    size = about["image_size"]
    config = {
        "architecture": network.name,
        "num_classes": 0,
        "num_features": trained.num_features,
        "model_args": kwargs,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": about["mean"],
            "std": about["std"],
            "interpolation": "bilinear",
            "crop_pct": size / resize,
            "crop_mode": "center",
            "num_classes": 0,
            "custom_load": False,
            **{k: own.pretrained_cfg.get(k) for k in ("first_conv", "classifier")},
            "fixed_input_size": bool(own.pretrained_cfg.get("fixed_input_size", False)),
        },
        "iecl_solo": about,
    }
    _write_safetensors(trained, to / "model.safetensors")
    write_json(to / "config.json", config)
    return [
        "import timm",
        f"model = timm.create_model({f'local-dir:{to}'!r}, pretrained=True).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    ]


def _in_255(values: list[float]) -> list[float]:
    """Of pixels from 0 to 255, as detectors count them."""
    return [round(255 * value, 3) for value in values]


def _write_detectron2(trained: Trained, to: Path) -> list[str]:
    """The pickle of arrays that detectron2's checkpointer reads."""
    name = torchvision_resnet(trained, "detectron2")
    arrays = {detectron2_name(k): v.numpy() for k, v in trained.state.items()}
    content = {
        "model": arrays,
        "__author__": "iecl-solo",
        "matching_heuristics": True,
        "metadata": trained.about,
    }
    with replacing(to) as part:
        part.write_bytes(pickle.dumps(content))
    depth = int(name.removeprefix("resnet"))
    options: list[Any] = ["MODEL.WEIGHTS", str(to), "MODEL.RESNETS.DEPTH", depth]
    if depth < 50:
        options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    options += ["MODEL.RESNETS.STRIDE_IN_1X1", False, "INPUT.FORMAT", "RGB"]
    options += ["MODEL.PIXEL_MEAN", _in_255(trained.about["mean"])]
    options += ["MODEL.PIXEL_STD", _in_255(trained.about["std"])]
    return [f"cfg.merge_from_list({options!r})"]


def _write_mmdetection(trained: Trained, to: Path) -> list[str]:
    """torch's file of a state dict under torchvision's names, as mmengine's loader reads it."""
    name = torchvision_resnet(trained, "mmdetection")
    with replacing(to) as part:
        torch.save({"meta": trained.about, "state_dict": trained.state}, part)
    start = f"dict(type='Pretrained', checkpoint={str(to)!r})"
    depth = int(name.removeprefix("resnet"))
    mean, std = _in_255(trained.about["mean"]), _in_255(trained.about["std"])
    return [
        f"model.backbone: dict(type='ResNet', depth={depth}, style='pytorch', init_cfg={start})",
        f"model.data_preprocessor: dict(mean={mean}, std={std}, bgr_to_rgb=True)",
    ]


#: What a file is for: how its name ends ("" for a folder), and what writes it and says how to load.
FORMATS: dict[str, tuple[str, Callable[[Trained, Path], list[str]]]] = {
    "plain": (".safetensors", _write_plain),
    "huggingface": ("", _write_huggingface),
    "detectron2": (".pkl", _write_detectron2),
    "mmdetection": (".pth", _write_mmdetection),
}


def check_target(to: Path, form: str) -> None:
    """Refuse a name that another program would not read as this format.

    Raises:
        IECLError: one line.
    """
    suffix, _ = FORMATS[form]
    if suffix and to.suffix != suffix:
        raise IECLError(f"--to {to}: a file name that ends in {suffix} is expected")
    if not suffix and (to.suffix in {s for s, _ in FORMATS.values()} - {""} or to.is_file()):
        raise IECLError(f"--to {to}: --format {form} writes a folder; name one")


def export_backbone(pretrained: Pretrained, host: Host, to: Path, form: str = "plain") -> list[str]:
    """Write a checkpoint's backbone, whole or not at all.

    Args:
        pretrained: the checkpoint.
        host: the solo-learn in use.
        to: the file, or the folder for ``huggingface``.
        form: a key of ``FORMATS``.

    Returns:
        Lines that load it: Python, or an entry of mmdetection's configuration.

    Raises:
        IECLError: one line, for a network that the format does not have, or a file that cannot be
            written.
    """
    check_target(to, form)
    _, write = FORMATS[form]
    return write(trained_network(pretrained, host), to)
