"""Probes trained together are what the host's own model is when each is trained alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from support import HOST, config
from torch import nn

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.probe import epoch_order, fit_probes, initial_layer
from iecl_solo.evaluate.protocol import LinearProtocol, decay_epochs, linear_config
from iecl_solo.solo.build import build_linear
from iecl_solo.solo.settings import prepare_linear

ROWS, DIM, CLASSES, BATCH, EPOCHS, SEED = 40, 6, 3, 16, 5, 4


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % CLASSES
    features = torch.randn(ROWS, DIM, generator=generator)
    return features + torch.eye(DIM)[labels], labels


class _Features(nn.Module):
    num_features = inplanes = DIM

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _InOrder(torch.utils.data.IterableDataset):
    """Batches of features in the order of each epoch, which is counted as it is asked for."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self.features, self.labels, self.epoch = features, labels, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in epoch_order(len(self.features), SEED, self.epoch).split(BATCH):
            yield self.features[index], self.labels[index]
        self.epoch += 1


def _alone(data, rate: float, weight_decay: float, images: Path) -> nn.Linear:
    """The host's own linear layer after training at one rate."""
    cfg = config("simclr", images)
    protocol = LinearProtocol(EPOCHS, [rate], weight_decay, BATCH)
    own = {"dataset": "custom", "train_path": str(images), "val_path": str(images)}
    cfg = prepare_linear(linear_config(cfg, {**own, "format": "image_folder"}, protocol, "x"), HOST)
    assert cfg.optimizer.lr == pytest.approx(rate * BATCH / 256)
    # features are no images, which main would lay out channels last
    OmegaConf.update(cfg, "performance.disable_channel_last", True, force_add=True)
    model = build_linear(cfg, _Features(), HOST)
    model.classifier.load_state_dict(initial_layer(DIM, CLASSES, SEED).state_dict())
    loader = torch.utils.data.DataLoader(_InOrder(*data), batch_size=None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    quiet["enable_model_summary"] = False
    Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **quiet).fit(model, loader)
    return model.classifier


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_grid_in_one_pass_is_the_hosts_model_run_by_run(data, weight_decay: float, images: Path):
    rates = [0.1, 1.0, 10.0]
    probes = fit_probes(
        *data,
        [rate * BATCH / 256 for rate in rates],
        classes=CLASSES,
        max_epochs=EPOCHS,
        decay_epochs=decay_epochs(EPOCHS),
        batch_size=BATCH,
        weight_decay=weight_decay,
        seed=SEED,
    )
    found = probes.accuracies(*data)
    for i, rate in enumerate(rates):
        layer = _alone(data, rate, weight_decay, images)
        torch.testing.assert_close(probes.weight[i], layer.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probes.bias[i], layer.bias, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            right = layer(data[0]).argmax(1) == data[1]
        assert found[i] == (pytest.approx(100 * float(right.float().mean())), 100.0)
    assert len({accuracy for accuracy, _ in found}) > 1  # the rates do differ


def test_a_probe_does_not_depend_on_the_others(data):
    kwargs = {"classes": CLASSES, "max_epochs": 3, "batch_size": BATCH, "seed": 1}
    together = fit_probes(*data, [0.01, 0.3, 1e6], **kwargs)
    alone = fit_probes(*data, [0.3], **kwargs)
    torch.testing.assert_close(together.weight[1], alone.weight[0])


def test_a_rate_that_diverges_has_no_accuracy(data):
    features = data[0].clone()
    features[0] = torch.inf
    probes = fit_probes(features, data[1], [0.1], classes=CLASSES, max_epochs=1)
    assert all(value != value for value in probes.accuracies(*data)[0])


def test_the_global_random_state_is_left_alone(data):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fit_probes(*data, [0.1], classes=CLASSES, max_epochs=1)
    assert torch.rand(1) == expected


def test_nothing_to_train_is_refused(data):
    with pytest.raises(IECLError, match="0 rates on 40 features"):
        fit_probes(*data, [], classes=CLASSES, max_epochs=1)
