"""Whether a target computes gradients of its own while it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class InnerGradients:
    """How many backward passes were made."""

    count: int = 0


@contextmanager
def counting_gradients() -> Iterator[InnerGradients]:
    """Count the backward passes made in this process meanwhile, by whatever name of torch's they were asked for.

    >>> with counting_gradients() as made:
    ...     x = torch.ones(1, requires_grad=True)
    ...     (2 * x).backward()
    >>> made.count
    1
    """
    made = InnerGradients()
    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def counted(*arguments: Any, **options: Any) -> Any:
        made.count += 1
        return run(*arguments, **options)

    torch.autograd._engine_run_backward = counted  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        torch.autograd._engine_run_backward = run  # type: ignore[attr-defined]
