"""Each mode of the encoder's regulariser on five networks: what it does to the spectrum, its cost.

    python studies/regularizer_table.py --images FOLDER

``--images`` is a folder of classes; a batch of them is trained on. A row's columns: the largest and
smallest singular value over all layers (full decomposition) at the start, and after ``--steps``
steps on the regulariser alone, which shows what it converges to with no loss against it
(``parametrize`` has no loss: its forward passes are made); the loss before and after ``--train``
whole training steps on one batch; the time of a step over SimCLR's, in turn, median and quartiles.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from iecl_solo.experiments.cost import Step, interleaved, ratio
from iecl_solo.lipschitz import SpectralRegularizer, parametrize_spectral, plain_weights, sigmas
from iecl_solo.solo.backbones import build_backbone
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.settings import prepare_pretrain

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet-18": ("resnet18", {}),
    "ViT-tiny": ("timm/vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}),
    "Swin-tiny": ("timm/swin_tiny_patch4_window7_224", {"img_size": 32, "patch_size": 2}),
    "ConvNeXt-tiny": ("timm/convnext_tiny", {}),
    "EfficientNet-B0": ("timm/efficientnet_b0", {}),
}

MODES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "penalty": {"mode": "penalty"},
    "penalty, convolution norm": {"mode": "penalty", "norm": "convolution"},
    "bilipschitz": {"mode": "bilipschitz"},
    "parametrize": {"mode": "parametrize"},
}


def config(backbone: str, mode: str, args: argparse.Namespace) -> DictConfig:
    """SimCLR with the mode and nothing else of IE-CL."""
    block = MODES[mode]
    method = "simclr" if block is None else "iecl_simclr"
    name, kwargs = BACKBONES[backbone]
    with initialize_config_module("iecl_solo.configs", version_base="1.3"):
        cfg = compose(
            f"pretrain/custom/{method}",
            overrides=[
                f"data.train_path={args.images}",
                "data.image_size=32",
                "data.num_workers=0",
                f"backbone.name={name}",
                f"optimizer.batch_size={args.batch_size}",
                "precision=32-true",
            ],
        )
    OmegaConf.set_struct(cfg, False)
    cfg.backbone.kwargs = kwargs
    cfg.optimizer = {
        "name": "adamw",
        "batch_size": args.batch_size,
        "lr": 1e-3,
        "classifier_lr": 1e-3,
        "weight_decay": 0.0,
    }
    if block is not None:
        cfg.iecl = {"beta": 0, "lambda": 0, "gamma": 0, "placement": "none", "regularizer": block}
    return cfg


def extremes(backbone: torch.nn.Module) -> tuple[float, float]:
    values = sigmas(backbone).values()
    return max(v for v, _ in values), min(v for _, v in values)


def alone(cfg: DictConfig, mode: str, host: Host, steps: int) -> dict[str, float]:
    """The spectrum before and after the regulariser has had its way."""
    torch.manual_seed(0)
    kwargs = plain(cfg.backbone.kwargs)
    backbone = build_backbone(host, cfg.backbone.name, method=cfg.method, cifar=False, **kwargs)
    before = extremes(backbone)
    block = MODES[mode]
    assert block is not None
    if block["mode"] == "parametrize":
        parametrize_spectral(backbone).train()
        for _ in range(20):
            backbone(torch.randn(2, 3, 32, 32))
        effective = {
            name: torch.linalg.svdvals(w.flatten(1)) for name, w in plain_weights(backbone).items()
        }
        after = (
            max(v.max().item() for v in effective.values()),
            min(v.min().item() for v in effective.values()),
        )
    else:
        size = (3, 32, 32) if block.get("norm") == "convolution" else None
        regularizer = SpectralRegularizer(backbone, **block, input_size=size)
        # the gradient of a convolution's norm is up to kh kw times that of its kernel's
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05 if size else 0.4)
        for _ in range(steps):
            optimizer.zero_grad()
            regularizer(backbone).backward()
            optimizer.step()
        after = extremes(backbone)
    names = ("sigma_max before", "sigma_min before", "sigma_max after", "sigma_min after")
    return dict(zip(names, (*before, *after), strict=True))


def trained(step: Step, count: int) -> tuple[float, float]:
    """The loss at the first and the last of ``count`` steps on one batch."""
    losses: list[float] = []
    inner = step.model.training_step

    def recorded(batch: Any, index: int) -> Any:
        loss = inner(batch, index)
        losses.append(float(loss["loss"] if isinstance(loss, dict) else loss))
        return loss

    step.model.training_step = recorded  # type: ignore[method-assign]
    for _ in range(count):
        step()
    step.model.training_step = inner  # type: ignore[method-assign]
    return losses[0], losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--train", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="regularizer_table.csv")
    args = parser.parse_args()
    host, rows = find_host(), []
    for backbone in args.backbones:
        configs = {mode: config(backbone, mode, args) for mode in MODES}
        torch.manual_seed(0)
        completed = prepare_pretrain(OmegaConf.create(plain(configs["none"])), host)
        batch = next(iter(pretrain_loader(completed, host)))
        steps = {mode: Step(cfg, host, args.device) for mode, cfg in configs.items()}
        for step in steps.values():
            step.batch = [
                batch[0].to(args.device),
                [view.to(args.device) for view in batch[1]],
                batch[2].to(args.device),
            ]
        losses = {mode: trained(step, args.train) for mode, step in steps.items()}
        seconds = interleaved(list(steps.values()), args.rounds, device=args.device)
        for mode, own in zip(steps, seconds, strict=True):
            middle, low, high = ratio(seconds[0], own)
            spectrum = {} if mode == "none" else alone(configs[mode], mode, host, args.steps)
            rows.append(
                {
                    "backbone": backbone,
                    "mode": mode,
                    **spectrum,
                    "loss first": losses[mode][0],
                    "loss last": losses[mode][1],
                    "time ratio": middle,
                    "low": low,
                    "high": high,
                }
            )
            print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(args.output, index=False)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
