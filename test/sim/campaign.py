"""Runs the simulated worlds under fresh seeds until so many faults have struck; shrinks what fails.

    python test/sim/campaign.py --faults 1000000 [--seed N] [--world shadow] [--minutes 10]
    python test/sim/campaign.py --world shadow --seed 17 --replay [--steps 90] [--only 12:crash:1,40:flush:1]

A fault is an event that was injected and took effect; requests, and faults that found nothing to strike, do not count.
The worlds take turns so that each gets its share of the processor's time.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "python")]

import failover_world  # noqa: E402
import frontends_world  # noqa: E402
import membership_world  # noqa: E402
import reform_world  # noqa: E402
import session_sim  # noqa: E402
import shadow_sim  # noqa: E402
from shrink import Failure, Simulate, attempt, shrink  # noqa: E402

#: by name: how it is run, for how many steps, and its share of the time
WORLDS: dict[str, tuple[Simulate, int, float]] = {
    "failover": (failover_world.simulate, failover_world.STEPS, 0.3),
    "shadow": (shadow_sim.simulate, shadow_sim.STEPS, 0.3),
    "membership": (membership_world.simulate, membership_world.STEPS, 0.1),
    "reform": (reform_world.simulate, reform_world.STEPS, 0.1),
    "session": (session_sim.simulate, session_sim.STEPS, 0.1),
    "frontends": (frontends_world.simulate, frontends_world.STEPS, 0.1),
}
PROGRESS = 10.0
SHRINK_SECONDS = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long, whatever is reached")
    parser.add_argument("--seed", type=int, help="the first (default: any)")
    parser.add_argument("--world", choices=list(WORLDS), help="only this one")
    parser.add_argument("--replay", action="store_true", help="run one seed of one world, and print what happens")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", help="events that may happen, separated by commas; '-' for none")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if args.replay:
        if args.world is None or args.seed is None:
            parser.error("--replay needs --world and --seed")
        return replay(args.world, args.seed, args.steps, args.only)
    seed = args.seed if args.seed is not None else secrets.randbelow(10**9)
    return run(seed, args.faults, args.minutes * 60, [args.world] if args.world else list(WORLDS))


def run(seed: int, wanted: int, seconds: float, names: list[str]) -> int:
    print(f"from seed {seed} on: {', '.join(names)}", flush=True)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    steps, spent, runs = (dict.fromkeys(names, 0.0) for _ in range(3))
    began = said = time.monotonic()
    while (total := sum(count.total() for count in counts.values())) < wanted and time.monotonic() - began < seconds:
        name = min(names, key=lambda each: spent[each] / WORLDS[each][2])
        simulate, length, _ = WORLDS[name]
        started = time.process_time()
        number = seed + int(runs[name])
        world = attempt(simulate, number, None, length)
        if isinstance(world, Failure):
            report(name, number, world)
            return 1
        runs[name] += 1
        spent[name] += time.process_time() - started
        counts[name] += world.faults.counts
        steps[name] += world.faults.step
        if time.monotonic() - said > PROGRESS:
            said = time.monotonic()
            print(f"{said - began:6.0f} s  {total:9,} faults  {int(sum(runs.values())):6,} seeds", flush=True)
    took = time.monotonic() - began
    for name in names:
        rate = counts[name].total() / max(spent[name], 1e-9)
        what = f"{int(runs[name]):,} seeds, {int(steps[name]):,} steps, {counts[name].total():,} faults"
        print(f"\n{name}: {what} in {spent[name]:.0f} s of CPU ({rate:,.0f}/s)")
        for kind, count in counts[name].most_common():
            print(f"  {count:9,}  {kind}")
    cpu = sum(spent.values())
    print(f"\n{total:,} faults in {took:.0f} s ({cpu:.0f} s of CPU), no invariant broken; seeds from {seed} on")
    return 0


def report(name: str, seed: int, failure: Failure) -> None:
    simulate, length, _ = WORLDS[name]
    print(f"\n{name}, seed {seed}: {failure.error!r}\n  at {failure.place}", flush=True)
    if failure.world is None:
        return
    count = len(failure.happened)
    failure, events, steps = shrink(simulate, seed, failure, length, SHRINK_SECONDS)
    print(f"shrunk from {count} events to {len(events)}, in {steps} steps:")
    print_trace(failure)
    only = ",".join(name for name in failure.happened) or "-"
    print(
        f"\nreplay: python test/sim/campaign.py --world {name} --seed {seed} --replay --steps {steps} --only '{only}'"
    )


def print_trace(failure: Failure) -> None:
    for name in failure.happened:
        print(f"  {name}")
    for line in failure.world.trace[-60:]:
        print(f"    {line}")
    print(f"  {failure.error!r}")


def replay(name: str, seed: int, steps: int | None, only: str | None) -> int:
    simulate, length, _ = WORLDS[name]
    events = None if only is None else frozenset(only.split(","))
    failure = attempt(simulate, seed, events, steps if steps is not None else length)
    if not isinstance(failure, Failure):
        print("nothing fails")
        return 0
    print_trace(failure)
    raise failure.error


if __name__ == "__main__":
    sys.exit(main())
