"""Bad input: one line that says what was given and what is allowed, a code, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from support import cpu_seconds, image_folder, raw_config

from iecl_solo.cli.main import main
from iecl_solo.train.fit import pretrain


def _benchmark(images: Path) -> dict[str, Any]:
    data = {"train_path": str(images), "val_path": str(images), "num_workers": 0}
    return {
        "name": "bench",
        "question": "Is what is wrong refused?",
        "data": {"toy": {"config": "custom", "settings": {"data": data}}},
        "arms": {"simclr": {"method": "simclr"}, "iecl": {"method": "iecl_simclr"}},
        "seeds": [0],
        "measures": ["knn_acc1"],
        "settings": {
            "backbone": {"name": "timm/test_resnet"},
            "optimizer": {"batch_size": 4},
            "precision": "32-true",
        },
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, bad data, a finished run of the host alone, and broken copies of it."""
    root = tmp_path_factory.mktemp("world")
    good = image_folder(root / "good", images=4)
    image_folder(root / "bad_image", images=4)
    (root / "bad_image/class2/3.png").write_bytes(b"\x89PNG but no more")
    for part in ("train", "test"):
        image_folder(root / "above" / part, images=2)
    image_folder(root / "empty_class", images=4)
    (root / "empty_class/class9").mkdir()
    (root / "no_classes").mkdir()
    (root / "configs").mkdir()
    (root / "configs/broken.yaml").write_text("method: simclr\n  optimizer: [\n")
    (root / "configs/bench.yaml").write_text(yaml.safe_dump(_benchmark(good)))
    raw = raw_config("simclr", good, data__val_path=str(good), max_epochs=1)
    raw["checkpoint"]["dir"] = str(root / "runs")
    raw["optimizer"]["batch_size"] = 4
    run = pretrain(OmegaConf.create(raw))
    whole = run.checkpoint.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("text", b"no checkpoint")):
        (root / name).mkdir()
        (root / name / "run.ckpt").write_bytes(content)
        (root / name / "args.json").write_text((run.folder / "args.json").read_text())
    (root / "alone").mkdir()
    (root / "alone/run.ckpt").write_bytes(whole)
    (root / "other").mkdir()
    torch.save({"weights": 1}, root / "other/run.ckpt")
    (root / "other/args.json").write_text("{}")
    args = json.loads((run.folder / "args.json").read_text())
    args["backbone"]["name"] = "resnet18"
    (root / "wrong").mkdir()
    (root / "wrong/run.ckpt").write_bytes(whole)
    (root / "wrong/args.json").write_text(json.dumps(args))
    return root


TRAIN = [
    *("pretrain", "--config-name", "digits/iecl_simclr"),
    *("data.train_path=good", "data.val_path=null", "data.num_workers=0", "precision=32-true"),
    *("backbone.name=timm/test_resnet", "~backbone.kwargs", "accelerator=cpu"),
    "devices=1",
    *("optimizer.batch_size=4", "max_epochs=1", "checkpoint.dir=new"),
]
COMPARE = ["compare", *TRAIN[1:-1], "data.val_path=good", "compare.dir=new"]
KNN = ["knn", "--config-name", "default"]
LINEAR = [
    *("linear", "--config-name", "digits", "data.train_path=good", "data.val_path=good"),
    *("backbone.name=timm/test_resnet", "max_epochs=1", "optimizer.batch_size=4"),
]
RUN = "runs/simclr/simclr"
GIVEN = f"pretrained_feature_extractor={RUN}"
# an own YAML, on data that are there: nothing may be written
BENCH = ["benchmark", "--config-path", "configs", "--config-name", "bench", "dir=new"]

#: What is typed, and what the one line must say: given, allowed, nearest.
CASES: list[tuple[list[str], list[str]]] = [
    (["pretran"], ["unknown command 'pretran'", "did you mean 'pretrain'"]),
    (["pretrain"], ["--config-name is missing"]),
    (
        ["pretrain", "--config-name", "digits/iecl_simclrr"],
        ["'digits/iecl_simclrr'", "did you mean 'digits/iecl_simclr'"],
    ),
    (["pretrain", "--config-path", "nowhere", "--config-name", "a"], ["nowhere: no such folder"]),
    (["pretrain", "--config-path", "configs", "--config-name", "brokn"], ["did you mean 'broken'"]),
    (["pretrain", "--config-path", "configs", "--config-name", "broken"], ["broken.yaml"]),
    ([*TRAIN, "method=iecl_simclrr"], ["'iecl_simclrr'", "did you mean 'iecl_simclr'"]),
    ([*TRAIN, "method=iecl_linear"], ["iecl_linear", "refused", "frozen backbone"]),
    ([*TRAIN, "optimizer.lrr=1"], ["optimizer.lrr", "did you mean 'lr'"]),
    ([*TRAIN, "optimizer.lr"], ["optimizer.lr"]),
    ([*TRAIN, "iecl.betta=1"], ["iecl.betta", "did you mean 'beta'", "Allowed: beta, lambda"]),
    ([*TRAIN, "iecl.saib.patchsize=4"], ["iecl.saib.patchsize", "did you mean 'patch_size'"]),
    ([*TRAIN, "iecl.lambda=abc"], ["iecl.lambda", "'abc'"]),
    ([*TRAIN, "iecl.beta=-1"], ["iecl.beta", "-1.0", "from 0 up"]),
    ([*TRAIN, "iecl.saib.patch_size=5"], ["patch_size", "5", "32", "4"]),
    ([*TRAIN, "iecl.saib.activation=gelo"], ["'gelo'", "did you mean 'gelu'"]),
    ([*TRAIN, "iecl.saib.variant=papr"], ["'papr'", "did you mean 'paper'"]),
    ([*TRAIN, "iecl.entropy.estimator=codingrate"], ["'codingrate'", "'coding_rate'"]),
    ([*TRAIN, "iecl.beta=inf"], ["iecl.beta", "inf", "a number from 0 up"]),
    ([*TRAIN, "iecl.saib.depth=1000000"], ["depth: 1000000", "from 1 to 100"]),
    ([*TRAIN, "iecl=5"], ["iecl: unknown value '5'", "saib_only"]),
    ([*TRAIN, "augmentations=null"], ["augmentations: unknown value 'null'", "symmetric"]),
    ([*TRAIN, "resume_from_checkpoint=text/run.ckpt"], ["text/run.ckpt"]),
    ([*TRAIN, "+climb.beta=3"], ["climb", "does not carry it"]),
    ([*TRAIN, "data.num_workers=999"], ["data.num_workers", "999"]),
    ([*TRAIN, "iecl.placement=left"], ["iecl.placement", "'left'", "none, query"]),
    ([*TRAIN, "iecl.query_views=[0,1]"], ["query_views", "[0, 1]", "no anchor"]),
    ([*TRAIN, "iecl.kl.covariance=ful"], ["iecl.kl.covariance", "did you mean 'full'"]),
    ([*TRAIN, "backbone.name=resnet19"], ["'resnet19'", "did you mean 'resnet18'"]),
    ([*TRAIN, "backbone.name=timm/resnet19"], ["'timm/resnet19'", "did you mean 'timm/resnet1"]),
    (
        [*TRAIN, "backbone.name=timm/test_vit", "+backbone.kwargs.small_stem=true"],
        ["timm/test_vit", "patch_size and img_size"],
    ),
    ([*TRAIN, "+backbone.kwargs.dept=3"], ["timm/test_resnet", "dept"]),
    ([*TRAIN, "data.dataset=cifr10"], ["data.dataset", "'cifr10'", "did you mean 'cifar10'"]),
    ([*TRAIN, "data.train_path=nowhere"], ["data.train_path: nowhere: no such folder"]),
    ([*TRAIN, "data.val_path=nowhere"], ["data.val_path: nowhere: no such folder"]),
    ([*TRAIN, "data.train_path=empty_class"], ["class9", "holds no image"]),
    ([*TRAIN, "data.train_path=[good,above]"], ["data.train_path", "several folders", "no labels"]),
    ([*TRAIN, "data.train_path=no_classes"], ["<class>/<image>", "data.no_labels=true"]),
    ([*TRAIN, "data.train_path=bad_image"], ["3.png", "does not decode"]),
    ([*TRAIN, "optimizer.batch_size=1"], ["optimizer.batch_size", "1", "from 2 up"]),
    ([*TRAIN, "optimizer.batch_size=64"], ["optimizer.batch_size", "64", "12 images"]),
    (
        [*TRAIN, "optimizer.batch_size=8", "devices=2", "strategy=ddp"],
        ["optimizer.batch_size: 8, on each of 2 devices", "12 images"],
    ),
    ([*TRAIN, "data.no_labels=true", "+data.fraction=0.5"], ["data.fraction", "folder of classes"]),
    ([*TRAIN, "optimizer.name=sdg"], ["optimizer.name", "'sdg'", "did you mean 'sgd'"]),
    ([*TRAIN, "optimizer.lr=fast"], ["optimizer.lr", "'fast'"]),
    ([*TRAIN, "scheduler.name=cosine"], ["scheduler.name", "'warmup_cosine'"]),
    ([*TRAIN, "max_epochs=0"], ["max_epochs", "0", "from 1 up"]),
    ([*TRAIN, "method_kwargs.temperature=null"], ["temperature"]),
    ([*TRAIN, "resume_from_checkpoint=cut/run.ckpt"], ["cut/run.ckpt", "cannot be read"]),
    ([*COMPARE, "evaluation.knn.distence=cosine"], ["evaluation.knn.distence", "'distance'"]),
    ([*COMPARE, "data.val_path=null"], ["data.val_path", "no value"]),
    ([*COMPARE, "iecl.saib.patch_size=7"], ["patch_size", "7"]),
    ([*KNN, "pretrained_feature_extractor=nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
    ([*KNN, "pretrained_feature_extractor=cut"], ["cut", "cannot be read"]),
    ([*KNN, "pretrained_feature_extractor=text"], ["text", "cannot be read"]),
    ([*KNN, "pretrained_feature_extractor=other"], ["no 'state_dict'"]),
    ([*KNN, "pretrained_feature_extractor=alone"], ["args.json", "not beside it"]),
    ([*KNN, "pretrained_feature_extractor=wrong"], ["another backbone", "missing"]),
    (
        [*KNN, f"pretrained_feature_extractor={RUN}", "distance_function=[cosin]"],
        ["'cosin'", "did you mean 'cosine'"],
    ),
    (LINEAR, ["pretrained_feature_extractor", "no value"]),
    (
        [*LINEAR, f"pretrained_feature_extractor={RUN}", "backbone.name=resnet18"],
        ["backbone.name", "'resnet18'", "'timm/test_resnet'"],
    ),
    (["export", RUN, "--to", "backbone.pt"], ["backbone.pt", ".safetensors"]),
    (["export", RUN, "--format", "hugging", "--to", "new"], ["'hugging'", "'huggingface'"]),
    (
        ["export", RUN, "--format", "detectron2", "--to", "new/a.pkl"],
        ["detectron2", "timm/test_resnet", "resnet50"],
    ),
    (["export", RUN, "--saib", "--to", "new/saib.safetensors"], ["without a SAIB"]),
    (["export", "cut", "--to", "new/a.safetensors"], ["cannot be read"]),
    (["install-host", "--from", "no_classes"], ["no_classes"]),
    # devices, loggers, data, paths
    ([*TRAIN, "accelerator=gpuu"], ["accelerator", "'gpuu'", "did you mean 'gpu'"]),
    (
        [*TRAIN, "data.val_path=above/test", "data.train_path=above"],
        ["data.val_path", "'class0'", "data.train_path=above/train?"],
    ),
    ([*TRAIN, "data.train_path=my photos (1)"], ["data.train_path='\"my photos (1)\"'"]),
    ([*TRAIN, "data.train_path=my", "photos"], ["'photos' is no KEY=VALUE", "quoted"]),
    ([*TRAIN, "precision=7"], ["precision", "'7'", "bf16-mixed"]),
    ([*TRAIN, "checkpoint.dir=good/class0/0.png/runs"], ["0.png", "ot a directory"]),
    ([*COMPARE, "compare.dir=good/class0/0.png/out"], ["0.png", "ot a directory"]),
    (["digits", "good/class0/0.png"], ["0.png"]),
    (["export", RUN, "--to", "good/class0/0.png/a.safetensors"], ["0.png", "written"]),
    (["embed", RUN, "--images", "good", "--to", "good/class0/0.png/a.npy"], ["0.png", "written"]),
    (["embed", RUN, "--images", "good", "--to", "new/a.txt"], ["'.txt'", ".parquet"]),
    (["embed", RUN, "--images", "no_classes", "--to", "new.npy"], ["no_classes", "no image"]),
    (["embed", RUN, "--images", "good", "--to", "new.npy", "--device", "gpu"], ["gpu"]),
    (["embed", RUN, "--images", "good", "--to", "n.npy", "--batch-size", "0"], ["batch-size 0"]),
    (["embed", "cut", "--images", "good", "--to", "new.npy"], ["cannot be read"]),
    (["report", "nowhere"], ["nowhere", "no such folder"]),
    (["report", "configs/broken.yaml"], ["broken.yaml", "no column"]),
    # k-NN and the linear probe
    ([*KNN, f"pretrained_feature_extractor={RUN}", "k=[]"], ["k:", "at least one value"]),
    ([*KNN, f"pretrained_feature_extractor={RUN}", "k=0"], ["k: 0", "from 1 up"]),
    ([*KNN, f"pretrained_feature_extractor={RUN}", "k=[1.5]"], ["k: 1.5", "from 1 up"]),
    ([*KNN, f"pretrained_feature_extractor={RUN}", "temperature=[0]"], ["temperature: 0"]),
    ([*KNN, GIVEN, "temperature=[]"], ["temperature: []"]),
    ([*KNN, GIVEN, "feature_type=[head]"], ["feature_type", "head"]),
    (
        [*LINEAR, f"pretrained_feature_extractor={RUN}", "scheduler.name=steps"],
        ["scheduler.name", "'steps'", "did you mean 'step'"],
    ),
    ([*LINEAR, f"pretrained_feature_extractor={RUN}", "devices=2"], ["devices: 2", "on one"]),
    ([*KNN, GIVEN, "k=[1,1]"], ["k: [1, 1]", "without repetitions"]),
    ([*KNN, GIVEN, "k=[100000]"], ["k: 100000", "12 training images"]),
    ([*KNN, GIVEN, "temperature=[abc]"], ["temperature: 'abc'", "a number above 0"]),
    ([*KNN, GIVEN, "temperature=[-1]"], ["temperature: -1", "a number above 0"]),
    ([*KNN, GIVEN, "distance_function=[]"], ["distance_function: []", "at least one value"]),
    ([*KNN, GIVEN, "num_workers=999"], ["num_workers: 999", "a whole number from 0"]),
    ([*KNN, GIVEN, "num_workers=-1"], ["num_workers: -1", "a whole number from 0"]),
    ([*KNN, GIVEN, "+neighbours=3"], ["unknown key neighbours"]),
    ([*KNN, GIVEN, "+data.dataset=foo"], ["data.dataset", "'foo'", "cifar10"]),
    ([*KNN, "pretrained_feature_extractor=5"], ["pretrained_feature_extractor: 5", "a text"]),
    ([*LINEAR, GIVEN, "name=../x"], ["name: '../x'"]),
    ([*LINEAR, GIVEN, "name=result"], ["name: 'result'", "a file of that name"]),
    ([*LINEAR, GIVEN, "scheduler.lr_decay_steps=null"], ["lr_decay_steps", "no value"]),
    ([*COMPARE, "+compare.foo=1"], ["unknown key compare.foo", "Allowed: dir"]),
    ([*COMPARE, "evaluation.datasets.a=3"], ["evaluation.datasets.a: 3", "a block of keys"]),
    (
        [*COMPARE, "evaluation.datasets.a={torchvision: CIFAR11, root: good}"],
        ["evaluation.datasets.a.torchvision", "did you mean 'CIFAR10'"],
    ),
    (
        [*COMPARE, "evaluation.datasets.a={dataset: custom, train_path: gone, val_path: good}"],
        ["evaluation.datasets.a.train_path: gone: no such folder"],
    ),
    (
        [*COMPARE, "evaluation.datasets.a={dataset: custm, train_path: good, val_path: good}"],
        ["evaluation.datasets.a.dataset", "did you mean 'custom'"],
    ),
    (
        [*COMPARE, "evaluation.datasets.a={dataset: custom, train_path: good, val_path: null}"],
        ["evaluation.datasets.a: ['val_path'] missing"],
    ),
    (
        [
            *COMPARE,
            "evaluation.datasets.a={dataset: custom, train_path: good, val_path: good, formt: h5}",
        ],
        ["unknown key evaluation.datasets.a.formt", "did you mean 'format'"],
    ),
    (
        [*COMPARE, "evaluation.datasets.a={torchvision: Flowers102, root: good}"],
        ["Flowers102"],
    ),
    (
        [*COMPARE, "evaluation.retrieval.pattern='(?P<obj>x)'"],
        ["evaluation.retrieval.pattern", "no group (?P<object>...)"],
    ),
    ([*TRAIN, "evaluation.knn.distence=cosine"], ["evaluation.knn.distence", "'distance'"]),
    # benchmarks
    ([*BENCH[:-1], "dir=good/class0/0.png/out"], ["0.png", "ot a directory"]),
    ([*BENCH, "threads=0"], ["threads: 0", "from 1 up"]),
    ([*BENCH, "threads=-1"], ["threads: -1", "from 1 up"]),
    ([*BENCH, "rounds=0"], ["rounds: 0", "from 2 up"]),
    ([*BENCH, "seeds=[0,0]"], ["seeds: 0 is given twice"]),
    ([*BENCH, "seeds=[-1]"], ["seed: -1", "from 0"]),
    ([*BENCH, "measures=[foo]"], ["measures", "'foo'"]),
    ([*BENCH, "measures=[knn_acc1,knn_acc1]"], ["measures: knn_acc1 is given twice"]),
    ([*BENCH, "name=../x"], ["name: '../x'", "a folder's name"]),
    ([*BENCH, "cell=a"], ["cell", "only the launchers"]),
    ([*BENCH, "settings.foo=1"], ["unknown key settings.foo", "no run reads it"]),
    ([*BENCH, "settings.optimizer.foo=1"], ["unknown key settings.optimizer.foo"]),
    ([*BENCH, "axes.foo=[1,2]"], ["unknown key axes.foo", "no run reads it"]),
    ([*BENCH, "axes.optimizer.lr=[1,1]"], ["axes.optimizer.lr", "1 is given twice"]),
    ([*BENCH, "axes.seed=[1,2]"], ["axes.seed", "no axis", "seeds"]),
    ([*BENCH, "data.toy.settings.data.val_path=null"], ["data.val_path", "no value"]),
    (
        [*BENCH, "evaluation.measures=[dense_miou]", "evaluation.dense.root=nowhere"],
        ["nowhere/train/images: no such folder"],
    ),
    ([*BENCH, "arms.iecl.foo=1"], ["unknown key arms.iecl.foo"]),
    ([*BENCH, "arms.foo=1"], ["arms.foo", "no method"]),
    ([*BENCH, "evaluation.knn.distance=foo"], ["evaluation.knn.distance", "cosine, euclidean"]),
    ([*BENCH, "evaluation.knn.temperature=0"], ["evaluation.knn.temperature", "above 0"]),
    ([*BENCH, "evaluation.linear.max_epochs=-1"], ["evaluation.linear.max_epochs: -1"]),
    ([*BENCH, "evaluation.linear.batch_size=0"], ["evaluation.linear.batch_size: 0"]),
    ([*BENCH, "evaluation.linear.lr=[inf]"], ["evaluation.linear.lr: inf"]),
    ([*BENCH, "evaluation.retrieval.pattern='('"], ["retrieval.pattern", "no regular expression"]),
]


def _tree(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("arguments", "said"), CASES, ids=[f"{c[0][0]} {c[0][-1]}" for c in CASES])
@pytest.mark.counts("bad inputs tried")
def test_one_line_a_code_and_nothing_written(
    arguments: list[str],
    said: list[str],
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(world)
    before = _tree(world)
    code = main(arguments)
    out = capfd.readouterr()
    assert code == 2
    lines = [line for line in out.err.splitlines() if line.strip()]
    assert len(lines) == 1, out.err
    assert lines[0].startswith("iecl-solo: ")
    assert "Traceback" not in out.out + out.err
    for text in said:
        assert text in lines[0]
    assert _tree(world) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_and_no_login_are_one_line(world: Path, monkeypatch, capfd):
    monkeypatch.chdir(world)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    # nor in a file; wandb is asked itself, which warns of its older ways in lines of its own
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.setenv("NETRC", str(world / "netrc"))
    for given, said in (
        ("accelerator=gpu", "accelerator: gpu is not on this machine, cpu is"),
        ("wandb.enabled=true", "wandb.enabled: nobody is logged in: wandb login"),
    ):
        assert main([*TRAIN, given]) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0]
    monkeypatch.setattr("iecl_solo.train.checks.installed", lambda *names: False)
    for name in ("wandb", "tensorboard"):
        assert main([*TRAIN, f"{name}.enabled=true"]) == 2
        assert f"pip install 'iecl-solo[{name}]'" in capfd.readouterr().err


@pytest.mark.any_host
@pytest.mark.parametrize("key", [None, "0" * 40])
def test_a_key_of_wandb_is_looked_up_without_its_server(key: str | None, tmp_path: Path):
    given = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | given
    # as Lightning's logger goes offline, after the advice to
    offline = "os.environ['WANDB_MODE'] = 'dryrun'; wandb.init(settings={'silent': True}).finish()"
    code = f"""
import os, wandb
from iecl_solo.train.checks import _logged_in
print(_logged_in())
{offline if key is None else ""}
"""
    with socket.create_server(("127.0.0.1", 0)) as server:  # it would never answer
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=kept | {"WANDB_BASE_URL": url} | ({} if key is None else {"WANDB_API_KEY": key}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(key is not None)]
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr


def test_checkout_that_is_none_is_named(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "iecl_solo.cli.main", "doctor"],
        env={**os.environ, "SOLO_LEARN": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if str(tmp_path) in line]
    assert len(said) == 1 and "not a solo-learn checkout" in said[0]


@pytest.mark.parametrize("command", [["--help"], ["benchmark", "--help"], ["help", "pretrain"]])
def test_help_is_quick(command: list[str]):
    spent, told = cpu_seconds("-m", "iecl_solo", *command)
    assert "usage: iecl-solo" in told
    assert spent < 0.3


def test_help_groups_the_configurations(capsys):
    assert main(["help", "pretrain"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") < 40 and "  cifar/, custom/, digits/, " in out
    assert main(["help"]) == 0
    assert "benchmark" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["pre"], {"pretrain"}),
        (["help", "kn"], {"knn"}),
        (["pretrain", "--config-name", "digits/iecl_sims"], {"digits/iecl_simsiam"}),
        (["embed", "--im"], {"--images"}),
        (["linear", "--config-p"], {"--config-path"}),
        (["report", "goo"], {"good"}),
    ],
)
def test_bash_completes(typed: list[str], expected: set[str], world: Path, monkeypatch, capsys):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    assert main(["completion", "bash"]) == 0
    words = " ".join(f"'{word}'" for word in ["iecl-solo", *typed])
    program = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}; _iecl_solo;"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=world)
    assert set(done.stdout.split()) == expected, done.stderr
