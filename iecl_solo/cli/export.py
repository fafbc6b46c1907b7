"""``iecl-solo export``: a backbone or a SAIB out of a checkpoint, for use without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from iecl_solo.errors import IECLError, unknown_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", help="a .ckpt file of a run, or the run's folder")
    parser.add_argument("--to", required=True, help="the file to write, or the folder")
    parser.add_argument(
        "--format",
        default="plain",
        help="plain (default): FILE.safetensors for torchvision and timm; huggingface: a FOLDER "
        "that timm loads offline; detectron2: FILE.pkl; mmdetection: FILE.pth",
    )
    parser.add_argument(
        "--saib", action="store_true", help="write the learned SAIB instead of the backbone"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file, whole or not at all, and print how to load it."""
    from iecl_solo.evaluate.export import FORMATS, check_target, export_backbone, preparation
    from iecl_solo.evaluate.load import load_method, read_pretrained
    from iecl_solo.files import replacing
    from iecl_solo.quiet import quiet
    from iecl_solo.saib import BaseSAIB, save_saib
    from iecl_solo.solo.host import find_host
    from iecl_solo.solo.wrapper import transforming

    if args.format not in FORMATS:
        raise IECLError(f"--format: {unknown_name('format', args.format, FORMATS)}")
    if args.saib and args.format != "plain":
        raise IECLError(f"--format {args.format}: a SAIB has one format, FILE.safetensors")
    to = Path(args.to)
    check_target(to, args.format)
    with quiet():
        host = find_host()
        pretrained = read_pretrained(args.checkpoint)
        if args.saib:
            objective = transforming(load_method(pretrained, host))
            if objective is None or not isinstance(objective.transformer, BaseSAIB):
                raise IECLError(f"checkpoint {pretrained.path}: it was trained without a SAIB")
            about = {"method": pretrained.cfg.method, **preparation(pretrained.cfg, host)}
            with replacing(to) as part:
                save_saib(objective.transformer, part, about)
            lines = ["from iecl_solo.saib import load_saib", f"saib = load_saib({args.to!r})"]
        else:
            lines = export_backbone(pretrained, host, to, args.format)
    print(f"written: {to}", *lines, sep="\n")
    return 0
