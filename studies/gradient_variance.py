"""Variance of the gradient estimate against the batch size: MINC, spectral, SimCLR.

    python studies/gradient_variance.py --config-name digits/minc data.train_path=TRAIN
    python studies/gradient_variance.py --run RUN     # the weights of a finished run

With ``--store``, of the benchmark ``minc``, the accuracy against the batch size is drawn beside.

One network (backbone and projector of the configuration's method, in training mode), its weights
held; for every batch the gradient of each loss in all of them. All losses see the same batches. The
spectral loss is halved, which makes its expectation MINC's. Printed, for each batch size: the trace
of the gradient's covariance, and the same relative to the squared norm of the mean gradient, which
is what can be compared between losses of different scale. That norm is the largest batch size's
(corrected for the error of the mean): at the small ones the noise hides it. Lambda is the moving
average of MINC's own final decay, after as many batches again without a gradient.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from iecl_solo.evaluate.load import load_method, read_pretrained
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.losses import MINCLoss, spectral_contrastive_loss
from iecl_solo.solo.build import build_model
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import Host, find_host
from iecl_solo.train.complete import complete

Loss = Callable[[Tensor, Tensor], Tensor]


def simclr(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1) over both views."""
    z = F.normalize(torch.cat([z1, z2]))
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def losses(cfg: DictConfig, temperature: float, device: str) -> dict[str, Loss]:
    kwargs = cfg.method_kwargs
    mu = float(kwargs.mu)
    moving = MINCLoss(
        int(kwargs.proj_output_dim), base_decay=float(kwargs.get("final_decay", 0.99)), mu=mu
    ).to(device)
    return {
        "minc": lambda z1, z2: moving(torch.cat([z1, z2]), torch.cat([z2, z1])),
        "spectral": lambda z1, z2: spectral_contrastive_loss(z1, z2, mu=mu) / 2,
        "simclr": lambda z1, z2: simclr(z1, z2, temperature),
    }


def endless(cfg: DictConfig, host: Host, device: str) -> Iterator[list[Tensor]]:
    """The two views of one batch after the other, augmented anew in every epoch."""
    loader = pretrain_loader(cfg, host)
    while True:
        for _, views, _ in loader:
            yield [view.to(device) for view in views[:2]]


class Moments:
    """Mean and trace of the covariance of vectors, one at a time."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), 0.0

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        vector = torch.cat([g.flatten() for g in gradients]).double()
        self.count += 1
        self.total = self.total.to(vector.device) + vector
        self.squares += float(vector @ vector)

    def summary(self) -> dict[str, float]:
        mean = float((self.total / self.count).square().sum())
        variance = (self.squares - self.count * mean) / (self.count - 1)
        return {"variance": variance, "signal": mean - variance / self.count}


def measure(
    network: nn.Module, named: dict[str, Loss], views: Iterator[list[Tensor]], batches: int
) -> dict[str, dict[str, float]]:
    moments = {name: Moments() for name in named}
    parameters = [p for p in network.parameters() if p.requires_grad]
    for batch in range(2 * batches):
        with torch.set_grad_enabled(batch >= batches):
            z1, z2 = (network(view) for view in next(views))
            if batch < batches:
                named["minc"](z1, z2)  # Lambda forgets how it began
                continue
            for name, loss in named.items():
                value = loss(z1, z2)
                moments[name].add(torch.autograd.grad(value, parameters, retain_graph=True))
    return {name: moment.summary() for name, moment in moments.items()}


def accuracy(path: Path) -> pd.DataFrame:
    """Finished runs of a benchmark's store: arm, batch size, k-NN accuracy."""
    store = Store(path / STORE, create=False)
    metrics = store.metrics()
    knn = metrics[metrics["name"] == "knn_acc1"].set_index("cell")["value"].rename("accuracy")
    runs = store.cells().rename(columns={"optimizer.batch_size": "batch", "arm": "loss"})
    return runs.join(knn, on="id", how="inner")[["loss", "batch", "accuracy"]]


def picture(frame: pd.DataFrame, path: Path, runs: pd.DataFrame | None) -> None:
    panels = 1 if runs is None else 2
    figure, axes = plt.subplots(
        1, panels, figsize=(5 * panels, 3.8), layout="constrained", squeeze=False
    )
    right = axes[0, -1]
    for i, (name, rows) in enumerate(frame.groupby("loss", sort=False)):
        right.loglog(rows["batch"], rows["relative"], f"C{i}o-", label=name)
        if runs is not None:
            points = runs[runs["loss"] == name].groupby("batch")["accuracy"].agg(["mean", "std"])
            axes[0, 0].errorbar(
                points.index, points["mean"], points["std"], fmt=f"C{i}o-", capsize=3, label=name
            )
    if runs is not None:
        axes[0, 0].set_xscale("log")
        axes[0, 0].set_ylabel("k-NN top-1, % (mean ± s.d. over seeds)")
    right.set_ylabel("tr Cov(g) / |E g|², g the gradient")
    for panel in axes[0]:
        sizes = sorted((frame if panel is right or runs is None else runs)["batch"].unique())
        panel.set_xticks(sizes, labels=sizes)
        panel.minorticks_off()
        panel.set_xlabel("batch size")
        panel.legend()
    figure.savefig(path, dpi=150)


def setting(options: argparse.Namespace) -> tuple[DictConfig, Any]:
    """The configuration, and the model that it or the run's checkpoint gives."""
    host = find_host()
    if options.run:
        pretrained = read_pretrained(options.run)
        return pretrained.cfg, load_method(pretrained, host)
    with initialize_config_module("iecl_solo.configs", version_base="1.2"):
        cfg = compose(f"pretrain/{options.config_name}", overrides=options.overrides)
    cfg = complete(cfg, host)
    torch.manual_seed(options.seed)
    return cfg, build_model(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), host)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    parser.add_argument("--config-name", default="digits/minc", help="a spectral or minc one")
    parser.add_argument("--run", help="folder of a finished spectral or minc run")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, help="folder of a finished minc benchmark")
    parser.add_argument("--out", type=Path, default=Path("gradient_variance"))
    options = parser.parse_args()
    cfg, model = setting(options)
    host = find_host()
    network = nn.Sequential(getattr(model, host.online), model.projector).to(options.device).train()
    start = copy.deepcopy(network.state_dict())
    rows = []
    for size in sorted(options.sizes, reverse=True):
        network.load_state_dict(start)  # batch norm's running statistics have moved
        torch.manual_seed(options.seed)
        own = copy.deepcopy(cfg)
        own.optimizer.batch_size = size
        views = endless(own, host, options.device)
        named = losses(own, options.temperature, options.device)
        for name, found in measure(network, named, views, options.batches).items():
            rows.append({"batch": size, "loss": name, **found})
    frame = pd.DataFrame(rows)
    signal = frame[frame["batch"] == frame["batch"].max()].set_index("loss")["signal"]
    frame["relative"] = frame["variance"] / frame["loss"].map(signal.where(signal > 0))
    for value in ("variance", "relative"):
        print(f"{value}:\n{frame.pivot(index='batch', columns='loss', values=value).to_string()}")
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "gradient_variance.csv", index=False)
    runs = accuracy(options.store) if options.store else None
    picture(frame, options.out / "gradient_variance.png", runs)
    print(f"{options.out}: gradient_variance.csv, gradient_variance.png")


if __name__ == "__main__":
    main()
