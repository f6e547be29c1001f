"""Forward passes timed as they happen, on the device where that has a clock of its own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .state import Forward


@dataclass(slots=True)
class Timer:
    """A forward that is being timed: on the device where that has a clock of its own."""

    model: str
    width: int
    rows: int
    device: torch.device
    begins: bool
    begun: Any = None
    ended: Any = None

    def mark(self) -> Any:
        """This moment."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def forward(self) -> Forward:
        """What was timed. Asked only after the host has waited for the device anyway."""
        if self.device.type == "cuda":
            self.ended.synchronize()
            spent = self.begun.elapsed_time(self.ended) / 1000
        else:
            spent = self.ended - self.begun
        return Forward(self.model, self.width, self.rows, spent, self.begins)


@contextmanager
def timed(
    timers: list[Timer],
    model: str,
    width: int,
    rows: int,
    device: torch.device,
    *,
    begins: bool = False,
) -> Iterator[None]:
    """Time a forward pass, and write it down behind the others."""
    timer = Timer(model, width, rows, device, begins)
    timer.begun = timer.mark()
    yield
    timer.ended = timer.mark()
    timers.append(timer)
