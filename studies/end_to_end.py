"""Images a second of whole commands: solo-learn's own script, and ours with batched views and bf16.

    python studies/end_to_end.py DATA/train --config small --rounds 3

Commands run in turn, on all cores, each for one epoch and for more; what the further epochs took is
the training alone. solo-learn must be a checkout (``SOLO_LEARN=PATH``), which has main_pretrain.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from omegaconf import OmegaConf

from iecl_solo.experiments.cost import ratio
from iecl_solo.experiments.throughput import timed_command
from iecl_solo.images import image_files
from iecl_solo.solo.host import find_host
from iecl_solo.train.compose import compose_pretrain

#: What is compared: whose command, and what it is told.
ARMS = {
    "host": ("main_pretrain.py", {"precision": "32-true"}),
    "per image": ("pretrain", {"precision": "32-true"}),
    "batched": ("pretrain", {"precision": "32-true", "data.views": "batched"}),
    "batched, auto": ("pretrain", {"precision": "auto", "data.views": "batched"}),
}


def seconds(arm: str, config: str, images: Path, epochs: int, cores: int) -> float:
    """Wall seconds of one command.

    Raises:
        IECLError: with its last line, when it failed.
    """
    command, told = ARMS[arm]
    cfg = compose_pretrain(config, "simclr", [f"data.train_path={images.resolve()}"])
    cfg.data.views, cfg.data.val_path, cfg.data.num_workers = "per_image", None, cores
    cfg.accelerator, cfg.devices, cfg.max_epochs = "cpu", "1", epochs
    cfg.scheduler.warmup_epochs, cfg.checkpoint.enabled = 0, False
    cfg.monitor.every_n_epochs = 0
    for key, value in told.items():
        OmegaConf.update(cfg, key, value)
    script = find_host().path.parent / "main_pretrain.py"
    return timed_command(cfg, script if command == script.name else None, cores)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", type=Path)
    parser.add_argument("--config", default="small", help="a packaged set: small, cifar, ...")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1, help="those that are timed")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    count = len(image_files(args.images))
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(args.rounds):
        for arm in ARMS if turn % 2 == 0 else reversed(ARMS):
            one, more = (
                seconds(arm, args.config, args.images, epochs, cores)
                for epochs in (1, 1 + args.epochs)
            )
            taken[arm].append(more - one)
            rate = count * args.epochs / (more - one)
            print(
                f"round {turn + 1}: {arm}: start and first epoch {one:.1f} s, {rate:.0f} images/s",
                flush=True,
            )
    print("\n| command | images/s | times the host's |\n| --- | --- | --- |")
    for arm, times in taken.items():
        middle, low, high = ratio(times, taken["host"])
        rate = count * args.epochs / statistics.median(times)
        print(f"| {arm} | {rate:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


if __name__ == "__main__":
    main()
