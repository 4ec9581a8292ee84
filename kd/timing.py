"""How long the parts of a training step take."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopwatch:
    """Adds up the time of named parts. On a GPU it is the GPU's time, taken by events that nobody has to wait for.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._open = []  # (name, start, end) of parts whose time has not been read
        self._seconds = defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside; parts of one name add up."""
        start = self._now()
        yield
        self._open.append((name, start, self._now()))

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and time the wait for each of them."""
        iterator, end = iter(items), object()
        while True:
            with self.part(name):
                item = next(iterator, end)
            if item is end:
                return
            yield item

    def read(self) -> dict[str, float]:
        """Return the seconds of each part so far. On a GPU, parts that are still running are left for the next call."""
        waiting = []
        for name, start, end in self._open:
            if self.on_gpu and not end.query():
                waiting.append((name, start, end))
            else:
                self._seconds[name] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        self._open = waiting
        return dict(self._seconds)

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
