"""The benchmark runner: its grid, its store, its launchers, its evaluation, its costs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from support import HOST
from support_report import make_store

from iecl_solo.cli.benchmark import _check_measures, check, show, take_gpu
from iecl_solo.cli.main import main
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import evaluate, split
from iecl_solo.experiments.cell import _prepare
from iecl_solo.experiments.cost import Step, interleaved, measure_cost
from iecl_solo.experiments.grid import cells, configuration, read_benchmark
from iecl_solo.experiments.store import STORE, Store, read_rows
from iecl_solo.order import seed_all
from iecl_solo.report.results import read
from iecl_solo.solo.build import build_model
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.registry import check_method
from iecl_solo.solo.settings import prepare_pretrain
from iecl_solo.train.fit import pretrain
from iecl_solo.train.packaged import packaged_configs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "benchmark"
# what a clock or the machine decides
NOT_REPEATABLE = ("seconds_per_step", "peak_memory_bytes")


def grid(images: Path, **changes: Any) -> dict[str, Any]:
    """A benchmark of four runs of seconds."""
    return {
        "name": "tiny",
        "question": "Does anything work?",
        "data": {
            "toy": {
                "config": "custom",
                "settings": {
                    "data": {
                        "train_path": str(images),
                        "val_path": str(images),
                        "image_size": 32,
                        "num_workers": 0,
                    }
                },
            }
        },
        "arms": {"simclr": {"method": "simclr"}, "iecl_simclr": {"method": "iecl_simclr"}},
        "seeds": [0, 1],
        "measures": ["knn_acc1"],
        "settings": {
            "backbone": {"name": "timm/test_resnet"},
            "method_kwargs": {"proj_hidden_dim": 32, "proj_output_dim": 16},
            "optimizer": {"name": "sgd", "kwargs": None, "batch_size": 8, "lr": 0.1},
            "scheduler": {"warmup_epochs": 0},
            "precision": "32-true",
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "monitor": {"every_n_epochs": 1, "delta_h_images": 1, "images": 8, "steps": 4},
        },
        "evaluation": {"linear": {"max_epochs": 1, "augment": False}},
        "threads": 1,
        **changes,
    }


def write(folder: Path, benchmark: dict[str, Any]) -> list[str]:
    """Arguments of ``iecl-solo`` that run a benchmark out of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    there = ("--config-path", str(folder), "--config-name", "tiny", f"dir={folder}/out")
    return ["benchmark", *there]


def rows(folder: Path) -> pd.DataFrame:
    """All that a store says of its cells but how long they took."""
    store = Store(folder / "out" / STORE, create=False)
    metrics = store.metrics()
    metrics = metrics[~metrics["name"].isin(NOT_REPEATABLE)].assign(epoch=-1)
    both = pd.concat([metrics, store.curves()])
    return both.sort_values(["cell", "name", "epoch"]).reset_index(drop=True)


def of_first_seed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["cell"].str.contains("seed0")].reset_index(drop=True)


@pytest.fixture(scope="module", autouse=True)
def unrendered() -> Iterator[None]:
    """Pictures without ink: tests/report looks at them, and the thirty of a report take seconds."""

    def save(self: Figure, file: TextIO, **_: Any) -> None:
        file.write("<svg></svg>")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


@pytest.fixture(scope="module")
def local(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a benchmark that ran in one process."""
    folder = tmp_path_factory.mktemp("local")
    assert main(write(folder, grid(images))) == 0
    return folder


def test_every_cell_of_the_grid_is_a_row(local: Path):
    store = Store(local / "out" / STORE, create=False)
    found = store.cells()
    assert sorted(zip(found["arm"], found["seed"], strict=True)) == [
        ("iecl_simclr", 0),
        ("iecl_simclr", 1),
        ("simclr", 0),
        ("simclr", 1),
    ]
    assert set(found["status"]) == {"done"}
    assert torch.__version__.startswith(found["versions"].iloc[0]["torch"])
    assert found["config"].iloc[0]["max_epochs"] == 2
    assert set(store.meta()["cells"]) == set(found["id"])
    measures = store.metrics().pivot_table(index="cell", columns="name", values="value")
    for name in ("knn_acc1", "linear_acc1", "online_acc1", "query_entropy", "effective_rank"):
        assert measures[name].notna().all(), name
    assert set(store.curves()["name"]) >= {"host_loss", "iecl_kl", "delta_h", "val_acc1"}
    assert (local / "out" / "report.html").is_file()


def test_a_rerun_does_nothing(local: Path, images: Path, capsys: pytest.CaptureFixture[str]):
    before, stamp = rows(local), sorted(p.stat().st_mtime_ns for p in local.rglob("*.ckpt"))
    users = logging.getLogger("users.of_a_benchmark")
    assert main(write(local, grid(images))) == 0
    assert users.isEnabledFor(logging.WARNING)  # Hydra can silence the loggers that it finds
    assert "to run" not in capsys.readouterr().out
    pd.testing.assert_frame_equal(rows(local), before)
    assert sorted(p.stat().st_mtime_ns for p in local.rglob("*.ckpt")) == stamp


def _copy(local: Path, to: Path) -> Path:
    shutil.copytree(local, to)
    return to


def _trained(folder: Path) -> list[int]:
    return sorted(p.stat().st_mtime_ns for p in folder.rglob("*.ckpt"))


def test_lost_rows_are_made_again_of_the_runs(local: Path, images: Path, tmp_path: Path, capsys):
    copy = _copy(local, tmp_path / "copy")
    expected, stamps = rows(copy), _trained(copy)
    shutil.rmtree(copy / "out" / STORE)
    assert main(write(copy, grid(images))) == 0
    out = capsys.readouterr().out
    assert "4 rows made again" in out and "to run" not in out
    pd.testing.assert_frame_equal(rows(copy), expected)
    assert _trained(copy) == stamps


def test_an_arm_that_ran_without_its_baseline_is_compared_with_it_later(
    local: Path, images: Path, tmp_path: Path
):
    copy = _copy(local, tmp_path / "copy")
    shutil.rmtree(copy / "out" / STORE)
    whole = write(copy, grid(images))
    alone = [*whole, "~arms.simclr"]
    for command, expected in ((alone, None), (whole, "simclr"), (alone, "simclr")):
        assert main(command) == 0
        _, kept = read_rows(copy / "out/rows.csv")
        assert {r["against"] for r in kept if r["arm"] == "iecl_simclr"} == {expected}


def test_committed_rows_are_not_run_again(local: Path, images: Path, tmp_path: Path, capsys):
    lines = (local / "out" / "rows.csv").read_text().splitlines(keepends=True)
    (tmp_path / "kept.csv").write_text("".join(x for x in lines if "simclr-seed1" not in x))
    folder = tmp_path / "new"
    assert main([*write(folder, grid(images)), f"rows={tmp_path / 'kept.csv'}"]) == 0
    out = capsys.readouterr().out
    assert "2 of 4 cells were run elsewhere" in out and "2 of 4 cells to run" in out
    assert len(list(folder.rglob("*.ckpt"))) == 2
    measured = rows(folder)[lambda f: f["epoch"] == -1].reset_index(drop=True)
    expected = rows(local)[lambda f: f["epoch"] == -1].reset_index(drop=True)
    pd.testing.assert_frame_equal(measured, expected)


def test_a_report_of_a_csv_alone(local: Path, tmp_path: Path, capsys):
    shutil.copy(local / "out" / "rows.csv", tmp_path)
    assert main(["report", str(tmp_path / "rows.csv")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Does anything work?" in page and "iecl_simclr" in page
    assert "k-NN top-1" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".csv", ".html")) == [
        "report.html",
        "rows.csv",
    ]


@pytest.mark.parametrize("data", [("strong",), ("strong", "minimal")])
@pytest.mark.parametrize("count", [2, 13])
def test_its_table_is_read_with_few_arms_and_with_many(count, data, tmp_path, capsys):
    arms = {f"method_number_{i}": {"method": "simclr"} for i in range(count)}
    show(read(make_store(tmp_path, arms=arms, data=data, measures=["knn_acc1", "linear_acc1"])))
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if line.startswith(("│", "┃"))]
    names = [*arms, *(data if len(data) > 1 else ())]
    assert all(any(name in line for line in table) for name in names) and "…" not in said
    assert "k-NN top-1 (%)" in said and "linear probe top-1 (%)" in said
    # many arms are down, each once a setting; two are across, in a table for each measure
    few = 3 if len(data) == 1 else 2 * (1 + len(data))
    assert len(table) == (1 + count * len(data) if count > 2 else few)


def test_it_says_which_cell_how_long_and_what_came_out(local: Path, images: Path, tmp_path, capsys):
    copy = _copy(local, tmp_path / "copy")
    assert main([*write(copy, grid(images)), "seeds=[0,1,2]"]) == 0
    out = capsys.readouterr().out
    assert "2 of 6 cells to run" in out
    assert len(Store(copy / "out" / STORE).done()) == 6
    assert "cell 5 of 6  toy-simclr-seed2" in out and " left)" in out
    table = out[out.index("k-NN top-1 (%)") :]
    assert "iecl_simclr" in table and "±" in table


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("ray", marks=pytest.mark.robust)])
def test_other_launchers_give_the_same_rows(
    local: Path, images: Path, tmp_path: Path, launcher: str
):
    options = {
        "joblib": ["hydra.launcher.n_jobs=2"],
        "ray": ["++hydra.launcher.ray.init.num_cpus=2"],
    }
    arguments = write(tmp_path, grid(images, seeds=[0]))
    assert main([*arguments, f"hydra/launcher={launcher}", *options[launcher]]) == 0
    pd.testing.assert_frame_equal(rows(tmp_path), of_first_seed(rows(local)))


def test_kill_in_the_middle_leaves_the_same_store(local: Path, images: Path, tmp_path: Path):
    arguments = write(tmp_path, grid(images))
    command = [sys.executable, "-m", "iecl_solo.cli.main", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    store, deadline = tmp_path / "out" / STORE, time.monotonic() + 200
    while time.monotonic() < deadline:
        if store.is_dir() and {"done", "running"} <= {row["status"] for row in Store(store).rows()}:
            break
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(Store(store).done()) < 4
    assert main(arguments) == 0
    pd.testing.assert_frame_equal(rows(tmp_path), rows(local))


def test_a_job_that_is_lost_is_one_line_and_the_report_is_written(
    local: Path, images: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """As submitit says it of a node that died, and joblib and Ray of a worker."""
    copy = _copy(local, tmp_path / "copy")

    def lose(*_: Any) -> None:
        raise RuntimeError("Job 7_1 (task: 0)\nhas not produced any output (state: NODE_FAIL)")

    monkeypatch.setattr("iecl_solo.cli.hydra_app.launch", lose)
    arguments = [*write(copy, grid(images)), "seeds=[0,1,2]"]
    with pytest.raises(RuntimeError):  # here there is no launcher that could lose one
        main(arguments)
    assert main([*arguments, "hydra/launcher=joblib"]) == 1
    out, error = capsys.readouterr()
    assert "a job was lost (has not produced any output (state: NODE_FAIL))" in error
    assert "report: " in out and len(Store(copy / "out" / STORE).done()) == 4


def test_workers_of_one_machine_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    taken = []
    for given in ("", "5,6,7"):
        for number in range(4):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
            take_gpu(number)
            taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == ["0", "1", "2", "0", "5", "6", "7", "5"]


_SBATCH = """#!/bin/bash
# stands for SLURM: runs each task of the array here, once the pickle has its final name
script="${@: -1}"
cp "$script" {folder}/submission.sh
last=$(grep -oP '(?<=--array=0-)[0-9]+' "$script")
(
  sleep 2
  for i in $(seq 0 "$last"); do
    SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i SLURM_JOB_NUM_NODES=1 \\
    SLURM_NTASKS=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=here \\
    bash {folder}/submission.sh > {folder}/task-$i.log 2>&1
  done
) > /dev/null 2>&1 &
echo "Submitted batch job 7"
"""
_SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do
  case "$1" in --output|--error) shift 2 ;; *) shift ;; esac
done
exec "$@"
"""
_SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for i in 0 1 2 3; do echo "7_$i|RUNNING|here"; done
"""


@pytest.mark.robust
def test_slurm_gets_a_submission_for_each_cell(
    local: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, text in {"sbatch": _SBATCH, "srun": _SRUN, "sacct": _SACCT}.items():
        (tmp_path / name).write_text(text.replace("{folder}", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    arguments = write(tmp_path, grid(images, seeds=[0]))
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    launcher += ["hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=90"]
    command = [sys.executable, "-m", "iecl_solo.cli.main", *arguments, *launcher]
    subprocess.run(command, check=True, timeout=400)
    submission = (tmp_path / "submission.sh").read_text()
    for line in ("--partition=gpu", "--gpus-per-node=1", "--time=90", "--array=0-1"):
        assert f"#SBATCH {line}" in submission, submission
    pd.testing.assert_frame_equal(rows(tmp_path), of_first_seed(rows(local)))


def test_a_failed_cell_is_recorded_and_the_others_go_on(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setattr(
        "iecl_solo.experiments.cell.evaluate",
        lambda run, protocol: 1 / 0 if "-simclr" in run.folder.name else evaluate(run, protocol),
    )
    arguments = write(tmp_path, grid(images, seeds=[0]))
    assert main(arguments) == 1
    found = Store(tmp_path / "out" / STORE).cells().set_index("arm")
    assert dict(found["status"]) == {"simclr": "failed", "iecl_simclr": "done"}
    assert "ZeroDivisionError" in found.loc["simclr", "error"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments) == 0  # tried again, from the checkpoints that are there
    assert set(Store(tmp_path / "out" / STORE).cells()["status"]) == {"done"}


def test_a_seed_shares_weights_batches_and_views(images: Path):
    benchmark = read_benchmark(grid(images))
    for seed in benchmark.seeds:
        both = []
        for cell in [c for c in cells(benchmark) if c.seed == seed]:
            cfg = prepare_pretrain(configuration(benchmark, cell), HOST)
            seed_everything(cfg.seed, verbose=False)
            model = build_model(cfg, HOST)
            seed_all(cfg.seed, 0)
            index, views, _ = next(iter(pretrain_loader(cfg, HOST)))
            both.append((dict(model.named_parameters()), index, views))
        (plain, index, views), (variant, variant_index, variant_views) = both
        assert all(torch.equal(p, variant[name]) for name, p in plain.items())
        assert torch.equal(index, variant_index)
        assert all(torch.equal(a, b) for a, b in zip(views, variant_views, strict=True))


# --- the grid


def packaged_presets() -> list[tuple[str, str]]:
    """All but those whose images only the user can name."""
    found = []
    for name in packaged_configs("benchmark"):
        presets = plain(OmegaConf.load(CONFIGS / f"{name}.yaml"))["presets"]
        found += [(name, p) for p, keys in presets.items() if "???" not in str(keys.get("data"))]
    return found


@pytest.mark.parametrize(("name", "preset"), packaged_presets())
def test_packaged_benchmarks_compose(name: str, preset: str):
    written = plain(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    benchmark = read_benchmark({**written, "preset": preset})
    assert benchmark.question.endswith("?")
    _check_measures(benchmark, _protocol(benchmark.evaluation), unlabelled=False)
    for key in (*benchmark.arms, *benchmark.data):  # so that ~arms.KEY can be typed
        assert re.fullmatch(r"\w+", key), key
    grid_cells = cells(benchmark)
    assert len({c.id for c in grid_cells}) == len(grid_cells)
    seen = set()
    for cell in grid_cells:
        if (cell.arm, cell.data) in seen:
            continue
        seen.add((cell.arm, cell.data))
        check_method(cell.method)
        cfg = configuration(benchmark, cell)
        assert cfg.seed == cell.seed
        for key, value in cell.axes.items():
            assert OmegaConf.select(cfg, key) == value
    if preset == "smoke":
        assert benchmark.kind != "training" or benchmark.threads == 1
    for entry in benchmark.published:
        assert entry["arm"] in benchmark.arms
        assert set(entry["axes"]) <= set(benchmark.axes)


def test_a_saib_learned_elsewhere_is_an_augmentation(images: Path, tmp_path: Path):
    elsewhere = {"method": "simclr", "saib_from": {"arm": "iecl_simclr", "data": "toy"}}
    benchmark = grid(images, seeds=[0], evaluation={"linear": {"max_epochs": 0}})
    benchmark["arms"]["frozen"] = elsewhere
    assert main(write(tmp_path, benchmark)) == 0
    found = Store(tmp_path / "out" / STORE).cells().set_index("arm")
    saib = found.loc["frozen", "config"]["augmentations"][0]["saib"]
    assert Path(saib["file"]).is_file()
    assert "iecl_simclr" in saib["file"]


def _data(**keys: Any) -> dict[str, Any]:
    return {"data": {"toy": {"config": "custom", **keys}}}


def _taking(source: Any, **others: Any) -> dict[str, Any]:
    """An arm that takes its SAIB from elsewhere, beside the grid's two."""
    arms = {name: {"method": name} for name in ("simclr", "iecl_simclr")}
    return {"arms": {**arms, "frozen": {"method": "simclr", "saib_from": source}, **others}}


PUBLISHED = {"data": "toy", "arm": "simclr", "measure": "knn_acc1", "value": 90.0}
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown preset": ({"presets": {"smoke": {}}, "preset": "smok"}, ["preset", "'smoke'"]),
    "an unknown key": ({"seedz": [1]}, ["benchmark.seedz", "'seeds'"]),
    "no seeds": ({"seeds": []}, ["seeds"]),
    "an arm without a method": ({"arms": {"a": {}}}, ["arms.a", "method"]),
    "an unknown method": ({"arms": {"a": {"method": "simclrr"}}}, ["simclrr"]),
    "an unknown baseline": (
        {"arms": {"a": {"method": "simclr", "against": "bb"}}},
        ["arms.a.against", "bb"],
    ),
    "an axis that is no list": ({"axes": {"max_epochs": 3}}, ["axes.max_epochs", "list"]),
    "a seed twice": ({"seeds": [0, 0]}, ["seeds", "0", "twice"]),
    "an unknown measure": ({"measures": ["knn_ac1"]}, ["measures", "knn_ac1", "'knn_acc1'"]),
    "a measure of no data set": ({"measures": ["knn_acc1/stl"]}, ["measures", "stl"]),
    "one round": ({"rounds": 1}, ["rounds", "1", "from 2 up"]),
    "no threads": ({"threads": -1}, ["threads", "-1", "from 1 up"]),
    "a measure of the dense task": (
        {"measures": ["dense_miou"]},
        ["measures: dense_miou", "dense_miou in evaluation.measures"],
    ),
    "a measure without labels": (
        {"measures": ["knn_acc1", "rankme"]},
        ["measures: rankme", "label_free in evaluation.measures"],
    ),
    "a measure of objects": (
        {
            "measures": ["same_object_recall_at_1"],
            "evaluation": {"measures": ["retrieval"]},
        },
        ["measures: same_object_recall_at_1", "evaluation.retrieval.pattern"],
    ),
    "a measure of no probe": (
        {"measures": ["linear_acc1"], "evaluation": {"linear": {"max_epochs": 0}}},
        ["measures: linear_acc1", "evaluation.linear.max_epochs above 0"],
    ),
    "a measure of no fine-tuning": (
        {"measures": ["finetune_10_acc1"]},
        ["measures: finetune_10_acc1", "evaluation.finetune.fractions"],
    ),
    "a measure of cost": ({"measures": ["time_ratio"]}, ["measures: time_ratio", "kind: cost"]),
    "a measure of training": (
        {"measures": ["knn_acc1"], "kind": "cost"},
        ["measures: knn_acc1", "kind: training"],
    ),
    "a measure of a curve": ({"measures": ["val_acc1"]}, ["unknown measure 'val_acc1'"]),
    "an unknown objective": (
        {"arms": {"a": {"method": "simclr", "objectives": ["iecll"]}}},
        ["objectives", "'iecll'", "'iecl'"],
    ),
    "a misspelt setting": (
        {"settings": {"max_epoch": 2}},
        ["settings.max_epoch", "'max_epochs'"],
    ),
    "a misspelt key of an arm": (
        {"arms": {"a": {"method": "simclr", "optimizer": {"batchsize": 8}}}},
        ["arms.a.optimizer.batchsize", "'batch_size'"],
    ),
    "a misspelt axis": (
        {"axes": {"optimizer.wieght_decay": [0]}},
        ["axes.optimizer.wieght_decay", "'weight_decay'"],
    ),
    "an unknown kind": ({"kind": "costs"}, ["costs", "'cost'"]),
    "a bad weight": (
        {"arms": {"a": {"method": "iecl_simclr", "iecl": {"beta": -1}}}},
        ["iecl.beta", "-1"],
    ),
    "an unknown evaluation": ({"evaluation": {"knn": {"kk": [1]}}}, ["evaluation.knn.kk"]),
    "published figures that are a text": (
        {"published": ["abc"]},
        ["published.0: 'abc'", "block of keys"],
    ),
    "a published figure without a value": (
        {"published": [{**PUBLISHED, "value": None}]},
        ["published.0.value: None", "a number"],
    ),
    "a published figure that is a text": (
        {"published": [PUBLISHED, {**PUBLISHED, "value": "abc"}]},
        ["published.1.value: 'abc'", "a number"],
    ),
    "a misspelt key of a published figure": (
        {"published": [{**PUBLISHED, "mesure": "knn_acc1"}]},
        ["published.0.mesure", "'measure'"],
    ),
    "a published figure of no measure": (
        {"published": [{**PUBLISHED, "measure": None}]},
        ["published.0", "measure"],
    ),
    "an arm that is compared with itself": (
        {"arms": {"a": {"method": "simclr", "against": "a"}}},
        ["arms.a.against", "itself"],
    ),
    "an axis of names": ({"axes": {"name": ["a", "b"]}}, ["axes.name", "no axis", "id"]),
    "an axis of folders": (
        {"axes": {"checkpoint.dir": ["a", "b"]}},
        ["axes.checkpoint.dir", "no axis", "dir of the benchmark"],
    ),
    "two arms that are one": (
        {"arms": {"a+b": {"method": "simclr"}, "a b": {"method": "simclr"}}},
        ["arms: 'a+b' and 'a b'", "rename one"],
    ),
    "a misspelt key of a data set": (
        _data(setings={"max_epochs": 2}),
        ["unknown key data.toy.setings", "'settings'"],
    ),
    "overrides that are a text": (
        _data(overrides="augmentations"),
        ["data.toy.overrides: 'augmentations'", "a list"],
    ),
    "settings that are no block": (_data(settings=5), ["data.toy.settings: 5", "block of keys"]),
    "digits without a folder": (_data(digits={}), ["data.toy.digits", "no folder"]),
    "a misspelt key of the digits": (
        _data(digits={"folder": "a", "clases": [1]}),
        ["data.toy.digits.clases", "'classes'"],
    ),
    "the rest of all digits": (
        _data(digits={"folder": "a", "rest": "b"}),
        ["data.toy.digits.rest", "no classes"],
    ),
    "a misspelt key of a source": (
        _taking({"arm": "iecl_simclr", "data": "toy", "probb": 1}),
        ["arms.frozen.saib_from.probb", "'prob'"],
    ),
    "a source's probability": (
        _taking({"arm": "iecl_simclr", "data": "toy", "prob": 5}),
        ["arms.frozen.saib_from.prob: 5", "from 0 to 1"],
    ),
    "a source that is no block": (
        _taking("iecl_simclr"),
        ["arms.frozen.saib_from: 'iecl_simclr'", "block of keys"],
    ),
    "a source without an arm": (_taking({"data": "toy"}), ["arms.frozen.saib_from", "no arm"]),
    "a source of an unknown arm": (
        _taking({"arm": "iecl_simcl", "data": "toy"}),
        ["arms.frozen.saib_from.arm", "'iecl_simclr'"],
    ),
    "a source of an unknown data set": (
        _taking({"arm": "iecl_simclr", "data": "toys"}),
        ["arms.frozen.saib_from.data", "'toy'"],
    ),
    "a source that is the arm itself": (
        _taking({"arm": "frozen", "data": "toy"}),
        ["arms.frozen.saib_from.arm", "its own source"],
    ),
    "no such pretraining config": (
        {"data": {"toy": {"config": "cifarr"}}},
        ["data.toy.config", "cifarr"],
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what: str, images: Path, tmp_path: Path, capsys):
    change, expected = BAD[what]
    assert main(write(tmp_path, grid(images, **change))) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    for part in expected:
        assert part in lines[0]
    assert not (tmp_path / "out").exists()


def test_another_benchmarks_folder_is_refused(local: Path, images: Path, tmp_path: Path, capsys):
    shutil.copytree(local, tmp_path / "copy")
    arguments = write(tmp_path / "copy", grid(images, name="other"))
    assert main(arguments) == 2
    assert "another name" in capsys.readouterr().err


# --- the store

CELL = {"data": "d", "arm": "a", "against": None, "method": "m", "axes": {}, "seed": 0}


def _claim_all(path: Path, count: int, queue: Any, all_said: Any) -> None:
    store = Store(path)
    queue.put([i for i in range(count) if store.claim({**CELL, "id": str(i)})])
    assert all_said.wait(60)  # a worker that has ended has no cell, and a later one may take it


def test_no_cell_is_claimed_twice(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    queue, all_said = context.Queue(), context.Event()
    path = tmp_path / STORE
    given = (path, 40, queue, all_said)
    workers = [context.Process(target=_claim_all, args=given) for _ in range(4)]
    for worker in workers:
        worker.start()
    claimed = [i for _ in workers for i in queue.get(timeout=60)]
    all_said.set()
    for worker in workers:
        worker.join()
    assert sorted(claimed) == list(range(40))
    assert len(Store(path).cells()) == 40


_HOLD = """
import sys, time
from iecl_solo.experiments.store import Store
store = Store(sys.argv[1])
assert store.claim({**%r, "id": "x"})
print("claimed", flush=True)
time.sleep(100)
"""


def test_a_living_process_keeps_its_cell_and_a_dead_one_does_not(tmp_path: Path):
    store = Store(tmp_path / STORE)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD % CELL, str(store.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "claimed\n"
    assert not store.claim({**CELL, "id": "x"})
    assert store.cells()["status"].tolist() == ["running"]
    holder.kill()
    holder.wait()
    assert store.claim({**CELL, "id": "x"})


def _forge(store: Store, **changes: str) -> None:
    """A marker as another process would have left it."""
    assert store.claim({**CELL, "id": "x"})
    marker = store.path / "x.lock"
    lines = dict(line.partition("=")[::2] for line in marker.read_text().splitlines())
    store.release("x")
    marker.write_text(
        "\n".join(f"{k}={v}" if v else k for k, v in (lines | changes).items()) + "\n"
    )


def test_a_process_that_was_started_later_is_another(tmp_path: Path):
    """As after a reboot: the number lives again, in a process that never claimed the cell."""
    store = Store(tmp_path / STORE)
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        _forge(store, pid=str(sleeper.pid), start="1")
        assert store.claim({**CELL, "id": "x"})
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_silent_worker_of_another_machine_loses_its_cell(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("iecl_solo.experiments.store.STALE", 0.5)
    store = Store(tmp_path / STORE)
    _forge(store, host="elsewhere", pid="1", token="0" * 32)
    assert not store.claim({**CELL, "id": "x"})
    long_ago = time.time() - 3600
    os.utime(store.path / "x.lock", (long_ago, long_ago))
    assert store.claim({**CELL, "id": "x"})


def _write_rows(path: Path, worker: int, count: int) -> None:
    store = Store(path)
    for i in range(count):
        name = f"{worker}-{i}"
        assert store.claim({**CELL, "id": name, "seed": i})
        store.finish(name, {"knn_acc1": float(i)}, versions={"torch": "2"})
        store.export()


def test_sixteen_writers_lose_no_row(tmp_path: Path):
    path = tmp_path / STORE
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_rows, args=(path, i, 5)) for i in range(16)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if Store(path).csv.is_file():  # whole, whoever wrote it last
            _, rows_then = read_rows(Store(path).csv)
            assert all(row["metrics"] for row in rows_then)
    assert [worker.exitcode for worker in workers] == [0] * 16
    store = Store(path)
    assert len(store.done()) == len(store.metrics()) == 80
    store.export()
    assert {row["id"] for row in read_rows(store.csv)[1]} == store.done()
    assert not list(tmp_path.rglob("*.part"))


def test_a_csv_of_rows_holds_what_the_store_holds(tmp_path: Path):
    store = Store(tmp_path / "a" / STORE)
    store.begin({"name": "toy", "question": "Does a # or a , matter?"})
    cell = {**CELL, "id": "x", "axes": {"optimizer.lr": 0.1, "mode": "a,b"}, "against": "b"}
    store.claim(cell)
    found = {"knn_acc1": 1 / 3, "linear_acc1": float("nan")}
    store.finish("x", found, seconds=2.5, device="cpu", versions={"torch": "2"})
    store.claim({**CELL, "id": "y"})
    store.fail("y", "why")
    store.export()
    meta, (row,) = read_rows(store.csv)
    assert meta == store.meta()
    other = Store(tmp_path / "b" / STORE)
    other.put(row)
    pd.testing.assert_frame_equal(other.metrics(), store.metrics(), check_exact=True)
    columns = ["id", "data", "arm", "against", "method", "seed", "seconds", "device", "versions"]
    columns += ["optimizer.lr", "mode", "status"]
    mine, theirs = (s.cells().set_index("id").loc[["x"]].reset_index() for s in (store, other))
    pd.testing.assert_frame_equal(mine[columns], theirs[columns])
    assert len(pd.read_csv(store.csv, skiprows=1)) == 2


def test_what_is_no_store_is_refused(tmp_path: Path):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(IECLError, match="it is a file"):
        Store(tmp_path / "x")
    with pytest.raises(IECLError, match="no such folder"):
        Store(tmp_path / "y", create=False)
    for text in ("a,b\n1,2\n", "# {", ""):
        (tmp_path / "rows.csv").write_text(text)
        with pytest.raises(IECLError, match=r"rows\.csv"):
            read_rows(tmp_path / "rows.csv")
    with pytest.raises(IECLError, match="no such file"):
        read_rows(tmp_path / "z.csv")


def test_a_cell_has_another_id_whenever_what_it_says_is_another(images: Path, tmp_path: Path):
    own = tmp_path / "own.yaml"
    text = "method: simclr\noptimizer: { lr: LR }\n"

    def ids(lr: str = "0.1", **changes: Any) -> list[str]:
        own.write_text(text.replace("LR", lr))
        given = grid(images, data={"mine": {"config": str(own)}}, **changes)
        return [cell.id for cell in cells(read_benchmark(given))]

    assert ids() == ids() == ids(rounds=5)  # a training has no rounds
    assert not {*ids()} & {*ids(lr="0.2")}
    assert not {*ids(kind="cost", rounds=5)} & {*ids(kind="cost", rounds=6)}
    assert not {*ids(kind="cost", threads=1)} & {*ids(kind="cost", threads=2)}


def test_how_often_a_cell_saves_is_its_settings(images: Path, tmp_path: Path):
    often = {"checkpoint": {"every_n_steps": 7, "keep": 3, "frequency": 5, "dir": "elsewhere"}}
    given = grid(images, dir=str(tmp_path))
    benchmark = read_benchmark({**given, "settings": {**given["settings"], **often}})
    made = _prepare(benchmark, cells(benchmark)[0]).checkpoint
    expected = {"enabled": True, "dir": f"{tmp_path}/runs", "frequency": 1}
    assert made == {**expected, "every_n_steps": 7, "keep": 3}


# --- the evaluation


def test_nothing_is_chosen_on_the_evaluation_split(images: Path, tmp_path: Path):
    """Other test images and labels: the same k and the same learning rate."""
    benchmark = read_benchmark(grid(images, dir=str(tmp_path)))
    (cell, *_) = cells(benchmark)
    cfg = configuration(benchmark, cell)
    cfg.checkpoint, cfg.name = {"enabled": True, "dir": str(tmp_path), "frequency": 1}, "run"
    run = pretrain(cfg)
    shuffled = tmp_path / "shuffled"
    for i, folder in enumerate(sorted(p for p in images.iterdir() if p.is_dir())):
        names = sorted(p.name for p in images.iterdir() if p.is_dir())
        shutil.copytree(folder, shuffled / names[(i + 1) % len(names)])
    choose = {"knn": {"k": [1, 3, 10]}, "linear": {"max_epochs": 2, "lr": [0.01, 1.0]}}
    choose["linear"]["augment"] = False
    chosen = []
    for val in (images, shuffled):
        other = {"dataset": "custom", "train_path": str(images), "val_path": str(val)}
        protocol = _protocol({**choose, "datasets": {"other": other}})
        (run.folder / "evaluation.json").unlink(missing_ok=True)
        measures = evaluate(run, protocol)
        chosen.append((measures["knn_k/other"], measures["linear_lr/other"]))
        assert measures["knn_k"] in (1, 3, 10)
    assert chosen[0] == chosen[1]


def _protocol(block: dict[str, Any]) -> EvaluationConfig:
    from iecl_solo.solo.config import parse_block

    return parse_block("evaluation", EvaluationConfig, block)


def test_split_is_stratified_and_disjoint():
    labels = torch.arange(10).repeat_interleave(30)
    chosen, rest = split(labels, 0.1, seed=0)
    assert sorted([*chosen, *rest]) == list(range(300))
    assert labels[chosen].bincount().tolist() == [3] * 10
    few, _ = split(labels, 0.01, seed=0)
    assert labels[few].bincount().tolist() == [1] * 10


def test_finetuning_trains_the_backbone_on_few_labels(images: Path, tmp_path: Path):
    benchmark = read_benchmark(grid(images, dir=str(tmp_path)))
    cfg = configuration(benchmark, cells(benchmark)[0])
    cfg.checkpoint, cfg.name = {"enabled": True, "dir": str(tmp_path), "frequency": 1}, "run"
    run = pretrain(cfg)
    protocol = _protocol({"finetune": {"fractions": [0.5], "max_epochs": 1, "batch_size": 4}})
    if HOST.name == "main":
        assert 0 <= evaluate(run, protocol)["finetune_50_acc1"] <= 100
    else:
        with pytest.raises(IECLError, match="only trains the last layer"):
            evaluate(run, protocol)


# --- the cost


def test_published_figures_of_no_arm_are_said(images: Path, tmp_path: Path, capsys):
    """~arms.NAME leaves an arm out, so that they are not refused."""
    published = [{**PUBLISHED, "arm": arm} for arm in ("simclr", "iecl_simclrr")]
    published.append({**PUBLISHED, "arm": "other", "data": "elsewhere"})
    check(read_benchmark(grid(images, published=published, dir=str(tmp_path))))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("published: unknown arm 'iecl_simclrr': did you mean 'iecl_simclr'?")


@pytest.mark.parametrize("every", [0, 1])
def test_the_answer_is_about_what_is_monitored(every: int, images: Path, tmp_path: Path):
    given = grid(images, measures=["effective_rank", "knn_acc1"], dir=str(tmp_path))
    given["settings"]["monitor"]["every_n_epochs"] = every
    if every:
        check(read_benchmark(given))
        return
    with pytest.raises(IECLError, match="effective_rank is not measured here; monitor"):
        check(read_benchmark(given))
    check(read_benchmark(given | {"measures": ["knn_acc1", "effective_rank"]}))  # left out


@pytest.mark.parametrize("measure", ["rank/other", "effective_rank/other", "knn_acc5/corrupted"])
def test_measures_on_other_data_are_those_of_any_data(measure: str, images: Path, tmp_path: Path):
    other = {"dataset": "custom", "train_path": str(images), "val_path": str(images)}
    evaluation = {"datasets": {"other": other}, "measures": ["corruptions"]}
    given = grid(images, evaluation=evaluation, dir=str(tmp_path), measures=[measure])
    with pytest.raises(IECLError, match="measures: "):
        check(read_benchmark(given))


def test_null_undoes_what_the_preset_says(images: Path):
    presets = {"presets": {"paper": {"threads": 1}}}
    given = {k: v for k, v in grid(images, **presets).items() if k != "threads"}
    assert read_benchmark(given).threads == 1
    assert read_benchmark({**given, "threads": None}).threads is None


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("backbone.kwargs", [{"channels": [8, 8, 16, 16]}, {"channels": [4, 4, 8, 8]}]),
        ("scheduler.lr_decay_steps", [[1, 2], [2, 3]]),
    ],
)
def test_values_of_an_axis_may_be_blocks_and_lists(key: str, values: list[Any], images: Path):
    arms: dict[str, Any] = {name: {"method": name} for name in ("simclr", "iecl_simclr")}
    arms["frozen"] = {"method": "simclr", "saib_from": {"arm": "iecl_simclr", "data": "toy"}}
    benchmark = read_benchmark(grid(images, axes={key: values}, arms=arms))
    grid_cells = {cell.id: cell for cell in cells(benchmark)}
    assert len(grid_cells) == 12
    for cell in grid_cells.values():
        assert OmegaConf.select(configuration(benchmark, cell), key) == cell.axes[key]
        assert len(cell.id) < 100
        if cell.source is not None:
            assert grid_cells[cell.source].axes == cell.axes


@pytest.mark.parametrize("kind", ["training", "cost"])
def test_objectives_of_an_arm_are_in_its_cells_method(images: Path, kind: str):
    arms = {"plain": {"method": "simclr"}, "both": {"method": "simclr"}}
    arms["both"]["objectives"] = ["iecl", "climb"]  # type: ignore[assignment]
    benchmark = read_benchmark(grid(images, arms=arms, kind=kind, seeds=[0]))
    plain_cell, both = cells(benchmark)
    assert (plain_cell.method, both.method) == ("simclr", "iecl_climb_simclr")
    configs = [configuration(benchmark, cell) for cell in (both, plain_cell)]
    assert measure_cost(*configs, HOST, rounds=2, device="cpu")["parameters_ratio"] > 1


def test_interleaved_times_what_it_is_given():
    calls: list[str] = []
    fast, slow = interleaved(
        [lambda: calls.append("a"), lambda: (calls.append("b"), time.sleep(0.01))],
        rounds=5,
        warmup=1,
    )
    assert len(fast) == len(slow) == 5
    assert min(slow) >= 0.01 > max(fast)
    assert calls.count("a") == calls.count("b") == 6
    assert "".join(calls).startswith("baab")  # in turn, the order turned round


def test_cost_of_a_variant_without_terms_is_its_hosts(images: Path):
    off = {"beta": 0, "lambda": 0, "eta": 0, "gamma": 0, "placement": "none"}
    arms = {
        "simclr": {"method": "simclr"},
        "off": {"method": "iecl_simclr", "iecl": off},
        "iecl_simclr": {"method": "iecl_simclr"},
    }
    benchmark = read_benchmark(grid(images, arms=arms, seeds=[0]))
    configs = {c.arm: configuration(benchmark, c) for c in cells(benchmark)}
    nothing = measure_cost(configs["off"], configs["simclr"], HOST, rounds=2, device="cpu")
    assert nothing["parameters_ratio"] == 1
    assert nothing["memory_ratio"] == pytest.approx(1, abs=0.02)
    variant = measure_cost(configs["iecl_simclr"], configs["simclr"], HOST, rounds=2, device="cpu")
    assert variant["parameters_ratio"] > 1
    assert variant["flops_ratio"] > 1
    assert variant["memory_ratio"] > 1
    assert variant["time_ratio_low"] <= variant["time_ratio"] <= variant["time_ratio_high"]


def test_the_regularizer_needs_no_second_set_of_gradients(images: Path):
    """Its gradients come when the activations are gone: the height of the step stays."""
    regularizer = {"beta": 0, "lambda": 0, "gamma": 0, "eta": 0.01, "placement": "none"}
    arms = {
        "simclr": {"method": "simclr"},
        "on": {"method": "iecl_simclr", "iecl": regularizer},
    }
    benchmark = read_benchmark(grid(images, arms=arms, seeds=[0]))
    heights, weights = [], 0
    for cell in cells(benchmark):
        cfg = configuration(benchmark, cell)
        cfg.backbone.name, cfg.optimizer.batch_size = "resnet18", 16
        cfg.augmentations[0].crop_size = 96
        step = Step(cfg, HOST)
        weights = sum(p.nbytes for p in step.model.parameters())
        heights.append(step.peak_memory())
    assert heights[1] - heights[0] < weights / 10


def test_a_step_without_a_trainer_is_a_step(images: Path, capfd: pytest.CaptureFixture):
    benchmark = read_benchmark(grid(images, seeds=[0], arms={"m": {"method": "iecl_mocov2plus"}}))
    step = Step(configuration(benchmark, cells(benchmark)[0]), HOST)
    momentum = getattr(step.model, HOST.momentum)
    before = [p.clone() for p in (*step.model.parameters(), *momentum.parameters())]
    step()
    after = [*step.model.parameters(), *momentum.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) > len(moved) / 2
    assert step.flops() > 0
    assert step.peak_memory() > sum(p.nbytes for p in step.model.parameters())
    assert "profiler_start" not in capfd.readouterr().err


def test_check_writes_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    digits = {"config": "digits", "digits": {"folder": "low", "classes": [0, 1]}}
    arms = {"simclr": {"method": "simclr"}}
    given = {"name": "n", "question": "?", "data": {"low": digits}, "arms": arms}
    check(read_benchmark({**given, "seeds": [0], "measures": ["knn_acc1"]}))
    assert sorted(p.name for p in (tmp_path / "low" / "train").iterdir()) == ["0", "1"]
