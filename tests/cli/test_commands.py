"""The commands as a person runs them: compare, interruption, loggers, linear and knn."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from support import HOST, raw_config, same_tensors

from iecl_solo.cli.compare import verdict
from iecl_solo.cli.main import main
from iecl_solo.evaluate.load import load_backbone, read_pretrained
from iecl_solo.images import load_image
from iecl_solo.quiet import quiet
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.solo.data import evaluation_transform
from iecl_solo.train.callbacks import terminal
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import fit, pretrain
from iecl_solo.train.run import Run
from iecl_solo.version import __version__

ROOT = Path(__file__).parents[2]


def small(images: Path, to: Path, *more: str) -> list[str]:
    """Overrides that make a packaged configuration of the digits a matter of seconds."""
    return [
        *("--config-name", "digits/iecl_simclr", "accelerator=cpu", "devices=1"),
        *(f"data.train_path={images}", f"data.val_path={images}", "optimizer.batch_size=8"),
        *("backbone.name=timm/test_resnet", "~backbone.kwargs", "max_epochs=2"),
        *(f"checkpoint.dir={to}", "monitor.every_n_epochs=1", "monitor.images=8"),
        *("monitor.delta_h_images=1", "monitor.steps=4", "monitor.share=1", *more),
    ]


@pytest.fixture(scope="module")
def compared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``iecl-solo compare`` leaves."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = small(images, folder / "ignored", f"compare.dir={folder}")
    assert main(["compare", *arguments, "evaluation.linear.max_epochs=1"]) == 0
    return folder


def test_compare_leaves_a_table_and_pictures(compared: Path):
    frame = pd.read_csv(compared / "table.csv", index_col="method")
    assert list(frame.index) == ["simclr", "iecl_simclr"]
    for column in ("k-NN %", "linear %", "H(Z') nats", "s/step", "peak MB", "parameters"):
        assert frame[column].notna().all(), column
    assert frame["iecl_kl"].isna().tolist() == [True, False]
    assert frame["k-NN %"].between(0, 100).all()
    assert frame["parameters"].iloc[1] > frame["parameters"].iloc[0]
    for name in ("curves.png", "saib.png"):
        assert min(Image.open(compared / name).size) > 300
    page = (compared / "report.html").read_text()
    assert "iecl-solo compare --config-name digits/iecl_simclr" in page
    assert "accelerator=cpu" in page


def test_both_saw_the_same_batches_from_the_same_weights(compared: Path):
    """Before any step is taken, baseline and variant have the same loss on the same first batch."""
    logs = [
        pd.read_csv(next((compared / "runs" / m / m / "logs").glob("*/metrics.csv")))
        for m in ("simclr", "iecl_simclr")
    ]
    # accuracy of the online classifier on view 0 and 1 depends on batch and weights alone, and
    # SAIB starts as a scaling of view 1: the class loss of the first epoch is nearly shared
    first = [log["train_class_loss_epoch"].dropna().iloc[0] for log in logs]
    assert first[0] == pytest.approx(first[1], rel=0.5)
    args = [
        json.loads((compared / "runs" / m / m / "args.json").read_text())
        for m in ("simclr", "iecl_simclr")
    ]
    shared = set(args[0]) - {"method", "name", "iecl"}
    assert all(args[0][key] == args[1][key] for key in shared)


@pytest.mark.any_host
def test_second_compare_trains_nothing(compared: Path, images: Path, capfd):
    files = {p: p.stat().st_mtime_ns for p in compared.glob("runs/**/*") if p.is_file()}
    arguments = small(images, compared / "ignored", f"compare.dir={compared}")
    assert main(["compare", *arguments, "evaluation.linear.max_epochs=1"]) == 0
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert capfd.readouterr().out.count("trained already") == 2


def test_linear_and_knn_of_a_run(compared: Path, images: Path, capsys, monkeypatch):
    run = compared / "runs/iecl_simclr/iecl_simclr"
    assert main(["knn", "--config-name", "default", f"pretrained_feature_extractor={run}"]) == 0
    # all of its own training images vote with one neighbour: each finds itself
    assert "k-NN (cosine, k 1, T 0.07): top-1 100.00 %" in capsys.readouterr().out
    linear = [
        *("linear", "--config-name", "digits", f"pretrained_feature_extractor={run}"),
        *(f"data.train_path={images}", f"data.val_path={images}", "max_epochs=2"),
        *("backbone.name=timm/test_resnet", "~backbone.kwargs", "name=probe"),
        *("scheduler.lr_decay_steps=[1]", "data.num_workers=1"),
    ]
    started = []
    start = BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", lambda self: (started.append(self), start(self))[1])
    assert main(linear) == 0
    assert len(started) == 2  # one worker that trains and one that tests, in whatever many epochs
    result = json.loads((run / "probe.json").read_text())
    assert 0 <= result["acc1"] <= 100 and result["settings"]["max_epochs"] == 2


def test_inspect_measures_and_draws(compared: Path, capsys):
    run = compared / "runs/iecl_simclr/iecl_simclr"
    assert main(["inspect", str(run), "--images", "16", "--probes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "delta_h_isotropic" in printed and "effective_rank" in printed
    figures = {p.name for p in (run / "inspect").glob("*.png")}
    assert figures == {"entropy.png", "saib_over_training.png", "singular_values.png"}


def test_inspect_says_what_the_monitor_said(compared: Path, capsys):
    run = compared / "runs/iecl_simclr/iecl_simclr"
    assert main(["inspect", str(run)]) == 0
    monitor = pd.read_csv(run / "monitor.csv").iloc[-1]
    found = json.loads((run / "inspect" / "inspect.json").read_text())
    assert f"{found['sample']['images']} images, the first of epoch" in capsys.readouterr().out
    assert found["sample"]["images"] == monitor["images"]
    assert found["sample"]["epoch"] == monitor["epoch"]
    for name, value in found["measures"].items():
        assert value == pytest.approx(monitor[name], rel=1e-3, abs=1e-5), name


def test_inspect_has_a_delta_h_where_the_monitor_had_no_time(
    compared: Path, tmp_path: Path, capsys
):
    run = shutil.copytree(compared / "runs/iecl_simclr/iecl_simclr", tmp_path / "run")
    monitor = pd.read_csv(run / "monitor.csv")
    names = [name for name in monitor if name.startswith("delta_h_") and name != "delta_h_images"]
    monitor.drop(columns=["delta_h", *names]).assign(delta_h_images=0).to_csv(
        run / "monitor.csv", index=False
    )
    asked = ["inspect", str(run), "--images", "8", "--to", str(tmp_path / "figures")]
    assert main(asked) == 0
    assert "delta_h_isotropic" in capsys.readouterr().out
    assert (tmp_path / "figures/inspect.json").is_file()


def test_linear_takes_data_size_and_learning_rate_of_the_run(compared: Path, capsys):
    run = compared / "runs/iecl_simclr/iecl_simclr"
    source = [f"pretrained_feature_extractor={run}", "max_epochs=2", "scheduler.lr_decay_steps=[1]"]
    assert main(["linear", "--config-name", "default", *source, "accelerator=cpu"]) == 0
    assert "the best of [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]" in capsys.readouterr().out
    settings = json.loads((run / "linear.json").read_text())["settings"]
    args = json.loads((run / "args.json").read_text())
    assert settings["data"]["augmentations"]["crop_size"] == args["augmentations"][0]["crop_size"]
    for name in ("dataset", "train_path", "val_path", "format"):
        assert settings["data"][name] == args["data"][name]
    assert settings["backbone"]["name"] == "timm/test_resnet"
    # another configuration's size does not count unless it was typed
    data = [f"data.{part}_path={args['data']['train_path']}" for part in ("train", "val")]
    custom = ["linear", "--config-name", "custom", *source, *data, "~backbone", "name=custom"]
    assert main([*custom, "accelerator=cpu", "devices=1", "precision=32-true"]) == 0
    settings = json.loads((run / "custom.json").read_text())["settings"]
    assert settings["data"]["augmentations"]["crop_size"] == 32


def test_a_linear_layer_that_diverged_is_no_result(compared: Path, capsys):
    run = compared / "runs/simclr/simclr"
    command = ["linear", "--config-name", "default", f"pretrained_feature_extractor={run}"]
    command += ["max_epochs=4", "optimizer.lr=1e38", "optimizer.weight_decay=1"]
    command += ["name=diverged", "accelerator=cpu"]
    assert main(command) != 0
    assert "optimizer.lr: the linear layer diverged at 1e+38" in capsys.readouterr().err
    assert not (run / "diverged.json").exists()


def test_linear_by_a_yaml_of_ones_own_takes_what_it_leaves_open(compared: Path, tmp_path, capsys):
    """Also where it has no ``data.augmentations``, which solo-learn's own have."""
    own = {
        "backbone": {"name": "timm/test_resnet"},
        "data": {"dataset": "custom", "num_workers": 0},
        "optimizer": {"name": "sgd", "batch_size": 8, "lr": 0.1, "weight_decay": 0},
        "scheduler": {"name": "step", "lr_decay_steps": [1]},
        **{"max_epochs": 1, "name": "mine", "devices": 1, "accelerator": "cpu"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    run = compared / "runs/simclr/simclr"
    given = f"+pretrained_feature_extractor={run}"
    assert main(["linear", "--config-path", str(tmp_path), "--config-name", "own", given]) == 0
    settings = json.loads((run / "mine.json").read_text())["settings"]
    assert settings["data"]["augmentations"]["crop_size"] == 32


def test_embed_any_folder_of_images(compared: Path, tmp_path: Path, monkeypatch, capsys):
    """Nested, of mixed formats; the same features in each format of file; it goes on."""
    photos = tmp_path / "photos"
    generator = np.random.default_rng(0)
    names = ["a.png", "2024/b.JPG", "2024/may/c.bmp", "d.webp", "2024/may/e.png"]
    for i, name in enumerate(names):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    run = str(compared / "runs/iecl_simclr/iecl_simclr")
    common = ["embed", run, "--images", str(photos), "--num-workers", "0", "--device", "cpu"]
    for suffix in ("npy", "csv", "parquet"):
        assert main([*common, "--batch-size", "2", "--to", f"{tmp_path}/f.{suffix}"]) == 0
    assert "5 images" in capsys.readouterr().out
    features = np.load(tmp_path / "f.npy")
    paths = (tmp_path / "f.npy.paths.txt").read_text().splitlines()
    assert features.dtype == np.float32 and sorted(paths) == sorted(names)
    frame = pd.read_parquet(tmp_path / "f.parquet")
    assert frame["path"].tolist() == paths
    assert np.array_equal(np.stack(frame["features"].tolist()), features)
    table = pd.read_csv(tmp_path / "f.csv")
    assert table["path"].tolist() == paths
    np.testing.assert_allclose(table.filter(regex=r"^f\d+$").to_numpy(), features, rtol=1e-6)
    # each image alone gives the same, through the run's own evaluation transform
    backbone = load_backbone(pretrained := read_pretrained(run), HOST).eval()
    transform = evaluation_transform(HOST, "custom", pretrained.cfg.augmentations[0].crop_size)
    with torch.no_grad():
        alone = backbone(transform(load_image(photos / paths[3]))[None])[0].numpy()
    np.testing.assert_allclose(features[3], alone, rtol=1e-4, atol=1e-5)
    # interrupted after two batches, the next command computes the third alone
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "EachMinute", lambda what: stop)
    again = [*common, "--batch-size", "2", "--to", f"{tmp_path}/g.npy"]
    assert main(again) == 130 and not (tmp_path / "g.npy").exists()
    (parts,) = tmp_path.glob("g.npy.*.parts")
    (parts / "000002.npy.e9962b82.part").write_bytes(b"a kill in the middle of a write")
    # another folder with files of these names has features of its own
    shutil.copytree(photos, tmp_path / "others")
    others = [a.replace(str(photos), str(tmp_path / "others")) for a in again]
    assert main(others) == 0 and seen == [2, 4, 2, 4, 5]
    del seen[2:]
    (tmp_path / "g.npy").unlink()
    assert main(again) == 0 and seen == [2, 4, 5]
    assert np.array_equal(np.load(tmp_path / "g.npy"), features)
    assert not list(tmp_path.glob("*.parts"))


def test_each_job_of_a_sweep_has_its_own_folder(images: Path, tmp_path: Path):
    arguments = small(images, tmp_path / "runs", "max_epochs=1", "monitor.every_n_epochs=0")
    typed = list(sys.argv)
    assert main(["pretrain", *arguments, "--multirun", "optimizer.lr=0.1,0.2"]) == 0
    assert sys.argv == typed
    runs = {p.parent.name: p.parent for p in tmp_path.rglob("result.json")}
    assert set(runs) == {"iecl_simclr-digits-lr0.1", "iecl_simclr-digits-lr0.2"}
    rates = [json.loads((r / "args.json").read_text())["optimizer"]["lr"] for r in runs.values()]
    assert len(set(rates)) == 2
    for checkpoint in tmp_path.rglob("*.ckpt"):
        assert checkpoint.stem == checkpoint.parent.name


@pytest.mark.any_host
def test_a_command_leaves_the_process_as_it_was(compared: Path, images: Path):
    """Loggers, warnings, matplotlib's backend, torch's threads, the arguments and variables."""
    import matplotlib

    def state() -> list[object]:
        names = ("lightning", "lightning.pytorch", "lightning.fabric", "users.own")
        return [
            logging.root.manager.disable,
            [logging.getLogger(name).level for name in names],
            list(warnings.filters),
            dict.__getitem__(matplotlib.rcParams, "backend"),
            torch.get_num_threads(),
            list(sys.argv),
            {k: v for k, v in os.environ.items() if k.startswith(("HYDRA", "MASTER", "LOCAL"))},
            GlobalHydra.instance().is_initialized(),
        ]

    before = state()
    run = compared / "runs/iecl_simclr/iecl_simclr"
    assert main(["inspect", str(run), "--images", "8", "--probes", "2"]) == 0
    assert main(["knn", "--config-name", "default", f"pretrained_feature_extractor={run}"]) == 0
    arguments = small(images, compared / "ignored", f"compare.dir={compared}")
    assert main(["compare", *arguments, "evaluation.linear.max_epochs=1"]) == 0
    assert state() == before


@pytest.mark.any_host
def test_importing_pictures_leaves_the_backend_alone():
    program = (
        "import matplotlib; before = dict.__getitem__(matplotlib.rcParams, 'backend');"
        "import iecl_solo.evaluate.pictures;"
        "assert dict.__getitem__(matplotlib.rcParams, 'backend') is before"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_users_own_logger_is_heard(caplog: pytest.LogCaptureFixture):
    with quiet(), caplog.at_level(logging.INFO):
        logging.getLogger("users.own").info("from the user's code")
        logging.getLogger("lightning.pytorch").warning("an announcement")
        # of solo-learn's GitHub main, at each model; a run of ours resumes bit for bit
        logging.warning("Using scheduler_interval=step might generate issues when resuming a ...")
    logging.warning("from the user's root")
    said = [record.message for record in caplog.records]
    assert said == ["from the user's code", "from the user's root"]


@pytest.mark.parametrize("command", ["pretrain", "compare", "benchmark", "linear", "knn"])
def test_the_first_line_waits_for_no_library(command: str):
    name = {"benchmark": "small_batch", "linear": "digits", "knn": "default"}
    name = name.get(command, "digits/iecl_simclr")
    program = (
        "import sys; sys.modules['torch'] = None; from iecl_solo.cli.main import main;"
        f"main(['{command}', '--config-name', '{name}'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "import of torch halted" in done.stderr
    said = f"{command} {name}: solo-learn {HOST.version}, iecl-solo {__version__}, loading torch"
    assert done.stdout.splitlines() == [said]


def test_verdict_is_honest():
    frame = pd.DataFrame(
        {"k-NN %": [50.0, 48.0], "linear %": [50.0, 51.5]}, index=["simclr", "iecl_simclr"]
    )
    said = verdict(frame)
    assert "behind the baseline by 2.00 points (k-NN)" in said
    assert "ahead of the baseline by 1.50 points (linear)" in said and "one seed" in said
    unlabelled = pd.DataFrame({"RankMe": [12.6, 19.3]}, index=["simclr", "iecl_simclr"])
    assert verdict(unlabelled).endswith("nothing here says which of the two is better.")


class _Crash(pl.Callback):
    """Fails at the start of the second epoch, when the first one's checkpoint is there."""

    def on_train_epoch_start(self, trainer, module) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("method", ["iecl_simclr", "iecl_byol"])
def test_run_that_was_cut_off_ends_as_the_whole_one(method: str, images: Path, tmp_path: Path):
    def cfg(name: str):
        raw = raw_config(method, images, max_epochs=2, checkpoint__dir=str(tmp_path / name))
        return OmegaConf.create(raw)

    whole = pretrain(cfg("whole"))
    cut = complete(cfg("cut"), HOST)
    run = Run(cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(cut, HOST, run, callbacks=[_Crash()])
    again = pretrain(cfg("cut"))
    a, b = (read_checkpoint(r.checkpoint) for r in (whole, again))
    assert a["global_step"] == b["global_step"]
    assert same_tensors(a["state_dict"], b["state_dict"]) == []


@pytest.mark.any_host
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_stopped_by_a_signal_says_so_and_goes_on(
    number: int, workers: int, images: Path, tmp_path: Path
):
    more = ("max_epochs=500", "monitor.every_n_epochs=0", f"data.num_workers={workers}")
    arguments = small(images, tmp_path / "runs", *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "iecl_solo.cli.main", "pretrain", *arguments],
        env={**os.environ, "PYTHONPATH": str(HOST.path.parent), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a job in the background is started deaf to it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.rglob("*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, number)  # terminals, timeout and schedulers signal the workers too
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    (said,) = [line for line in error.splitlines() if line.startswith("iecl-solo: ")]
    assert "saved at " in said and said.endswith("the same command goes on where it stopped")
    assert "Traceback" not in error
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert read_checkpoint(checkpoint)["epoch"] >= 0


def test_every_logger_by_configuration(images: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    arguments = small(
        images,
        tmp_path / "runs",
        *("max_epochs=1", "+log_every_n_steps=1", "tensorboard.enabled=true"),
        *("wandb.enabled=true", "wandb.offline=true"),
    )
    assert main(["pretrain", *arguments]) == 0
    (run,) = (tmp_path / "runs/iecl_simclr").iterdir()
    metrics = pd.read_csv(run / "logs/version_0/metrics.csv")
    for name in ("train_iecl_kl_step", "train_iecl_kl_epoch", "monitor_delta_h"):
        assert metrics[name].notna().any(), name
    assert list(run.glob("tensorboard/**/events.out.*"))
    assert list(run.glob("wandb/offline-run-*"))
    result = json.loads((run / "result.json").read_text())
    assert result["seconds_per_step"] > 0 and result["versions"]["solo-learn"] == HOST.version


def _wandb_runs(folder: Path) -> set[str]:
    # offline-run-DATE_TIME-ID; two of one second are told apart by a number behind it
    return {p.name.split("-")[3] for p in folder.glob("wandb/offline-run-*")}


def _logged_records(file: Path) -> Iterator[bytes]:
    """Records of LevelDB's log format, in which W&B keeps an offline run, after its own 7 bytes."""
    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := -at % 32768) and left < 7:  # a block's rest holds no header
            at += left
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield record
            record = b""


def _wandb_records(folder: Path) -> dict[str, list[Any]]:
    """What the offline runs hold, in their order: configurations, rows of the history."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[Any]] = {"config": [], "history": []}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        config: dict[str, Any] = {}
        for data in _logged_records(file):
            record = Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = {i.key or ".".join(i.nested_key): i for i in record.history.item}
                found["history"].append({k: json.loads(i.value_json) for k, i in items.items()})
            elif kind in ("run", "config"):
                updated = record.run.config if kind == "run" else record.config
                config |= {i.key: json.loads(i.value_json) for i in updated.update}
        found["config"].append(config)
    return found


def test_loggers_get_the_configuration_and_go_on_with_the_same_run(
    images: Path, tmp_path: Path, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    raw = raw_config("iecl_simclr", images, checkpoint__dir=str(tmp_path), max_epochs=2)
    raw["tensorboard"] = {"enabled": True}
    raw["wandb"] = {"enabled": True, "offline": True, "project": "test"}
    raw["monitor"] = {"images": 8, "delta_h_images": 1, "probes": 2, "steps": 4}
    raw["log_every_n_steps"] = 1  # rows of learning rates alone, without an epoch, among the rest
    cut = complete(OmegaConf.create(raw), HOST)
    run = Run(cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(cut, HOST, run, callbacks=[_Crash()])
    before = _wandb_runs(run.folder)
    pretrain(OmegaConf.create(raw))
    assert len(before) == 1 and _wandb_runs(run.folder) == before
    assert json.loads((run.folder / "args.json").read_text())["wandb_run_id"] in before
    for hparams in run.folder.glob("*/version_0/hparams.yaml"):
        told = OmegaConf.to_container(OmegaConf.load(hparams))
        assert told["optimizer"]["lr"] == cut.optimizer.lr and told["iecl"]["lambda"] >= 0
    assert len(list(run.folder.glob("*/version_0/hparams.yaml"))) == 2  # CSV and TensorBoard
    sent = _wandb_records(run.folder)
    assert len(sent["config"]) == 2  # of one run: before the cut, and after it
    for told in sent["config"]:
        assert told["optimizer"]["lr"] == cut.optimizer.lr and told["iecl"]["lambda"] >= 0
    # pictures at the monitor's frequency: every tenth epoch and the last one
    steps = []
    for version in (0, 1):
        folder = run.folder / f"tensorboard/version_{version}"
        events = EventAccumulator(str(folder), {"images": 0}).Reload()
        steps += [e.step for e in events.Images("iecl_views")]
    assert steps == [3, 6]
    media = [row["iecl_views.filenames"] for row in sent["history"] if "iecl_views.count" in row]
    assert len(media) == 2
    for (path,) in media:
        assert len(list(run.folder.glob(f"wandb/offline-run-*/files/{path}"))) == 1
