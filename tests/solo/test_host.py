"""Which host is found, in what order things may be imported, and what happens without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import HOST, build, raw_config

from iecl_solo.errors import IECLError
from iecl_solo.solo.backbones import build_backbone, timm_backbone
from iecl_solo.solo.config import dump_block, parse_block

ROOT = Path(__file__).parents[2]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that finds the same host as this one."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HOST.path.parent}", **env},
        cwd="/",
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "order",
    [
        "import iecl_solo, solo.methods",
        "from iecl_solo.solo.registry import added_methods; added_methods()",
        *(
            pytest.param(order, marks=pytest.mark.robust)
            for order in (
                "import iecl_solo; from iecl_solo.solo.host import find_host; find_host()",
                "from iecl_solo.solo.registry import register; register(); register()",
            )
        ),
    ]
    + (["import solo.methods, iecl_solo"] if HOST.name == "main" else []),
)
def test_any_order_of_imports_registers_the_methods_once(order: str):
    code = (
        f"{order}\nimport iecl_solo\n"
        "from solo.methods import METHODS\n"
        "from iecl_solo.solo.registry import added_methods\n"
        "print('iecl_simclr' in METHODS, 'iecl_byol' in METHODS)\n"
        "print([m for m in METHODS if m.count('iecl') > 1 or m.count('climb') > 1])\n"
        "print(len(added_methods()) == len(set(added_methods())))\n"
        "print(max(c.__name__.count('CLIMB') for c in METHODS.values()))\n"
    )
    done = python(code)
    assert done.stdout.split() == ["True", "True", "[]", "True", "1"], done.stdout + done.stderr


def test_both_objectives_train_where_a_command_imports_the_host_first(images: Path, tmp_path: Path):
    """As README has it: the process has not imported solo before it completes a configuration."""
    (tmp_path / "cfg.json").write_text(
        json.dumps(raw_config("simclr", images, objectives=["iecl", "climb"], max_epochs=1))
    )
    code = (
        "import json, torch\n"
        "from omegaconf import OmegaConf\n"
        "from iecl_solo.solo.host import find_host\n"
        "from iecl_solo.train.complete import complete\n"
        "from iecl_solo.solo.build import build_model\n"
        "from iecl_solo.solo.registry import check_method\n"
        "check_method('iecl_climb_simclr')\n"
        f"cfg = OmegaConf.create(json.load(open({str(tmp_path / 'cfg.json')!r})))\n"
        "host = find_host()\n"
        "model = build_model(complete(cfg, host), host)\n"
        "torch.optim.SGD(model.learnable_params, lr=0.1)\n"  # refuses a parameter in two groups
        "print(type(model).__name__)\n"
    )
    done = python(code)
    assert done.stdout.strip() == "IECLCLIMBSimCLR", done.stderr[-2000:]


def test_only_configs_and_patches_of_a_checkout_are_the_packages():
    done = python(
        "import importlib, iecl_solo\n"
        "for name in ('configs', 'patches', 'tests', 'docs', 'studies', 'iecl_solo'):\n"
        "    try:\n"
        "        importlib.import_module(f'iecl_solo.{name}')\n"
        "        print(name)\n"
        "    except ModuleNotFoundError:\n"
        "        pass\n"
    )
    assert done.stdout.split() == ["configs", "patches"], done.stderr


def test_importing_the_package_is_light():
    done = python("import iecl_solo, sys; print('torch' in sys.modules, 'solo' in sys.modules)")
    assert done.stdout.strip() == "False False"


def test_without_a_host_the_mathematics_work_and_the_rest_says_so():
    # a finder that hides solo stands for a machine that has none
    hide = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'solo' or name.startswith('solo.'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'solo' else found(name, *a)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    maths = (
        "import torch, iecl_solo\n"
        "from iecl_solo.entropy import coding_rate\n"
        "from iecl_solo.saib import SAIB\n"
        "x = torch.zeros(1, 3, 32, 32)\n"
        "print(float(coding_rate(torch.eye(4))) > 0, SAIB(32)(x).shape[1])\n"
    )
    command = (
        "from iecl_solo.cli.main import main\n"
        "sys.exit(main(['export', 'run', '--to', 'a.safetensors']))"
    )
    done = python(hide + maths + command)
    assert done.stdout.split() == ["True", "3"]
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "iecl-solo: solo-learn is not installed; install it with: iecl-solo install-host"
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "features"),
    [
        ("resnet18", {"small_stem": True}, 512),
        ("efficientnet_b0", {"small_stem": True}, 1280),
        ("test_vit", {"img_size": 32, "patch_size": 4}, 64),
        ("mobilenetv3_small_050", {}, 1024),
    ],
)
def test_timm_backbones_have_the_features_they_say(name: str, kwargs: dict, features: int):
    import torch

    model = timm_backbone(name=name, **kwargs).eval()
    assert model.num_features == features
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, features)


def test_small_stem_keeps_the_resolution():
    import torch

    sizes = []
    model = timm_backbone(name="resnet18", small_stem=True)
    model.layer1.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert sizes == [32]


@pytest.mark.parametrize("method", ["simclr", "byol", "iecl_byol"])
def test_every_method_takes_a_timm_name(method: str, images: Path):
    model = build(method, images, backbone__name="timm/test_efficientnet")
    assert type(getattr(model, HOST.online)).__name__ == "EfficientNet"
    if hasattr(model, HOST.momentum):
        assert type(getattr(model, HOST.momentum)).__name__ == "EfficientNet"


def test_variant_has_its_hosts_network():
    """Main builds another ViT for mocov3: the variant must have it too."""
    for method in ("mocov3", "simclr"):
        kwargs = {"img_size": 32, "patch_size": 8}
        plain = build_backbone(HOST, "vit_tiny", method=method, cifar=False, **kwargs)
        variant = build_backbone(HOST, "vit_tiny", method=f"iecl_{method}", cifar=False, **kwargs)
        assert type(plain) is type(variant)


def test_blocks_come_back_as_they_were_written():
    from iecl_solo.objectives.iecl import IECLConfig

    written = {"lambda": 0.5, "query_views": [0], "saib": {"patch_size": 8}}
    config = parse_block("iecl", IECLConfig, written)
    assert config.lambda_ == 0.5 and config.query_views == [0]
    dumped = dump_block(config)
    assert dumped["lambda"] == 0.5 and "lambda_" not in dumped
    assert parse_block("iecl", IECLConfig, dumped) == config


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"saib": 3}, "iecl.saib"),
        ({"beta": None}, "iecl.beta"),
        ({"query_views": "left"}, "iecl.query_views"),
        ({"saib": {"positional_encoding": "perhaps"}}, "iecl.saib.positional_encoding"),
        ({"eta": [1]}, "iecl.eta"),
        (["beta"], "not a block"),
    ],
)
def test_wrong_types_name_the_full_path(block: object, said: str):
    from iecl_solo.objectives.iecl import IECLConfig

    with pytest.raises(IECLError) as error:
        parse_block("iecl", IECLConfig, block)  # type: ignore[arg-type]
    assert said in str(error.value) and "\n" not in str(error.value)


def test_timm_names_are_timms_own_networks():
    """Main registers its own ConvNeXt and Swin under timm's names."""
    from iecl_solo.solo.backbones import timm_backbone

    for name in ("convnext_tiny", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"):
        model = timm_backbone(name=name)
        assert type(model).__module__.startswith("timm.")
        assert model.num_features > 0
