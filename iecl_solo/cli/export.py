"""``iecl-solo export``: a backbone or a SAIB out of a checkpoint, for use without this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iecl_solo.errors import IECLError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", help="a .ckpt file of a run, or the run's folder")
    parser.add_argument("--to", required=True, help="the .safetensors file to write")
    parser.add_argument(
        "--saib", action="store_true", help="write the learned SAIB instead of the backbone"
    )


#: The timm model that each of solo-learn's own names is built on.
_TIMM_NAMES = {
    **{f"vit_{s}": f"vit_{s}_patch16_224" for s in ("tiny", "small", "base", "large")},
    **{f"swin_{s}": f"swin_{s}_patch4_window7_224" for s in ("tiny", "small", "base", "large")},
    **{f"convnext_{s}": f"convnext_{s}" for s in ("tiny", "small", "base", "large")},
}


def _statements(name: str, cifar: bool, kwargs: dict[str, Any]) -> list[str]:
    """Python that builds the plain network, without any weights."""
    from iecl_solo.solo.backbones import PREFIX, first_convolution, timm_backbone

    small_stem = bool(kwargs.pop("small_stem", False))
    given = "".join(f", {k}={v!r}" for k, v in kwargs.items())
    if name.startswith("resnet"):
        out = ["import torch, torchvision", f"model = torchvision.models.{name}({given[2:]})"]
        out.append("model.fc = torch.nn.Identity()")
        stem, padding = ("conv1", 2) if cifar else (None, 0)
    else:
        timm_name = name.removeprefix(PREFIX) if PREFIX in name else _TIMM_NAMES.get(name)
        if timm_name is None:
            raise IECLError(
                f"backbone '{name}': it is solo-learn's own network and loads into no plain one; "
                "keep the checkpoint"
            )
        out = [
            "import timm, torch",
            f"model = timm.create_model({timm_name!r}, num_classes=0{given})",
        ]
        stem, padding = None, 1
        if small_stem:
            stem = first_convolution(timm_backbone(name=timm_name, **kwargs), timm_name)
    if stem is not None:
        out.append(
            f"model.{stem} = torch.nn.Conv2d(3, model.{stem}.out_channels, 3, padding={padding}, "
            f"bias=model.{stem}.bias is not None)"
        )
        out.append("model.maxpool = torch.nn.Identity()")
    return out


def recipe(name: str, cifar: bool, kwargs: dict[str, Any], file: str) -> list[str]:
    """Two lines of Python that load an exported backbone into plain torchvision or timm.

    Args:
        name: the backbone's name in solo-learn.
        cifar: whether it was trained on CIFAR, where ResNets have another stem.
        kwargs: the backbone's own arguments.
        file: the exported file.

    Raises:
        IECLError: for a network that neither torchvision nor timm has.
    """
    load = f"from safetensors.torch import load_file; model.load_state_dict(load_file({file!r}))"
    return ["; ".join(_statements(name, cifar, dict(kwargs))), load]


def run(args: argparse.Namespace) -> int:
    """Write the file, whole or not at all, and print how to load it."""
    from safetensors.torch import save_file

    from iecl_solo.evaluate.load import load_backbone, load_method, read_pretrained
    from iecl_solo.files import replacing
    from iecl_solo.saib import SAIB, save_saib
    from iecl_solo.solo.config import plain
    from iecl_solo.solo.host import find_host
    from iecl_solo.solo.wrapper import transforming

    to = Path(args.to)
    if to.suffix != ".safetensors":
        raise IECLError(f"--to {args.to}: a file name that ends in .safetensors is expected")
    host = find_host()
    pretrained = read_pretrained(args.checkpoint)
    if args.saib:
        objective = transforming(load_method(pretrained, host))
        if objective is None or not isinstance(objective.transformer, SAIB):
            raise IECLError(f"checkpoint {pretrained.path}: it was trained without a SAIB")
        with replacing(to) as part:
            save_saib(objective.transformer, part)
        lines = ["from iecl_solo.saib import load_saib", f"saib = load_saib({args.to!r})"]
    else:
        cfg = pretrained.cfg
        kwargs = plain(cfg.backbone.get("kwargs")) or {}
        cifar = cfg.data.dataset in ("cifar10", "cifar100")
        lines = recipe(cfg.backbone.name, cifar, kwargs, args.to)
        backbone = load_backbone(pretrained, host)
        tensors = {k: v.contiguous() for k, v in backbone.state_dict().items()}
        about = {"format": "pt", "backbone": cfg.backbone.name}
        with replacing(to) as part:
            save_file(tensors, part, metadata=about)
    print(f"written: {to}", *lines, sep="\n")
    return 0
