"""What it takes to add an objective, a method and a third solo-learn: each is done here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from support import HOST, raw_config

import iecl_solo
from iecl_solo.solo.registry import OBJECTIVES

ROOT = Path(__file__).parents[2]

OBJECTIVE = """
from dataclasses import dataclass
from iecl_solo.errors import IECLError
from iecl_solo.objectives.protocol import Objective, Term, of_views

@dataclass
class PullConfig:
    weight: float = 0.5
    kind: str = "square"

class Pull(Objective):
    name = "pull"
    Config = PullConfig
    shown = ("length",)

    def __init__(self, config, image_size, views, network, space):
        super().__init__()
        self.config, self.views = config, views

    def terms(self, made, epoch):
        z = of_views(made.online, tuple(range(self.views.num_views)))
        return {"length": Term(z.square().mean(), self.config.weight)}
"""

METHOD = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from iecl_solo.methods.protocol import Method

@dataclass
class MyConfig:
    proj_hidden_dim: int = 32
    proj_output_dim: int = 16
    kind: str = "square"
    signed: bool = False
    power: int = 2
    margin: float | None = None

class MyMethod(Method):
    name = "my_method"
    Config = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.config = config

    def forward(self, large, small, momentum, progress):
        return (large[0] - large[1]).pow(self.config.power).mean()
"""

#: The one line, and then what is to be done.
REGISTER = """
import sys
import iecl_solo.solo.registry as registry
from {module} import {name}
registry.{where} += ({name},)
{then}
"""
#: Two commands as they were given: one that trains, and after a "--" one that is refused.
COMMANDS = """
from iecl_solo.cli.main import main
end = sys.argv.index("--")
assert main(sys.argv[end + 1 :]) == 2
sys.exit(main(sys.argv[1:end]))
"""


def run(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT), str(HOST.path.parent)])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def written(folder: Path, images: Path, method: str, **overrides: object) -> list[str]:
    cfg = raw_config(method, images, max_epochs=1, **overrides)
    cfg["checkpoint"]["dir"] = str(folder / "runs")
    (folder / "mine.yaml").write_text(json.dumps(cfg))
    return ["pretrain", "--config-path", str(folder), "--config-name", "mine"]


@pytest.mark.any_host
def test_an_objective_is_its_file_and_one_line(tmp_path: Path, images: Path):
    (tmp_path / "pull.py").write_text(OBJECTIVE)
    program = REGISTER.format(module="pull", name="Pull", where="OBJECTIVES", then=COMMANDS)
    command = written(tmp_path, images, "simclr")
    good = [*command, "objectives=[pull,iecl]", "pull.weight=0.25"]
    bad = [*command, "method=pull_simclr", "pull.wieght=1"]
    done = run(program, tmp_path, *good, "--", *bad)
    assert done.returncode == 0, done.stderr
    assert "pull.wieght: did you mean 'weight'?" in done.stderr
    assert "pull_length" in done.stdout
    (folder,) = (tmp_path / "runs" / "iecl_pull_simclr").iterdir()
    assert json.loads((folder / "args.json").read_text())["pull"] == {
        "weight": 0.25,
        "kind": "square",
    }
    (metrics,) = folder.rglob("metrics.csv")
    assert pd.read_csv(metrics)["train_pull_length_epoch"].dropna().gt(0).all()


def test_a_method_is_its_file_and_one_line(tmp_path: Path, images: Path):
    (tmp_path / "mine.py").write_text(METHOD)
    program = REGISTER.format(module="mine", name="MyMethod", where="WHOLE", then=COMMANDS)
    command = written(tmp_path, images, "my_method")
    given = ["++method_kwargs.kind=cube", "++method_kwargs.signed=true", "++method_kwargs.power=3"]
    good = [*command, *given, "objectives=[climb]"]
    done = run(program, tmp_path, *good, "--", *command, "++method_kwargs.powre=3")
    assert done.returncode == 0, done.stderr
    assert "method_kwargs.powre: did you mean 'power'?" in done.stderr
    (folder,) = (tmp_path / "runs" / "climb_my_method").iterdir()
    options = json.loads((folder / "args.json").read_text())["method_kwargs"]
    assert (options["kind"], options["signed"], options["power"]) == ("cube", True, 3)
    assert options["margin"] is None and options["proj_hidden_dim"] == 32


@pytest.mark.any_host
def test_a_methods_options_are_read_as_their_types(tmp_path: Path):
    (tmp_path / "mine.py").write_text(METHOD)
    then = """
import argparse
from solo.methods import METHODS
if not hasattr(METHODS["simclr"], "add_model_specific_args"):
    METHODS["my_method"].__mro__[1].add_model_specific_args = staticmethod(lambda parser: parser)
parser = METHODS["my_method"].add_model_specific_args(argparse.ArgumentParser())
words = "--kind cube --signed true --power 3 --margin 0.5"
for action in parser._actions:
    action.required = False
given, _ = parser.parse_known_args(words.split())
print(repr(given.kind), given.signed, given.power, given.margin)
given, _ = parser.parse_known_args([])
print(repr(given.kind), given.signed, given.power, given.margin)
"""
    program = REGISTER.format(module="mine", name="MyMethod", where="WHOLE", then=then)
    done = run(program, tmp_path)
    assert done.stdout.splitlines() == ["'cube' True 3 0.5", "'square' False 2 None"], done.stderr


SOLO = {
    "solo/__init__.py": "",
    "solo/methods/base.py": """
import lightning.pytorch as pl
class BaseMethod(pl.LightningModule):
    third_generation = True
class BaseMomentumMethod(BaseMethod):
    pass
""",
    "solo/methods/__init__.py": """
import torch
from solo.methods.base import BaseMethod
class Toy(BaseMethod):
    def __init__(self, options):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(options["width"]))
        self.rate = options["rate"]
    def training_step(self, batch, batch_idx):
        return self.net(batch[1][0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)
METHODS = {"toy": Toy}
""",
}

THIRD = """
import torch
from torch.utils.data import DataLoader
from iecl_solo.solo.host import Given, Host

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return i, [torch.ones(3, 4, 4)] * 2, 0

class Third(Host):
    name, online, momentum, loaders = "third", "net", "slow_net", "data"
    backbones = {"mlp": None}

    @classmethod
    def recognises(cls, base_method):
        return hasattr(base_method, "third_generation")

    def register(self, objectives):
        self.base_method.told = list(objectives)

    def complete(self, cfg):
        cfg.optimizer.lr = cfg.optimizer.lr / 2
        cfg.seed, cfg.num_nodes, cfg.data.num_classes = 1, 1, 3
        return cfg

    def complete_linear(self, cfg):
        return cfg

    def build(self, cfg):
        return self.methods[cfg.method]({**cfg.method_kwargs, "rate": cfg.optimizer.lr})

    def build_linear(self, cfg, backbone):
        raise NotImplementedError

    def unpack(self, method, args, kwargs, blocks):
        return Given(args, kwargs, {name: None for name in blocks}, 4)

    def blocked_infonce(self, model):
        raise NotImplementedError

    def options(self, method):
        return {"width"}

    def network(self, name, method, *, cifar, **kwargs):
        return torch.nn.Identity()

    def pipelines(self, cfg):
        return []

    def crops(self, pipelines, copies):
        return None

    def pretrain_set(self, cfg, transform):
        return Images()

    def pretrain_loader(self, cfg, dataset):
        return DataLoader(dataset, batch_size=cfg.optimizer.batch_size)

    def evaluation_sets(self, dataset, transforms, paths, data_format):
        raise NotImplementedError
"""

USE_THIRD = """
import sys
import iecl_solo.solo
iecl_solo.solo.__path__.append(sys.argv[1])  # where its one file stands for this test
from iecl_solo import load
from iecl_solo.solo.host import find_host
host = find_host()
model, loader, trainer = load(sys.argv[2], enable_progress_bar=False)
trainer.fit(model, loader)
print(host.name, type(model).__name__, model.rate, len(loader), model.told == host.base_method.told)
"""


@pytest.mark.any_host
def test_a_third_solo_learn_is_one_file(tmp_path: Path, images: Path):
    for name, text in SOLO.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bridge").mkdir()
    (tmp_path / "bridge" / "host_third.py").write_text(THIRD)
    cfg = raw_config("toy", images, backbone__name="mlp", max_epochs=1)
    cfg["method_kwargs"] = {"width": 2}
    cfg["optimizer"]["batch_size"] = 4
    (tmp_path / "mine.yaml").write_text(json.dumps(cfg))
    environment = {k: v for k, v in os.environ.items() if k != "SOLO_LEARN"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE_THIRD, str(tmp_path / "bridge"), "mine.yaml"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["third", "Toy", "0.05", "2", "True"], done.stderr


def _names_in_code(path: Path) -> set[str]:
    """Strings, attributes and names of a file that are not in its docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                found.add(node.value)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def _leaks(path: Path, name: str) -> list[str]:
    begins = (f"{name}_", f"{name}.", f"train_{name}", f"+{name}")
    own = ("iecl_solo", "iecl-solo")
    # KEY=VALUE is an example in a help text
    words = {w for text in _names_in_code(path) for w in text.split() if "=" not in w}
    return sorted(w for w in words if (w == name or w.startswith(begins)) and not w.startswith(own))


@pytest.mark.parametrize("name", [objective.name for objective in OBJECTIVES])
def test_a_name_is_known_to_its_own_file_alone(name: str):
    package = Path(iecl_solo.__file__).parent
    leaks = {
        str(path.relative_to(package)): leaks
        for path in sorted(package.rglob("*.py"))
        if path.parts[-2:] != ("objectives", f"{name}.py") and (leaks := _leaks(path, name))
    }
    assert leaks == {}, "derive it from the registry or from the objective"
