"""SAIB: what each variant is at the start, what its Jacobian can and cannot do, what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from iecl_solo.errors import IECLError
from iecl_solo.saib import (
    SAIB,
    SAIBS,
    BaseSAIB,
    ConvexSAIB,
    NoiseSAIB,
    load_saib,
    make_saib,
    match_statistics,
    patchify,
    save_saib,
    unpatchify,
)

VARIANTS = sorted(SAIBS)
#: The paper's variant with nothing of ours: it begins as x -> 2 x.
SCALING = {"outer_skip": True, "match_statistics": False}


def perturbed(saib: BaseSAIB, scale: float = 0.3, seed: int = 0) -> BaseSAIB:
    """The same SAIB with every parameter moved off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in saib.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise)
    return saib


def jacobian(saib: BaseSAIB, x: Tensor) -> Tensor:
    """(n, n), differentiable; x is one image (1, C, H, W)."""

    def flat(v: Tensor) -> Tensor:
        return saib(v.view_as(x)).reshape(-1)

    return torch.func.jacrev(flat)(x.reshape(-1))


def logdet(saib: BaseSAIB, x: Tensor) -> Tensor:
    return torch.linalg.slogdet(jacobian(saib, x)).logabsdet


def lower_logdet(saib: BaseSAIB, x: Tensor, steps: int, lr: float) -> float:
    """An adversary: gradient steps on the weights that minimise log|det J| at x (nats)."""
    optimizer = torch.optim.Adam(saib.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        value = logdet(saib, x)
        value.backward()
        optimizer.step()
    return logdet(saib, x).item()


# --- patches


def test_patchify_agrees_with_slicing_and_is_inverted() -> None:
    x = torch.randn(2, 3, 8, 12)
    patches = patchify(x, 4)
    assert patches.shape == (2, 48, 2, 3)
    for c in range(3):
        for i in range(4):
            for j in range(4):
                assert torch.equal(patches[:, 16 * c + 4 * i + j], x[:, c, i::4, j::4])
    assert torch.equal(unpatchify(patches, 4), x)


# --- the paper's variant


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("inner_skip", [True, False])
def test_paper_variant_starts_as_the_identity_or_as_pure_scaling(
    depth: int, inner_skip: bool
) -> None:
    x = torch.randn(2, 3, 16, 16)
    options = {"depth": depth, "inner_skip": inner_skip, "match_statistics": False}
    assert torch.equal(SAIB(16, outer_skip=True, **options)(x), 2 * x)
    assert torch.equal(SAIB(16, **options)(x), x)
    torch.testing.assert_close(SAIB(16, depth=depth)(x), x)


def test_paper_variant_is_the_paper_formula() -> None:
    saib = perturbed(SAIB(8, patch_size=2, activation="silu", **SCALING).double())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weights = dict(saib.named_parameters())
    step = "steps.0."
    block = step + "blocks.0."

    def conv(name: str, inputs: Tensor, padding: int) -> Tensor:
        # written a second way: unfold and matrix product
        weight, bias = weights[block + name + ".weight"], weights[block + name + ".bias"]
        columns = nn.functional.unfold(inputs, weight.shape[-1], padding=padding)
        out = weight.flatten(1) @ columns + bias[:, None]
        return out.unflatten(-1, inputs.shape[-2:])

    p = nn.functional.pixel_unshuffle(x, 2) + weights[step + "position"]
    h = nn.functional.silu(conv("expand", p, 0))
    h = h + nn.functional.silu(conv("mix", h, 1))
    expected = x + nn.functional.pixel_shuffle(p + conv("contract", h, 0), 2)
    torch.testing.assert_close(saib(x), expected)


@pytest.mark.parametrize(
    ("variant", "options"), [("paper", {}), ("paper", SCALING), ("convex", {}), ("noise", {})]
)
def test_every_parameter_is_trained(variant: str, options: dict) -> None:
    torch.manual_seed(0)
    saib = make_saib(variant, 8, depth=2, **options)
    optimizer = torch.optim.SGD(saib.parameters(), lr=0.1)
    x = torch.randn(4, 3, 8, 8)
    before = {name: p.detach().clone() for name, p in saib.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (saib(x) ** 2 + (saib(x) * x.flip(-1))).sum().backward()
        optimizer.step()
    for name, parameter in saib.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_scaling_alone_gives_n_ln_2() -> None:
    saib = SAIB(8, **SCALING).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    n = x.numel()
    assert logdet(saib, x).item() == pytest.approx(n * math.log(2), abs=1e-9)
    # and scaling is all there is: the isotropic part takes the whole of it
    frobenius = jacobian(saib, x).norm().item()
    assert n * math.log(frobenius / math.sqrt(n)) == pytest.approx(n * math.log(2), abs=1e-9)


def test_nothing_keeps_the_paper_variant_above_det_1() -> None:
    torch.manual_seed(0)
    saib = SAIB(8, match_statistics=False).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    assert logdet(saib, x).item() == pytest.approx(0, abs=1e-9)
    assert lower_logdet(saib, x, steps=8, lr=1e-2) < -10


def test_nor_does_the_outer_skip() -> None:
    # GELU is the identity far from zero, so these weights make P' = P - 3/2 P and X' = X / 2
    saib = SAIB(8, **SCALING).double()
    block = saib.steps[0].blocks[0]
    eye = torch.eye(48, dtype=torch.float64)
    with torch.no_grad():
        block.expand.weight.copy_(torch.cat([eye, eye])[:, :, None, None])
        block.expand.bias.fill_(20)
        block.mix.weight.zero_()
        block.mix.bias.zero_()
        block.contract.weight.copy_(torch.cat([-1.5 * eye, 0 * eye], 1)[:, :, None, None])
        block.contract.bias.fill_(30)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(saib(x), x / 2)
    assert logdet(saib, x).item() == pytest.approx(-x.numel() * math.log(2), abs=1e-9)


# --- the convex variant


def explicit_k(saib: ConvexSAIB, size: int) -> Tensor:
    """K of the first step as a matrix (hidden outputs, pixels), one basis image after another."""
    step = saib.steps[0]
    n = saib.channels * size * size
    basis = torch.eye(n, dtype=step.mix.dtype).view(n, saib.channels, size, size)
    patches = nn.functional.pixel_unshuffle(basis, saib.patch_size)
    hidden = nn.functional.conv2d(patches, step.expand)
    return nn.functional.conv2d(hidden, step.mix, padding=1).flatten(1).T


def convex(size: int, scale: float, seed: int = 0, **options) -> ConvexSAIB:
    torch.manual_seed(seed)
    return perturbed(ConvexSAIB(size, **options).double(), scale, seed)


def assert_expanding(saib: ConvexSAIB, x: Tensor) -> None:
    """What is proved: no direction shrinks, log|det J| >= 0, and one step is symmetric."""
    j = jacobian(saib, x).detach()
    rounding = 1e-12 * j.norm().item() * len(j)
    assert torch.linalg.svdvals(j)[-1] >= 1 - rounding
    sign, value = torch.linalg.slogdet(j)
    assert sign == 1 and value >= -rounding
    if len(saib.steps) == 1:
        torch.testing.assert_close(j, j.T, rtol=0, atol=rounding)
        assert torch.linalg.eigvalsh(j)[0] >= 1 - rounding


@pytest.mark.parametrize(
    ("activation", "derivative"),
    [
        ("tanh", lambda h: 1 - torch.tanh(h) ** 2),
        ("sigmoid", lambda h: torch.sigmoid(h) * torch.sigmoid(-h)),
        ("softplus", torch.sigmoid),
    ],
)
def test_convex_variant_is_its_formula(activation: str, derivative) -> None:
    saib = convex(8, 0.1, activation=activation)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    k, step = explicit_k(saib, 8), saib.steps[0]
    h = k @ x.flatten() + (step.bias[:, None, None] + step.position[0]).flatten()
    s = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": nn.functional.softplus}
    torch.testing.assert_close(saib(x).flatten(), x.flatten() + k.T @ s[activation](h))
    expected = torch.eye(x.numel(), dtype=torch.float64) + k.T @ torch.diag(derivative(h)) @ k
    torch.testing.assert_close(jacobian(saib, x), expected)


def test_convex_step_is_the_gradient_of_a_convex_function() -> None:
    saib = convex(8, 0.1)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    step = saib.steps[0]
    h = explicit_k(saib, 8) @ x.flatten()
    h = h + (step.bias[:, None, None] + step.position[0]).flatten()
    potential = x.square().sum() / 2 + torch.log(torch.cosh(h)).sum()
    torch.testing.assert_close(saib(x), torch.autograd.grad(potential, x)[0])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    scale=st.floats(0, 2),
    contrast=st.floats(0, 10),
    activation=st.sampled_from(["tanh", "sigmoid", "softplus"]),
    depth=st.integers(1, 3),
    channels=st.integers(1, 2),
)
def test_convex_variant_expands_whatever_the_weights(
    seed: int, scale: float, contrast: float, activation: str, depth: int, channels: int
) -> None:
    options = {"activation": activation, "depth": depth, "channels": channels, "patch_size": 2}
    saib = convex(4, scale, seed, **options)
    x = contrast * torch.randn(1, channels, 4, 4, dtype=torch.float64)
    assert_expanding(saib, x)


@pytest.mark.parametrize("depth", [1, 2])
def test_convex_variant_expands_against_an_adversary(depth: int) -> None:
    saib = convex(8, 0.05, depth=depth)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    before = logdet(saib, x).item()
    after = lower_logdet(saib, x, steps=15, lr=1e-2)
    assert 0 < after < before / 4  # it tried, and got somewhere
    assert_expanding(saib, x)


def test_convex_variant_moves_no_two_images_closer() -> None:
    saib = convex(16, 0.2, depth=2)
    x, y = torch.randn(2, 64, 3, 16, 16, dtype=torch.float64)
    near = x + 1e-3 * y
    for other in (y, near):
        assert (
            (saib(x) - saib(other)).flatten(1).norm(dim=1) >= (x - other).flatten(1).norm(dim=1)
        ).all()


def test_convex_variant_starts_small_because_at_zero_nothing_would_move() -> None:
    torch.manual_seed(0)
    saib = ConvexSAIB(8).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    n = x.numel()
    assert 0.003 * n < logdet(saib, x).item() < 0.03 * n

    def gradient() -> float:
        saib.zero_grad()
        (saib(x).flip(-1) * x).sum().backward()
        return sum(p.grad.norm().item() for p in (saib.steps[0].expand, saib.steps[0].mix))

    def logdet_gradient() -> float:
        saib.zero_grad()
        logdet(saib, x).backward()
        return sum(p.grad.norm().item() for p in (saib.steps[0].expand, saib.steps[0].mix))

    assert gradient() > 1e-2 and logdet_gradient() > 1e-2
    nn.init.zeros_(saib.steps[0].mix)
    assert gradient() == 0 and logdet_gradient() == 0


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_displacement_is_bounded(activation: str) -> None:
    saib = convex(16, 0.3, depth=2, activation=activation)
    bound = saib.displacement_bound()
    for contrast in (0.1, 1, 100):
        x = contrast * torch.randn(32, 3, 16, 16, dtype=torch.float64)
        assert (saib(x) - x).abs().max() <= bound


def test_displacement_bound_is_attained() -> None:
    saib = convex(12, 0.3)
    step, bound = saib.steps[0], saib.displacement_bound()
    kernel = torch.einsum("omij,mc->ocij", step.mix, step.expand[..., 0, 0])
    worst = kernel.abs().sum((0, 2, 3)).argmax()
    with torch.no_grad():
        # on a 3x3 grid the middle patch sees the whole transposed kernel
        step.position.copy_(1e3 * kernel[:, worst].flip(-1, -2).sign()[None])
    x = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    assert saib(x).abs().max().item() == pytest.approx(bound, rel=1e-9)


def test_no_bound_where_there_is_none() -> None:
    for options in ({"match_statistics": True}, {"activation": "softplus"}):
        with pytest.raises(IECLError, match="displacement_bound"):
            ConvexSAIB(8, **options).displacement_bound()


def test_matching_statistics_breaks_the_guarantee() -> None:
    saib = convex(8, 0.1, match_statistics=True)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    assert logdet(saib, x) < 0


# --- statistics


def test_matched_statistics() -> None:
    torch.manual_seed(0)
    saib = perturbed(SAIB(16, match_statistics=True))
    x = torch.randn(4, 3, 16, 16) * torch.rand(4, 3, 1, 1) + torch.randn(4, 3, 1, 1)
    y = saib(x)
    assert not torch.allclose(y, x, atol=0.1)
    torch.testing.assert_close(y.mean((-2, -1)), x.mean((-2, -1)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y.std((-2, -1)), x.std((-2, -1)), atol=1e-3, rtol=1e-3)


def test_matched_statistics_of_constant_images_are_finite() -> None:
    x = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    y = match_statistics(2 * x, x)
    y.square().sum().backward()
    assert torch.allclose(y, x)
    assert x.grad is not None and x.grad.isfinite().all()


# --- sizes, dtypes, formats


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_grids_and_single_images(variant: str) -> None:
    saib = perturbed(make_saib(variant, (16, 24)), 0.05)
    for size in [(16, 24), (8, 8), (4, 4), (32, 20)]:
        x = torch.randn(1, 3, *size)
        assert saib(x).shape == x.shape


def test_position_is_interpolated() -> None:
    saib = SAIB(8, **SCALING)
    with torch.no_grad():
        saib.steps[0].position[:, :, 0] = -1
        saib.steps[0].position[:, :, 1] = 1
    added = saib(torch.zeros(1, 3, 16, 16))[0, 0, :, 0]
    expected = torch.tensor([-1, -0.5, 0.5, 1]).repeat_interleave(4)
    torch.testing.assert_close(added, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes_autocast_and_memory_format(variant: str) -> None:
    torch.manual_seed(0)
    saib = perturbed(make_saib(variant, 16), 0.05).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = saib(x)
    last = saib(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = saib(x)
        assert saib(x.bfloat16()).dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, atol=0.1, rtol=0.05)
    assert saib.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert saib.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_a_graph_break(variant: str) -> None:
    saib = perturbed(make_saib(variant, 8), 0.05)
    compiled = torch.compile(saib, backend="eager", fullgraph=True)
    for size in (8, 16):
        x = torch.randn(2, 3, size, size)
        given = (x, saib.draw(x)) if isinstance(saib, NoiseSAIB) else (x,)
        torch.testing.assert_close(compiled(*given), saib(*given))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant: str) -> None:
    torch.manual_seed(0)
    saib = make_saib(variant, 4, channels=1, patch_size=2, activation="tanh")
    saib = perturbed(saib.double()).eval()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = tuple(saib.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: saib(x), (x, *parameters))


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 30}, "28x28, 32x32; patch sizes that divide it: 1, 2, 3, 5, 6, 10, 15, 30"),
        ({"image_size": (32, 30)}, "32x28, 32x32; patch sizes that divide it: 1, 2"),
        ({"image_size": 0}, "positive"),
        ({"image_size": (32, 32, 3)}, "positive"),
        ({"variant": "papper"}, "did you mean 'paper'"),
        ({"activation": "gelo"}, "did you mean 'gelu'"),
        ({"activation": "sigmoid"}, "unknown paper SAIB activation"),
        ({"variant": "convex", "activation": "gelu"}, "Allowed: sigmoid, softplus, tanh"),
        ({"variant": "convex", "inner_skip": True}, "unknown option of the convex SAIB"),
        ({"variant": "noise", "outer_skip": False}, "unknown option of the noise SAIB"),
        ({"outer_skipp": False}, "did you mean 'outer_skip'"),
        ({"variant": "noise", "budget": 0.0}, "budget: 0.0"),
        ({"variant": "noise", "noise_channels": 0}, "noise_channels: 0"),
        ({"depth": 0}, "depth: 0"),
        ({"expansion": 0}, "expansion: 0"),
        ({"patch_size": 0}, "patch_size: 0"),
    ],
)
def test_refused_at_construction(options: dict, words: str) -> None:
    with pytest.raises(IECLError, match=words) as refusal:
        make_saib(**{"variant": "paper", "image_size": 32, **options})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 3, 33, 32), "33x32: not a multiple of patch_size 4; nearest sizes 32x32, 36x32"),
        ((2, 3, 3, 3), "nearest sizes 4x4"),
        ((2, 1, 32, 32), r"\(B, 3, H, W\) is needed"),
        ((3, 32, 32), r"\(B, 3, H, W\) is needed"),
    ],
)
def test_refused_images(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(IECLError, match=words) as refusal:
        SAIB(32)(torch.zeros(shape))
    assert "\n" not in str(refusal.value)


# --- files


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_is_all_that_loading_needs(tmp_path, variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options = {"channels": 1, "patch_size": 2, "expansion": 3, "depth": 2}
    saib = perturbed(make_saib(variant, (8, 4), **options).to(dtype)).eval()
    save_saib(saib.to(memory_format=torch.channels_last), tmp_path / "saib.safetensors")
    state = torch.get_rng_state()
    loaded = load_saib(tmp_path / "saib.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 1, 8, 4, dtype=dtype)
    torch.testing.assert_close(loaded.eval()(x), saib(x))
    assert type(loaded) is SAIBS[variant]
    assert all(p.requires_grad and p.dtype == dtype for p in loaded.parameters())


def test_wrong_files_are_refused_in_one_line(tmp_path) -> None:
    from safetensors.torch import save_file

    good = tmp_path / "good.safetensors"
    save_saib(SAIB(8), good)
    (tmp_path / "truncated").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text").write_text("not a file of weights")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"w": torch.zeros(2)}, tmp_path / "other")
    paper = '{"variant": "paper", "image_size": 8, '
    for options in ["{", "[1]", '{"image_size": 8}', paper + '"colour": 1}', paper + '"depth": 2}']:
        metadata = {"iecl_solo.saib": options}
        save_file(SAIB(8).state_dict(), tmp_path / f"bad{len(options)}", metadata=metadata)
    for path in [*tmp_path.iterdir(), tmp_path / "missing", tmp_path]:
        if path == good:
            continue
        with pytest.raises(IECLError, match="SAIB file") as refusal:
            load_saib(path)
        assert "\n" not in str(refusal.value)


def test_files_of_version_0_1_are_read(tmp_path) -> None:
    """They hold the options of both variants, of which one class took all."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    common = {"image_size": [8, 8], "channels": 3, "patch_size": 4, "expansion": 2, "depth": 1}
    common |= {"positional_encoding": True, "inner_skip": True, "outer_skip": True}
    x = torch.randn(2, 3, 8, 8)
    for variant, activation in (("paper", "gelu"), ("convex", "tanh")):
        options = common | {"variant": variant, "activation": activation}
        options |= {"match_statistics": False}
        own = SCALING if variant == "paper" else {}
        saib = perturbed(make_saib(variant, 8, **own), 0.1)
        metadata = {"iecl_solo.saib": json.dumps(options)}
        save_file(saib.state_dict(), tmp_path / variant, metadata=metadata)
        loaded = load_saib(tmp_path / variant)
        assert torch.equal(loaded(x), saib(x))
        assert {"steps.0.position"} < set(loaded.state_dict())


# --- the variant with noise


def test_every_image_moves_by_the_budget() -> None:
    torch.manual_seed(0)
    saib = perturbed(NoiseSAIB(16, budget=0.25, depth=2), 0.1)
    x = 10 * torch.rand(4, 1, 1, 1) * torch.randn(4, 3, 16, 16) + 3
    step = saib(x) - x
    torch.testing.assert_close(
        step.abs().mean((1, 2, 3)), torch.full((4,), 0.25), rtol=1e-4, atol=0
    )
    with torch.no_grad():
        saib.log_budget.fill_(math.log(0.01))
    assert (saib(x) - x).abs().mean().item() == pytest.approx(0.01, rel=1e-3)
    assert saib.budget == pytest.approx(0.01)


def test_noise_is_its_own_stream_and_resumes(tmp_path) -> None:
    torch.manual_seed(0)
    saib = NoiseSAIB(8)
    x = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    first, second = saib(x), saib(x)
    assert torch.equal(torch.get_rng_state(), state), "the global stream moved"
    assert not torch.equal(first, second)
    kept = {k: v.clone() for k, v in saib.state_dict().items()}
    third = saib(x)
    torch.manual_seed(5)
    resumed = NoiseSAIB(8)
    assert not torch.equal(resumed.draw(x), saib.draw(x)), "another seed, another stream"
    resumed.load_state_dict(kept)
    assert torch.equal(resumed(x), third)
    # through a file as well
    save_saib(saib, tmp_path / "saib")
    assert torch.equal(load_saib(tmp_path / "saib")(x), saib(x))


def test_measuring_in_evaluation_mode_repeats_and_moves_nothing() -> None:
    saib, x = NoiseSAIB(8), torch.randn(2, 3, 8, 8)
    state = saib.state_dict()["stream._extra_state"].clone()
    saib.eval()
    assert torch.equal(saib(x), saib(x))
    assert torch.equal(saib.state_dict()["stream._extra_state"], state)
    one = saib.realize(x[:1])  # one draw, for a batch of any size
    torch.testing.assert_close(one(x)[1:], one(x[1:]))
    assert not torch.equal(one(x[1:]), saib(x)[1:])


def test_processes_draw_different_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    saib, x = NoiseSAIB(8), torch.randn(2, 3, 8, 8)
    kept = saib.state_dict()
    drawn = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        saib.load_state_dict(kept)
        drawn.append(saib.draw(x))
    assert not torch.equal(*drawn)
