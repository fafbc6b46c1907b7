"""``iecl-solo inspect``: the entropies of a finished run, measured and drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from iecl_solo.quiet import quiet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", help="a .ckpt file of a run, or the run's folder")
    parser.add_argument("--data", help="a folder of <class>/<image>; the run's own if not given")
    parser.add_argument("--to", help="folder for the figures; RUN/inspect if not given")
    parser.add_argument("--images", type=int, default=256, help="images whose embeddings count")
    parser.add_argument("--probes", type=int, default=8, help="random probes of log|det J|")
    parser.add_argument("--volume-images", type=int, default=0, help="images of the log-volume")


@quiet()
def run(args: argparse.Namespace) -> int:
    """Print every measure, write them as JSON, and draw what the run kept."""
    import pandas as pd
    import torch

    from iecl_solo.evaluate.load import load_method, read_pretrained
    from iecl_solo.evaluate.pictures import (
        plot_monitor,
        plot_saib_over_training,
        plot_singular_values,
    )
    from iecl_solo.files import write_json
    from iecl_solo.lipschitz import sigmas
    from iecl_solo.saib import load_saib
    from iecl_solo.solo.data import pretrain_loader
    from iecl_solo.solo.host import find_host
    from iecl_solo.solo.settings import check_image_folder
    from iecl_solo.train.callbacks.entropy_monitor import MonitorConfig, measure
    from iecl_solo.train.logs import read_metrics
    from iecl_solo.train.run import versions

    config = MonitorConfig(images=args.images, probes=args.probes, volume_images=args.volume_images)
    host = find_host()
    pretrained = read_pretrained(args.checkpoint)
    cfg, folder = pretrained.cfg, pretrained.path.parent
    if args.data is not None:
        cfg.data.train_path = args.data
    available = check_image_folder("--data", cfg.data.train_path)
    cfg.optimizer.batch_size = min(args.images, available)
    model = load_method(pretrained, host)
    torch.manual_seed(cfg.seed)
    _, views, _ = next(iter(pretrain_loader(cfg, host)))
    values = measure(model, host, views, config)
    to = Path(args.to) if args.to else folder / "inspect"
    for name, value in values.items():
        if "/" not in name:  # the layers' own are in the file and in the picture
            print(f"{name:<22}{value:.5g}")
    write_json(to / "inspect.json", {"measures": values, "versions": versions(host)})
    plot_singular_values(sigmas(getattr(model, host.online)), to / "singular_values.png")
    if (folder / "monitor.csv").is_file():
        monitor = pd.read_csv(folder / "monitor.csv")
        plot_monitor(monitor, read_metrics(folder), to / "entropy.png")
    kept = sorted(folder.glob("saib-epoch-*.safetensors"))
    if kept:
        chosen = [*kept[:: max(1, len(kept) // 4)], kept[-1]]
        names = [f"epoch {int(p.stem.split('-')[-1]) + 1}" for p in chosen]
        saibs = dict(zip(names, map(load_saib, chosen), strict=True))
        plot_saib_over_training(views[1], saibs, to / "saib_over_training.png")
    print(f"figures: {to}")
    return 0
