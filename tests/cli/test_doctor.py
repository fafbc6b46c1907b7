"""The doctor's findings, and solo-learn installed for real into an environment of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import cpu_seconds

from iecl_solo.checks import installed
from iecl_solo.cli import doctor, install_host
from iecl_solo.cli.main import main
from iecl_solo.errors import IECLError
from iecl_solo.solo import host
from iecl_solo.version import __version__

ROOT = Path(__file__).parents[2]

# --- doctor ------------------------------------------------------------------------------------


def test_ready_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--full"]) == 0
    told = capsys.readouterr().out
    found = host.find_host()
    assert f"solo-learn {found.version} in {found.path}" in told
    assert torch.__version__.split("+")[0] in told
    assert "knn-metric: knn_eval fails" in told
    assert told.endswith("ready to train\n") and "not ready" not in told


@pytest.mark.any_host
def test_by_itself_it_imports_no_host_and_says_its_own_version() -> None:
    program = (
        "import sys; from iecl_solo.cli.main import main; code = main(['doctor']);"
        "print('imported', [m for m in ('solo', 'lightning', 'torchvision') if m in sys.modules]);"
        "sys.exit(code)"
    )
    spent, told = cpu_seconds("-c", program)
    lines = told.splitlines()
    assert lines[0].split() == ["iecl-solo", __version__]
    assert "imported []" in lines and "ready to train" in lines
    assert any(f"solo-learn {host.find_host().version} in" in line for line in lines)
    # it needs torch; lightning alone would double what that takes
    assert spent < 1.5 * cpu_seconds("-c", "import torch")[0]


def test_a_torchvision_for_another_torch_is_seen_without_importing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["numpy", "torch==1.2.3"])
    (problem,) = doctor.diagnose().problems
    assert problem[0].startswith("torchvision does not fit torch (it wants torch 1.2.3, ")


def test_every_device_is_told() -> None:
    devices = dict(doctor.diagnose(full=True).facts)["devices"]
    assert "cpu" in devices
    assert devices.count("cuda:") == torch.cuda.device_count()


def _told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a doctor who finds something in the way."""
    assert doctor.run(argparse.Namespace(full=True)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "not ready to train"
    return lines


def test_no_host(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(host, "locate", lambda: None)
    monkeypatch.delitem(sys.modules, "solo", raising=False)
    lines = _told(capsys)
    i = lines.index("  solo-learn: not installed")
    assert lines[i + 1] == "    -> iecl-solo install-host"


def test_a_name_that_is_no_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SOLO_LEARN", str(tmp_path))
    lines = _told(capsys)
    i = next(i for i, line in enumerate(lines) if "not a solo-learn checkout" in line)
    assert lines[i + 1] == "    -> unset SOLO_LEARN"


@pytest.mark.parametrize(
    ("error", "command"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "pip install x"),
        (RuntimeError("broken\nat last"), "iecl-solo install-host"),
        (RuntimeError(), "iecl-solo install-host"),
    ],
)
def test_a_host_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    command: str,
) -> None:
    def fail() -> Any:
        raise error

    monkeypatch.setattr(host, "find_host", fail)
    lines = _told(capsys)
    i = next(i for i, line in enumerate(lines) if "solo-learn does not import" in line)
    assert lines[i + 1] == f"    -> {command}"


def test_a_missing_requirement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(doctor.REQUIRED, "some-thing", "no_such_module")
    lines = _told(capsys)
    assert "some-thing    -" in lines
    i = lines.index("  some-thing: not installed")
    assert lines[i + 1] == "    -> pip install some-thing"


def test_torchvision_of_another_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = doctor.importlib.import_module

    def without_torchvision(name: str) -> ModuleType:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name)

    monkeypatch.setattr(doctor.importlib, "import_module", without_torchvision)
    lines = _told(capsys)
    i = next(i for i, line in enumerate(lines) if "torchvision::nms" in line)
    assert lines[i + 1] == "    -> pip install --upgrade torch torchvision"


def test_what_is_optional_keeps_no_one_from_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(doctor.OPTIONAL, "umap", (("no_such_module",), "UMAP pictures"))
    assert doctor.run(argparse.Namespace(full=True)) == 0
    told = capsys.readouterr().out
    assert "no_such_module is missing: no UMAP pictures" in told
    assert "-> pip install 'iecl-solo[umap]'" in told


def test_a_folder_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "left_by_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed("left_by_a_run")
    assert installed("json")


# --- install-host ------------------------------------------------------------------------------


def _from(source: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    install_host.add_arguments(parser)
    return parser.parse_args(["--from", str(source)])


def test_the_index_is_the_default() -> None:
    parser = argparse.ArgumentParser()
    install_host.add_arguments(parser)
    assert parser.parse_args([]).source == "index"


def test_a_path_that_is_no_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_host, "_pip", lambda *_, **__: pytest.fail("pip was called"))
    assert main(["install-host", "--from", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(tmp_path) in lines[0] and "not a solo-learn checkout" in lines[0]


def test_github_needs_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_host, "_pip", lambda *_, **__: pytest.fail("pip was called"))
    monkeypatch.setattr(install_host.shutil, "which", lambda _: None)
    with pytest.raises(IECLError, match="git is not installed"):
        install_host.run(_from("github"))


def test_what_pip_says_is_one_line() -> None:
    with pytest.raises(IECLError, match="--from here: pip failed \\(ERROR: ") as failed:
        install_host._pip("install", "--no-index", "no-such-distribution==0", what="here")
    assert "\n" not in str(failed.value)


class Environment:
    """A virtual environment with nothing but pip, and the folder of its packages."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        self.packages = Path(self.run("-c", asked).stdout.strip())

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Its Python, which finds iecl_solo and nothing else of the one that runs the tests."""
        return subprocess.run(
            [str(self.python), *arguments],
            env={k: v for k, v in os.environ.items() if k != "SOLO_LEARN"}
            | {"PYTHONPATH": str(ROOT)}
            | environment,
            capture_output=True,
            text=True,
        )

    def install_host(self, source: object, **environment: str) -> Any:
        """``iecl-solo install-host``, for which one of the host's small needs is enough."""
        script = (
            "import sys; from iecl_solo.cli import install_host, main\n"
            "install_host.NEEDS = {'einops': 'einops'}\n"
            f"sys.exit(main.main(['install-host', '--from', {str(source)!r}]))"
        )
        return self.run("-c", script, **environment)

    def version(self) -> str:
        """Of its solo-learn."""
        told = self.run("-m", "pip", "show", "solo-learn").stdout
        return next(line.split()[1] for line in told.splitlines() if line.startswith("Version"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("env") / "venv")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What matters of GitHub main: setup.py, requirements that must not be followed, tests."""
    (tmp_path / "setup.py").write_text(
        "from pkg_resources import parse_requirements\n"
        "from setuptools import find_packages, setup\n"
        "needs = [str(r) for r in parse_requirements(open('requirements.txt'))]\n"
        "setup(name='solo-learn', version='1.0.6', packages=find_packages(exclude=['tests']),\n"
        "      install_requires=needs)\n"
    )
    (tmp_path / "requirements.txt").write_text("no-such-distribution==0\n")
    for package in ("solo", "tests", "tests/args"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    return tmp_path


@pytest.mark.any_host
def test_from_the_index(environment: Environment) -> None:
    mine = environment.packages / "tests" / "mine.py"
    mine.parent.mkdir()
    mine.write_text("")
    done = environment.install_host("index")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "installed solo-learn 1.0.2 from index, and einops"
    assert environment.version() == "1.0.2"
    assert (environment.packages / "solo" / "methods" / "base.py").is_file()
    assert (environment.packages / "einops").is_dir()
    assert not list(environment.packages.glob("torch*"))
    # the host's tests are gone, what another put there is not
    assert list(mine.parent.iterdir()) == [mine]
    mine.unlink()
    mine.parent.rmdir()


@pytest.mark.any_host
def test_from_a_checkout(environment: Environment, checkout: Path) -> None:
    before = sorted(checkout.rglob("*"))
    setuptools = sorted(environment.packages.glob("setuptools*"))
    done = environment.install_host(checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"installed solo-learn 1.0.6 from {checkout}")
    assert environment.version() == "1.0.6"
    assert (environment.packages / "solo" / "__init__.py").is_file()
    assert not (environment.packages / "tests").exists()
    assert sorted(checkout.rglob("*")) == before
    assert sorted(environment.packages.glob("setuptools*")) == setuptools


@pytest.mark.any_host
def test_a_checkout_needs_the_older_setuptools(environment: Environment, checkout: Path) -> None:
    """Without the constraint pip builds with today's setuptools, and setup.py fails."""
    done = environment.run("-m", "pip", "wheel", "--no-deps", str(checkout), "-w", str(checkout))
    assert done.returncode != 0
    assert "pkg_resources" in done.stdout + done.stderr


@pytest.mark.any_host
def test_github_without_a_network(environment: Environment) -> None:
    nowhere = "http://127.0.0.1:9"
    done = environment.install_host("github", https_proxy=nowhere, HTTPS_PROXY=nowhere)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("iecl-solo: install-host --from github: no network")
