"""What the tests share: a small configuration in main's schema, and a few steps of training."""

from __future__ import annotations

import copy
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import iecl_solo  # noqa: F401
from iecl_solo.solo.build import build_model
from iecl_solo.solo.host import find_host
from iecl_solo.solo.registry import split_method
from iecl_solo.solo.settings import prepare_pretrain
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import fit
from iecl_solo.train.run import Run

HOST = find_host()
SIZE = 32

#: Options that make each method small enough for a test; the rest are the host's defaults.
_SMALL = {"proj_hidden_dim": 32, "proj_output_dim": 16}
_PREDICTS = {**_SMALL, "pred_hidden_dim": 32}
METHOD_KWARGS: dict[str, dict[str, Any]] = {
    "all4one": {**_PREDICTS, "temperature": 0.2, "queue_size": 16},
    "barlow_twins": _SMALL,
    "byol": _PREDICTS,
    "deepclusterv2": {**_SMALL, "num_prototypes": [8, 8, 8], "temperature": 0.1},
    "dino": {**_SMALL, "num_prototypes": 32, "warmup_teacher_temperature_epochs": 0},
    "minc": _SMALL,
    "mocov2plus": {**_SMALL, "temperature": 0.2, "queue_size": 32},
    "mocov3": {**_PREDICTS, "temperature": 0.2},
    "nnbyol": {**_PREDICTS, "queue_size": 16},
    "nnclr": {**_PREDICTS, "temperature": 0.2, "queue_size": 16},
    "nnsiam": {**_PREDICTS, "queue_size": 16},
    "ressl": {**_SMALL, "temperature_q": 0.1, "temperature_k": 0.04, "queue_size": 16},
    "simclr": {**_SMALL, "temperature": 0.2},
    "simsiam": _PREDICTS,
    "spectral": _SMALL,
    "supcon": {**_SMALL, "temperature": 0.2},
    "swav": {**_SMALL, "temperature": 0.1, "num_prototypes": 16, "queue_size": 0},
    "vibcreg": {**_SMALL, "iternorm": False},
    "vicreg": _SMALL,
    "wmse": {**_SMALL, "proj_output_dim": 4, "whitening_iters": 1, "whitening_size": 8},
}

#: Every weight zero and no SAIB: the variant must be its host.
OFF = {
    **{"beta": 0.0, "lambda": 0.0, "eta": 0.0, "gamma": 0.0},
    **{"generation": {"weight": 0.0}, "placement": "none"},
}


def image_folder(root: Path, classes: int = 3, images: int = 8, size: int = SIZE) -> Path:
    """A folder of random images, ``root/<class>/<n>.png``."""
    generator = torch.Generator().manual_seed(0)
    for c in range(classes):
        for i in range(images):
            path = root / f"class{c}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (size, size, 3), generator=generator)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return root


def pipeline(**given: Any) -> dict[str, Any]:
    """One pipeline of ``augmentations``: crops and flips, and what is given."""
    return {
        "rrc": {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0},
        "color_jitter": {"prob": 0.0},
        "grayscale": {"prob": 0.0},
        "gaussian_blur": {"prob": 0.0},
        "solarization": {"prob": 0.0},
        "equalization": {"prob": 0.0},
        "horizontal_flip": {"prob": 0.5},
        "crop_size": SIZE,
        "num_crops": 2,
        **given,
    }


def raw_config(method: str, root: Path, **overrides: Any) -> dict[str, Any]:
    """A configuration as a person writes it; ``overrides`` are dotted keys with __ for the dot."""
    jitter = {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    crop = pipeline(color_jitter=jitter, grayscale={"prob": 0.2})
    plain = split_method(method)[1]
    cfg = OmegaConf.create(
        {
            "name": method,
            "method": method,
            "backbone": {"name": "timm/test_resnet", "kwargs": {}},
            "method_kwargs": copy.deepcopy(METHOD_KWARGS.get(plain, _SMALL)),
            "momentum": {"base_tau": 0.9, "final_tau": 1.0},
            "data": {
                "dataset": "custom",
                "train_path": str(root),
                "val_path": None,
                "format": "image_folder",
                "num_workers": 0,
            },
            "optimizer": {
                "name": "sgd",
                "batch_size": 8,
                "lr": 0.1,
                "classifier_lr": 0.1,
                "weight_decay": 1e-4,
            },
            "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1},
            "augmentations": [crop],
            "checkpoint": {"enabled": True, "dir": str(root.parent / "runs"), "frequency": 1},
            "max_epochs": 2,
            "devices": 1,
            "accelerator": "cpu",
            "precision": "32-true",
        }
    )
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return OmegaConf.to_container(cfg)  # type: ignore[return-value]


def config(method: str, root: Path, **overrides: Any) -> Any:
    """``raw_config``, checked and completed."""
    return prepare_pretrain(OmegaConf.create(raw_config(method, root, **overrides)), HOST)


def batches(steps: int, batch_size: int = 8, views: int = 2, sizes: Any = None) -> list[Any]:
    """Batches as the host's loader makes them, ``[index, views, label]``."""
    generator = torch.Generator().manual_seed(1)
    sizes = sizes or [SIZE] * views
    return [
        [
            torch.arange(batch_size),
            [torch.randn(batch_size, 3, s, s, generator=generator) for s in sizes],
            torch.randint(0, 3, (batch_size,), generator=generator),
        ]
        for _ in range(steps)
    ]


class _Batches(torch.utils.data.Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def train_on(
    model: LightningModule, items: Any, epochs: int = 1, resume: Path | None = None, **trainer: Any
) -> LightningModule:
    """Train a model on given batches or on a loader, from a checkpoint if given; deterministic."""
    loader = items
    if isinstance(items, list):
        loader = torch.utils.data.DataLoader(_Batches(items), batch_size=None)
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    seed_everything(7, verbose=False)
    # a checkpoint of ours holds plain values alone
    safely = {} if resume is None else {"weights_only": True}
    Trainer(**settings | trainer).fit(model, loader, ckpt_path=resume, **safely)
    return model


class StopAfterFirstEpoch(Callback):
    """Saves after the first epoch and stops there: the schedules stay those of the whole run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        trainer.should_stop = True


def assert_resumes(method: str, root: Path, path: Path, **overrides: Any) -> None:
    """Two epochs in one go, and stopped after the first, at ``path``, and resumed: bit for bit."""
    items = batches(3)
    whole = train_on(build(method, root, **overrides), items, epochs=2)
    stop = StopAfterFirstEpoch(path)
    train_on(build(method, root, **overrides), items, epochs=2, callbacks=[stop])
    resumed = train_on(build(method, root, seed=99, **overrides), items, epochs=2, resume=path)
    assert same_tensors(whole.state_dict(), resumed.state_dict()) == []


def build(method: str, root: Path, seed: int = 3, **overrides: Any) -> LightningModule:
    """A method built from ``config`` under a seed."""
    cfg = config(method, root, **overrides)
    seed_everything(seed, verbose=False)
    return build_model(cfg, HOST)


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in ``a`` whose tensor in ``b`` differs in any bit."""
    return [k for k in a if k not in b or not torch.equal(a[k], b[k])]


def online(model: nn.Module) -> nn.Module:
    """The online network, whatever the host calls it."""
    return getattr(model, HOST.online)


def _as_rank(program: str, folder: str, rank: int, start_method: str) -> None:
    """One of the two: runs the program, and leaves its ``result`` or what went wrong."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method(start_method, force=True)  # for the workers of its loaders
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    known: dict[str, Any] = {"torch": torch, "DistributedDataParallel": DistributedDataParallel}
    known |= {"rank": rank, "given": torch.load(f"{folder}/given.pt")}
    try:
        exec(program, known)
        torch.save(known["result"], f"{folder}/rank{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        Path(f"{folder}/rank{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    # torch takes gloo's threads down with the interpreter, and now and then aborts one that is done
    os._exit(0)


def in_two_processes(program: str, given: Any, folder: Path) -> list[Any]:
    """The ``result`` that a program leaves in each of two gloo processes, of what is ``given``.

    They come of a server that has imported the libraries once, for all tests: it takes ten seconds.
    """
    torch.save(given, folder / "given.pt")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["iecl_solo.train.fit", "solo.methods"])
    usual = multiprocessing.get_start_method()
    ranks = [
        context.Process(target=_as_rank, args=(program, str(folder), r, usual)) for r in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()  # one that hangs; nothing happens to one that has ended
    said = [file.read_text() for file in sorted(folder.glob("rank*.txt"))]
    assert [process.exitcode for process in ranks] == [0, 0], said
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def note_command_line(path: str) -> None:
    """Append this process's LOCAL_RANK, arguments, and how it starts a loader's workers.

    Here, since a child finds no test module.
    """
    with open(path, "a") as file:
        start = multiprocessing.get_start_method()
        file.write(json.dumps([os.environ.get("LOCAL_RANK"), sys.argv, start]) + "\n")


class _Note(Callback):
    """Appends [rank, epoch, images] for each batch, and ends the run after one of them."""

    def __init__(self, path: str, stop: list[int] | None) -> None:
        self.path, self.stop = path, stop

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rank, epoch = trainer.global_rank, trainer.current_epoch
        with open(f"{self.path}{rank}", "a") as file:
            file.write(json.dumps([rank, epoch, batch[0].tolist()]) + "\n")
        if self.stop is not None and [epoch, batch_idx] == list(self.stop):
            os.kill(os.getpid(), signal.SIGTERM)


def train_and_note(raw: dict[str, Any], path: str, stop: list[int] | None) -> None:
    """One process of a run, which notes what it sees; here, since a child finds no test module."""
    cfg = complete(OmegaConf.create(raw), HOST)
    fit(cfg, HOST, Run(cfg), callbacks=[_Note(path, stop)])


def end_by_a_notice() -> None:
    """What a process does that is told in its evaluation; here for the same reason."""
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(60)


def script(path: Path) -> ModuleType:
    """A study or an example as a module, from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


_PEAK = """
def peak():  # of this program; resource's ru_maxrss begins with that of the process that started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
"""


def mebibytes(program: str, *arguments: str) -> float:
    """What a program prints last: how far its ``peak()`` of memory grew, in MiB.

    Glibc gives a large block back at once only above a threshold, which it raises as it goes.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", _PEAK + program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def cpu_seconds(*arguments: str) -> tuple[float, str]:
    """The processor's seconds of a Python with these arguments, and its output: the least of two
    starts, because the first compiles what it imports and a busy machine slows any one of them."""
    spent = []
    for _ in range(2):
        before = os.times()
        command = [sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = os.times()
        spent.append(after.children_user + after.children_system)
        spent[-1] -= before.children_user + before.children_system
    return min(spent), done.stdout


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``what`` gives once it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")
