"""Who asks what, when: Poisson arrivals of conversation-like lengths, or a recorded trace."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from load import random_prompt

#: mean tokens of ShareGPT's prompts and answers, as the paper on vLLM gives them (arXiv 2309.06180, figure 11)
MEAN_PROMPT, MEAN_ANSWER = 161, 338
#: of the logarithm: a standard deviation of 1.3 times the mean, the long tail that the same figure shows
SIGMA = 1.0
SHORTEST, LONGEST = 4, 1024


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    new_tokens: int


def conversation(count: int, chance: random.Random, vocabulary: int) -> list[Ask]:
    """The same seed gives the same questions, so that all systems and rates can be compared with one reference."""
    return [
        Ask(random_prompt(chance, _length(chance, MEAN_PROMPT), vocabulary), _length(chance, MEAN_ANSWER))
        for _ in range(count)
    ]


def poisson(count: int, rate: float, chance: random.Random) -> list[float]:
    """Seconds at which they arrive, ``rate`` a second on average."""
    at, times = 0.0, []
    for _ in range(count):
        at += chance.expovariate(rate)
        times.append(at)
    return times


def read_trace(path: Path, chance: random.Random, vocabulary: int) -> tuple[list[Ask], list[float]]:
    """JSON lines with ``at`` (seconds), ``prompt_tokens`` and ``answer_tokens``. Raises ValueError with the line."""
    asks, times = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            asks.append(
                Ask(random_prompt(chance, int(entry["prompt_tokens"]), vocabulary), int(entry["answer_tokens"]))
            )
            times.append(float(entry["at"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from None
    return asks, times


def _length(chance: random.Random, mean: float) -> int:
    # The mean of a log-normal distribution is exp(mu + sigma^2 / 2).
    value = mean * chance.lognormvariate(-(SIGMA**2) / 2, SIGMA)
    return min(LONGEST, max(SHORTEST, round(value)))
