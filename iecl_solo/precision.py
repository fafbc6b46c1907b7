"""What is computed in float32 at least, whatever autocast and the backends' switches say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _precision_switches() -> list[tuple[object, str, object]]:
    """What lets torch multiply float32 in TF32 or bfloat16: object, attribute, value of "no"."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        cuda = [backends.cuda.matmul, backends.cudnn.conv]
        cpu = [backends.mkldnn.matmul, backends.mkldnn.conv]
        return [(place, "fp32_precision", "ieee") for place in (*cuda, *cpu)]
    # torch < 2.9
    return [(place, "allow_tf32", False) for place in (backends.cuda.matmul, backends.cudnn)]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, and float32 products in float32: no TF32, and no bfloat16 behind a "medium".

    >>> with torch.autocast("cpu"), full_precision(torch.device("cpu")):
    ...     (torch.eye(2) @ torch.eye(2)).dtype
    torch.float32
    """
    before = [(place, name, getattr(place, name)) for place, name, _ in _precision_switches()]
    try:
        for place, name, exact in _precision_switches():
            setattr(place, name, exact)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


class _FullPrecision(torch.autograd.Function):
    """A function with a graph of its own, so that its backward pass can be run under a context."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        with torch.enable_grad(), full_precision(tensors[0].device):
            inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            ctx.inputs, ctx.out = inputs, function(*inputs)
        out = ctx.out.detach()
        if not ctx.out.requires_grad:  # as a KL whose anchor alone has a graph
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [t for t in ctx.inputs if t.requires_grad]
        with torch.enable_grad(), full_precision(grad[0].device):
            # retained, since the caller may have asked for the same of the graph around it
            found = torch.autograd.grad(ctx.out, wanted, grad, retain_graph=True, allow_unused=True)
        grads = iter(found)
        return None, *(next(grads) if t.requires_grad else None for t in ctx.inputs)


def in_full_precision(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)`` under `full_precision`, and its backward pass too.

    Args:
        function: returns one tensor; what it closes over gets no gradient.
        *tensors: of floating dtype.

    Returns:
        The value, differentiable once.

    >>> a = torch.eye(2, requires_grad=True)
    >>> with torch.autocast("cpu"):
    ...     product = in_full_precision(torch.matmul, a, torch.ones(2, 2))
    >>> product.dtype, torch.autograd.grad(product.sum(), a)[0].dtype
    (torch.float32, torch.float32)
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _FullPrecision.apply(function, *tensors)
    with full_precision(tensors[0].device):
        return function(*tensors)
