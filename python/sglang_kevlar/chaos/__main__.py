"""``python -m sglang_kevlar.chaos SCENARIO``: load, faults and checks against a running server.

It signals processes, so it runs on the server's own host and as its user. For a staging server: it does what it says.
Exit status: 0 all checks held, 1 one did not or could not be judged, 2 the scenario is wrong or cannot be run here.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import signal
import sys
import time
from pathlib import Path

from sglang_kevlar.chaos.report import Report
from sglang_kevlar.chaos.run import CannotRun, Run
from sglang_kevlar.chaos.scenario import Kill, Scenario, ScenarioError, load, shipped


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kevlar.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", nargs="?", metavar="SCENARIO", help="a YAML file, or a name of --list")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="Default: %(default)s.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="For timeline and verdict. Default: chaos-TIME.")
    parser.add_argument("--seed", type=int, metavar="N", help="Everything random comes from it. Default: a new one.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, metavar="M", help="Repeat the faults for so long.")
    length.add_argument("--kills", type=int, metavar="N", help="Repeat the faults until so many kills.")
    parser.add_argument("--api-key", metavar="KEY", help="Sent as bearer token.")
    parser.add_argument("--validate", action="store_true", help="Check the scenario and do nothing.")
    parser.add_argument("--list", action="store_true", help="The scenarios that come with this.")
    args = parser.parse_args(argv)
    if args.scenario is None and not args.list:
        parser.error("a scenario is needed (--list shows those that come with this)")
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        parser.error("argument --minutes: must be positive")
    if args.kills is not None and args.kills < 1:
        parser.error("argument --kills: must be at least 1")
    return args


async def _run(args: argparse.Namespace, scenario: Scenario) -> str:
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31)
    out = args.out or Path(time.strftime("chaos-%Y%m%d-%H%M%S"))
    with Report(out) as report:
        report.say(f"{args.scenario}: {scenario.description} (seed {seed})")
        run = Run(scenario, report, args.url.rstrip("/"), seed, args.api_key, args.minutes, args.kills)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            report.say("stopping; once more to end at once, without a verdict")
            run.stop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        return await run.execute()


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        if args.list:
            for name, description in shipped().items():
                print(f"{name:10} {description}")
            return 0
        scenario = load(args.scenario)
        if args.kills is not None and not any(isinstance(fault, Kill) for fault in scenario.faults):
            raise ScenarioError(f"{args.scenario}: faults: none of them kills, so --kills would never be reached")
        if args.validate:
            print(f"{args.scenario}: valid")
            return 0
        return 0 if asyncio.run(_run(args, scenario)) == "held" else 1
    except (ScenarioError, CannotRun) as error:
        print(f"sglang_kevlar.chaos: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
