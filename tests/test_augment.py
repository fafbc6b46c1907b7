"""A frozen SAIB in the host's own pipeline, on tensors and on PIL images."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import HOST, config, raw_config

from iecl_solo.augment import FrozenSAIB
from iecl_solo.errors import IECLError
from iecl_solo.saib import SAIB, NoiseSAIB, save_saib
from iecl_solo.solo.data import pretrain_loader


@pytest.fixture(scope="module")
def saib() -> SAIB:
    """A SAIB that does something."""
    module = SAIB(32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module


def test_tensor_is_what_saib_makes_of_it(saib: SAIB):
    x = torch.randn(3, 32, 32)
    assert torch.equal(FrozenSAIB(saib, 1.0)(x), saib(x[None])[0])
    assert torch.equal(FrozenSAIB(saib, 0.0)(x), x)
    assert FrozenSAIB(saib, 1.0)(x.half()).dtype == torch.float16


def test_probability_is_kept(saib: SAIB):
    random.seed(0)
    transform, x = FrozenSAIB(saib, 0.3), torch.randn(3, 32, 32)
    changed = sum(not torch.equal(transform(x), x) for _ in range(300))
    assert 60 < changed < 120


def test_pil_image_keeps_size_brightness_and_mode(saib: SAIB):
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels)
    out = FrozenSAIB(saib, 1.0)(image)
    assert isinstance(out, Image.Image) and out.size == image.size and out.mode == "RGB"
    before, after = (torch.tensor(list(i.convert("L").tobytes())).float() for i in (image, out))
    assert not torch.equal(before, after)
    assert abs(before.mean() - after.mean()) < 12


def test_nothing_of_it_is_trained(saib: SAIB):
    x = torch.randn(3, 32, 32, requires_grad=True)
    assert not FrozenSAIB(saib, 1.0)(x).requires_grad
    assert not any(p.requires_grad for p in FrozenSAIB(saib).saib.parameters())


def test_stands_in_the_hosts_pipeline_by_configuration(saib: SAIB, images: Path, tmp_path: Path):
    file = tmp_path / "saib.safetensors"
    save_saib(saib, file)
    crop = raw_config("simclr", images)["augmentations"][0]
    views = {}
    for name, extra in (("without", {}), ("with", {"saib": {"file": str(file), "prob": 1.0}})):
        cfg = config("simclr", images, augmentations=[{**crop, **extra}])
        random.seed(0)
        torch.manual_seed(0)
        _, views[name], _ = next(iter(pretrain_loader(cfg, HOST)))
    expected = saib(views["without"][0][:1])
    # the first crop of the first image is drawn before SAIB's own random number is
    torch.testing.assert_close(views["with"][0][:1], expected)


def test_mistakes_are_one_line(saib: SAIB, images: Path):
    with pytest.raises(IECLError, match="a number from 0 to 1"):
        FrozenSAIB(saib, 1.5)
    crop = raw_config("simclr", images)["augmentations"][0]
    with pytest.raises(IECLError, match=r"augmentations\[0\]\.saib\.path"):
        config("simclr", images, augmentations=[{**crop, "saib": {"path": "x"}}])
    cfg = config("simclr", images, augmentations=[{**crop, "saib": {"prob": 0.5}}])
    with pytest.raises(IECLError, match=r"augmentations\.saib: no file"):
        pretrain_loader(cfg, HOST)


def test_a_saib_with_noise_draws_by_pythons_seed_and_goes_through_a_file(tmp_path: Path):
    """As the host's loaders seed their workers; its own stream is the training's."""
    saib = NoiseSAIB(32, budget=0.2)
    save_saib(saib, tmp_path / "saib.safetensors")
    x = torch.randn(3, 32, 32)
    made = {}
    for name in ("object", "file", "again"):
        transform = FrozenSAIB(saib if name == "object" else tmp_path / "saib.safetensors", 1.0)
        random.seed(0)
        state = torch.get_rng_state()
        made[name] = [transform(x), transform(x)]
        assert torch.equal(torch.get_rng_state(), state)
    first, second = made["object"]
    assert not torch.equal(first, second), "one view for all"
    for name in ("file", "again"):
        assert torch.equal(made[name][0], first) and torch.equal(made[name][1], second)
    assert (first - x).abs().mean().item() == pytest.approx(0.2, rel=1e-3)
    assert transform(Image.new("RGB", (32, 32))).size == (32, 32)
