"""L_reg(f): singular values against full decompositions, and checkpoints that stay plain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from iecl_solo.errors import IECLError
from iecl_solo.lipschitz import (
    SpectralRegularizer,
    convolution_norm,
    lipschitz_report,
    parametrize_spectral,
    plain_state_dict,
    plain_weights,
    sigmas,
    spectral_layers,
)

CONVERGED = 1000


def small_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every kind of layer: plain, strided, grouped, depthwise, 1x1, tall, wide, equal shapes."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 3, stride=2, groups=2, bias=False),
        nn.GELU(),
        nn.Conv2d(12, 6, 1),
        nn.Flatten(),
        nn.Linear(54, 16),
        nn.Linear(16, 16),
        nn.Linear(16, 16),
        nn.Linear(16, 40),
    )
    with torch.no_grad():
        for _, layer in spectral_layers(network):
            layer.weight.mul_(2.5)  # some above one, some below
        network[2].weight[3] /= 20  # one weak filter among eight
    return network.to(dtype)


def blocks(layer: nn.Module, weight: Tensor) -> list[Tensor]:
    """The diagonal blocks of a layer's reshaped kernel, one slice a group."""
    groups = getattr(layer, "groups", 1)
    rows = weight.shape[0] // groups
    return [weight[g * rows : (g + 1) * rows].flatten(1) for g in range(groups)]


def reference(network: nn.Module, floor: float = 0.0) -> Tensor:
    """The penalty by full SVD of every block, written layer by layer."""
    total = torch.zeros((), dtype=torch.float64)
    for _, layer in spectral_layers(network):
        if isinstance(layer, nn.MultiheadAttention):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
            weights = [getattr(layer, n) for n in names if getattr(layer, n) is not None]
        else:
            weights = [layer.weight]
        for weight in weights:
            values = [torch.linalg.svdvals(block) for block in blocks(layer, weight)]
            total = total + (torch.stack([v[0] for v in values]).max() - 1).clamp_min(0) ** 2
            if floor:
                lowest = torch.stack([v[-1] for v in values]).min()
                total = total + (floor - lowest).clamp_min(0) ** 2
    return total


def separate(layer: nn.Conv2d) -> None:
    """Lift the largest singular value off the rest, for power iteration to converge fast."""
    with torch.no_grad():
        layer.weight.add_(0.3)


def explicit_matrix(layer: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """The convolution as a matrix (outputs, inputs): one basis image after another."""
    n = layer.in_channels * size[0] * size[1]
    basis = torch.eye(n, dtype=layer.weight.dtype).view(n, layer.in_channels, *size)
    bias = 0 if layer.bias is None else layer.bias[:, None, None]
    return (layer(basis) - bias).flatten(1).T


def gradients(loss: Tensor, network: nn.Module) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


# --- which layers


def test_layers_of_a_resnet() -> None:
    network = torchvision.models.resnet18()
    names = [name for name, _ in spectral_layers(network)]
    assert len(names) == 21
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert "layer4.0.downsample.0" in names and names[-1] == "fc"


@pytest.mark.parametrize("kdim", [None, 5])
def test_attention_inputs_count(kdim: int | None) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim).double()
    assert [name for name, _ in spectral_layers(attention)] == ["", "out_proj"]
    expected = ["in_proj_weight"]
    if kdim is not None:
        expected = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert list(sigmas(attention)) == [*expected, "out_proj.weight"]
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(3)
    regularizer = SpectralRegularizer(attention, power_iterations=CONVERGED)
    torch.testing.assert_close(regularizer(attention), reference(attention))


# --- the penalty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["penalty", "bilipschitz"])
def test_value_and_gradient_are_those_of_a_full_svd(mode: str, dtype: torch.dtype) -> None:
    network = small_network(dtype)
    floor = 0.5 if mode == "bilipschitz" else 0.0
    regularizer = SpectralRegularizer(
        network, mode, power_iterations=10, sigma_min_floor=floor or 0.1
    )
    for _ in range(100):  # inverse iteration makes one step a call
        value = regularizer(network)
    expected = reference(network, floor)
    assert expected > 1
    if floor:
        assert expected > reference(network) + 0.1
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float64 else {}
    torch.testing.assert_close(value, expected.to(dtype), **tolerance)
    got, wanted = gradients(value, network), gradients(expected, network)
    assert got.keys() == {f"{name}.weight" for name, _ in spectral_layers(network)}
    loose = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float64 else {"atol": 3e-3, "rtol": 3e-3}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], **loose, msg=name)


def test_no_penalty_within_the_bounds() -> None:
    network = small_network()
    with torch.no_grad():
        for _, layer in spectral_layers(network):
            layer.weight.copy_(layer.weight / 100)
    assert SpectralRegularizer(network)(network) == 0


@pytest.mark.parametrize("mode", ["penalty", "bilipschitz"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_is_the_singular_values_own_in_either_memory_format(
    mode: str, groups: int
) -> None:
    torch.manual_seed(2)
    layer = nn.Conv2d(4, 6, 3, groups=groups).double()
    regularizer = SpectralRegularizer(layer, mode, power_iterations=20, sigma_min_floor=1.0)
    weight = layer.weight.detach().clone().mul_(2).requires_grad_()
    values = torch.linalg.svdvals(weight.reshape(groups, 6 // groups, -1))
    slow = (values.max() - 1).relu().square()
    if mode == "bilipschitz":
        slow = slow + (1 - values.min()).relu().square()
    (expected,) = torch.autograd.grad(slow, weight)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            layer.weight.data = weight.detach().clone(memory_format=memory_format)
        for _ in range(300):  # the smallest is followed one step in five calls
            penalty = regularizer(layer)
        (gradient,) = torch.autograd.grad(penalty, layer.weight)
        torch.testing.assert_close(penalty, slow, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradient, expected, atol=2e-3, rtol=2e-3)


def test_nothing_of_a_weights_size_is_kept_for_the_backward_pass() -> None:
    network = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3))
    network = network.to(memory_format=torch.channels_last)
    regularizer = SpectralRegularizer(network)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        regularizer(network)
    assert 0 < max(sizes) <= 32 * 9  # a right vector of the second layer


def test_warm_start_converges_to_svd_over_calls() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(40, 30).double()
    u, _, vh = torch.linalg.svd(torch.randn(30, 40, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(2, 0.5, 30, dtype=torch.float64)
    values[1] = 1.99  # a close second
    with torch.no_grad():
        layer.weight.copy_(u @ torch.diag(values) @ vh)
    regularizer = SpectralRegularizer(layer)
    estimates = torch.stack([1 + regularizer(layer).sqrt() for _ in range(600)]).detach()
    assert (estimates.diff() > -1e-12).all()  # from below: nothing is overestimated
    assert estimates[0] < 2 - 1e-4
    assert estimates[-1] == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize(("power_iterations", "lag"), [(1, 0.7), (10, 0.3)])
def test_lag_behind_a_full_svd_in_training(power_iterations: int, lag: float) -> None:
    network = small_network(torch.float32)
    regularizer = SpectralRegularizer(network, power_iterations=power_iterations)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    missed = total = 0.0
    for _ in range(200):
        value, exact = regularizer(network), reference(network)
        assert value < exact + 1e-4
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        missed, total = missed + (exact - value).item(), total + exact.item()
    assert missed < lag * total
    # the network did move, and ended near the bound
    assert reference(small_network()) > 10
    assert all(largest < 1.3 for largest, _ in sigmas(network).values())


def test_bilipschitz_training_raises_the_floor() -> None:
    network = small_network(torch.float32)
    with torch.no_grad():
        network[8].weight[0] = network[8].weight[1]  # singular
    assert sigmas(network)["8.weight"][1] < 1e-5
    regularizer = SpectralRegularizer(network, "bilipschitz", sigma_min_floor=0.3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        regularizer(network).backward()
        optimizer.step()
    for name, (largest, smallest) in sigmas(network).items():
        assert largest < 1.1 and smallest > 0.27, name


def test_the_factor_is_made_in_every_fifth_step_and_a_run_goes_on_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = small_network(torch.float32)
    made = [0]
    real = torch.linalg.cholesky_ex

    def counted(*args: Any) -> Any:
        made[0] += 1
        return real(*args)

    regularizer = SpectralRegularizer(network, "bilipschitz")
    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    layers = len(spectral_layers(network))
    for _ in range(13):
        regularizer(network)
    assert made[0] == layers * (5 + 2)  # the first five steps, the sixth and the eleventh
    state = {k: v.clone() for k, v in regularizer.state_dict().items()}
    expected = [regularizer(network).item() for _ in range(12)]
    again = SpectralRegularizer(network, "bilipschitz")
    again(network)  # it has counted already
    again.load_state_dict(state)
    assert [again(network).item() for _ in range(12)] == expected


def test_a_zero_weight_can_come_back() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    for mode in ("penalty", "bilipschitz"):
        nn.init.zeros_(layer.weight)
        regularizer = SpectralRegularizer(layer, mode, power_iterations=20)
        value = regularizer(layer)
        value.backward()
        assert value.isfinite() and layer.weight.grad.isfinite().all()
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])))
        assert regularizer(layer).item() == pytest.approx(4, abs=1e-3)


def test_a_singular_value_of_zero_comes_up_to_its_floor() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        layer.weight[2] = 0
    regularizer = SpectralRegularizer(layer, "bilipschitz", sigma_min_floor=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        regularizer(layer).backward()
        optimizer.step()
    assert sigmas(layer)["weight"][1] > 0.45


# --- state, dtypes, the outside world


def test_state_dict_holds_numbers_only_and_no_weight_twice() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = small_network()
            self.regularizer = SpectralRegularizer(
                self.backbone, norm="convolution", input_size=(3, 8, 8)
            )

    host = Host()
    assert not list(host.regularizer.parameters())
    keys = set(host.regularizer.state_dict())
    assert keys and keys == {f"u_{index}" for index in range(len(keys))}
    floor = SpectralRegularizer(host.backbone, "bilipschitz").state_dict()
    assert {key.rpartition("_")[0] for key in floor if key != "calls"} == {"u", "low"}
    assert sum(p.numel() for p in host.parameters()) == sum(
        p.numel() for p in host.backbone.parameters()
    )


@pytest.mark.parametrize(
    "options", [{"mode": "bilipschitz"}, {"norm": "convolution", "input_size": (3, 8, 8)}]
)
def test_resuming_continues_where_it_was(options: dict) -> None:
    network = small_network()
    one = SpectralRegularizer(network, **options)
    two = SpectralRegularizer(network, **options)
    for _ in range(5):
        one(network)
    assert one(network) != two(network)
    two.load_state_dict(one.state_dict())
    assert one(network) == two(network)
    clone = copy.deepcopy(one)
    assert clone(network) == one(network)


@pytest.mark.parametrize(
    "options", [{"mode": "bilipschitz"}, {"norm": "convolution", "input_size": (3, 8, 8)}]
)
def test_vectors_move_in_training_only(options: dict) -> None:
    network = small_network()
    regularizer = SpectralRegularizer(network, **options).eval()
    before = copy.deepcopy(regularizer.state_dict())
    with torch.inference_mode():
        regularizer(network)
    assert all(torch.equal(v, before[k]) for k, v in regularizer.state_dict().items())
    regularizer.train()(network)
    assert any(not torch.equal(v, before[k]) for k, v in regularizer.state_dict().items())


def test_two_calls_before_one_backward() -> None:
    network = small_network()
    regularizer = SpectralRegularizer(network, power_iterations=300)
    single = gradients(regularizer(network), network)
    double = gradients(regularizer(network) + regularizer(network), network)
    for name in single:
        torch.testing.assert_close(double[name], 2 * single[name], atol=1e-5, rtol=1e-5)


def test_float32_under_autocast_and_for_narrow_weights() -> None:
    network = small_network(torch.float32)
    regularizer = SpectralRegularizer(network, power_iterations=200)
    expected = regularizer(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = regularizer(network)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected)
    narrow = regularizer.bfloat16()(network.bfloat16())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, reference(network.double()).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["penalty", "bilipschitz"])
def test_global_random_state_is_neither_read_nor_moved(mode: str) -> None:
    network = small_network()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = SpectralRegularizer(network, mode)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = SpectralRegularizer(network, mode)
    assert all(torch.equal(one.get_buffer(k), v) for k, v in two.state_dict().items())
    state = torch.get_rng_state()
    SpectralRegularizer(network, norm="convolution", input_size=(3, 8, 8))(network)
    lipschitz_report(network, (3, 8, 8), iterations=2)
    parametrize_spectral(network)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "penalti"}, "did you mean 'penalty'"),
        ({"norm": "conv"}, "Allowed: convolution, reshaped"),
        ({"power_iterations": 0}, "power_iterations: 0"),
        ({"sigma_min_floor": 0.0}, "sigma_min_floor: 0.0"),
        ({"sigma_min_floor": 1.5}, "sigma_min_floor: 1.5"),
        ({"norm": "convolution"}, "need it"),
        ({"input_size": (3, 8, 8)}, "need it"),
        ({"mode": "bilipschitz", "norm": "convolution", "input_size": (3, 8, 8)}, "reshaped"),
    ],
)
def test_refused_options(options: dict, words: str) -> None:
    with pytest.raises(IECLError, match=words) as refusal:
        SpectralRegularizer(small_network(), **options)
    assert "\n" not in str(refusal.value)


def test_refused_networks() -> None:
    with pytest.raises(IECLError, match="no Conv2d"):
        SpectralRegularizer(nn.Sequential(nn.BatchNorm2d(3)))
    convolutional = {"norm": "convolution", "input_size": (3, 8, 8)}
    for options in ({}, convolutional):
        regularizer = SpectralRegularizer(small_network(), **options)
        with pytest.raises(IECLError, match="another backbone") as refusal:
            regularizer(nn.Linear(4, 4))
        assert "\n" not in str(refusal.value)
    with pytest.raises(IECLError, match="another backbone"):
        SpectralRegularizer(nn.Linear(3, 4))(nn.Linear(5, 6))


# --- the convolution as an operator


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
        {"kernel_size": (3, 1), "padding": "same", "padding_mode": "circular"},
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 1, "padding": 1, "stride": 2, "padding_mode": "circular"},
    ],
)
def test_operator_norm_is_that_of_the_explicit_matrix(options: dict) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, **options).double()
    separate(layer)
    matrix = explicit_matrix(layer, (6, 5))
    expected = torch.linalg.matrix_norm(matrix, 2)
    assert convolution_norm(layer, (6, 5), 500).item() == pytest.approx(expected.item(), rel=1e-6)
    (reported,) = lipschitz_report(nn.Sequential(layer), (4, 6, 5), 500).values()
    assert reported.operator_norm == pytest.approx(expected.item(), rel=1e-6)
    kernel = max(torch.linalg.svdvals(b)[0].item() for b in blocks(layer, layer.weight))
    area = layer.weight[0, 0].numel()
    # where an edge is copied in more often than the kernel is wide there is no such bound
    assert expected <= area**0.5 * kernel * (1 + 1e-9) or options["kernel_size"] == 1


def test_penalty_by_operator_norm() -> None:
    network = small_network()
    sizes = {0: (9, 7), 2: (9, 7), 3: (9, 7)}
    network[7] = nn.Linear(6 * 4 * 3, 16).double()
    for index in sizes:
        separate(network[index])
    regularizer = SpectralRegularizer(
        network, norm="convolution", input_size=(3, 9, 7), power_iterations=1000
    )
    value = regularizer(network)
    expected = torch.zeros((), dtype=torch.float64)
    for index in (0, 2, 3, 5, 7, 8, 9, 10):
        layer = network[index]
        spatial = index in sizes
        matrix = explicit_matrix(layer, sizes[index]) if spatial else layer.weight.flatten(1)
        expected = expected + (torch.linalg.svdvals(matrix)[0] - 1).clamp_min(0) ** 2
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    got, wanted = gradients(value, network), gradients(expected, network)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_reached_are_left_out() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Conv2d(3, 4, 3)
            self.spare = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    network = TwoHeads()
    nn.init.constant_(network.spare.weight, 10)
    nn.init.constant_(network.used.weight, 0.01)
    assert SpectralRegularizer(network, norm="convolution", input_size=(3, 8, 8))(network) == 0
    assert SpectralRegularizer(network)(network) > 100
    assert lipschitz_report(network, (3, 8, 8))["spare.weight"].operator_norm is None


# --- reports


def test_sigmas_are_extreme_singular_values() -> None:
    network = small_network()
    found = sigmas(network)
    assert list(found) == [f"{name}.weight" for name, _ in spectral_layers(network)]
    for name, layer in spectral_layers(network):
        values = torch.cat([torch.linalg.svdvals(b) for b in blocks(layer, layer.weight)])
        assert found[f"{name}.weight"] == pytest.approx(
            (values.max().item(), values.min().item()), rel=1e-9
        )


def test_report_folds_the_batch_norm_that_follows() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(3),  # before the first convolution: not folded
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.BatchNorm2d(4),  # not directly after a convolution
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, affine=False),
    ).double()
    for norm in network:
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
            norm.running_var.uniform_(0.1, 4)
            norm.running_mean.normal_()
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    for index in (1, 6, 8):
        separate(network[index])
    network[4].eval()
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        report = lipschitz_report(network, (3, 6, 6), iterations=500)
    assert not calls
    assert [layer.training for layer in network] == [i != 4 for i in range(10)]
    network.eval()

    def jacobian(layers: nn.Module, size: int) -> Tensor:
        channels = 3 if layers[0].in_channels == 3 else 4
        x = torch.zeros(1, channels, size, size, dtype=torch.float64)
        return torch.func.jacrev(lambda x: layers(x).flatten())(x).flatten(1)

    # the folded operator is the Jacobian of convolution and norm together
    for start, stop, size in [(1, 3, 6), (3, 4, 6), (6, 7, 6), (8, 10, 4)]:
        norm = torch.linalg.matrix_norm(jacobian(network[start:stop], size), 2).item()
        assert report[f"{start}.weight"].operator_norm == pytest.approx(norm, rel=1e-6)
    scale = network[2].weight.abs() / (network[2].running_var + network[2].eps).sqrt()
    values = torch.linalg.svdvals(torch.diag(scale) @ network[1].weight.flatten(1))
    assert report["1.weight"].sigma_max == pytest.approx(values[0].item())
    assert report["1.weight"].sigma_min == pytest.approx(values[-1].item())


def test_report_folds_synchronised_batch_norms_too() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        network[1].running_var.uniform_(0.1, 4)
        network[1].weight.normal_()
    plain = lipschitz_report(network, (3, 6, 6))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    assert lipschitz_report(synchronised, (3, 6, 6)) == plain


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_the_operators_bound_is_not_of_reflected_pixels(mode: str) -> None:
    layer = nn.Conv2d(1, 1, 5, padding=2, padding_mode=mode, bias=False).double()
    nn.init.ones_(layer.weight)
    bound = 5 * layer.weight.norm().item()
    norm = convolution_norm(layer, (6, 6), 500).item()
    assert (norm <= bound * (1 + 1e-9)) == (mode in ("zeros", "circular"))


def test_report_of_a_resnet() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.fill_(3)
    network.layer3, network.layer4, network.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 4)
    report, plain = lipschitz_report(network, (3, 32, 32), iterations=1), sigmas(network)
    assert report.keys() == plain.keys() and len(plain) == 11
    for name, layer in report.items():
        factor = 1.0 if name == "fc.weight" else 3.0  # each convolution is followed by its norm
        assert layer.sigma_max == pytest.approx(factor * plain[name][0], rel=1e-3)


# --- the parametrised form


def train(network: nn.Module, steps: int, seed: int = 0, size: int = 8) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(network.parameters()).dtype
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(steps):
        x = torch.randn(8, 3, size, size, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        (network(x) - x.mean((-2, -1)).repeat(1, 14)[:, :40]).square().mean().backward()
        optimizer.step()


def test_every_effective_weight_has_norm_one_after_training() -> None:
    network = parametrize_spectral(small_network(torch.float32))
    before = plain_weights(network)
    train(network, 30)
    after = plain_weights(network)
    assert list(after) == [f"{name}.weight" for name, _ in spectral_layers(small_network())]
    for name, weight in after.items():
        assert not torch.equal(weight, before[name])
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.03)


def test_plain_state_dict_is_the_plain_networks() -> None:
    network = parametrize_spectral(small_network())
    train(network, 3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = plain_state_dict(network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    plain = small_network()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(plain.eval()(x), network.eval()(x))


def test_momentum_pairs_line_up() -> None:
    online = parametrize_spectral(small_network(torch.float32))
    for momentum in (copy.deepcopy(online), parametrize_spectral(small_network(torch.float32))):
        train(online, 3)
        names = [name for name, _ in online.named_parameters()]
        assert names == [name for name, _ in momentum.named_parameters()]
        for p, q in zip(online.parameters(), momentum.parameters(), strict=True):
            assert p.shape == q.shape and p.data_ptr() != q.data_ptr()
            q.data = 0.5 * q.data + 0.5 * p.data
        train(momentum, 1)
        assert momentum(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_parametrising_twice_is_once_and_other_parametrisations_stay() -> None:
    network = small_network()
    nn.utils.parametrizations.weight_norm(network[7])
    once = parametrize_spectral(network)
    keys = list(once.state_dict())
    assert list(parametrize_spectral(once).state_dict()) == keys
    assert "7.weight" not in plain_weights(once)
    assert "7.parametrizations.weight.original0" in plain_state_dict(once)


def test_attention_can_be_parametrised() -> None:
    torch.manual_seed(0)
    attention = parametrize_spectral(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(2, 5, 8)
    attention(x, x, x)[0].square().sum().backward()
    assert list(plain_weights(attention)) == ["in_proj_weight", "out_proj.weight"]
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    plain.load_state_dict(plain_state_dict(attention))
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x, x, x)[0], attention.eval()(x, x, x)[0])


# --- networks that people use


def vision_transformer() -> nn.Module:
    network = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=4)
    nn.init.normal_(network.heads.head.weight)  # starts at zero
    return network


BACKBONES = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "torchvision_vit": vision_transformer,
    "vit_tiny": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0, depth=2
    ),
    "swin_tiny": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        num_classes=0,
        depths=(1, 1, 1, 1),
    ),
    "convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=0),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0", num_classes=0),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "bilipschitz"}, {"norm": "convolution", "input_size": (3, 32, 32)}],
    ids=["penalty", "bilipschitz", "convolution"],
)
def test_backbones_take_a_step(name: str, options: dict) -> None:
    torch.manual_seed(0)
    network = BACKBONES[name]()
    regularizer = SpectralRegularizer(network, **options)
    with torch.no_grad():  # so that no layer is within its bounds
        for _, layer in spectral_layers(network):
            weight = getattr(layer, "weight", None)
            (layer.in_proj_weight if weight is None else weight).mul_(20)
    value = regularizer(network)
    value.backward()
    assert value.isfinite()
    for _, layer in spectral_layers(network):
        weight = getattr(layer, "weight", None)
        weight = layer.in_proj_weight if weight is None else weight
        assert weight.grad is not None and weight.grad.abs().max() > 0
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    optimizer.step()
    assert regularizer(network) < value


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_can_be_parametrised(name: str) -> None:
    torch.manual_seed(0)
    network = BACKBONES[name]()
    names = set(network.state_dict())
    parametrize_spectral(network)
    network(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert plain_state_dict(network).keys() == names
    BACKBONES[name]().load_state_dict(plain_state_dict(network))


# --- the folded penalty


def normed_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.1),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).double()
    for norm in network:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.05, 0.4)
            nn.init.uniform_(norm.weight, 1, 2)
    return network


@pytest.mark.parametrize("mode", ["penalty", "bilipschitz"])
def test_folded_penalty_is_that_of_the_report(mode: str) -> None:
    network = normed_network()
    regularizer = SpectralRegularizer(
        network,
        mode,
        power_iterations=100,
        sigma_min_floor=0.9,
        fold=True,
        input_size=(3, 8, 8),
    )
    report = lipschitz_report(network, (3, 8, 8))
    expected = sum(max(0, s.sigma_max - 1) ** 2 for s in report.values())
    for _ in range(40):  # one step of inverse iteration a call
        regularizer(network)
    if mode == "bilipschitz":
        expected += sum(max(0, 0.9 - s.sigma_min) ** 2 for s in report.values())
    assert expected > 0.5
    assert regularizer(network).item() == pytest.approx(expected, rel=1e-5)


def test_folded_penalty_cannot_be_paid_by_shrinking_a_kernel() -> None:
    """What batch norm takes out again has no gradient; the norm's own factor has."""
    network = normed_network()
    fold = SpectralRegularizer(network, fold=True, input_size=(3, 8, 8))
    plain = SpectralRegularizer(network)

    def along_the_kernel(regularizer: SpectralRegularizer) -> float:
        network.zero_grad()
        regularizer(network).backward()
        kernel = network[0].weight
        return (kernel.grad * kernel).flatten(1).sum(1).abs().max().item()

    assert along_the_kernel(fold) < 1e-12
    assert network[0].weight.grad.abs().max() > 1e-3 and network[1].weight.grad.abs().max() > 1e-3
    with torch.no_grad():
        network[0].weight.mul_(3)  # and the running variance follows
        network[1].running_var.mul_(9)
    assert along_the_kernel(plain) > 1e-2
    assert network[1].weight.grad is None


def test_folding_needs_the_images_size() -> None:
    with pytest.raises(IECLError, match="need it") as refusal:
        SpectralRegularizer(normed_network(), fold=True)
    assert "\n" not in str(refusal.value)


def test_volume_is_the_geometric_mean_of_each_layers_singular_values() -> None:
    network = normed_network()
    with torch.no_grad():
        network[1].weight.mul_(0.05)
    regularizer = SpectralRegularizer(network, "volume", fold=True, input_size=(3, 8, 8))
    assert not regularizer.state_dict()
    expected = 0.0
    for layer, norm in ((0, 1), (3, 4), (7, None)):
        weight = network[layer].weight.detach().flatten(1)
        if norm is not None:
            n = network[norm]
            weight = weight * (n.weight / (n.running_var + n.eps).sqrt())[:, None]
        expected += max(0.0, 1 - torch.linalg.svdvals(weight).log().mean().exp().item()) ** 2
    assert expected > 0.5
    found = regularizer(network)
    assert found.item() == pytest.approx(expected, rel=1e-3)
    # of a kernel before a norm the gradient leaves out its size, on purpose
    weights = (network[1].weight, network[4].weight, network[7].weight)
    assert torch.autograd.gradcheck(lambda *_: regularizer(network), weights)
    assert SpectralRegularizer(small_network(), "volume")(small_network()).isfinite()


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 0.1])
def test_volumes_gradient_is_bounded_at_a_norm_that_begins_at_zero(scale: float) -> None:
    """As the last norm of a residual branch does, in timm's ResNets and in the paper's own."""
    network = normed_network()
    nn.init.constant_(network[1].weight, scale)
    SpectralRegularizer(network, "volume", fold=True, input_size=(3, 8, 8))(network).backward()
    assert network[1].weight.grad.norm() < 2


def test_volume_alone_keeps_the_log_volume_that_training_loses() -> None:
    """The cap of the paper does not, and on the folded weight it takes more away."""
    from iecl_solo.jacobian import log_volume

    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    after = {}
    for name, mode, fold in (
        ("none", "", False),
        ("cap", "penalty", True),
        ("kept", "volume", True),
    ):
        network = normed_network()
        options = {"fold": True, "input_size": (3, 8, 8)} if fold else {}
        regularizer = SpectralRegularizer(network, mode, **options) if mode else None
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
        with torch.no_grad():
            for _ in range(40):
                network(x)
        before = log_volume(network.eval(), x[:8]).mean().item()
        network.train()
        for _ in range(40):
            # a loss that asks for less and less volume
            loss = network(x).square().mean()
            optimizer.zero_grad()
            (loss if regularizer is None else loss + regularizer(network)).backward()
            optimizer.step()
        after[name] = log_volume(network.eval(), x[:8]).mean().item() - before
    assert after["kept"] > -2
    assert after["none"] < 3 * after["kept"] - 2 and after["cap"] < after["none"] + 2
