"""``iecl-solo dense``: mIoU of a linear head on a checkpoint's frozen feature map."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", help="a .ckpt file of a run, or the run's folder")
    parser.add_argument(
        "--root", required=True, help="a folder with {train,val}/images and {train,val}/masks"
    )
    parser.add_argument("--torchvision", help="VOCSegmentation or OxfordIIITPet, on disk in --root")
    parser.add_argument("--size", type=int, help="of the images shown; the run's own if not given")
    parser.add_argument("--epochs", type=int, help="of the head")
    parser.add_argument("--lr", type=float, help="of the head")


def run(args: argparse.Namespace) -> int:
    """Print the mIoU, and keep it beside the checkpoint."""
    from iecl_solo.evaluate.load import read_pretrained
    from iecl_solo.evaluate.protocol import DenseProtocol
    from iecl_solo.evaluate.run import dense
    from iecl_solo.files import write_json
    from iecl_solo.quiet import quiet
    from iecl_solo.solo.host import find_host
    from iecl_solo.train.run import versions

    given = {"root": args.root, "torchvision": args.torchvision, "size": args.size}
    given |= {"max_epochs": args.epochs, "lr": args.lr}
    protocol = DenseProtocol(**{k: v for k, v in given.items() if v is not None})
    with quiet():
        host, pretrained = find_host(), read_pretrained(args.checkpoint)
        found = dense(pretrained, host, protocol)
    result = pretrained.path.parent / "dense.json"
    about = {"protocol": vars(protocol), "versions": versions(host)}
    write_json(result, {"dense_miou": found, **about})
    print(f"dense, linear head on the frozen feature map: mIoU {found:.2f} %  ({result})")
    return 0
