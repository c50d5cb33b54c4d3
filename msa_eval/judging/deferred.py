"""What depends on values that a device is still computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_eval.device import asynchronous


@dataclass(frozen=True)
class _Waiting:
    flag: Tensor
    copied: torch.cuda.Event | None
    then: Callable[[], None]
    otherwise: Callable[[], None] | None


class Deferred:
    """Does what a flag decides: on a CPU at once, on a GPU a step late.

    A loop that reads a value of each step lets a GPU run empty at each. So the flag sets out for the host, and what it
    decides is done at the next `settle`, when the host has already given the GPU its next step to do.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []

    def when(self, flag: Tensor, then: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
        """Do one thing or the other, as a boolean ``()`` says."""
        if not asynchronous(flag):
            _choose(bool(flag), then, otherwise)
            return
        copied = None
        host = flag.to("cpu", non_blocking=True)
        if flag.is_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(flag.device))
        self._waiting.append(_Waiting(host, copied, then, otherwise))

    def settle(self) -> None:
        """Do what has waited until now; what comes of it waits on."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if one.copied is not None:
                one.copied.synchronize()
            _choose(bool(one.flag.numpy()), one.then, one.otherwise)

    def finish(self) -> None:
        """Do all that waits."""
        while self._waiting:
            self.settle()


def _choose(flag: bool, then: Callable[[], None], otherwise: Callable[[], None] | None) -> None:
    if flag:
        then()
    elif otherwise is not None:
        otherwise()
