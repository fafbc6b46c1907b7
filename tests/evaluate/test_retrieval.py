"""Recall@k against a loop over queries; objects and sources out of file names."""

from __future__ import annotations

import pytest
import torch

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.retrieval import groups_by_name, recall_at_k


def _slowly(x, groups, k: int, sources=None) -> float:
    right, queries = 0, 0
    unit = [row / row.norm() for row in x.double()]
    for q in range(len(x)):
        others = [
            i
            for i in range(len(x))
            if i != q and (sources is None or int(sources[i]) != int(sources[q]))
        ]
        if not any(groups[i] == groups[q] for i in others):
            continue
        queries += 1
        others.sort(key=lambda i: -float(unit[q] @ unit[i]))
        right += any(groups[i] == groups[q] for i in others[:k])
    return 100 * right / queries


@pytest.mark.parametrize("with_sources", [False, True])
def test_recall(with_sources: bool):
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 9, (60,), generator=generator)
    groups[0] = 99  # alone in its group, so no query
    sources = torch.randint(0, 3, (60,), generator=generator) if with_sources else None
    x = torch.randn(60, 5, generator=generator) + torch.randn(100, 5, generator=generator)[groups]
    found = recall_at_k(x, groups, [1, 3, 10], sources=sources)
    for k in (1, 3, 10):
        assert found[k] == pytest.approx(_slowly(x, groups, k, sources)), k
    assert found[1] < found[3] < found[10]
    assert recall_at_k(x, groups, [1, 3, 10], sources=sources, block=130) == found


def test_own_source_is_not_searched():
    # each image has a near copy by the same artist, which would be found first
    x = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.9, 0.3], [0.0, 1.0]])
    groups, sources = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    assert recall_at_k(x, groups, [1]) == {1: 0.0}
    assert recall_at_k(x, groups, [1], sources=sources)[1] == 50.0


def test_nothing_to_find_is_refused():
    with pytest.raises(IECLError, match="no image has another one"):
        recall_at_k(torch.eye(3), torch.arange(3), [1])


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "unterminated subpattern"),
        ("(.*)", r"no group \(\?P<object>"),
        ("(?P<object>x)", "does not match a/b.png"),
    ],
)
def test_bad_patterns_are_refused(pattern: str, words: str):
    with pytest.raises(IECLError, match=words):
        groups_by_name(["a/b.png"], pattern)
