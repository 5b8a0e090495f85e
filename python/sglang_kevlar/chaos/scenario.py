"""A scenario: YAML into structs, strictly. What is wrong with a file is one error that names the place."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import yaml
from msgspec import Meta

Count: TypeAlias = Annotated[int, Meta(ge=0)]
Positive: TypeAlias = Annotated[int, Meta(ge=1)]
Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=1e6)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Range: TypeAlias = tuple[Positive, Positive]
Process: TypeAlias = Literal["rank", "detokenizer", "supervisor", "frontend"]
Which: TypeAlias = Literal["busiest", "idle", "random", "all"]
Harm: TypeAlias = Literal["flip", "truncate", "drop", "double", "swap", "replay", "any"]


class ScenarioError(Exception):
    """The file is no scenario; the message names the file and the place in it."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Load(_Strict, frozen=True, kw_only=True):
    """The clients. Shares are of requests."""

    #: closed loop: each of them sends a request when its last one has ended
    clients: Count = 0
    #: open loop: requests a second, at random times; at most ``in_flight`` at once, the others are not sent
    rate: Annotated[float, Meta(ge=0, le=1e4)] = 0.0
    in_flight: Positive = 64
    #: how many prompts there are, and of how many tokens
    prompts: Annotated[int, Meta(ge=1, le=10_000)] = 24
    prompt_tokens: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (20, 200, 600)
    #: share of the prompts that begin with half of another
    shared_prefix: Share = 0.5
    #: token ids of the prompts, least and most
    vocabulary: Range = (64, 2000)
    #: instead of made prompts: a file with one text a line, its path relative to that of the scenario
    texts: str | None = None
    #: tokens of an answer, least and most
    output_tokens: Range = (1, 150)
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.0
    stream: Share = 1.0
    #: of those that stream: their client leaves in the middle
    leave: Share = 0.0
    cache_salt: Share = 0.0
    #: left out of the shadow
    no_shadow: Share = 0.0
    #: seconds without anything from the server after which a request has hung
    hung_after: Seconds = 120.0


class _Fault(_Strict, frozen=True, kw_only=True, tag_field="do"):
    """Once, ``at`` so many seconds from the beginning, or ``every`` so many, give or take the share ``jitter``."""

    at: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    every: Seconds | None = None
    jitter: Share = 0.0
    #: only when all groups are ready. Default: yes for ``every``
    wait_ready: bool | None = None
    #: also when no other group serves
    allow_total_loss: bool = False

    @property
    def waits(self) -> bool:
        return self.every is not None if self.wait_ready is None else self.wait_ready


class _AtGroup(_Fault, frozen=True, kw_only=True, tag_field="do"):
    group: Which | Count = "busiest"
    rank: Count | Literal["random"] = 0


class _AtProcess(_AtGroup, frozen=True, kw_only=True, tag_field="do"):
    #: of a list, one at random
    process: Process | Annotated[list[Process], Meta(min_length=1)] = "rank"

    @property
    def processes(self) -> list[Process]:
        return self.process if isinstance(self.process, list) else [self.process]


class Kill(_AtProcess, frozen=True, kw_only=True, tag_field="do", tag="kill"):
    """SIGKILL."""


class Stop(_AtProcess, frozen=True, kw_only=True, tag_field="do", tag="stop"):
    """SIGSTOP, and SIGCONT if it is still there after ``seconds``."""

    seconds: Seconds


class Slow(_AtProcess, frozen=True, kw_only=True, tag_field="do", tag="slow"):
    """Stopped again and again, each time for less than the server's ``--stop-grace``."""

    seconds: Seconds
    #: of the time in which it is stopped
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5


class Starve(_AtProcess, frozen=True, kw_only=True, tag_field="do", tag="starve"):
    """Busy loops on the CPUs that the process may use."""

    seconds: Seconds
    loops: Annotated[int, Meta(ge=1, le=1024)]


class Memory(_Fault, frozen=True, kw_only=True, tag_field="do", tag="memory"):
    """Memory is taken until only ``leave`` GiB are available: of the host, also where a container has less."""

    seconds: Seconds
    leave: Annotated[float, Meta(ge=0.25)]


class Error(_AtGroup, frozen=True, kw_only=True, tag_field="do", tag="error"):
    """The scheduler's loop raises."""


class Hang(_AtGroup, frozen=True, kw_only=True, tag_field="do", tag="hang"):
    """The scheduler's loop sleeps; other threads of the process go on."""

    seconds: Seconds


class Frames(_AtGroup, frozen=True, kw_only=True, tag_field="do", tag="frames"):
    """Harm to the next ``count`` frames that a rank sends to its shadow. Given up after ``seconds``."""

    count: Annotated[int, Meta(ge=1, le=1000)] = 1
    harm: Harm = "any"
    seconds: Seconds = 30.0


Fault: TypeAlias = Kill | Stop | Slow | Starve | Memory | Error | Hang | Frames
#: after these a group is expected to be lost
DISRUPTIVE = (Kill, Stop, Error, Hang)
#: these need a server with --allow-chaos
ORDERS = (Error, Hang, Frames)


class Checks(_Strict, frozen=True, kw_only=True):
    """What is demanded. What is left out is not looked at."""

    #: exact: token for token as without faults; whole: complete, whatever the tokens; any: nothing
    answers: Literal["exact", "whole", "any"] = "exact"
    #: log-probabilities closer than this are equal to the arithmetic: either token is right
    tie: Annotated[float, Meta(ge=0)] = 1e-4
    #: requests that ended with an error of the server, at most
    refused: Count | None = None
    #: longest wait between two tokens of an answer
    stall_ms: Annotated[float, Meta(gt=0)] | None = None
    #: seconds after the last fault until all groups are ready
    ready_within: Seconds | None = None
    #: a request that was moved says so in its meta_info
    redirects_marked: bool = False
    #: of the frontend, the launcher and the supervisors each: resident memory and open files, since they were warm
    growth_mb: Annotated[float, Meta(gt=0)] | None = None
    growth_files: Count | None = None
    #: files in /dev/shm of incarnations that are dead
    stale_shm: Count | None = None
    failovers_at_least: Count | None = None
    failovers_at_most: Count | None = None


class Scenario(_Strict, frozen=True, kw_only=True):
    description: str
    #: seconds; with ``--minutes`` and ``--kills`` it is repeated
    duration: Seconds
    load: Load
    faults: list[Fault] = []
    checks: Checks = msgspec.field(default_factory=Checks)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for a text; everybody else, for a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+e[-+]?\d+", re.I), list("-+0123456789"))


def shipped() -> dict[str, str]:
    """Names of the scenarios that come with the package, and their descriptions."""
    directory = files("sglang_kevlar.chaos") / "scenarios"
    names = sorted(file.name.removesuffix(".yaml") for file in directory.iterdir() if file.name.endswith(".yaml"))
    return {name: load(name).description for name in names}


def load(name: str) -> Scenario:
    """A file, or one of `shipped`. Raises ScenarioError."""
    path = Path(name)
    if "/" not in name and path.suffix == "" and not path.exists():
        path = Path(str(files("sglang_kevlar.chaos") / "scenarios" / f"{name}.yaml"))
        if not path.exists():
            raise ScenarioError(f"{name}: there is no such file, and no scenario of that name (--list)")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{name}: cannot be read: {error}") from None
    return parse(text, str(path))


def parse(text: str, file: str) -> Scenario:
    """Raises ScenarioError."""
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ScenarioError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    try:
        scenario = msgspec.convert(content, Scenario)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `")
        place = place.removesuffix("`").removeprefix("$").removeprefix(".")
        raise ScenarioError(f"{file}: {place or 'the whole of it'}: {what}") from None
    if problem := _problem(scenario):
        raise ScenarioError(f"{file}: {problem}")
    if scenario.load.texts is not None:
        texts = str(Path(file).parent / scenario.load.texts)
        scenario = msgspec.structs.replace(scenario, load=msgspec.structs.replace(scenario.load, texts=texts))
    return scenario


def _problem(scenario: Scenario) -> str | None:
    load, checks = scenario.load, scenario.checks
    if (load.clients > 0) == (load.rate > 0):
        return "load: one of clients and rate is needed"
    for key in ("output_tokens", "vocabulary"):
        least, most = getattr(load, key)
        if least > most:
            return f"load.{key}: the first is larger than the second"
    if load.temperature and checks.answers == "exact":
        return "checks.answers: sampled answers cannot be compared (load.temperature); demand that they are whole"
    low, high = checks.failovers_at_least, checks.failovers_at_most
    if low is not None and high is not None and low > high:
        return "checks.failovers_at_least: more than failovers_at_most"
    for number, fault in enumerate(scenario.faults):
        if problem := _problem_of(fault, scenario.duration):
            return f"faults[{number}].{problem}"
    return None


def _problem_of(fault: Any, duration: float) -> str | None:
    if (fault.at is None) == (fault.every is None):
        return "at: one of at and every is needed"
    if fault.at is not None and fault.at >= duration:
        return f"at: not within the duration of {duration:g} s"
    if fault.jitter and fault.every is None:
        return "jitter: only for every"
    at_all = isinstance(fault, DISRUPTIVE) and fault.group == "all"
    if at_all and not fault.allow_total_loss:
        return "group: all of them at once needs allow_total_loss: true"
    return None
