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
    own = "; as the run's monitor has it if not given"
    parser.add_argument("--images", type=int, help=f"images whose embeddings count{own}")
    parser.add_argument("--probes", type=int, help=f"random probes of log|det J|{own}")
    parser.add_argument("--volume-images", type=int, help=f"images of the log-volume{own}")


@quiet()
def run(args: argparse.Namespace) -> int:
    """Print every measure, write them as JSON, and draw what the run kept.

    With no option, on the very views that the monitor measured last, so that both say the same.
    """

    from iecl_solo.evaluate.inspect import inspect
    from iecl_solo.evaluate.load import read_pretrained
    from iecl_solo.evaluate.pictures import (
        plot_monitor,
        plot_saib_over_training,
        plot_singular_values,
    )
    from iecl_solo.files import write_json
    from iecl_solo.lipschitz import sigmas
    from iecl_solo.saib import load_saib
    from iecl_solo.solo.host import find_host
    from iecl_solo.solo.settings import check_images, without_labels
    from iecl_solo.train.logs import read_metrics
    from iecl_solo.train.run import versions

    host = find_host()
    pretrained = read_pretrained(args.checkpoint)
    cfg, folder = pretrained.cfg, pretrained.path.parent
    if args.data is not None:
        cfg.data.train_path = args.data
        if not without_labels(cfg):
            check_images("--data", cfg.data.get("format", "image_folder"), args.data)
    given = {"images": args.images, "probes": args.probes, "volume_images": args.volume_images}
    values, sample, model, views, monitor = inspect(pretrained, host, given)
    print(
        f"{sample['images']} images, the first of epoch {sample['epoch'] + 1} "
        f"(seed {sample['seed']}) of {sample['of']}"
    )
    for name, value in values.items():
        if "/" not in name:  # the layers' own are in the file and in the picture
            print(f"{name:<26}{value:.5g}")
    to = Path(args.to) if args.to else folder / "inspect"
    about = {"sample": sample, "versions": versions(host)}
    write_json(to / "inspect.json", {"measures": values, **about})
    plot_singular_values(sigmas(getattr(model, host.online)), to / "singular_values.png")
    if monitor is not None:
        plot_monitor(monitor, read_metrics(folder), to / "entropy.png")
    kept = sorted(folder.glob("saib-epoch-*.safetensors"))
    if kept:
        chosen = [*kept[:: max(1, len(kept) // 4)], kept[-1]]
        names = [f"epoch {int(p.stem.split('-')[-1]) + 1}" for p in chosen]
        saibs = dict(zip(names, map(load_saib, chosen), strict=True))
        plot_saib_over_training(views[1], saibs, to / "saib_over_training.png")
    print(f"figures: {to}")
    return 0
