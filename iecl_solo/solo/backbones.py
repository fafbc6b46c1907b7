"""Every timm model as a backbone of the host, ``timm/<name>``, with a stem for small images."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from torch import nn

from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.solo.host import Host

PREFIX = "timm/"


def first_convolution(model: nn.Module, name: str) -> str:
    """Dotted name of the strided convolution that a timm model begins with.

    Raises:
        IECLError: for a model that begins otherwise (one that cuts the image into patches).
    """
    path = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    path = path[0] if isinstance(path, (tuple, list)) else path
    conv = model.get_submodule(path) if path else None
    if not isinstance(conv, nn.Conv2d) or conv.stride == conv.kernel_size:
        raise IECLError(
            f"{PREFIX}{name}: small_stem is for networks that begin with a strided convolution; "
            "this one cuts the image into patches, so give it patch_size and img_size instead"
        )
    assert path is not None  # it named the convolution
    return path


def _small_stem(model: nn.Module, name: str) -> None:
    """Keep the resolution of small images: first convolution 3x3 with stride 1, no max-pool."""
    path = first_convolution(model, name)
    conv: nn.Conv2d = model.get_submodule(path)  # type: ignore[assignment]
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, small)
    if isinstance(getattr(model, "maxpool", None), nn.MaxPool2d):
        model.maxpool = nn.Identity()


def timm_backbone(
    method: str | None = None, *, name: str, small_stem: bool = False, **kwargs: Any
) -> nn.Module:
    """A timm model as the host wants a backbone: (B, 3, H, W) to (B, num_features).

    Args:
        method: what hosts pass first; not used.
        name: any name of ``timm.list_models()``.
        small_stem: begin with a 3x3 convolution of stride 1 and no max-pool, as solo-learn does
            for ResNets on CIFAR.
        kwargs: handed to ``timm.create_model`` (``img_size``, ``patch_size``, ...).

    Raises:
        IECLError: unknown name, or a small stem for a network that has none to replace.

    Example:
        >>> timm_backbone(name="resnet18", small_stem=True).num_features
        512
    """
    if not timm.is_model(name):
        raise unknown_name("backbone", PREFIX + name, (PREFIX + n for n in timm.list_models()))
    # not by timm's registry, where main has put its own ConvNeXt and others under timm's names
    entry = getattr(timm.models, name, partial(timm.create_model, name))
    try:
        model = entry(num_classes=0, **kwargs)
    except TypeError as error:
        raise IECLError(f"backbone {PREFIX}{name}: {error}") from None
    if small_stem:
        _small_stem(model, name)
    # some heads (MobileNetV3, ...) widen after the last stage; hosts read num_features
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    return model


def build_backbone(host: Host, name: str, *, method: str, cifar: bool, **kwargs: Any) -> nn.Module:
    """The network that a method of the host trains, on its own and without its last layer.

    Args:
        host: the solo-learn in use.
        name: a backbone name of the host.
        method: the pretraining method (some hosts choose the network by it).
        cifar: whether ResNets take the host's stem for CIFAR.
        kwargs: the backbone's own arguments.

    Raises:
        IECLError: unknown name or argument.
    """
    if name not in host.backbones:
        raise unknown_name("backbone", name, host.backbones)
    if name.startswith(PREFIX):
        return timm_backbone(method, name=name.removeprefix(PREFIX), **kwargs)
    try:
        network: Any = host.network(name, method, cifar=cifar, **kwargs)
    except TypeError as error:
        raise IECLError(f"backbone {name}: {error}") from None
    if name.startswith("resnet"):
        network.fc = nn.Identity()
        if cifar:
            network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
            network.maxpool = nn.Identity()
    return network
