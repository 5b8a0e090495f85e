"""A launch that is one worker group of servers on other hosts: asks a frontend with what to start, then starts it."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Sequence

import msgspec
import zmq

from sglang_kevlar import join_config
from sglang_kevlar.cluster import hosts, keys
from sglang_kevlar.cluster.sockets import Closed, Connected, Dealer, Frame
from sglang_kevlar.control.backoff import Backoff
from sglang_kevlar.launcher import main, rundir
from sglang_kevlar.launcher.process import PARENT_ENV
from sglang_kevlar.protocol.cluster import Ask, BadFrame, Over, Refused, Setup, Told, decode, encode, to_group
from sglang_kevlar.protocol.launch import EXIT_CONFIG, JoinArgs, NodeArgs

#: seconds for a connection and an answer
ANSWER_TIME = 5.0
#: seconds between two rounds over all frontends, and between two lines about that
BACKOFF_BASE, BACKOFF_CAP = 0.5, 10.0
LOG_INTERVAL = 30.0


class JoinRefused(Exception):
    """No other try will go better; the message is for the operator."""


class _NoAnswer(Exception):
    pass


def ask(frontends: Sequence[str], key: keys.ClusterKey | None) -> Setup:
    """With what to start, from the first frontend that answers; waits for one for ever. Raises JoinRefused."""
    backoff = Backoff(BACKOFF_BASE, BACKOFF_CAP)
    said = -LOG_INTERVAL
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        while True:
            problems = []
            for address in frontends:
                try:
                    return _ask(context, address, key)
                except _NoAnswer as problem:
                    problems.append(f"{address}: {problem}")
            if time.monotonic() - said >= LOG_INTERVAL:
                said = time.monotonic()
                main.log(f"waiting for a frontend ({'; '.join(problems)})")
            time.sleep(backoff.failed(0.0))
    finally:
        context.destroy(linger=0)


def _ask(context: zmq.Context[zmq.Socket[bytes]], address: str, key: keys.ClusterKey | None) -> Setup:
    try:
        dealer = Dealer(context, address, key)
    except zmq.ZMQError as error:
        raise _NoAnswer(str(error)) from error
    session = f"ask-{secrets.token_hex(8)}"
    deadline = time.monotonic() + ANSWER_TIME
    try:
        while time.monotonic() < deadline:
            dealer.poll(min(0.2, max(0.0, deadline - time.monotonic())))
            for arrival in dealer.read()[0]:
                if isinstance(arrival, Connected):
                    dealer.send(encode(Ask(session=session)))
                elif isinstance(arrival, Closed):
                    raise _NoAnswer(arrival.reason)
                elif isinstance(arrival, Frame):
                    return _setup(arrival.data)
        raise _NoAnswer("no answer")
    finally:
        dealer.close()


def _setup(frame: bytes) -> Setup:
    try:
        message = decode(to_group, frame)
    except BadFrame as problem:
        raise JoinRefused(f"the frontend speaks another protocol: {problem}") from problem
    if isinstance(message, Told):
        return message.setup
    if isinstance(message, Refused) and message.retry_s is None:
        raise JoinRefused(message.reason)
    raise _NoAnswer(message.reason if isinstance(message, Refused | Over) else "no answer to the question")


def _nodes(node: NodeArgs | None) -> list[str]:
    """For upstream."""
    if node is None:
        return []
    return ["--nnodes", str(node.count), "--node-rank", str(node.rank), "--dist-init-addr", node.head]


def run(argv: Sequence[str]) -> int:
    """``launch_worker_group`` with these arguments. Returns the exit status."""
    if "--version" in argv:
        print(main.version_text())
        return 0
    flags, upstream_argv = join_config.split_args(argv)
    os.environ.pop(PARENT_ENV, None)
    try:
        setup = ask(flags.frontends, keys.load(flags.given.get("cluster_key_file")))
        kevlar = flags.settings(setup.kevlar)
    except JoinRefused as refusal:
        print(f"sglang-kevlar: error: the frontend refuses this group: {refusal}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    except msgspec.ValidationError as error:
        print(
            f"sglang-kevlar: error: the frontend has settings that are none here: {error}", file=sys.stderr, flush=True
        )
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 130
    follows = flags.node is not None and flags.node.rank > 0
    # The gateway of a group on several hosts is on the first.
    internal = main.Internal(front=main.GATEWAY, groups_only=follows, follows=follows)
    host = kevlar.host_label or hosts.label()

    def commands(run_dir: rundir.RunDir) -> main.Commands:
        name = flags.name or f"{host[:48]}-{run_dir.launch_id}"
        join = JoinArgs(frontends=flags.frontends, name=name, host=host, standby=flags.standby, node=flags.node)
        return main.engine_commands(run_dir, kevlar, internal, [*setup.argv, *upstream_argv, *_nodes(flags.node)], join)

    return main.launch(kevlar, internal, commands)
