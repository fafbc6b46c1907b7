"""Time and memory of evaluation beside the host's own: weighted k-NN, and the linear probe's grid.

    python studies/evaluation_speed.py --train 50000 --test 10000

prints a Markdown table. Each entry is measured in a process of its own, on random features: seconds
of the evaluation alone, and by how much it raised the process's peak resident memory (on CUDA: the
peak of what torch allocated). The host's probe is one Lightning run a learning rate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

RATES = [0.01, 0.03, 0.1, 0.3, 1.0]
KS = [1, 5, 20, 200]
CLASSES = 100


def data(rows: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features (rows, dim) around class means, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return means[labels] + 4 * torch.randn(rows, dim, generator=generator), labels


def our_knn(train, test, args) -> list[float]:
    from iecl_solo.evaluate.knn import knn_accuracies

    return [top1 for top1, _ in knn_accuracies(train, test, k=KS, device=args.device).values()]


def host_knn(train, test, args) -> list[float]:
    from iecl_solo.solo.host import find_host

    out = []
    for k in KS:
        classifier = find_host().import_module("utils.knn").WeightedKNNClassifier(k=k)
        for part, (x, y) in (("train", train), ("test", test)):
            x, y = F.normalize(x.to(args.device)), y.to(args.device)
            classifier.update(**{f"{part}_features": x, f"{part}_targets": y})
        out.append(float(classifier.compute()[0]))
    return out


def our_probe(train, test, args) -> list[float]:
    from iecl_solo.evaluate.probe import fit_probes
    from iecl_solo.evaluate.protocol import decay_epochs

    steps = decay_epochs(args.epochs)
    probes = fit_probes(
        *(t.to(args.device) for t in train),
        RATES,
        classes=CLASSES,
        max_epochs=args.epochs,
        decay_epochs=steps,
        device=args.device,
    )
    return [top1 for top1, _ in probes.accuracies(*test)]


class _Features(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = self.inplanes = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def host_probe(train, test, args) -> list[float]:
    import logging
    from types import SimpleNamespace

    from lightning.pytorch import Trainer
    from omegaconf import OmegaConf
    from torch.utils.data import DataLoader, TensorDataset

    from iecl_solo.evaluate.protocol import decay_epochs
    from iecl_solo.solo.build import build_linear
    from iecl_solo.solo.host import find_host

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    host, out = find_host(), []
    for rate in RATES:
        cfg = OmegaConf.create(
            {
                "data": {"num_classes": CLASSES},
                "max_epochs": args.epochs,
                "finetune": False,
                "optimizer": {
                    "name": "sgd",
                    "batch_size": 256,
                    "lr": rate,
                    "weight_decay": 0.0,
                    "kwargs": {"momentum": 0.9},
                    "exclude_bias_n_norm_wd": False,
                    "layer_decay": 0,
                },
                "scheduler": {
                    "name": "step",
                    "lr_decay_steps": decay_epochs(args.epochs),
                    "min_lr": 0.0,
                    "warmup_start_lr": 0.0,
                    "warmup_epochs": 0,
                    "interval": "step",
                },
                "performance": {"disable_channel_last": True},
            }
        )
        model = build_linear(cfg, _Features(train[0].shape[1]), host)
        quiet = SimpleNamespace(logger=False, enable_checkpointing=False)
        trainer = Trainer(
            **vars(quiet),
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=args.epochs,
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=1,
            check_val_every_n_epoch=args.epochs,
            num_sanity_val_steps=0,
        )
        loaders = (
            DataLoader(TensorDataset(*d), 256, shuffle=shuffle)
            for d, shuffle in ((train, True), (test, False))
        )
        trainer.fit(model, *loaders)
        out.append(float(trainer.callback_metrics["val_acc1"]))
    return out


WHAT = {"k-NN, ours": our_knn, "k-NN, host": host_knn}
WHAT |= {"probe, ours": our_probe, "probe, host": host_probe}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MiB; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(args: argparse.Namespace) -> None:
    """One entry, as a line of JSON."""
    cuda = args.device == "cuda"
    train, test = (data(rows, args.dim, seed) for seed, rows in enumerate((args.train, args.test)))
    # imports, thread pools and the device's context are no part of it
    small = data(1000, args.dim, 3), data(1000, args.dim, 4)
    epochs, args.epochs = args.epochs, 1
    WHAT[args.one](*small, args)
    args.epochs = epochs
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    start = time.perf_counter()
    found = WHAT[args.one](train, test, args)
    seconds = time.perf_counter() - start
    mib = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "mib": mib, "found": found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one", choices=WHAT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args)
        return
    print(f"{args.train:,} x {args.test:,} features of {args.dim}; k in {KS}; {len(RATES)} rates, ")
    print(f"{args.epochs} epochs; torch {torch.__version__}, {args.device}\n")
    print("| | seconds | memory, MiB | top-1 |\n| --- | ---: | ---: | --- |")
    for name in WHAT:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        top1 = ", ".join(f"{value:.2f}" for value in row["found"])
        print(f"| {name} | {row['seconds']:.1f} | {row['mib']:.0f} | {top1} |", flush=True)


if __name__ == "__main__":
    main()
