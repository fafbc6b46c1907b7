"""Images a second: of views by themselves and of a training, of solo-learn, of ours, of peers."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets.folder import default_loader

from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.experiments.cost import Step, interleaved, ratio
from iecl_solo.experiments.store import Store
from iecl_solo.solo.batched import BatchedLoader
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import IMAGENET_MEAN, IMAGENET_STD, pretrain_loader
from iecl_solo.solo.host import Host
from iecl_solo.train.complete import complete

#: Libraries that are compared where they are installed (the extra ``peers``), by import name.
PEERS = ("lightly", "kornia", "stable_pretraining")
PIPELINES = ("host", "per_image", "batched", *PEERS)
TABLE = "throughput.csv"

#: Views by themselves are made in batches of this many images, whatever a network is trained with.
_BATCH = 256
#: Batches of a timed turn.
_VIEW_BATCHES, _STEPS = 2, 2


def available(arms: Mapping[str, Any]) -> dict[str, Any]:
    """The pipelines that can be measured here.

    Raises:
        IECLError: for a name that is no pipeline.

    Example:
        >>> list(available({"host": {}, "batched": {}}))
        ['host', 'batched']
    """
    for name in arms:
        if name not in PIPELINES:
            raise IECLError(f"arms: {unknown_name('pipeline', name, PIPELINES)}")
    return {
        name: arm
        for name, arm in arms.items()
        if name not in PEERS or importlib.util.find_spec(name) is not None
    }


class _Loaded:
    """A turn of a data loader: always the same number of images, its workers kept between turns."""

    def __init__(self, dataset: Any, batch_size: int, batches: int, workers: int) -> None:
        self.loader: Any = DataLoader(
            Subset(dataset, range(min(len(dataset), batches * batch_size))),
            batch_size,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            persistent_workers=workers > 0,
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class _Batched:
    """A turn of views made for whole batches, of images that are decoded already."""

    def __init__(
        self,
        loader: BatchedLoader,
        batches: int,
        views: Callable[[Tensor], list[Tensor]] | None,
    ) -> None:
        self.loader, self.views = loader, views
        self.batches = min(batches, len(loader))

    def __iter__(self) -> Iterator[Any]:
        if self.views is None:
            yield from islice(self.loader, self.batches)
            return
        order = torch.tensor([index for _, index in self.loader.sampler])
        order = order.split(self.loader.sampler.batch_size)
        for index in order[: self.batches]:
            images, _, labels = self.loader.images.take(index)
            yield [index, self.views(images.float() / 255), labels]


def source(
    cfg: DictConfig, pipeline: str, host: Host, *, batch_size: int, batches: int, threads: int
) -> Any:
    """What gives a turn's batches ``[index, views, label]`` each time it is iterated.

    Args:
        cfg: completed.
        pipeline: one of ``PIPELINES``.
        host: the solo-learn in use.
        batch_size: images of a batch; all that there are if they are fewer.
        batches: of a turn; fewer if the data set has fewer.
        threads: cores it may use: as worker processes where images are transformed one by one
            (none if 1), as torch's threads where batches are.
    """
    cfg = OmegaConf.create(plain(cfg))
    cfg.optimizer.batch_size = batch_size
    if pipeline in ("batched", "kornia", "stable_pretraining"):
        cfg.data.views = "batched"
        loader = pretrain_loader(cfg, host)
        assert isinstance(loader, BatchedLoader)
        loader.sampler.batch_size = min(batch_size, len(loader.images))
        made = {"kornia": _kornia, "stable_pretraining": _stable_pretraining}.get(pipeline)
        return _Batched(loader, batches, made(cfg) if made else None)
    cfg.data.views = "per_image"
    dataset: Any = pretrain_loader(cfg, host).dataset  # type: ignore[union-attr]
    if pipeline == "host" and hasattr(dataset, "loader"):
        dataset.loader = default_loader  # torchvision's, as in the host's own scripts
    if pipeline == "lightly":
        dataset.transform = _lightly(cfg)
    batch_size = min(batch_size, len(dataset))
    return _Loaded(dataset, batch_size, batches, 0 if threads == 1 else threads)


def _pipeline(cfg: DictConfig) -> DictConfig:
    """The one pipeline that peers are given.

    Raises:
        IECLError: for several, or for operations that peers' SimCLR pipelines have not.
    """
    first = cfg.augmentations[0]
    if len(cfg.augmentations) > 1 or first.solarization.prob or first.equalization.prob:
        raise IECLError("throughput: peers are compared on SimCLR's two views of one pipeline")
    return first


def _lightly(cfg: DictConfig) -> Any:
    a = _pipeline(cfg)
    from lightly.transforms import SimCLRTransform  # type: ignore[import-not-found, unused-ignore]

    jitter = a.color_jitter
    return SimCLRTransform(
        input_size=a.crop_size,
        cj_prob=jitter.prob,
        cj_bright=jitter.brightness,
        cj_contrast=jitter.contrast,
        cj_sat=jitter.saturation,
        cj_hue=jitter.hue,
        min_scale=a.rrc.crop_min_scale,
        random_gray_scale=a.grayscale.prob,
        gaussian_blur=a.gaussian_blur.prob,
        hf_prob=a.horizontal_flip.prob,
    )


# PIL's blur reaches six pixels to each side at its widest, 2.0
_KERNEL = 13


def _kornia(cfg: DictConfig) -> Callable[[Tensor], list[Tensor]]:
    a = _pipeline(cfg)
    import kornia.augmentation as k  # type: ignore[import-not-found, unused-ignore]

    jitter = a.color_jitter
    size = (a.crop_size, a.crop_size)
    chain = torch.nn.Sequential(
        k.RandomResizedCrop(size, (a.rrc.crop_min_scale, a.rrc.crop_max_scale), resample="bicubic"),
        k.RandomHorizontalFlip(p=a.horizontal_flip.prob),
        k.ColorJitter(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, p=jitter.prob
        ),
        k.RandomGrayscale(p=a.grayscale.prob),
        k.RandomGaussianBlur((_KERNEL, _KERNEL), (0.1, 2.0), p=a.gaussian_blur.prob),
        k.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
    )
    return lambda images: [chain(images) for _ in range(a.num_crops)]


def _stable_pretraining(cfg: DictConfig) -> Callable[[Tensor], list[Tensor]]:
    a = _pipeline(cfg)
    from stable_pretraining.data import (  # type: ignore[import-not-found, unused-ignore]
        gpu_transforms as g,
    )

    jitter = a.color_jitter
    chain = g.StackedMultiView(
        g.GPUCompose(
            [
                g.GPURandomResizedCrop(a.crop_size, (a.rrc.crop_min_scale, a.rrc.crop_max_scale)),
                g.GPURandomHorizontalFlip(a.horizontal_flip.prob),
                g.GPUColorJitter(
                    jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.prob
                ),
                g.GPURandomGrayscale(a.grayscale.prob),
                g.GPUGaussianBlur(_KERNEL, (0.1, 2.0), a.gaussian_blur.prob),
                g.GPUNormalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        ),
        a.num_crops,
    )
    return lambda images: [v["image"] for v in chain({"image": images})["views"]]


def _images(turn: Any, step: Step | None = None) -> int:
    """Run one turn, training on it if a step is given; how many images it had."""
    count = 0
    for index, views, labels in turn:
        count += len(index)
        if step is not None:
            at = step.device
            step.batch = [index.to(at), [v.to(at) for v in views], labels.to(at)]
            step()
    return count


def _rates(name: str, turns: Sequence[Callable[[], int]], rounds: int) -> dict[str, float]:
    """Images a second of the last turn, and times the first's, with quartiles over rounds."""
    count = [turn() for turn in turns]  # also what warms each up
    seconds = interleaved(turns, rounds, warmup=1)
    each = [[t / n for t in times] for times, n in zip(seconds, count, strict=True)]
    out = {f"{name}images_per_second": 1 / statistics.median(each[-1])}
    middle, low, high = ratio(each[-1], each[0])
    prefix = f"{name}ratio_to_host"
    return out | {prefix: middle, f"{prefix}_low": low, f"{prefix}_high": high}


def _start(cfg: DictConfig, pipeline: str, host: Host, threads: int) -> dict[str, float]:
    """Wall seconds and peak resident bytes of a command whose training is one step.

    The host's is its own main_pretrain.py, which 1.0.2's wheel does not hold.
    """
    script = host.path.parent / "main_pretrain.py"
    if pipeline in PEERS or (pipeline == "host" and not script.is_file()):
        return {}
    cfg = OmegaConf.create(plain(cfg))
    cfg.data.views = "batched" if pipeline == "batched" else "per_image"
    cfg.data.num_workers = 0 if threads == 1 else threads
    cfg.max_epochs, cfg.limit_train_batches, cfg.scheduler.name = 1, 1, "none"
    cfg.data.val_path, cfg.checkpoint.enabled = None, False
    cfg.accelerator, cfg.devices, cfg.precision = "cpu", "1", "32-true"
    seconds, resident = timed_command(cfg, script if pipeline == "host" else None, threads)
    return {"startup_seconds": seconds, "resident_bytes": resident}


#: Runs a command and writes its peak memory into a file. Linux begins a program's peak with that of
#: the process that started it: this one is small, and that of a benchmark is not.
_MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def timed_command(cfg: DictConfig, script: Path | None, threads: int) -> tuple[float, float]:
    """Wall seconds and peak resident bytes of a whole pretraining command, a process of its own.

    Args:
        cfg: what it trains; where it writes is filled in.
        script: the host's own main_pretrain.py; None is ``iecl-solo pretrain``.
        threads: of OpenMP.

    Raises:
        IECLError: with its last line, when it fails.
    """
    cfg.data.train_path = str(Path(cfg.data.train_path).expanduser().resolve())
    whose = ["-m", "iecl_solo", "pretrain"] if script is None else [str(script)]
    with tempfile.TemporaryDirectory() as folder:
        cfg.checkpoint.dir = folder
        (Path(folder) / "one.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        command = [sys.executable, *whose, "--config-path", folder, "--config-name", "one"]
        log, peak = Path(folder) / "log.txt", Path(folder) / "peak"
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        begun = time.perf_counter()
        with log.open("w") as out:
            measured = [sys.executable, "-c", _MEASURED, str(peak), *command]
            code = subprocess.call(measured, cwd=folder, env=env, stdout=out, stderr=out)
        seconds = time.perf_counter() - begun
        if code:
            last = (log.read_text().strip().splitlines() or [f"exit {code}"])[-1]
            raise IECLError(f"throughput: {' '.join(command[1:4])}: {last}")
        unit = 1 if sys.platform == "darwin" else 1024
        return seconds, float(int(peak.read_text()) * unit)


def measure_throughput(
    cfg: DictConfig, pipeline: str, host: Host, *, rounds: int, threads: int, start: bool = True
) -> dict[str, float]:
    """How many images a second a pipeline gives, in turn with the host's in this process.

    Args:
        cfg: a pretraining configuration as composed.
        pipeline: one of ``PIPELINES``.
        host: the solo-learn in use.
        rounds: timed turns of each.
        threads: cores that each may use.
        start: whether a command is timed too.

    Returns:
        ``images_per_second`` of views by themselves; ``ratio_to_host`` with its quartiles ``_low``
        and ``_high``; the same with ``training_`` before them for whole training steps, but not for
        peers, which have no method of the host; and of a command that trains one step
        ``startup_seconds`` and ``resident_bytes``.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        completed = complete(OmegaConf.create(plain(cfg)), host)
        wanted = [pipeline] if pipeline == "host" else ["host", pipeline]

        def sources(batch_size: int, batches: int) -> list[Any]:
            return [
                source(
                    completed, name, host, batch_size=batch_size, batches=batches, threads=threads
                )
                for name in wanted
            ]

        out = _rates("", [partial(_images, s) for s in sources(_BATCH, _VIEW_BATCHES)], rounds)
        if pipeline not in PEERS:
            step, size = Step(cfg, host), cfg.optimizer.batch_size
            turns = [partial(_images, s, step) for s in sources(size, _STEPS)]
            out |= _rates("training_", turns, rounds)
    finally:
        torch.set_num_threads(before)
    return out | (_start(cfg, pipeline, host, threads) if start else {})


def write_table(store: Store, path: Path) -> None:
    """The table of a store's rows: a line for each pipeline, network and number of threads.

    Args:
        store: of a benchmark of the kind throughput.
        path: of the CSV; its columns are ``pipeline``, ``network``, ``threads`` and what
            ``measure_throughput`` returns.
    """
    wide = store.metrics().pivot(index="cell", columns="name", values="value")
    cells = store.cells()
    rows = cells[cells["status"] == "done"].merge(wide, left_on="id", right_index=True)
    rows = rows.rename(columns={"arm": "pipeline", "data": "network"})
    order = sorted(wide.columns, key=lambda c: (c.startswith("training"), "ratio" in c, c))
    about = [name for name in ("network", "threads", "pipeline") if name in rows]
    table = rows.sort_values(about)[[*reversed(about), *order]]
    table.to_csv(path, index=False)
