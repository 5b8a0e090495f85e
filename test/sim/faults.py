"""All chance in a simulated world: drawn from one seed, anew at each step, with a record of every fault.

Each step has its own random numbers, and whether an event happens depends on its name alone, so a run in which some are
left out is much alike otherwise. That is what makes a failing run shrink (`shrink.py`): ``only`` names the events that
may happen, out of those that happened in the run that failed.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter

#: how much more or less often than usual the faults of one kind strike in one run, drawn per kind and seed: a world in
#: which everything fails all the time never gets to the states that only some kinds lead to
WEATHER = (0.0, 0.2, 1.0, 1.0, 1.0, 3.0)


class Faults:
    def __init__(self, seed: int, only: frozenset[str] | None = None) -> None:
        self.seed = seed
        self.only = only
        self.random = random.Random(seed)
        self.step = 0
        #: nothing fails any more
        self.over = False
        #: by kind; what took effect
        self.counts: Counter[str] = Counter()
        #: names of everything that happened, faults and other events
        self.happened: list[str] = []
        self._weather: dict[str, float] = {}
        #: how often each kind was asked for in this step
        self._names: dict[str, int] = {}
        self._kinds: dict[str, int] = {}

    def next_step(self) -> None:
        self.step += 1
        self._names.clear()
        self.random.seed((self.seed << 24) + self.step)

    def chance(self, probability: float) -> bool:
        """Of what is no fault."""
        return self.random.random() < probability

    def strike(self, kind: str, probability: float) -> bool:
        """Whether a fault strikes. To be asked only where it takes effect, for it is counted."""
        if self.over or not self._happens(kind, probability * self.weather(kind)):
            return False
        self.counts[kind] += 1
        return True

    def event(self, kind: str, probability: float) -> bool:
        """The same for what is no fault, and not counted: load."""
        return not self.over and self._happens(kind, probability)

    def weather(self, kind: str) -> float:
        if kind not in self._weather:
            self._weather[kind] = random.Random(f"{self.seed} {kind}").choice(WEATHER)
        return self._weather[kind]

    def _happens(self, kind: str, probability: float) -> bool:
        number = self._names[kind] = self._names.get(kind, 0) + 1
        if kind not in self._kinds:
            self._kinds[kind] = zlib.crc32(kind.encode())
        # Of numbers alone, so the same in every process; multiplied, because a probability looks at its highest bits.
        draw = hash((self.seed, self.step, self._kinds[kind], number)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        if draw >= probability * 2.0**64:
            return False
        name = f"{self.step}:{kind}:{number}"
        if self.only is not None and name not in self.only:
            return False
        self.happened.append(name)
        return True
