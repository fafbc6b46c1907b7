"""What the pages tell a reader to type is accepted as it stands there, and what they name exists.

Every command is planned in this process: its configuration composes and is complete, its options
parse, its files are there; training, launching and installing are cut off where they begin. The
cheap ones are also run as a reader would (``-m robust``); of the others ``PLANNED_ONLY`` says why
they are not.
"""

from __future__ import annotations

import argparse
import configparser
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hydra import compose, initialize_config_dir
from markdown_it import MarkdownIt
from markdown_it.token import Token
from omegaconf import OmegaConf
from support import HOST, raw_config
from support_report import BATCH, make_store
from torch.distributed.run import get_args_parser

from iecl_solo.cli.main import COMMANDS, HYDRA_COMMANDS, main
from iecl_solo.digits import write_digits, write_masks
from iecl_solo.experiments.grid import BenchmarkConfig
from iecl_solo.train.complete import complete
from iecl_solo.train.compose import own_hydra

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    "iecl-solo",
    "python",
    "make",
    "pip",
    "pre-commit",
    "torchrun",
    "srun",
    "sqlite3",
    "git",
)
SHELLS = ("console", "bash", "sh", "shell")
#: Folders of the checkout, which a path in a page begins with.
FOLDERS = (
    "configs",
    "docs",
    "examples",
    "hydra_plugins",
    "iecl_solo",
    "patches",
    "studies",
    "tests",
)
SUFFIXES = (".py", ".yaml", ".md", ".cfg", ".cff", ".toml")
#: Keys of one name that a configuration or a benchmark has.
TOP_LEVEL = (
    *("devices", "max_epochs", "method", "name", "num_nodes", "precision", "seed", "strategy"),
    *(field.name for field in fields(BenchmarkConfig)),
)
#: solo-learn's, in its checkout.
HOST_SCRIPTS = ("main_pretrain.py", "main_linear.py", "main_knn.py", "main_umap.py")

RUN = "demo/runs/iecl_simclr/iecl_simclr"
#: What a placeholder stands for, in the reader's folder; after an option it may be another thing.
PLACEHOLDERS = {
    "--images DIR": "--images datasets/digits/test",
    "--to FOLDER": f"--to {RUN}/inspect",
    "--root DIR": "--root datasets/digits-masks",
    "CHECKOUT": "checkout",
    "KEY=A,B,C": "seed=1,2",
    "DATA": "datasets",
    "DIR": "own",
    "FILE": "benchmark/small_batch-smoke/rows.csv",
    "FOLDER": "datasets/digits/train",
    "IMAGES": "datasets/digits/train",
    "MASKS": "datasets/masks",
    "N": "10",
    "NAME": "mine",
    "PATH": "checkout",
    "PHOTOS": "datasets/digits/train",
    "RUN": RUN,
    "SCRIPT": "script.py",
    "SHARDS": "shards",
    "STORE": "benchmark/small_batch-smoke",
    "TEAM": "team",
    "TEST": "datasets/digits/test",
    "TRAIN": "datasets/digits/train",
}

#: Commands that are planned and not run to their end, by how they begin, and why.
PLANNED_ONLY = {
    "iecl-solo install-host": "installs from the network",
    "iecl-solo compare --config-name cifar": "1,000 epochs of CIFAR-10: a GPU's days",
    "iecl-solo compare --config-name custom": "images that are not here",
    "iecl-solo compare --config-name digits": "minutes each; the one of `make demo` is run",
    "iecl-solo pretrain --config-name cifar": "1,000 epochs of CIFAR-10: a GPU's days",
    "iecl-solo pretrain --config-name custom": "images that are not here, at 224 pixels",
    "iecl-solo pretrain --config-name digits": "minutes; `make demo` trains two such runs",
    "iecl-solo pretrain --config-name imagenet": "ImageNet: a GPU's days",
    "iecl-solo pretrain --config-name small": "minutes on CIFAR-10",
    "iecl-solo pretrain --config-name minimal": "images that are not here, at 224 pixels",
    "iecl-solo benchmark --config-name ablation": "a CPU's day on CIFAR-10",
    "iecl-solo benchmark --config-name climb_dino": "a CPU's day on CIFAR-10, an hour on digits",
    "iecl-solo benchmark --config-name cost": "its figures want a quiet machine",
    "iecl-solo benchmark --config-name input_entropy": "a CPU's day on CIFAR-10",
    "iecl-solo benchmark --config-name methods": "a quarter of an hour; small_batch is run",
    "iecl-solo benchmark --config-name minc": "an hour; small_batch is run",
    "iecl-solo benchmark --config-name small_batch preset=cpu": "a CPU's day on CIFAR-10",
    "iecl-solo benchmark --config-name views": "half an hour on CIFAR-10",
    "iecl-solo benchmark --config-name drawings": "hours of a CPU, and drawings that are not here",
    "iecl-solo benchmark --config-name throughput": "its figures want a quiet machine",
    "iecl-solo benchmark --config-path . --config-name grid": "a SLURM cluster",
    "iecl-solo pretrain --multirun": "names an option; tests/cli/test_commands.py runs it",
    "make": "sets up an environment from the network; what its recipe runs is planned too",
    "pre-commit": "writes into the checkout's .git",
    "python examples/write_shards.py": "tests/test_examples.py runs it",
    "python -m iecl_solo": "tests/cli/test_scripts.py runs solo-learn's scripts so",
    "python -m pip": "installs from the network",
    "python main_pretrain.py": "solo-learn's own script on CIFAR-10: a GPU's days",
    "srun": "a SLURM cluster",
    "torchrun": "several GPUs; tests/cli/test_devices.py runs it on two processes",
    "python studies/": "the study behind a table: minutes to hours, most on CIFAR-10",
}
#: Commands of which the page says that they fail.
FAILS = ("pip install solo-learn",)

#: What a command that is run leaves in the reader's folder.
PRODUCTS = {
    "benchmark": "benchmark/*/report.html",
    "compare": "demo/report.html",
    "dense": f"{RUN}/dense.json",
    "digits": "datasets/digits/t*/*/*.png",
    "embed": "FILE.*",
    "export": "FILE.safetensors",
    "inspect": f"{RUN}/inspect/inspect.json",
    "knn": f"{RUN}/knn.json",
    "linear": f"{RUN}/linear.json",
    "pretrain": "own/runs/*/*/result.json",
    "report": "benchmark/*/report.html",
}


@dataclass(frozen=True)
class Snippet:
    """What stands in a page: a command, inline code, a fence, the target of a link."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def begins(text: str) -> bool:
    """Whether a line begins with a program's name, after variables for it and a prompt."""
    words = text.removeprefix("$ ").split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return len(words) > 1 and words[0] in PROGRAMS


class Page:
    """A page's parts, in its order."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(ROOT).as_posix()
        parser = MarkdownIt("commonmark").enable("table")
        self.tokens = parser.parse(path.read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return self.name

    def fences(self, *languages: str) -> Iterator[Snippet]:
        """Fenced code of these languages."""
        for token in self.tokens:
            if token.type == "fence" and token.info.strip() in languages:
                yield self._snippet(token, token.content, 1)

    def codes(self) -> Iterator[Snippet]:
        """Inline code."""
        for token in self.tokens:
            for child in token.children or ():
                if child.type == "code_inline":
                    yield self._snippet(token, " ".join(child.content.replace("\\|", "|").split()))

    def links(self) -> Iterator[Snippet]:
        """Targets of links and images within the checkout."""
        for token in self.tokens:
            for child in token.children or ():
                target = str(child.attrGet("href") or child.attrGet("src") or "")
                if target and "://" not in target and not target.startswith("#"):
                    yield self._snippet(token, target.partition("#")[0])

    def commands(self) -> Iterator[Snippet]:
        """What a shell is given: blocks of commands, and inline code that begins with a program."""
        for token in self.tokens:
            # what is indented may be a formula or a drawing; a shell's fence is commands alone
            content = token.content.strip()
            block = token.type == "code_block" and (begins(content) or content.startswith("#!"))
            if block or (token.type == "fence" and token.info.strip() in SHELLS):
                for line in re.sub(r"\\\n\s*", "", token.content).splitlines():
                    if line.strip() and not line.strip().startswith("#"):
                        yield self._snippet(token, line.strip().removeprefix("$ "))
        yield from (code for code in self.codes() if begins(code.text))

    def overrides(self) -> Iterator[Snippet]:
        """Inline code that is KEY=VALUE, one or several, as a command takes them."""
        one = r"'?[+~]{0,2}[a-z][\w./]*=\S+"
        for code in self.codes():
            if not re.fullmatch(rf"{one}( {one})*", code.text) or "..." in code.text:
                continue
            # Python's keyword arguments look the same
            if re.match(rf"[^=]*[./]|({'|'.join(TOP_LEVEL)})=", code.text):
                yield code

    def _snippet(self, token: Token, text: str, shift: int = 0) -> Snippet:
        assert token.map is not None
        return Snippet(self.name, token.map[0] + 1 + shift, text)


ALL = [Page(path) for path in PAGES]


def listed(snippets: Iterator[Snippet]) -> Any:
    """Snippets as a test's parameters, each text once."""
    once: dict[str, Snippet] = {}
    for snippet in snippets:
        once.setdefault(snippet.text, snippet)
    return [pytest.param(snippet, id=str(snippet)) for snippet in once.values()]


COMMANDS_TYPED = listed(c for page in ALL for c in page.commands() if c.text not in FAILS)
OVERRIDES_TYPED = listed(o for page in ALL for o in page.overrides())


def words_of(text: str) -> list[str]:
    """A command's words: placeholders filled in, variables, comment and ellipsis left out.

    >>> words_of('SOLO_LEARN=PATH make test  # on the other host')
    ['make', 'test']
    >>> words_of("iecl-solo embed RUN --images DIR --to FILE.parquet")[3:]
    ['--images', 'datasets/digits/test', '--to', 'FILE.parquet']
    """
    for name, value in PLACEHOLDERS.items():
        text = re.sub(rf"(?<![\w./-]){name}(?![\w.=-])", value, text)
    words = [word for word in shlex.split(text, comments=True) if word != "..."]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        name = words.pop(0).partition("=")[0]
        assert name == "SOLO_LEARN", f"{name}: nothing reads this variable"
    return words


# ---------------------------------------------------------------------------------------------
# the reader's folder


def write_own(folder: Path, data: Path) -> None:
    """A YAML of one's own that the README's one line makes an IE-CL one: a run of seconds."""
    raw = raw_config("simclr", data, data__val_path=None, checkpoint__dir="own/runs", max_epochs=1)
    text = OmegaConf.to_yaml({**raw, "name": "mine"})
    (diff,) = ALL[0].fences("diff")
    for line in diff.text.splitlines():
        if line.startswith("-"):
            old = OmegaConf.to_yaml(OmegaConf.create(line[1:]))
            assert old in text, f"{diff}: {line}"
            text = text.replace(old, "")
        else:
            text += line.removeprefix("+") + "\n"
    folder.mkdir()
    (folder / "mine.yaml").write_text(text)


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has who has typed what comes before: data, a finished run, a benchmark."""
    folder = tmp_path_factory.mktemp("reader")
    digits = write_digits(folder / "datasets/digits")
    for name in ("imagenet", "imagenet-100"):
        (folder / "datasets" / name).mkdir()
        (folder / "datasets" / name / "train").symlink_to(digits / "train")
        (folder / "datasets" / name / "val").symlink_to(digits / "test")
    (folder / "cifar10").symlink_to(digits)
    for part in ("cifar10-20k", "cifar10-10k", "cifar10-5k"):
        (folder / "datasets" / part).mkdir()
        for name in ("train", "held_out"):
            (folder / "datasets" / part / name).symlink_to(digits / "train")
    (folder / "datasets/drawings").symlink_to(digits)
    few = write_digits(folder / "few", classes=[0, 1])
    write_masks(few, folder / "datasets/digits-masks")
    (folder / "datasets/drawings-dense").symlink_to(folder / "datasets/digits-masks")
    shards = runpy.run_path(str(ROOT / "examples/write_shards.py"))["write"]
    assert shards(few / "train", folder / "shards") > 256
    (folder / "datasets/imagenet-shards").mkdir()
    for name in ("train", "val"):
        (folder / "datasets/imagenet-shards" / name).symlink_to(folder / "shards")
    write_own(folder / "own", few / "train")
    arguments = [
        *("--config-name", "digits/iecl_simclr", "name=iecl_simclr", "max_epochs=1"),
        *(f"data.train_path={few}/train", f"data.val_path={few}/test", "optimizer.batch_size=64"),
        *(
            "backbone.name=timm/test_resnet",
            "~backbone.kwargs",
            f"checkpoint.dir={folder}/demo/runs",
        ),
        *("monitor.images=16", "monitor.delta_h_images=1", "monitor.steps=4"),
    ]
    assert main(["pretrain", *arguments]) == 0
    shutil.copy(next((folder / RUN).glob("*.ckpt")), folder / "a=b.ckpt")
    shutil.copy(folder / RUN / "args.json", folder)
    made = {"name": "small_batch", "preset": "smoke", "kind": "training"}
    store = make_store(folder / "benchmark/small_batch-smoke", axes={BATCH: [32, 64]}, **made)
    store.export()
    store.path.rename(store.path.with_name("rows"))
    store.csv.rename(store.csv.with_name("rows.csv"))
    (folder / "grid.yaml").write_text("defaults: [/benchmark/small_batch, _self_]\npreset: smoke\n")
    (folder / "checkout/solo").mkdir(parents=True)
    for name in ("setup.py", "solo/__init__.py"):
        (folder / "checkout" / name).touch()
    (folder / "script.py").touch()
    return folder


# ---------------------------------------------------------------------------------------------
# planning


class Planned(Exception):
    """All that comes before the work was accepted."""


def stop(*args: Any, **kwargs: Any) -> NoReturn:
    raise Planned


def enough(cfg: Any, images: int, *_: Any) -> None:
    """A batch is full on one device: of ImageNet there are some hundred images here, for 64."""
    assert images >= cfg.optimizer.batch_size


#: Where work begins, and what is done there instead.
BOUNDARIES = {
    "iecl_solo.cli.pretrain.pretrain": lambda cfg: stop(complete(cfg, HOST)),
    "iecl_solo.experiments.compare.in_processes": stop,
    "iecl_solo.cli.benchmark._launch": stop,
    "iecl_solo.cli.linear._chosen_lr": lambda *given: 0.1,
    "iecl_solo.cli.linear.linear_accuracy": stop,
    "iecl_solo.evaluate.run.dense": lambda *given: 50.0,
    "iecl_solo.solo.settings.too_few": enough,
    "iecl_solo.cli.install_host._pip": stop,
}


@pytest.fixture
def plan(reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Takes a command's words; fails unless it would be accepted."""
    for name, instead in BOUNDARIES.items():
        monkeypatch.setattr(name, instead)
    # files that a command writes are not there for the next one
    for entry in reader.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    for name in ("demo", "benchmark"):
        (tmp_path / name).unlink()
        shutil.copytree(reader / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    yield Plan(monkeypatch)


class Plan:
    """One method a program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, words: list[str]) -> None:
        unknown = [w for w in words if re.fullmatch(r"([\w.]+=)?[A-Z]{3,}", w)]
        unknown = [w for w in unknown if w != "COMMAND"]
        assert not unknown, f"{unknown}: nobody knows what this placeholder stands for"
        getattr(self, words[0].replace("-", "_"))(words[1:])

    def iecl_solo(self, words: list[str]) -> None:
        if words[:1] == ["COMMAND"]:
            for command in COMMANDS:
                self.iecl_solo([command, *words[1:]])
            return
        if len(words) == 1 and words[0] in COMMANDS:  # the command alone is named
            return
        if "--multirun" in words and "--config-name" not in words:
            words = [words[0], "--config-name", "digits/iecl_simclr", *words[1:]]
        code: object
        try:
            code = main(words)
        except Planned:
            code = "planned"
        except SystemExit as left:  # argparse, after its help
            code = left.code
        trains = words[0] in ("pretrain", "compare", "benchmark", "linear", "install-host")
        assert code == ("planned" if trains and "--help" not in words else 0)

    def srun(self, words: list[str]) -> None:
        self(words)

    def torchrun(self, words: list[str]) -> None:
        typed = get_args_parser().parse_args(words)
        assert typed.module and typed.training_script == "iecl_solo"
        self(["iecl-solo", *typed.training_script_args])

    def python(self, words: list[str]) -> None:
        if words[:2] == ["-m", "pip"]:
            self.pip(words[2:])
        elif words[:2] == ["-m", "iecl_solo"]:
            self._host_script(words[2])
        elif words[0] == "main_pretrain.py":
            self._host_script(words[0])
            self._compose_in_checkout(words[1:])
        else:
            self._own_script(ROOT / words[0], words[1:])

    def _own_script(self, script: Path, arguments: list[str]) -> None:
        """A study, up to where its arguments are read."""
        assert script.is_file()
        parse = argparse.ArgumentParser.parse_args

        def parse_and_stop(self: argparse.ArgumentParser, *args: Any) -> NoReturn:
            parse(self, *args)
            raise Planned

        with self.monkeypatch.context() as patch, pytest.raises(Planned):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            patch.setattr(sys, "argv", [str(script), *arguments])
            patch.syspath_prepend(str(script.parent))
            runpy.run_path(str(script), run_name="__main__")

    @staticmethod
    def _host_script(name: str) -> None:
        if name not in HOST_SCRIPTS:
            assert Path(name).is_file()
        elif HOST.name != "main":
            pytest.skip("solo-learn 1.0.2 ships no scripts")
        else:
            assert (HOST.path.parent / name).is_file()

    def _compose_in_checkout(self, words: list[str]) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--config-path")
        parser.add_argument("--config-name")
        parser.add_argument("overrides", nargs="*")
        typed = parser.parse_args(words)
        folder = HOST.path.parent / typed.config_path
        with own_hydra(), initialize_config_dir(str(folder), version_base="1.2"):
            cfg = compose(typed.config_name, typed.overrides)
        cfg.accelerator = "cpu"  # solo-learn's files want a GPU and a login
        self.monkeypatch.setenv("WANDB_MODE", "offline")
        complete(cfg, HOST)

    @staticmethod
    def pip(words: list[str]) -> None:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = set(setup["options.extras_require"])
        assert words[0] == "install"
        for wanted in (word for word in words[1:] if not word.startswith("-")):
            found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", wanted)
            assert found, f"pip install {wanted}: from a clone it is '.'; no index has it"
            assert set((found[1] or "").split(",")) - {""} <= extras

    def make(self, words: list[str]) -> None:
        """The target is there, its variables are read, and what it runs is planned too."""
        makefile = (ROOT / "Makefile").read_text()
        for name in (word.partition("=")[0] for word in words if "=" in word):
            assert f"$({name})" in makefile, f"{name}: the Makefile reads no such variable"
        for line in printed_by_make(*words):
            self(shlex.split(line))

    @staticmethod
    def pre_commit(words: list[str]) -> None:
        assert words == ["install"] and (ROOT / ".pre-commit-config.yaml").is_file()
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert "pre-commit" in setup["options.extras_require"]["dev"].split()


@pytest.mark.parametrize("command", COMMANDS_TYPED)
def test_command_is_accepted(command: Snippet, plan: Plan):
    plan(words_of(command.text))


#: Which command takes the KEY=VALUE that a page names, by page or by key.
TAKES = {
    # without what 1.0.2 cannot do
    "docs/benchmark.md": "benchmark --config-name small_batch preset=smoke "
    "evaluation.finetune.fractions=[]",
    "pretrained_feature_extractor": "linear --config-name default",
    # the reader has logged in; the test has not, and has no network
    "wandb.enabled": "pretrain --config-name digits/iecl_simclr wandb.offline=true",
    "": "pretrain --config-name digits/iecl_simclr",
}


@pytest.mark.parametrize("overrides", OVERRIDES_TYPED)
def test_override_is_accepted(overrides: Snippet, plan: Plan):
    words = words_of(overrides.text)
    key = words[0].lstrip("+~").partition("=")[0]
    command = TAKES.get(overrides.page) or TAKES.get(key) or TAKES[""]
    plan(["iecl-solo", *command.split(), *words])


def test_commands_are_found():
    """The parser loses none: the kinds that the pages have, each with one that is known."""
    texts = [param.values[0].text for param in COMMANDS_TYPED]
    for known in ("make test", "python -m pip install .", "iecl-solo report STORE"):
        assert any(text.startswith(known) for text in texts), known
    assert not any("\\" in text for text in texts)  # a command of two lines is one
    assert len(texts) > 40


# ---------------------------------------------------------------------------------------------
# what else a page names


@pytest.mark.parametrize("page", ALL, ids=str)
def test_what_a_page_names_exists(page: Page):
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
    files |= {path.name for path in ROOT.iterdir()} | set(HOST_SCRIPTS) | {"script.py"}
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    missing = []
    for code in page.codes():
        text = code.text.partition("(")[0]
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", text):
            if "/" in text and text.partition("/")[0] in FOLDERS:
                found = any(ROOT.glob(text.rstrip("/")))
            elif text.endswith(SUFFIXES):
                found = text.rpartition("/")[2] in files
            else:
                found = True
            if not found:
                missing.append(f"{code}: {text}")
        if re.fullmatch(r"iecl_solo(\.\w+)+", text):
            try:
                pkgutil.resolve_name(text)
            except (ImportError, AttributeError) as error:
                missing.append(f"{code}: {error}")
        for name in re.findall(r"(?<![\w/])test_\w+(?!\w|\.py)", code.text):
            if f"def {name}(" not in tests:
                missing.append(f"{code}: {name}")
    for link in page.links():
        if link.text and not (ROOT / page.name).parent.joinpath(link.text).exists():
            missing.append(f"{link}: {link.text}")
    assert missing == []


@pytest.mark.parametrize("fence", listed(f for page in ALL for f in page.fences("python")))
def test_python_runs(fence: Snippet, reader: Path, monkeypatch: pytest.MonkeyPatch):
    """As it stands, but for the length of a training: one step."""
    from iecl_solo.train import load

    arguments = load.trainer_arguments
    short = {"max_epochs": 1, "limit_train_batches": 1}
    monkeypatch.setattr(load, "trainer_arguments", lambda cfg: arguments(cfg) | short)
    monkeypatch.chdir(reader)
    exec(compile(fence.text, str(fence), "exec"), {"__name__": "fence"})


# ---------------------------------------------------------------------------------------------
# to the end


def printed_by_make(*words: str) -> list[str]:
    """What a target would run of this project, as typed in a shell."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
    return re.findall(r"\bbin/(iecl-solo .*|python studies/.*)", done.stdout)


def planned_only(line: str) -> bool:
    """Whether the list of exceptions has it, or a page names the command alone."""
    alone = line.removeprefix("iecl-solo ") in HYDRA_COMMANDS
    return alone or line.startswith(tuple(PLANNED_ONLY))


def typed_lines() -> list[str]:
    return [shlex.join(words_of(param.values[0].text)) for param in COMMANDS_TYPED]


def runs() -> list[str]:
    """The commands to run, those of ``make demo`` first, each once."""
    demo = [line for line in printed_by_make("demo") if "install-host" not in line]
    typed = [line for line in typed_lines() if not planned_only(line)]
    return list(dict.fromkeys([*demo, *typed]))


def test_what_is_only_planned_is_typed_somewhere():
    """The list of exceptions holds none that has gone from the pages."""
    lines = typed_lines()
    assert [start for start in PLANNED_ONLY if not any(t.startswith(start) for t in lines)] == []


def test_commands_that_are_run_leave_something():
    own = {"COMMAND", "doctor", "--help"}
    assert {line.split()[0] for line in runs()} == {"iecl-solo"}
    assert {line.split()[1] for line in runs()} - own == set(PRODUCTS)


@pytest.mark.robust
@pytest.mark.timeout(7200)
def test_commands_run(tmp_path: Path, images: Path):
    """In the pages' order, in one folder, with the console script, as a reader types them."""
    script = Path(sys.executable).with_name("iecl-solo")
    assert script.is_file()
    write_own(tmp_path / "own", images)
    failed = []
    lines = [shlex.split(line)[1:] for line in runs()]
    helped = next(line[1:] for line in lines if line[0] == "COMMAND")
    lines = [line for line in lines if line[0] != "COMMAND"]
    for line in [*lines, *([command, *helped] for command in COMMANDS)]:
        began = time.time()
        done = subprocess.run(
            [str(script), *line],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        print(f"{time.time() - began:6.1f} s, exit code {done.returncode}: {shlex.join(line)}")
        made = line[-1] == "--help" or line[0] not in PRODUCTS
        made = made or any(
            path.stat().st_mtime >= began - 1 for path in tmp_path.glob(PRODUCTS[line[0]])
        )
        if done.returncode or not done.stdout or not made:
            failed.append(f"{shlex.join(line)}: {done.stdout}{done.stderr}")
    assert failed == []
