"""Log-determinants against torch's own Jacobian, known determinants, and their inequalities."""

from __future__ import annotations

import dataclasses
import math

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from iecl_solo import jacobian
from iecl_solo.errors import IECLError
from iecl_solo.jacobian import delta_h_split, log_volume, logabsdet, logabsdet_exact
from iecl_solo.saib import NoiseSAIB

DTYPES = [torch.float32, torch.float64]


class Residual(nn.Module):
    """x + a small conv net, with batch norm: what a SAIB looks like."""

    def __init__(self, seed: int, channels: int = 3, width: int = 6, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stack = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, channels, 1),
        )
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.stack(x)


class ConvexStep(nn.Module):
    """x + K^T tanh(K x + b): its Jacobian is symmetric, every eigenvalue at least 1."""

    def __init__(self, seed: int, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kernel = nn.Parameter(torch.randn(width, channels, 3, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.conv2d(x, self.kernel, self.bias, padding=1))
        return x + F.conv_transpose2d(hidden, self.kernel, padding=1)


def images(batch: int, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)


def slow_jacobian(module, image: Tensor) -> Tensor:
    """(m, n) of one image, element by element of the output, by reverse mode."""
    x = image[None].clone().requires_grad_()
    out = module(x).flatten()
    rows = [torch.autograd.grad(out[i], x, retain_graph=True)[0].flatten() for i in range(len(out))]
    return torch.stack(rows)


def slow_logabsdet(module, x: Tensor) -> Tensor:
    logs = [torch.linalg.svdvals(slow_jacobian(module, image)).log().sum() for image in x]
    return torch.stack(logs)


def matrix_with(singular_values: Tensor, seed: int = 0) -> Tensor:
    n = len(singular_values)
    u = torch.linalg.qr(images(n, n, seed=seed))[0]
    v = torch.linalg.qr(images(n, n, seed=seed + 1))[0]
    return (u * singular_values) @ v.T


def linear(matrix: Tensor):
    return lambda x: (x.flatten(1) @ matrix.T).view(len(x), -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_of_linear_maps_with_known_determinants(dtype):
    singular_values = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    matrix = matrix_with(singular_values).to(dtype)
    got = logabsdet_exact(linear(matrix), images(3, 20, dtype=dtype))
    truth = singular_values.log().sum().to(dtype).expand(3)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    assert got.dtype == dtype and got.shape == (3,)
    triangular = torch.tensor([[2.0, 5.0], [0.0, -3.0]], dtype=dtype)
    assert logabsdet_exact(linear(triangular), images(1, 2, dtype=dtype)).item() == pytest.approx(
        math.log(6), rel=1e-5
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_exact_of_a_conv_net(chunk_size):
    net, x = Residual(0).double().eval(), images(2, 3, 4, 4)
    got = logabsdet_exact(net, x, chunk_size=chunk_size)
    torch.testing.assert_close(got, slow_logabsdet(net, x))


def test_exact_of_a_singular_map_is_minus_infinity():
    assert logabsdet_exact(lambda x: 0 * x, images(1, 4)).item() == -math.inf


def bottleneck(size: int, seed: int) -> Tensor:
    return images(size, size - 1, seed=seed) @ images(size - 1, size, seed=seed + 1)


class Doubling(nn.Module):
    """Reads one pixel where another should be."""

    def forward(self, x: Tensor) -> Tensor:
        out = x + 0.3 * torch.tanh(x.roll(1, -1))
        out[..., 0] = out[..., 1]
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 40, 150])
def test_exact_of_maps_that_are_singular_up_to_rounding(dtype, size):
    for seed in range(5):
        singular = linear(bottleneck(size, seed).to(dtype))
        assert logabsdet_exact(singular, images(1, size, dtype=dtype)).item() == -math.inf
    centred = logabsdet_exact(lambda x: x - x.mean(1, keepdim=True), images(2, size, dtype=dtype))
    assert (centred == -math.inf).all()
    assert (logabsdet_exact(Doubling(), images(2, size, dtype=dtype)) == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_of_ill_conditioned_maps_is_finite(dtype):
    # elementwise: no condition number is too much
    scale = torch.logspace(-18, 18, 40, dtype=dtype)
    got = logabsdet_exact(lambda x: x * scale, images(1, 40, dtype=dtype))
    assert got.item() == pytest.approx(scale.double().log().sum().item(), abs=1e-3)
    singular_values = torch.logspace(-4, 0, 40, dtype=torch.float64)
    matrix = matrix_with(singular_values).to(dtype)
    got = logabsdet_exact(linear(matrix), images(1, 40, dtype=dtype))
    truth = torch.linalg.slogdet(matrix.double()).logabsdet
    assert got.item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quadrature_of_a_linear_map_agrees_with_its_determinant(dtype):
    singular_values = torch.linspace(0.3, 3, 40, dtype=torch.float64)
    matrix = matrix_with(singular_values).to(dtype)
    x = images(50, 40, dtype=dtype)
    mean, stderr = logabsdet(linear(matrix), x, probes=16)
    z = (mean - singular_values.log().sum()) / stderr
    assert mean.dtype == stderr.dtype == dtype and mean.shape == stderr.shape == (50,)
    # of a t distribution with 15 degrees of freedom
    assert (z.abs() < 3).double().mean() >= 0.95
    assert 0.8 < z.std() < 1.4 and z.mean().abs() < 0.5


@pytest.mark.parametrize("symmetric", [False, True])
def test_quadrature_is_exact_probe_by_probe_once_the_space_is_exhausted(symmetric):
    # for a diagonal J every Rademacher probe gives the trace itself
    scale = torch.linspace(0.05, 7, 9, dtype=torch.float64)
    x = images(2, 9)
    mean, stderr = logabsdet(lambda x: x * scale, x, steps=50, symmetric=symmetric)
    torch.testing.assert_close(mean, scale.log().sum().expand(2))
    assert stderr.max() < 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_quadrature_survives_an_early_breakdown(dtype, symmetric):
    # two distinct singular values: the Krylov space ends after two of the thirty steps
    scale = torch.ones(30, dtype=dtype)
    scale[::3] = 4
    x = images(3, 30, dtype=dtype)
    mean, _ = logabsdet(lambda x: x * scale, x, symmetric=symmetric)
    truth = torch.full((3,), 10 * math.log(4), dtype=dtype)
    torch.testing.assert_close(mean, truth, rtol=1e-5, atol=1e-5)


def coverage(modules, x: Tensor, symmetric: bool) -> float:
    hits = []
    for seed, module in enumerate(modules):
        exact = logabsdet_exact(module, x)
        generator = torch.Generator().manual_seed(seed)
        mean, stderr = logabsdet(module, x, probes=16, generator=generator, symmetric=symmetric)
        hits.append((mean - exact).abs() <= 3 * stderr)
    return torch.cat(hits).double().mean().item()


def test_forty_conv_nets_within_three_standard_errors():
    modules = [Residual(seed, gain=2.0).eval() for seed in range(40)]
    x = images(1, 3, 4, 4, dtype=torch.float32)
    assert coverage(modules, x, symmetric=False) >= 0.95


def test_forty_convex_steps_within_three_standard_errors():
    modules = [ConvexStep(seed).double() for seed in range(40)]
    assert coverage(modules, images(1, 3, 4, 4), symmetric=True) >= 0.95


def test_symmetric_and_general_agree():
    module, x = ConvexStep(0).double(), images(2, 3, 4, 4)
    general = logabsdet(module, x, probes=4, steps=48)
    symmetric = logabsdet(module, x, probes=4, steps=48, symmetric=True)
    # the same probes, and both exact at steps = n: the same numbers, not only the same law
    torch.testing.assert_close(general, symmetric)


def test_images_do_not_see_each_other():
    net, x = Residual(1).double().eval(), images(3, 3, 4, 4)
    together = logabsdet_exact(net, x)
    alone = torch.cat([logabsdet_exact(net, image) for image in x.split(1)])
    torch.testing.assert_close(together, alone)
    assert together.std() > 1e-3
    mean, stderr = logabsdet(net, x, probes=64)
    assert ((mean - alone).abs() <= 4 * stderr).all()
    others = logabsdet(net, torch.cat([x[:1], 5 * x[1:]]), probes=64)
    torch.testing.assert_close(others.mean[0], mean[0])


def test_chunks_change_nothing():
    net, x = Residual(2).double().eval(), images(2, 3, 4, 4)
    results = [logabsdet(net, x, probes=5, chunk_size=c) for c in (None, 1, 2, 5)]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


def test_probes_are_the_generators_and_no_other_stream_is_touched():
    net, x = Residual(2).double().eval(), images(1, 3, 4, 4)
    state = torch.get_rng_state()
    first, again = logabsdet(net, x), logabsdet(net, x)
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(state, torch.get_rng_state())
    other = logabsdet(net, x, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first.mean, other.mean)


def test_more_probes_give_a_smaller_standard_error():
    net, x = Residual(3).double().eval(), images(1, 3, 4, 4)
    few, many = logabsdet(net, x, probes=8), logabsdet(net, x, probes=512)
    assert many.stderr < few.stderr / 4
    assert (many.mean - logabsdet_exact(net, x)).abs() < 4 * many.stderr


def test_ill_conditioned_maps_in_float32():
    # condition number 1000, a million when squared: at steps = n only rounding is left
    singular_values = torch.logspace(-3, 0, 24, dtype=torch.float64)
    x = images(2, 24, dtype=torch.float32)
    matrix = matrix_with(singular_values).float()
    single = logabsdet(linear(matrix), x, steps=24).mean.double()
    double = logabsdet(linear(matrix.double()), x.double(), steps=24).mean
    torch.testing.assert_close(single, double, rtol=1e-3, atol=0)


SPECTRA = {
    "condition 10": torch.logspace(-1, 0, 200, dtype=torch.float64),
    "condition 1e2": torch.logspace(-2, 0, 200, dtype=torch.float64),
    "condition 1e3": torch.logspace(-3, 0, 200, dtype=torch.float64),
    "condition 1e6": torch.logspace(-6, 0, 200, dtype=torch.float64),
    "condition 1e10": torch.logspace(-10, 0, 200, dtype=torch.float64),
    "linear to 1e-3": torch.linspace(1e-3, 1, 200, dtype=torch.float64),
    "log-normal": images(200, seed=3).mul(2).exp(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_covers_the_quadratures_own(name):
    """An elementwise map, of which every probe gives the same value, and one that is rotated."""
    spectrum = SPECTRA[name]
    truth, x = spectrum.log().sum().item(), images(1, 200)

    def elementwise(x: Tensor) -> Tensor:
        return x * spectrum

    for module in (elementwise, linear(matrix_with(spectrum))):
        mean, stderr = logabsdet(module, x)
        assert abs(mean.item() - truth) < 3 * stderr.item()
        split = delta_h_split(module, images(2, 200))
        assert abs(split.nats - truth) < 3 * split.stderr
        if module is elementwise:  # images and probes without a spread: only the rule errs
            assert abs(split.nats - truth) < 3 * split.image_stderr


def test_the_error_of_a_symmetric_map_covers_the_quadratures_own():
    spectrum = SPECTRA["condition 1e3"]
    mean, stderr = logabsdet(lambda x: x * spectrum, images(1, 200), steps=8, symmetric=True)
    error = abs(mean.item() - spectrum.log().sum().item())
    assert 1 < error < 3 * stderr.item() < math.inf


def test_where_the_rule_is_good_the_error_is_that_of_the_probes():
    net, x = Residual(2).double().eval(), images(2, 3, 8, 8)
    few, many = logabsdet(net, x), logabsdet(net, x, steps=192)
    torch.testing.assert_close(few.stderr, many.stderr, rtol=1e-2, atol=0)


MEASURES = {
    "exact": lambda module, x: logabsdet_exact(module, x),
    "stochastic": lambda module, x: logabsdet(module, x).mean,
    "volume": lambda module, x: log_volume(module, x),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_graph_is_kept_in_any_grad_mode(measure, mode):
    net, x = Residual(0).eval(), images(2, 3, 4, 4, dtype=torch.float32)
    with mode():
        got = MEASURES[measure](net, x.clone().requires_grad_(mode is torch.enable_grad))
        inside = MEASURES[measure](net, x + 0)
    assert not got.requires_grad and not inside.requires_grad and torch.equal(got, inside)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("measure", MEASURES)
def test_autocast_and_matmul_precision_change_nothing(measure):
    net, x = Residual(0).eval(), images(2, 3, 4, 4, dtype=torch.float32)
    plain = MEASURES[measure](net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(MEASURES[measure](net, x), plain)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(MEASURES[measure](net, x), plain)
    finally:
        torch.set_float32_matmul_precision(before)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unsqueeze(1).chunk(3, -1)
        return x + F.scaled_dot_product_attention(query, key, value).squeeze(1)


def test_attention():
    # its fused kernels cannot be differentiated twice, and this module's can
    module, x = Attention().double(), images(2, 5, 6)
    exact = slow_logabsdet(module, x)
    torch.testing.assert_close(logabsdet_exact(module, x), exact)
    mean, stderr = logabsdet(module, x, probes=32)
    assert ((mean - exact).abs() < 3 * stderr).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_diverged_module_gives_nan(symmetric):
    x = images(1, 6)
    assert logabsdet(lambda x: x * math.nan, x, symmetric=symmetric).mean.isnan().all()
    assert log_volume(lambda x: x * math.nan, x).isnan().all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_doubling_is_all_isotropic(symmetric):
    split = delta_h_split(lambda x: 2 * x, images(2, 3, 4, 4), symmetric=symmetric)
    assert split.dimensions == 48
    assert split.isotropic == pytest.approx(48 * math.log(2)) == split.nats
    assert split.anisotropic == pytest.approx(0, abs=1e-10)
    assert split.isotropic_per_dimension == pytest.approx(math.log(2))
    assert split.stderr == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("steps", [2, 5, 30])
def test_the_anisotropic_part_is_never_positive(seed, steps):
    x = images(3, 3, 4, 4)
    general = delta_h_split(Residual(seed, gain=2).double().eval(), x, probes=2, steps=steps)
    convex = delta_h_split(ConvexStep(seed).double(), x, probes=2, steps=steps, symmetric=True)
    assert general.anisotropic < 0 and convex.anisotropic < 0


def test_the_split_against_the_full_jacobian():
    net, x = Residual(4, gain=2).double().eval(), images(4, 3, 4, 4)
    exact = slow_logabsdet(net, x)
    norms = torch.stack([slow_jacobian(net, image).norm() for image in x])
    isotropic = (48 * (norms / math.sqrt(48)).log()).mean().item()
    split = delta_h_split(net, x, probes=200)
    assert abs(split.nats - exact.mean().item()) < 4 * split.stderr
    assert split.isotropic == pytest.approx(isotropic, abs=0.2)
    assert split.anisotropic == pytest.approx(exact.mean().item() - isotropic, abs=0.4)
    assert split.nats == pytest.approx(split.isotropic + split.anisotropic)
    assert split.nats_per_dimension == pytest.approx(split.nats / 48)
    assert split.anisotropic_per_dimension == pytest.approx(split.anisotropic / 48)
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.nats = 0.0  # type: ignore[misc]


def test_the_spread_of_the_images_has_its_own_standard_error():
    # an elementwise map: every probe gives the trace itself, and only the images differ
    x = images(5, 6)
    exact = (1 + 3 * x.square()).log().sum(1)
    split = delta_h_split(lambda x: x + x**3, x)
    assert split.image_stderr == pytest.approx((exact.std() / math.sqrt(5)).item())
    assert split.stderr == pytest.approx(0, abs=1e-10)


def test_one_image_has_no_spread():
    assert math.isnan(delta_h_split(lambda x: 2 * x, images(1, 5)).image_stderr)


def test_a_convex_step_expands():
    split = delta_h_split(ConvexStep(0).double(), images(2, 3, 4, 4), symmetric=True)
    assert split.nats > 3 * split.stderr > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 5, 16])
def test_log_volume_against_the_singular_values(dtype, chunk_size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 10))
    net, x = net.to(dtype).eval(), images(3, 3, 4, 4, dtype=dtype)
    got = log_volume(net, x, chunk_size=chunk_size)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got, slow_logabsdet(net, x), rtol=tolerance, atol=tolerance)
    assert got.dtype == dtype and got.shape == (3,)


def test_log_volume_of_a_square_map_is_its_log_determinant():
    net, x = Residual(0).double().eval(), images(2, 3, 4, 4)
    torch.testing.assert_close(log_volume(net, x), logabsdet_exact(net, x))


def test_log_volume_in_blocks_of_columns(monkeypatch):
    matrix = images(4, 30)
    whole = log_volume(linear(matrix), images(1, 30))
    monkeypatch.setattr(jacobian, "_COLUMNS", 7)
    torch.testing.assert_close(log_volume(linear(matrix), images(1, 30)), whole)
    gram = matrix @ matrix.T
    torch.testing.assert_close(whole, torch.logdet(gram)[None] / 2)


@pytest.mark.parametrize("smallest", [1e-8, 1e-12])
def test_log_volume_of_small_singular_values(smallest):
    singular_values = torch.logspace(math.log10(smallest), 0, 6, dtype=torch.float64)
    u, v = (torch.linalg.qr(images(n, n, seed=n))[0] for n in (6, 30))
    matrix = (u * singular_values) @ v[:, :6].T
    got = log_volume(linear(matrix), images(1, 30))
    assert got.item() == pytest.approx(singular_values.log().sum().item(), abs=1e-2)


def test_log_volume_of_normalised_embeddings_has_no_floor():
    matrix = images(6, 20)
    free = log_volume(linear(matrix), images(2, 20))
    held = log_volume(lambda x: F.normalize(x @ matrix.T), images(2, 20))
    assert (held < free - 20).all()


RANDOM = {
    "DropPath": lambda: timm.layers.DropPath(0.1),
    "StochasticDepth": lambda: torchvision.ops.StochasticDepth(0.1, "row"),
    "RReLU": lambda: nn.RReLU(),
    "DropBlock2d": lambda: timm.layers.DropBlock2d(0.1, block_size=2),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("measure", MEASURES)
def test_layers_that_draw_are_refused_in_training(name, measure):
    net, x = nn.Sequential(nn.Identity(), RANDOM[name]()), images(2, 3, 4, 4)
    state = torch.get_rng_state()
    with pytest.raises(IECLError, match=f"{name} '1' draws random numbers") as error:
        MEASURES[measure](net.train(), x)
    assert "\n" not in str(error.value) and torch.equal(state, torch.get_rng_state())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())
    MEASURES[measure](net.eval(), x)


def test_layers_that_draw_nothing_pass_in_training():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), timm.layers.DropPath(0.0), nn.GELU()).double().train()
    assert logabsdet_exact(net, images(1, 3, 4, 4)).isfinite()


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: logabsdet_exact(Narrow(), x), "from 48 to 5"),
        (lambda x: logabsdet(Narrow(), x), "see log_volume"),
        (lambda x: log_volume(lambda x: torch.cat([x, x], 1), x), "from 48 to 96"),
        (lambda x: logabsdet(lambda x: x.sum(0), x), "(B, ...) is needed"),
        (lambda x: logabsdet(lambda x: x, x.half()), "float32 or float64"),
        (lambda x: logabsdet(lambda x: x, x[:0]), "not empty"),
        (lambda x: logabsdet(Residual(0).double().train(), x), "BatchNorm2d 'stack.1'"),
        (lambda x: log_volume(nn.BatchNorm2d(3, track_running_stats=False).eval(), x), "BatchNorm"),
        (lambda x: logabsdet_exact(nn.Dropout().train(), x), "Dropout"),
        (lambda x: logabsdet(lambda x: x, x, probes=1), "probes: 1"),
        (lambda x: delta_h_split(lambda x: x, x, steps=1), "steps: 1"),
        (lambda x: logabsdet(lambda x: x, x, chunk_size=0), "chunk_size: 0"),
        (lambda x: log_volume(lambda x: x, x, chunk_size=0), "chunk_size: 0"),
        (lambda x: logabsdet(lambda x: -x, x, symmetric=True), "not positive"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, says):
    with pytest.raises(IECLError) as error:
        call(images(2, 3, 4, 4))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_a_singular_map_nothing_is_told(dtype: torch.dtype) -> None:
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for singular in (lambda x: x - x.mean(1, keepdim=True), lambda x: 0 * x):
        assert logabsdet_exact(singular, x).tolist() == [-math.inf] * 2
        assert logabsdet(singular, x, steps=24).stderr.tolist() == [math.inf] * 2
        assert delta_h_split(singular, x, steps=24).stderr == math.inf
    assert logabsdet(lambda x: 2 * x, x).stderr.tolist() == [0.0] * 2


def test_a_saib_with_noise_is_measured_given_its_noise() -> None:
    torch.manual_seed(0)
    saib, x = NoiseSAIB(8), torch.randn(2, 3, 8, 8)
    for measure in (logabsdet, logabsdet_exact, delta_h_split):
        for mode in (saib.train(), saib.eval()):
            with pytest.raises(IECLError, match=r"give realize\(x\[:1\]\)"):
                measure(mode, x)
    assert saib.stream.get_extra_state()[1] == 0
    given = saib.realize(x[:1])
    estimated = [logabsdet(given, x, chunk_size=chunk).mean for chunk in (1, 16)]
    torch.testing.assert_close(*estimated)
    exact = logabsdet_exact(given, x)
    assert (estimated[0] - exact).abs().max() < 3 * logabsdet(given, x).stderr.max()
