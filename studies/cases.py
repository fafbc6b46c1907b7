"""Every case that was found wrong, typed again: what came of it then, and what comes of it now.

    python studies/cases.py --rows docs/rows/cases.csv

Each command runs in a process of its own, forked of this one, which has imported the libraries. It
must end in one line and a code that is not zero, or work where working is right. What takes more
than one command (a kill, a full disk, several processes) is a row that names its test. Rows that
are there are not run again unless the case has changed; ``--only WORD`` takes the cases that hold
the word.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

# each takes seconds; they are imported once
for _name in ("pretrain", "knn", "linear", "benchmark", "export", "inspect", "digits"):
    importlib.import_module(f"iecl_solo.cli.{_name}")
torch.set_num_threads(1)  # the models are too small for more

COLUMNS = (
    *("section", "case", "before", "expected", "right", "code", "line", "seconds", "test", "state"),
)
#: Seconds that a command is given.
LIMIT = 120
TRACEBACK, ACCEPTED, SILENT, LOST = "traceback", "accepted", "no answer in 45 s", "lost"
NO_HINT, UNSAID = "an error without a hint", "not recorded"


@dataclass(frozen=True)
class Case:
    """What was found.

    Attributes:
        section: where it belongs.
        name: what was typed or done.
        before: what came of it.
        command: that is typed after ``iecl-solo``, if it is one.
        works: whether it is right that it works.
        test: that stands for it, if it is no single command, below ``tests``.
    """

    section: str
    name: str
    before: str
    command: Sequence[str] = field(default=())
    works: bool = False
    test: str = ""

    @property
    def expected(self) -> str:
        return "" if self.test else "works" if self.works else "one line"

    @property
    def state(self) -> str:
        """Changes when the case does."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


# ---- what is typed. All paths are below the folder that ``make_world`` fills.

RUN = "runs/simclr/simclr"
#: A checkpoint of which one weight is not a number.
_BROKEN = "runs/broken/not_finite"
_SMALL = ("backbone.name=timm/test_resnet", "~backbone.kwargs", "data.train_path=good")
_QUICK = ("data.num_workers=0", "accelerator=cpu", "devices=1", "optimizer.batch_size=4")
_TRAIN = [
    *("pretrain", "--config-name", "digits/iecl_simclr", *_SMALL, *_QUICK),
    *("data.val_path=null", "precision=32-true", "max_epochs=1", "checkpoint.dir=new"),
]
_KNN = ["knn", "--config-name", "default", f"pretrained_feature_extractor={RUN}", "num_workers=0"]
_LINEAR = [
    *("linear", "--config-name", "digits", f"pretrained_feature_extractor={RUN}", *_QUICK),
    *("data.train_path=good", "data.val_path=good", "max_epochs=1"),
]
_BENCH = ["benchmark", "--config-name", "small_batch", "preset=smoke", "dir=new"]

#: Settings of an augmentation: a command line cannot reach into a list, a YAML of one's own can.
_OWN = {
    "crop_min_scale=5": ("rrc.crop_min_scale", 5),
    "crop_min_scale=-1": ("rrc.crop_min_scale", -1),
    "grayscale.prob=abc": ("grayscale.prob", "abc"),
    "color_jitter.prob=5": ("color_jitter.prob", 5),
}

_MANY = "100,000 files in one folder"
#: Folders of images, one kind in each, and what came of it where the report said so.
_DECODED = {
    "16-bit PNG": ACCEPTED,
    "symlink loop": ACCEPTED,
    **dict.fromkeys(("palette PNG", "CMYK", "grey", "alpha", "EXIF rotation"), UNSAID),
    **dict.fromkeys(("1x1", "20,000 pixels wide", "non-ASCII path \u00e5\u56f3"), UNSAID),
    **dict.fromkeys(("text file among them", _MANY), UNSAID),
}
_NAMED = {
    "over 179 million pixels": TRACEBACK,
    **dict.fromkeys(("truncated JPEG", "zero bytes", "empty class"), UNSAID),
}


def _folder(kind: str) -> str:
    return "kinds/" + re.sub(r"[ ,]+", "_", kind)


def _file_of(name: str) -> str:
    return re.sub(r"[^\w-]", "_", name)


def _typed(
    section: str, before: str, base: list[str], *overrides: str, works: bool = False
) -> list[Case]:
    """One case for each override, or several with a space between, of a command."""
    where = "" if base is _TRAIN else f"{base[0]} "
    return [
        Case(section, where + override, before, (*base, *override.split()), works)
        for override in overrides
    ]


def _stands(section: str, before: str, **tests: str) -> list[Case]:
    """Cases that a test stands for, by what was done, with _ for a space."""
    return [
        Case(section, what.replace("_", " "), before, test=test) for what, test in tests.items()
    ]


_SETTINGS = "Bad configuration is one line"
_FINITE, _RECORD = "Never NaN saved", "The record of a run is true"
_CHECKPOINTS, _MID_EPOCH = "Checkpoints that cannot be lost", "Mid-epoch"
_SEVERAL, _PROCESSES = "Several processes", "Processes"
_IMAGES, _TWO = "Real-world images", "Two at once"
_DEVICES, _KEEP, _RESUME = "cli/test_devices.py::", "train/test_keep.py::", "train/test_resume.py::"
_BENCHMARK, _COLLAPSE = "experiments/test_benchmark.py::", "train/test_collapse.py::"


def _of_kind(kind: str) -> tuple[str, ...]:
    # twelve images in three steps: each is seen
    short = ("+limit_train_batches=3",) if kind == _MANY else ()
    return (*_TRAIN, f"data.train_path='{_folder(kind)}'", *short)


CASES: tuple[Case, ...] = (
    *_stands(
        *(_CHECKPOINTS, LOST),
        kill_in_the_write=f"{_KEEP}test_kill_in_mid_write_loses_nothing",
        damaged_newest_checkpoint=f"{_KEEP}test_damaged_newest_falls_back_to_the_one_before",
        CSV_rows_on_a_full_disk=f"{_KEEP}test_full_disk_is_one_line_and_the_same_command_goes_on",
    ),
    *_stands(
        *(_CHECKPOINTS, TRACEBACK),
        full_disk=f"{_KEEP}test_full_disk_is_one_line_and_the_same_command_goes_on",
        missing_key=f"{_KEEP}test_missing_key_is_one_line",
    ),
    *_stands(
        *(_CHECKPOINTS, "passed on"),
        advice_weights_only=f"{_KEEP}test_advice_to_let_a_file_run_code_is_not_passed_on",
    ),
    *_stands(
        *(_CHECKPOINTS, UNSAID), full_disk_at_the_result=f"{_KEEP}test_full_disk_at_the_result"
    ),
    *_stands(
        *(_CHECKPOINTS, ACCEPTED), flipped_bytes=f"{_KEEP}test_no_damage_is_read_as_something_else"
    ),
    *_stands(
        *(_MID_EPOCH, LOST),
        SIGTERM=f"{_RESUME}test_signal_in_mid_epoch_saves_and_goes_on_bit_for_bit",
        SIGUSR1=f"{_RESUME}test_signal_in_mid_epoch_saves_and_goes_on_bit_for_bit",
        power_cut=f"{_RESUME}test_every_n_steps_and_a_power_cut",
    ),
    *_typed(_FINITE, ACCEPTED, _TRAIN, "optimizer.lr=1e6 max_epochs=4"),
    *_stands(
        *(_FINITE, ACCEPTED),
        # 1e6 took many steps; the test's weight takes few
        an_absurd_weight_of_a_term="train/test_finite.py::test_absurd_settings_end_in_a_line",
    ),
    *_typed(_FINITE, TRACEBACK, _TRAIN, "precision=bf16-true", "precision=64-true"),
    Case(_FINITE, "precision=16-mixed on a CPU", ACCEPTED, (*_TRAIN, "precision=16-mixed"), True),
    *(
        Case(_FINITE, f"{command[0]} of a model that is not finite", ACCEPTED, command)
        for command in (
            ("inspect", _BROKEN),
            ("export", _BROKEN, "--to", "new/a.safetensors"),
            (*_KNN, f"pretrained_feature_extractor={_BROKEN}"),
            (*_LINEAR, f"pretrained_feature_extractor={_BROKEN}"),
        )
    ),
    *_stands(
        *("Collapse is seen", UNSAID),
        complete_collapse=f"{_COLLAPSE}test_embeddings_that_become_one_point_are_named",
        dimensional_collapse=f"{_COLLAPSE}test_dimensional_collapse_is_named_once_when_it_lasts",
    ),
    *_stands(
        *(_SEVERAL, TRACEBACK),
        a_rank_that_dies=f"{_DEVICES}test_a_rank_that_dies_ends_the_others_in_one_line",
    ),
    *_stands(
        *(_SEVERAL, ACCEPTED),
        marginal_of_one_rank_alone="objectives/test_climb.py"
        "::test_two_processes_fit_one_prototype_marginal",
        negatives_of_one_process=f"{_DEVICES}test_a_run_says_that_negatives_are_of_one_process",
    ),
    *_stands(
        *(_SEVERAL, UNSAID),
        uneven_batches=f"{_DEVICES}test_uneven_batches_are_one_line",
        four_ranks=f"{_DEVICES}test_four_processes_are_one",
    ),
    *_typed(
        *(_SETTINGS, TRACEBACK, _TRAIN),
        *("+optimizer.kwargs.momentum=-1", "+optimizer.kwargs.momentum=abc"),
        *("scheduler.warmup_epochs=abc", "data.num_workers=-1", "data.num_workers=abc"),
        *("seed=-1", "seed=abc", "seed=99999999999"),
        *("checkpoint.frequency=-1", "checkpoint.frequency=abc"),
        *("accumulate_grad_batches=0", "accumulate_grad_batches=-1", "num_nodes=0"),
        *("accelerator=gpu", "accelerator=foo", "precision=7", "precision=foo"),
        *("checkpoint.dir=/proc/nowhere", "checkpoint.dir=good/class0/0.png/runs"),
        *("resume_from_checkpoint=notes.txt", "method_kwargs.temperature=abc"),
        *("method_kwargs.proj_output_dim=-1", "+backbone.kwargs.channels=[0,0,0,0]"),
        *("augmentations=null", "iecl=5", "data.image_size=0", "wandb.enabled=true"),
        "data.dataset=cifar10 data.train_path=empty",
    ),
    *(
        Case(
            *(_SETTINGS, name, ACCEPTED if "jitter" in name else TRACEBACK),
            ("pretrain", "--config-path", "own", "--config-name", _file_of(name)),
        )
        for name in _OWN
    ),
    *(
        Case(_SETTINGS, shlex.join(command), TRACEBACK, command)
        for command in (
            ("export", RUN, "--to", "/proc/nowhere/a.safetensors"),
            ("digits", "/proc/nowhere"),
        )
    ),
    *_typed(_SETTINGS, TRACEBACK, _BENCH, "dir=/proc/nowhere", "threads=0", "threads=-1"),
    *_typed(_SETTINGS, TRACEBACK, _KNN, "k=5", works=True),
    *_typed(_SETTINGS, TRACEBACK, _KNN, "temperature=[abc]"),
    *_typed(_SETTINGS, TRACEBACK, _LINEAR, "scheduler.name=foo", "data.image_size=0"),
    *_typed(
        *(_SETTINGS, ACCEPTED, _TRAIN),
        *("iecl.beta=inf", "iecl.lambda=inf", "iecl.gamma=inf", "optimizer.lr=inf"),
        *("optimizer.lr=0", "optimizer.classifier_lr=-1", "+optimizer.kwargs.momentum=5"),
        *("method_kwargs.temperature=0", "method_kwargs.temperature=-1"),
        *("scheduler.warmup_epochs=-1", "data.format=foo", "devices=0", "devices=-1"),
        *("strategy=foo", "knn_eval.k=0", "csv.enabled=abc", "checkpoint.enabled=foo"),
        *("checkpoint.frequency=0", "+limit_train_batches=0", "+optimizer.foo=1"),
        *("+method_kwargs.foo=1", "+climb.beta=3"),
    ),
    *_typed(
        *(_SETTINGS, ACCEPTED, _KNN),
        *("k=[]", "k=[100000]", "temperature=[0]", "temperature=[-1]"),
        *("distance_function=[]", "feature_type=[foo]"),
    ),
    *_typed(
        *(_SETTINGS, ACCEPTED, _BENCH),
        *("seeds=[0,0]", "measures=[foo]", "rounds=0"),
        *("settings.foo=1", "axes.foo=[1,2]", "arms.iecl_simclr.foo=1"),
    ),
    *_typed(
        *(_SETTINGS, SILENT, _TRAIN),
        *("iecl.saib.depth=1000000", "data.num_workers=999", "performance.compile=abc"),
    ),
    *_stands(
        *(_RECORD, LOST),
        killed_before_its_result=f"{_RESUME}test_killed_before_its_result_the_run_is_completed",
        seconds_of_all_legs=f"{_RESUME}test_seconds_are_those_of_all_legs",
    ),
    *_stands(_RECORD, ACCEPTED, NaN_in_JSON=f"{_KEEP}test_json_has_no_nan"),
    *_stands(
        *(_PROCESSES, "trains on as an orphan"),
        compare_is_killed=f"{_DEVICES}test_compare_takes_its_training_with_it",
    ),
    *_stands(
        *(_PROCESSES, "never taken over"),
        process_id_lives_again=f"{_BENCHMARK}test_a_process_that_was_started_later_is_another",
    ),
    *(
        Case(_IMAGES, kind, before, _of_kind(kind), works=kind in _DECODED)
        for kind, before in (_DECODED | _NAMED).items()
    ),
    Case(
        *(_IMAGES, "truncated JPEG, data.on_error=skip", UNSAID),
        (*_of_kind("truncated JPEG"), "data.on_error=skip"),
        works=True,
    ),
    Case(_IMAGES, "a path with a space", NO_HINT, (*_TRAIN, "data.train_path=my photos (1)")),
    *_stands(
        *(_TWO, ACCEPTED),
        two_identical_pretrain="train/test_run.py"
        "::test_second_identical_command_takes_nothing_from_the_first",
        report_during_a_benchmark=f"{_BENCHMARK}test_sixteen_writers_lose_no_row",
    ),
)


# ---- the folder in which it is typed


def _images(root: Path, count: int = 4, size: tuple[int, int] = (32, 32)) -> list[Path]:
    """Three classes of random images, ``root/class<c>/<i>.png``."""
    random = np.random.default_rng(0)
    paths = [root / f"class{c}" / f"{i}.png" for c in range(3) for i in range(count)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def _make_kind(root: Path, kind: str) -> None:
    """A folder of images with one of a kind in it, or all of them."""
    sizes = {"1x1": (1, 1), "20,000 pixels wide": (20_000, 3)}
    name = "class\u00e5\u56f3" if "ASCII" in kind else "class0"
    paths = _images(root, size=sizes.get(kind, (32, 32)))
    (root / "class0").rename(root / name)
    first = root / name / "0.png"
    image, jpeg = Image.open(first).convert("RGB"), first.with_suffix(".jpg")
    modes = {"palette PNG": "P", "grey": "L", "alpha": "RGBA"}
    if kind == "16-bit PNG":
        Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257).save(first)
    elif kind in modes:
        image.convert(modes[kind]).save(first)
    elif kind == "CMYK":
        image.convert("CMYK").save(jpeg)
        first.unlink()
    elif kind == "EXIF rotation":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(jpeg, exif=exif)
        first.unlink()
    elif kind == "truncated JPEG":
        image.save(jpeg)
        jpeg.write_bytes(jpeg.read_bytes()[:400])
        first.unlink()
    elif kind == "zero bytes":
        first.write_bytes(b"")
    elif kind == "over 179 million pixels":
        Image.new("1", (20_000, 10_000)).save(first)
    elif kind == "empty class":
        (root / "class9").mkdir()
    elif kind == "text file among them":
        (first.parent / "notes.txt").write_text("no image")
    elif kind == "symlink loop":
        (root / "class1" / "back").symlink_to(root, target_is_directory=True)
    elif kind == _MANY:
        for i in range(100_000):
            os.link(paths[i % len(paths)], paths[-1].with_name(f"linked{i}.png"))


def _own_yamls(folder: Path) -> None:
    """The YAMLs of one's own: pretraining with one setting wrong."""
    from iecl_solo.cli.hydra_app import composed, read_arguments, without_hydra

    folder.mkdir()
    cfg = without_hydra(composed(read_arguments("pretrain", "pretrain", _TRAIN[1:])))
    for name, (key, value) in _OWN.items():
        wrong = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        OmegaConf.update(wrong.augmentations[0], key, value)
        OmegaConf.save(wrong, folder / f"{_file_of(name)}.yaml")


def make_world(root: Path, cases: Sequence[Case] = CASES) -> None:
    """What the cases read: images, YAMLs, and where one needs it a finished run.

    Raises:
        SystemExit: if the run fails.
    """
    from iecl_solo.train.keep import write_checkpoint

    _images(root / "good")
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("no checkpoint")
    _own_yamls(root / "own")
    words = {word for case in cases for word in case.command}
    for kind in (*_DECODED, *_NAMED):
        if f"data.train_path='{_folder(kind)}'" in words:
            _make_kind(root / _folder(kind), kind)
    if not any(RUN in word or _BROKEN in word for word in words):
        return
    baseline = [word.replace("iecl_simclr", "simclr") for word in _TRAIN]
    given = ["name=simclr", "checkpoint.dir=runs", "data.val_path=good"]
    outcome = typed((*baseline, *given), root)
    if outcome.code != 0:
        raise SystemExit(f"the run that the cases read failed: {outcome.err or 'no answer'}")
    run, broken = root / RUN, root / _BROKEN
    shutil.copytree(run, broken)
    (path,) = broken.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] = float("nan")
    write_checkpoint(checkpoint, path, 1)


# ---- typing it


@dataclass(frozen=True)
class Outcome:
    """What a command left: its code (None: no answer in time), its words, its seconds."""

    code: int | None
    out: str
    err: str
    seconds: float

    def right(self, works: bool) -> bool:
        """Whether it worked, or said in one line why not."""
        lines = self.err.strip().splitlines()
        if works:
            return self.code == 0 and "Traceback" not in self.err
        one = len(lines) == 1 and lines[0].startswith("iecl-solo: ")
        return self.code not in (0, None) and one

    def line(self, root: Path) -> str:
        """The line that counts, without the folder's own path."""
        lines = (self.err.strip() or self.out.strip()).splitlines() or [""]
        return lines[-1].replace(f"{root}/", "")


def _forked(command: Sequence[str], root: Path, out: Path, err: Path) -> None:
    os.setsid()  # with what it starts it can be ended
    for stream, path in ((0, Path(os.devnull)), (1, out), (2, err)):
        flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags), stream)
    # Python's own, of which a caller may have made others
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(root)
    # nobody is logged in, and no data set is fetched
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        os.environ.pop(name, None)
    os.environ |= {"HOME": str(root), "OMP_NUM_THREADS": "1"}
    os.environ |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    sys.argv[:] = ["iecl-solo", *command]
    from iecl_solo.cli.main import main as iecl_solo

    code: int | str | None = 1
    try:
        code = iecl_solo(command)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def typed(command: Sequence[str], root: Path, limit: float = LIMIT) -> Outcome:
    """What ``iecl-solo`` makes of a command that is typed in a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        out, err = Path(temporary, "out"), Path(temporary, "err")
        process = multiprocessing.get_context("fork").Process(
            target=_forked, args=(list(command), root, out, err)
        )
        begin = time.monotonic()
        process.start()
        process.join(limit)
        seconds, code = time.monotonic() - begin, process.exitcode
        with suppress(ProcessLookupError):  # it, if it hangs, and what it left running
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        words = [path.read_text() if path.is_file() else "" for path in (out, err)]
    return Outcome(code, *words, seconds)


def row_of(case: Case, root: Path) -> dict[str, object]:
    """What comes of a case now."""
    row: dict[str, object] = {"section": case.section, "case": case.name, "before": case.before}
    row |= {"expected": case.expected, "test": case.test, "state": case.state}
    if not case.test:
        shutil.rmtree(root / "new", ignore_errors=True)
        found = typed(case.command, root)
        row["right"] = "yes" if found.right(case.works) else "no"
        row["code"] = "none" if found.code is None else found.code
        row |= {"line": found.line(root), "seconds": f"{found.seconds:.1f}"}
    return row


def read_rows(path: Path) -> dict[str, dict[str, object]]:
    """The rows that are there, by their case's state."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {row["state"]: dict(row) for row in csv.DictReader(file)}


def main() -> int:
    """0 if every command said one line, or worked where that is right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=Path("cases.csv"))
    parser.add_argument("--only", default="", help="a word in a case")
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    wanted = [
        case
        for case in CASES
        if case.state not in rows and arguments.only in f"{case.section} {case.name}"
    ]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        make_world(root, wanted)
        for case in wanted:
            row = rows[case.state] = row_of(case, root)
            if not case.test:
                print(
                    f"{row['right']:>3}  {case.name}\n     {row['code']} {row['line']}", flush=True
                )
            with arguments.rows.open("w", newline="") as file:
                out = csv.DictWriter(file, COLUMNS, restval="")
                out.writeheader()
                out.writerows(rows[case.state] for case in CASES if case.state in rows)
    commands = [rows[case.state] for case in CASES if case.state in rows and not case.test]
    right = sum(row["right"] == "yes" for row in commands)
    print(f"{right} of {len(commands)} commands are right; {len(CASES) - len(commands)} by a test")
    return int(right < len(commands))


if __name__ == "__main__":
    sys.exit(main())
