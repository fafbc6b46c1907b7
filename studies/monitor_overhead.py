"""EntropyMonitor's share of a training: the same run with it and without it, in turn.

    iecl-solo digits datasets/digits
    python studies/monitor_overhead.py

The packaged digits configuration at the monitor's default frequency: it measures in every tenth
epoch and in the last one. Two figures: the ratio of the two runs' times, which a busy machine blurs
by more than what is looked for, and the seconds that the monitor took as a share of its run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_module

from iecl_solo.experiments.cost import ratio
from iecl_solo.train.fit import pretrain


def seconds(every_n_epochs: int, args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Of one whole run, and of its monitor."""
    with initialize_config_module("iecl_solo.configs", version_base="1.3"):
        cfg = compose(
            f"pretrain/{args.config}",
            overrides=[
                f"checkpoint.dir={folder}",
                f"max_epochs={args.epochs}",
                f"monitor.every_n_epochs={every_n_epochs}",
                *args.overrides,
            ],
        )
    start = time.perf_counter()
    run = pretrain(cfg)
    took, monitor = time.perf_counter() - start, run.folder / "monitor.csv"
    own = float(pd.read_csv(monitor)["monitor_seconds"].sum()) if monitor.is_file() else 0.0
    return took, own


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="digits/iecl_simclr")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args()
    off, on, shares = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for times, every in [(off, 0), (on, 10)][:: 1 if turn % 2 else -1]:
                took, own = seconds(every, args, Path(folder) / f"{turn}-{every}")
                times.append(took)
                shares += [own / (took - own)] if every else []
                print(f"every_n_epochs={every}: {took:.1f} s, monitor {own:.2f} s", flush=True)
    middle, low, high = ratio(off, on)
    print(f"without {statistics.median(off):.1f} s, with {statistics.median(on):.1f} s")
    print(f"the monitor's own share: {statistics.median(shares):.2%}")
    print(f"ratio {middle:.4f} (quartiles {low:.4f} to {high:.4f}, {args.rounds} rounds)")


if __name__ == "__main__":
    main()
