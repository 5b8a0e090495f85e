"""All chance in a simulated world: drawn from one seed, anew at each step, with a record of every fault.

Because each step has its own random numbers, a run in which some faults are left out is the same up to the first of
them and much alike behind it. That is what makes a failing run shrink (`shrink.py`): ``only`` names the events that may
happen, out of those that happened in the run that failed.
"""

from __future__ import annotations

import random
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
        self._names: Counter[str] = Counter()

    def next_step(self) -> None:
        self.step += 1
        self._names.clear()
        self.random.seed((self.seed << 24) + self.step)

    def chance(self, probability: float) -> bool:
        """Of what is no fault."""
        return self.random.random() < probability

    def strike(self, kind: str, probability: float) -> bool:
        """Whether a fault strikes. To be asked only where it takes effect, for it is counted."""
        if self.over or self.random.random() >= probability * self.weather(kind):
            return False
        if not self._may(kind):
            return False
        self.counts[kind] += 1
        return True

    def event(self, kind: str, probability: float) -> bool:
        """The same for what is no fault, and not counted: load."""
        return not self.over and self.random.random() < probability and self._may(kind)

    def weather(self, kind: str) -> float:
        if kind not in self._weather:
            self._weather[kind] = random.Random(f"{self.seed} {kind}").choice(WEATHER)
        return self._weather[kind]

    def _may(self, kind: str) -> bool:
        self._names[kind] += 1
        name = f"{self.step}:{kind}:{self._names[kind]}"
        if self.only is not None and name not in self.only:
            return False
        self.happened.append(name)
        return True
