"""``python -m sglang_kevlar.cluster.gateway``: stands for the frontends of other hosts where their worker group is.

No HTTP, no journal, no model: it watches the group, kills what is fenced, and carries messages. A sibling of the
group's supervisor: when it dies the group goes on for nobody, until the next one, which joins anew.
"""

from __future__ import annotations

from sglang_kevlar.launcher.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import argparse
import asyncio
import gc
import logging
import secrets
import signal
import sys

import msgspec

from sglang_kevlar.cluster import keys
from sglang_kevlar.launcher.status import StatusWriter
from sglang_kevlar.protocol.launch import EXIT_CONFIG, LaunchPlan, Paths

logger = logging.getLogger(__name__)

#: seconds between two looks at what the group says of itself
TICK = 0.25


class Refused(Exception):
    """By the frontends, and no other try will go better."""


async def serve(plan: LaunchPlan, paths: Paths, status: StatusWriter) -> None:
    """Until SIGTERM. Raises Refused, or what went wrong."""
    from sglang_kevlar.cluster.shared_group import SharedGroup

    gc.freeze()  # nothing of this is garbage: to look at all of it takes longer than some leases
    gc.enable()
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    shared = SharedGroup(plan, paths, keys.load(plan.kevlar.cluster_key_file), secrets.token_hex(8))
    reason = "the gateway ends"
    try:
        shared.start()
        status.send({"status": "ready"})
        while not ending.is_set():
            shared.tick()
            if shared.group.failed.done():
                shared.group.failed.result()
            if shared.is_refused:
                raise Refused("; ".join(f"{at}: {why}" for at, why in shared.refused.items()))
            try:
                async with asyncio.timeout(TICK):
                    await ending.wait()
            except TimeoutError:
                continue
            reason = "the group shuts down"
    finally:
        shared.close(reason)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    args = parser.parse_args()
    gc.disable()  # until all is imported: see `serve`
    paths, status = Paths(args.run_dir), StatusWriter(args.status_fd)
    with open(paths.plan, "rb") as file:
        plan = msgspec.json.decode(file.read(), type=LaunchPlan)

    from sglang_kevlar.platform import torchvision_shim
    from sglang_kevlar.upstream import contract, saved_args
    from sglang_kevlar.worker.bootstrap import name_semaphores

    name_semaphores(f"kevlar-{plan.launch_id}-gateway")
    torchvision_shim.install()
    server_args = saved_args.load(plan.server_args_file)

    from sglang.srt.utils import configure_logger

    configure_logger(server_args, prefix=" gateway")
    try:
        contract.check("gateway")
        from sglang_kevlar.worker.resume import register_wire_types

        register_wire_types()
        asyncio.run(serve(plan, paths, status))
    except contract.UpstreamMismatch as mismatch:
        status.send({"status": "failed", "cause": str(mismatch)})
        sys.exit(EXIT_CONFIG)
    except Refused as refusal:
        status.send({"status": "failed", "cause": str(refusal)})
        sys.exit(EXIT_CONFIG)


if __name__ == "__main__":
    main()
