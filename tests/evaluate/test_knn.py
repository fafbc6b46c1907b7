"""Neighbours by blocks: the host's own accuracies, whatever the blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import HOST

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.knn import knn_accuracies, knn_accuracy, nearest


def _data(rows: int, classes: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    means = torch.randn(classes, 8, generator=torch.Generator().manual_seed(9))
    return means[labels] + 1.5 * torch.randn(rows, 8, generator=generator), labels


def _hosts(train, test, k: int, temperature: float, distance: str) -> tuple[float, float]:
    classifier = HOST.import_module("utils.knn").WeightedKNNClassifier(
        k=k, T=temperature, distance_fx=distance
    )
    # 1.0.2 leaves the normalisation of the cosine to its caller
    x, y = (F.normalize(d[0]) if distance == "cosine" else d[0] for d in (train, test))
    classifier.update(train_features=x, train_targets=train[1])
    classifier.update(test_features=y, test_targets=test[1])
    return classifier.compute()


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equal_to_the_hosts_classifier(distance: str, temperature: float):
    train, test, ks = _data(300), _data(101, seed=1), [1, 3, 5, 20, 500]
    options = {"temperature": temperature, "distance": distance}
    found = knn_accuracies(train, test, k=ks, **options)
    for k in ks:
        assert found[k] == pytest.approx(_hosts(train, test, k, temperature, distance)), k
    assert len({top1 for top1, _ in found.values()}) > 2
    blocked = knn_accuracies(train, test, k=ks, block=700, **options)
    assert all(blocked[k] == pytest.approx(found[k]) for k in ks)


@pytest.mark.parametrize("temperature", [0.01, 0.001])
def test_no_weight_overflows_at_a_small_temperature(temperature: float):
    """float32's exp does beyond 88, as the host's own does; in float64 there is a reference."""
    train, test = _data(300), _data(101, seed=1)
    wide = ((train[0].double(), train[1]), (test[0].double(), test[1]))
    top1, _ = knn_accuracy(train, test, k=20, temperature=temperature)
    assert top1 == pytest.approx(knn_accuracy(*wide, k=20, temperature=temperature)[0])
    if temperature == 0.01:  # exp(100) is a number there
        assert top1 == pytest.approx(_hosts(*wide, 20, temperature, "cosine")[0])


def test_neighbours_are_those_of_the_whole_matrix():
    bank, queries = _data(50)[0], _data(17, seed=2)[0]
    similar, rows = nearest(queries, bank, 5, block=60)
    whole = F.cosine_similarity(queries[:, None], bank[None], dim=-1).topk(5)
    assert torch.equal(rows, whole.indices)
    torch.testing.assert_close(similar, whole.values)


def test_classes_that_only_the_training_set_has():
    train, test = _data(60, classes=12), _data(20, classes=3, seed=1)
    assert 0 <= knn_accuracies(train, test, k=[5])[5][0] <= 100


def test_bad_input_is_refused():
    with pytest.raises(IECLError, match="did you mean 'cosine'"):
        knn_accuracies(_data(5), _data(5), distance="cosin")
    with pytest.raises(IECLError, match="none may be empty"):
        knn_accuracies(_data(5), (torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)))
