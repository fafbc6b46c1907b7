"""What happens as CLIMB's beta grows: entropy bound, coding rate, effective rank, accuracy.

    python studies/climb_beta.py --out climb_beta

Trains the digits configuration of each method once for each beta and prints a table, which it
writes as CSV and as a figure too. Everything is measured on the *training* images: the accuracy is
the host's online classifier's in the last epoch. A run that is finished is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import Tensor

from iecl_solo.digits import write_digits
from iecl_solo.entropy import coding_rate, effective_rank
from iecl_solo.evaluate.load import load_method, read_pretrained
from iecl_solo.losses.climb import PrototypeMarginal, VMFMixture, entropy_bound
from iecl_solo.quiet import quiet
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import find_host
from iecl_solo.solo.wrapper import find_embedder, find_prototypes
from iecl_solo.train.fit import pretrain
from iecl_solo.train.run import Run

MEASURES = {
    "bound": "bound on H(Z), nats",
    "coding rate": "coding rate, nats",
    "effective rank": "effective rank",
    "accuracy %": "online training accuracy, %",
}


def train(method: str, beta: float, args: argparse.Namespace) -> Run:
    """The digits configuration with this beta, trained or found trained."""
    with initialize_config_module("iecl_solo.configs", version_base="1.3"):
        cfg = compose(
            f"pretrain/digits/climb_{method}",
            overrides=[
                f"data.train_path={args.out / 'digits/train'}",
                "data.val_path=null",
                "monitor.every_n_epochs=0",
                f"max_epochs={args.epochs}",
                f"checkpoint.dir={args.out / 'runs'}",
                f"seed={args.seed}",
                *args.overrides,
            ],
        )
    OmegaConf.set_struct(cfg, False)
    cfg.climb.beta = beta
    cfg.name = f"beta{beta:g}-seed{args.seed}"
    return pretrain(cfg)


@torch.no_grad()
def embeddings(run: Run, passes: int) -> list[tuple[Tensor, Tensor | None]]:
    """For each pass over the training images: embeddings (N, d), and prototypes' scores (N, K)."""
    host = find_host()
    pretrained = read_pretrained(run.checkpoint)
    model = load_method(pretrained, host).eval()
    embedder, prototypes = find_embedder(model, "online"), find_prototypes(model)
    assert embedder is not None
    torch.manual_seed(0)  # the same views for every beta
    out = []
    for _ in range(passes):
        z, scores = [], []
        for _, views, _ in pretrain_loader(pretrained.cfg, host):
            features = getattr(model, host.online)(views[0])
            z.append(F.normalize(model.get_submodule(embedder)(features), dim=-1))
            if prototypes is not None:
                scores.append(model.get_submodule(prototypes)(features))
        out.append((torch.cat(z), torch.cat(scores) if scores else None))
    return out


def fitted_bound(fit: Tensor, held_out: Tensor, marginal: VMFMixture | PrototypeMarginal) -> float:
    """The bound after the marginal was fitted anew: the same for every beta, 0 included."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(marginal.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        rows = fit[torch.randint(len(fit), (256,))]
        optimizer.zero_grad()
        marginal.fitting_loss(rows).backward()
        optimizer.step()
        schedule.step()
    return entropy_bound(held_out, marginal).item()


def measure(run: Run) -> dict[str, float]:
    """All of ``MEASURES`` for a finished run."""
    (z, scores), (z_other, scores_other) = embeddings(run, passes=2)
    if scores is None or scores_other is None:
        mixture = VMFMixture(z.shape[1], 64, max_concentration=10 * z.shape[1])
        bound = fitted_bound(z, z_other, mixture)
    else:
        temperature = run.args["method_kwargs"].get("student_temperature", 0.1)
        prototypes = PrototypeMarginal(scores.shape[1], temperature=temperature)
        bound = fitted_bound(scores, scores_other, prototypes)
    assert run.result is not None
    return {
        "bound": bound,
        "coding rate": coding_rate(z).item(),
        "effective rank": effective_rank(z).item(),
        "accuracy %": run.result["metrics"]["train_acc1_epoch"],
    }


def draw(frame: pd.DataFrame, path: Path) -> None:
    """One panel a measure, one line a method; beta on a logarithmic axis, 0 at its left end."""
    positive = sorted(b for b in frame["beta"].unique() if b > 0)
    zero = positive[0] / 10
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(15, 3.2), layout="constrained")
    for axis, (column, title) in zip(axes, MEASURES.items(), strict=True):
        for method, rows in frame.groupby("method", sort=False):
            curve = rows.groupby("beta")[column].mean()
            if column == "bound":  # of prototypes a few nats, of embeddings hundreds
                curve = (curve - curve.min()) / (curve.iloc[0] - curve.min())
            axis.plot([b or zero for b in curve.index], curve, "o-", ms=4, label=method)
        axis.set_xscale("log")
        axis.set_xticks([zero, *positive], ["0", *(f"{b:g}" for b in positive)], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("beta", fontsize=9)
        shown = "bound on H(Z), from its least to beta 0's" if column == "bound" else title
        axis.set_title(shown, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@quiet()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["simclr", "simsiam", "dino"])
    parser.add_argument("--betas", type=float, nargs="+", default=[0, 0.03, 0.1, 0.3, 1, 3])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("climb_beta"))
    parser.add_argument("--overrides", nargs="*", default=[], help="KEY=VALUE of the configuration")
    args = parser.parse_args()
    write_digits(args.out / "digits")
    rows = []
    for method in args.methods:
        for beta in args.betas:
            row = measure(train(method, beta, args))
            rows.append({"method": f"climb_{method}", "beta": beta, **row})
            print({k: v if k == "method" else round(v, 4) for k, v in rows[-1].items()}, flush=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(args.out / "climb_beta.csv", index=False)
    if any(b > 0 for b in args.betas):
        draw(frame, args.out / "climb_beta.png")
    print(frame.to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
