"""What the paper presets of the packaged benchmarks come to: runs, steps, operations.

    python studies/plan.py

Operations are counted by torch.utils.flop_counter in one training step of 8 images for each arm,
data set and network, and multiplied; evaluation is not counted. Storage is a checkpoint for each
run. Hours follow from what a device sustains: ``--sustained`` in TFLOP/s, measured if it is not
given, on whatever device this runs on, with the first benchmark's first arm.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from iecl_solo.experiments.cost import Step, interleaved
from iecl_solo.experiments.grid import Cell, cells, configuration, read_benchmark
from iecl_solo.solo.config import plain
from iecl_solo.solo.host import Host, find_host
from iecl_solo.train.packaged import packaged_configs

CONFIGS = Path(__file__).parent.parent / "configs" / "benchmark"
#: Training images that a pretraining run of each data set sees in an epoch.
IMAGES = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "stl10": 105_000,
    "imagenet100": 126_689,
    "imagenet": 1_281_167,
}
BATCH = 8


def stand_in(folder: Path) -> Path:
    """As many images as one small step needs: the counting looks at their number alone."""
    for i in range(2 * BATCH):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    return folder


def small(cfg: DictConfig, folder: Path) -> DictConfig:
    cfg.optimizer.batch_size, cfg.precision = BATCH, "32-true"
    cfg.data.train_path, cfg.data.val_path = str(folder), str(folder)
    return cfg


def counted(cfg: DictConfig, folder: Path, host: Host) -> tuple[float, float]:
    """Operations for one image in a step, and bytes of a checkpoint."""
    step = Step(small(cfg, folder), host)
    weights = sum(t.nbytes for t in step.model.state_dict().values())
    trained = sum(p.nbytes for p in step.model.parameters() if p.requires_grad)
    return step.flops() / BATCH, weights + trained  # and one moment for each trained weight


def sustained(cfg: DictConfig, host: Host, folder: Path, device: str, batch: int) -> float:
    """TFLOP/s of one step."""
    cfg = small(cfg, folder)
    each, _ = counted(cfg.copy(), folder, host)
    cfg.optimizer.batch_size = min(batch, 2 * BATCH)
    (seconds,) = interleaved([Step(cfg, host, device)], rounds=5, device=device)
    return each * cfg.optimizer.batch_size / statistics.median(seconds) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sustained", type=float, help="TFLOP/s of the device")
    parser.add_argument("--benchmarks", nargs="+", default=packaged_configs("benchmark"))
    parser.add_argument("--output", default="plan.csv")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    host, rows, rate = find_host(), [], args.sustained
    with tempfile.TemporaryDirectory() as temporary:
        folder = stand_in(Path(temporary))
        for name in args.benchmarks:
            written = plain(OmegaConf.load(CONFIGS / f"{name}.yaml"))
            benchmark = read_benchmark({**written, "preset": "paper"})
            if benchmark.kind != "training":
                continue
            known: dict[tuple[str, str, str], tuple[float, float]] = {}
            total: dict[str, float] = defaultdict(float)
            grid: list[Cell] = cells(benchmark)
            if configuration(benchmark, grid[0]).data.dataset not in IMAGES:
                print(f"{name}: left out, a folder of yours may hold any number of images")
                continue
            for cell in grid:
                cfg = configuration(benchmark, cell)
                batch, epochs = int(cfg.optimizer.batch_size), int(cfg.max_epochs)
                images = IMAGES[cfg.data.dataset]
                if rate is None:
                    rate = sustained(cfg.copy(), host, folder, device, batch)
                key = (cell.arm, cell.data, str(cfg.backbone.name))
                if key not in known:
                    known[key] = counted(cfg, folder, host)
                each, checkpoint = known[key]
                total["steps"] += epochs * (images // batch)
                total["PFLOP"] += each * images * epochs / 1e15
                total["GB"] += checkpoint / 1e9
            rows.append(
                {
                    "benchmark": name,
                    "runs": len(grid),
                    "million steps": total["steps"] / 1e6,
                    "exaFLOP": total["PFLOP"] / 1e3,
                    "GB": total["GB"],
                    "hours": total["PFLOP"] * 1e3 / rate / 3600,
                }
            )
            print(rows[-1], flush=True)
    frame = pd.DataFrame(rows).set_index("benchmark")
    frame.loc["all"] = frame.sum()
    frame.to_csv(args.output)
    print(f"at {rate:.3g} TFLOP/s ({device if args.sustained is None else 'given'})")
    print(frame.to_string(float_format="%.4g"))


if __name__ == "__main__":
    main()
