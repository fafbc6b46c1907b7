"""What a run prints: header, lines, figures; no accuracy without labels; no objective by name."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support import raw_config

from iecl_solo.solo.registry import OBJECTIVES
from iecl_solo.train.callbacks import terminal
from iecl_solo.train.fit import pretrain

pytestmark = pytest.mark.any_host


def test_header_lines_and_figures(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    given = {"checkpoint__dir": str(tmp_path), "monitor__every_n_epochs": 0}
    cfg = raw_config("iecl_climb_simclr", images, data__val_path=str(images), **given)
    run = pretrain(OmegaConf.create(cfg))
    header, data, first, second, end = capsys.readouterr().out.splitlines()
    assert header.startswith("iecl_climb_simclr: iecl_climb_simclr with timm/test_resnet (solo-")
    assert header.endswith("on 1 cpu, 32-true")
    assert data == (f"24 images, 3 classes, 2 epochs in batches of 8; from the start; {run.folder}")
    for epoch, line in enumerate((first, second), start=1):
        assert line.startswith(f"iecl_climb_simclr  epoch {epoch}/2  ")
        assert re.search(r"nce_loss [\d.]+  acc1 [\d.]+  val_acc1 [\d.]+  iecl_", line)
        assert "climb_" in line and re.search(r"\d+ images/s  \d+ s left$", line)
    assert "  trained in " in end and "val_acc1" in end


def test_a_terminal_breaks_lines_between_words(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    line = "a  trained in 50 s  class_loss 2.267  nce_loss 4.427  acc1 17.057"
    terminal.tell(line)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    terminal.tell(line)
    whole, *broken = capsys.readouterr().out.splitlines()
    assert whole == line
    assert broken == ["a  trained in 50 s  class_loss 2.267", "nce_loss 4.427  acc1 17.057"]


def test_long_work_says_each_minute_how_far_it_is(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    now = 0.0
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now)
    for seconds in (25.0, 5.0):  # an item
        for _ in terminal.EachMinute("simclr  epochs").over(range(6)):
            now += seconds
    # after 75 s; 150 s is the end, whose result says it
    assert capsys.readouterr().out == "simclr  epochs  3 of 6  1 min 15 s left\n"
    resumed = terminal.EachMinute("images")
    for done in range(1010, 1060, 10):  # 1,000 are an earlier call's
        now += 25
        resumed(done, 2000)
    # two after 25 s and 50 s, the line after 75 s: 20 images in 50 s
    assert capsys.readouterr().out == "images  1030 of 2000  40 min 25 s left\n"
    prepared = terminal.EachMinute("epochs")
    for done in range(2):  # 300 s of preparation are no epoch's
        now += 300 if not done else 70
        prepared(done, 4)
    assert capsys.readouterr().out == "epochs  1 of 4  3 min 30 s left\n"


def test_a_run_that_ends_in_its_warmup_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    given = {"checkpoint__dir": str(tmp_path), "monitor__every_n_epochs": 0, "max_epochs": 1}
    for name, warmup in (("short", 2), ("long", 1)):
        scheduler = {"scheduler__warmup_epochs": warmup}
        pretrain(OmegaConf.create(raw_config("simclr", images, name=name, **scheduler, **given)))
        said = capsys.readouterr().out
        line = "scheduler.warmup_epochs: 2 is more than max_epochs, 1: the learning rate never"
        assert (line in said) == (name == "short")


def test_lines_within_a_long_epoch(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(terminal, "BETWEEN", 0.0)
    given = {"checkpoint__dir": str(tmp_path), "monitor__every_n_epochs": 0}
    cfg = raw_config("iecl_simclr", images, optimizer__batch_size=4, **given)
    pretrain(OmegaConf.create(cfg))
    lines = [x for x in capsys.readouterr().out.splitlines() if "step 3/6" in x]
    assert len(lines) == 2 and all("nce_loss" in x and "iecl_entropy" in x for x in lines)


def test_bar_on_a_terminal(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(terminal, "OF_BAR", 0.0)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    given = {"checkpoint__dir": str(tmp_path), "monitor__every_n_epochs": 0}
    name = "strong-generation-seed0-f4b8693f"  # as long as a benchmark's cell has it
    cfg = raw_config("iecl_simclr", images, name=name, optimizer__batch_size=4, **given)
    pretrain(OmegaConf.create(cfg))
    drawn = re.sub(r"\x1b\[[^m]*m", "", capsys.readouterr().err)
    # nothing is cut off: the bar takes what the words leave, the terms stand below
    assert re.search(rf"{name}  epoch 2/2 .+ \d+ images/s  \d+ s left", drawn)
    assert re.search(r"nce_loss [\d.]+  .*iecl_entropy\s+[\d.]+", drawn, re.S)
    assert "…" not in drawn


def test_lines_go_into_a_pipe_whatever_stderr_is(monkeypatch: pytest.MonkeyPatch):
    """``iecl-solo pretrain ... | tee log``: its epochs are in the log."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not terminal.Terminal("run", [], labelled=True)._bar


def test_without_labels_no_accuracy_is_shown():
    logged = {"train_acc1_epoch": 100.0, "train_class_loss_epoch": 0.0, "train_nce_loss_epoch": 2.0}
    assert terminal.figures(logged, labelled=False) == "nce_loss 2.000"


def test_no_objective_is_known_by_name():
    source = inspect.getsource(terminal)
    assert not [o.name for o in OBJECTIVES if o.name in source.replace("iecl_solo", "")]
