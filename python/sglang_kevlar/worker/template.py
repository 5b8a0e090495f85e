"""``python -m sglang_kevlar.worker.template``: SGLang, imported once, of which the members of a group are forked.

Imports are most of what a restart takes. This process does nothing else, so a fork of it is a process that has just
imported: no second thread, no child, no CUDA. Where that cannot be had it says so, and members are started cold.

It is asked over a socket: ``{"module": "...", "argv": [...]}`` with three descriptors: the member's standard error,
what it says about its start, and the pipe of its orders, with a byte in front that lets it go on. It answers
``{"pid": N}`` or ``{"error": "..."}``. A member is orphaned at once, which makes it a child of the supervisor
(`launcher.process.adopt_orphans`); without the byte it ends, for then nobody knows of it.
"""

from __future__ import annotations

from sglang_kevlar.launcher.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import argparse
import contextlib
import gc
import importlib
import json
import os
import socket
import sys
from typing import NoReturn

import msgspec

from sglang_kevlar.protocol.launch import LaunchPlan, Paths

#: a message and the descriptors with it
MESSAGE_LIMIT = 1 << 16
DESCRIPTORS = 3
#: what OMP_NUM_THREADS is for the members, "" when it is not set
OMP_ENV = "SGLANG_KEVLAR_OMP_NUM_THREADS"
#: No thread survives a fork. torch makes a pool of them when it is imported, and the allocator of Arrow, which
#: Transformers imports where it is installed, makes one if it is not told otherwise.
ARROW = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
TORCH = {"OMP_NUM_THREADS": "1"}
#: modules whose ``main`` a member may run
MEMBERS = ("sglang_kevlar.worker.rank", "sglang_kevlar.worker.detokenizer")


def why_not_forkable() -> str | None:
    """What of this process would not be whole in a fork of it."""
    if threads := _other_threads():
        return f"the imports have started {len(threads)} threads: {', '.join(threads)}"
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        if children := file.read().split():
            return f"the imports have started {len(children)} processes"
    if driver := [name for name in _open_files() if name.startswith(("/dev/nvidia-uvm", "/dev/kfd"))]:
        return f"the imports have initialised the GPU driver ({driver[0]} is open)"
    return None


def _other_threads() -> list[str]:
    names = []
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != os.getpid():
            with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/comm") as file:
                names.append(file.read().strip())
    return sorted(names)


def _open_files() -> list[str]:
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            pass  # the one of the listing itself
    return names


def serve(channel: socket.socket) -> None:
    """Say whether this process can be forked, then fork what is asked for until the other end is closed."""
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page it looks at
    gc.enable()
    reason = why_not_forkable()
    channel.send(json.dumps({"unfit": reason} if reason else {"ready": True}).encode())
    while reason is None:
        data, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_LIMIT, DESCRIPTORS)
        if not data:
            return
        try:
            answer: dict[str, object] = {"pid": _fork(channel, data, descriptors)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        channel.send(json.dumps(answer).encode())


def _fork(channel: socket.socket, data: bytes, descriptors: list[int]) -> int:
    """The pid of a new member, which is the supervisor's child when this returns."""
    request = json.loads(data)
    module, argv = request["module"], list(request["argv"])
    if module not in MEMBERS:
        raise ValueError(f"{module} is no member of a group")
    if len(descriptors) != DESCRIPTORS:
        raise ValueError(f"{len(descriptors)} descriptors instead of {DESCRIPTORS}")
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        # Its only task is to die, which leaves the member to the supervisor.
        try:
            member = os.fork()
            if member == 0:
                os.close(reader)
                os.close(writer)
                channel.close()
                _become(module, argv, *descriptors)
            os.write(writer, str(member).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        pid = told.read()
    os.waitpid(between, 0)
    if not pid:
        raise OSError("the fork failed")
    return int(pid)


def _become(module: str, argv: list[str], stderr: int, ready: int, orders: int) -> NoReturn:
    """Run ``module`` as if this process had been started with it; never returns."""
    status = 1
    try:
        os.setsid()
        os.dup2(stderr, 2)
        os.close(stderr)
        if not os.read(orders, 1):
            os._exit(1)
        die_with_parent()
        _restore_threads()
        sys.argv = [module, *argv, "--ready-fd", str(ready), "--orders-fd", str(orders)]
        importlib.import_module(module).main()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _restore_threads() -> None:
    """Threads to compute with: as ``OMP_NUM_THREADS`` of the supervisor says, or as many as there are usable cores."""
    wanted = os.environ.pop(OMP_ENV)
    if wanted:
        os.environ["OMP_NUM_THREADS"] = wanted
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
    first = wanted.partition(",")[0].strip()
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(first) if first.isdecimal() and int(first) else len(os.sched_getaffinity(0)))


def _import_the_rest() -> None:
    """What members import until they are ready, with all that it takes along."""
    from sglang.srt.managers import detokenizer_manager, scheduler  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401  (every model class)

    for module in (*MEMBERS, "sglang_kevlar.worker.scheduler", "sglang_kevlar.shadow.rank"):
        importlib.import_module(module)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--channel-fd", type=int, required=True)
    args = parser.parse_args()
    gc.disable()  # nothing that is imported is garbage, and to look at all of it is a third of the time imports take
    channel = socket.socket(fileno=args.channel_fd)
    channel.set_inheritable(False)
    with open(Paths(args.run_dir).plan, "rb") as file:
        plan = msgspec.json.decode(file.read(), type=LaunchPlan)

    from sglang_kevlar.worker import device_answers

    with device_answers.from_a_child():
        from sglang_kevlar.worker.bootstrap import import_upstream

        import_upstream(plan)
        _import_the_rest()
    serve(channel)


if __name__ == "__main__":
    main()
