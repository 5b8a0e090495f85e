"""``python -m sglang_kevlar.frontend.main``: upstream's HTTP application over the worker groups.

Holds the client connections and the journal, no GPU and no model. A sibling of the worker groups, so that whatever
happens to one of them a client survives, and a frontend that dies finds its groups warm when it is back.
"""

from __future__ import annotations

from sglang_kevlar.launcher.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import argparse
import contextlib
import gc
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_kevlar.launcher.status import StatusWriter
from sglang_kevlar.protocol.launch import EXIT_CONFIG, LaunchPlan, Paths
from sglang_kevlar.worker.bootstrap import describe, name_semaphores

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    args = parser.parse_args()
    gc.disable()  # until all is imported: see `serve`
    paths, status = Paths(args.run_dir), StatusWriter(args.status_fd)
    with open(paths.plan, "rb") as file:
        plan = msgspec.json.decode(file.read(), type=LaunchPlan)
    from sglang_kevlar.upstream.contract import UpstreamMismatch

    try:
        serve(plan, paths, load_upstream(plan), lambda: status.send({"status": "ready"}))
    except UpstreamMismatch as mismatch:
        # Another try meets the same upstream.
        print(f"sglang-kevlar: error: {mismatch}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CONFIG)
    except Exception as error:
        status.send({"status": "failed", "cause": describe(error)})
        raise


def load_upstream(plan: LaunchPlan) -> ServerArgs:
    """Import SGLang with our plug-ins, verified, and load the arguments the launcher resolved."""
    from sglang_kevlar.platform import torchvision_shim
    from sglang_kevlar.upstream import patches, saved_args

    name_semaphores(f"kevlar-{plan.launch_id}-frontend")
    patches.install()
    torchvision_shim.install()
    server_args = saved_args.load(plan.server_args_file)

    from sglang.srt.plugins import load_plugins

    from sglang_kevlar.upstream import contract, plugin

    load_plugins()
    contract.check("frontend")
    plugin.verify_applied()
    return server_args


def serve(plan: LaunchPlan, paths: Paths, server_args: ServerArgs, on_ready: Callable[[], None]) -> None:
    """Returns when the HTTP server was told to stop and has drained. ``on_ready``: called after its warm-up."""
    from sglang.srt.entrypoints import http_server

    from sglang_kevlar.frontend import endpoints, middleware
    from sglang_kevlar.frontend.admin_port import AdminPort
    from sglang_kevlar.frontend.groups_engine import GroupsEngine
    from sglang_kevlar.frontend.kept import endpoints as kept_endpoints

    manager, templates, port_args, init_result, watchdog = GroupsEngine.launch(server_args, plan, paths)
    app = manager.app = http_server.app
    middleware.install(app, manager.kept)
    endpoints.install(app, manager, http_server.HEALTH_CHECK_TIMEOUT)
    kept_endpoints.install(app, manager.kept)
    admin_port = AdminPort(app, plan, server_args) if plan.kevlar.admin_port else None
    upstream_lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        # From the first moment, not from the first request on: membership is followed while idle too.
        manager.auto_create_handle_loop()
        async with upstream_lifespan(app) as state:
            if admin_port is not None:
                admin_port.start()
            yield state
            if admin_port is not None:
                await admin_port.close()
        if manager.peers is not None:
            await manager.peers.close()

    app.router.lifespan_context = lifespan
    gc.freeze()  # nothing of this is garbage: to look at all of it takes longer than some leases, and all streams wait
    gc.enable()
    http_server._setup_and_run_http_server(
        server_args,
        manager,
        templates,
        port_args,
        init_result.scheduler_infos,
        watchdog,
        launch_callback=on_ready,
    )


if __name__ == "__main__":
    main()
