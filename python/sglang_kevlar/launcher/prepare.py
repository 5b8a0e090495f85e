"""``python -m sglang_kevlar.launcher.prepare``: decide, once for all processes, what this launch is.

The only place that parses SGLang's flags. It checks what can be checked before anything is started, resolves the
arguments, and writes ``server_args.pickle`` and ``plan.json`` into the run directory. Whatever must not differ
between processes (random seed, LoRA ids, parsers found in the chat template) is decided here.

Exit status: 0, 2 for a command line SGLang cannot parse (argparse), ``EXIT_CONFIG`` for a launch that cannot work.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_kevlar import transport
from sglang_kevlar.cluster import hosts, keys
from sglang_kevlar.launcher.process import die_with_parent
from sglang_kevlar.protocol.launch import (
    EXIT_CONFIG,
    PROTOCOL_VERSION,
    JoinArgs,
    KevlarArgs,
    LaunchPlan,
    NodeArgs,
    Paths,
)

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


class LaunchRefused(Exception):
    """This launch cannot work; the message is for the operator."""


def main(argv: Sequence[str]) -> int:
    if "--" not in argv:
        raise SystemExit("usage: prepare --run-dir D --launch-id I --kevlar JSON -- <sglang flags>")
    split = list(argv).index("--")
    parser = argparse.ArgumentParser(prog="prepare")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--launch-id", required=True)
    parser.add_argument("--kevlar", required=True, help="KevlarArgs as JSON")
    parser.add_argument("--join", help="JoinArgs as JSON: one group of servers on other hosts, which listens nowhere")
    parser.add_argument("--no-http", action="store_true", help="an offline engine, which listens nowhere")
    own = parser.parse_args(argv[:split])
    kevlar = msgspec.json.decode(own.kevlar, type=KevlarArgs)
    join = None if own.join is None else msgspec.json.decode(own.join, type=JoinArgs)
    http = not own.no_http and join is None
    try:
        prepare(Paths(own.run_dir), own.launch_id, kevlar, list(argv[split + 1 :]), http, join)
    except LaunchRefused as refusal:
        print(f"sglang-kevlar: error: {refusal}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    return 0


def prepare(
    paths: Paths,
    launch_id: str,
    kevlar: KevlarArgs,
    argv: list[str],
    http: bool = True,
    join: JoinArgs | None = None,
) -> LaunchPlan:
    """Write the launch plan and the resolved arguments. Raises ``LaunchRefused``."""
    kevlar = hosts.completed(kevlar, join)
    _check_shadow(kevlar)
    node = None if join is None else join.node
    environment, search_path = dict(os.environ), list(sys.path)
    _load_upstream()
    from sglang_kevlar.upstream import saved_args

    server_args = _parse(argv)
    _check_supported(server_args, node)
    _check_peers(kevlar, server_args.batch_notify_size)
    if http:
        _check_port(server_args.host, server_args.port, "--host", "--port")
        if kevlar.admin_port:
            if kevlar.admin_port == server_args.port:
                raise LaunchRefused(f"--admin-port {kevlar.admin_port}: is --port, too; give one of them another")
            if server_args.enable_ssl_refresh:
                raise LaunchRefused("--admin-port: would not renew its certificate; leave --enable-ssl-refresh out")
            _check_port(kevlar.admin_host, kevlar.admin_port, "--admin-host", "--admin-port")
    _resolve(server_args)
    _check_supported(server_args, node, resolved=True)
    plan = _plan(paths, launch_id, kevlar, server_args, node)
    if join is not None or kevlar.listen is not None:
        plan = _for_cluster(plan, server_args, argv, join)
    saved_args.save(paths.server_args, server_args, saved_args.changes_since(environment, search_path))
    temporary = f"{paths.plan}.new"
    with open(temporary, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(plan), indent=2))
    os.replace(temporary, paths.plan)
    return plan


def _check_shadow(kevlar: KevlarArgs) -> None:
    try:
        if kevlar.shadow_memory and (kevlar.worker_groups > 1 or kevlar.advertise is not None):
            transport.require(kevlar.shadow_transport)
        key = keys.load(kevlar.cluster_key_file)
    except transport.TransportError as error:
        raise LaunchRefused(f"--shadow-transport {kevlar.shadow_transport}: {error}") from error
    except keys.KeyProblem as error:
        raise LaunchRefused(str(error)) from error
    if kevlar.advertise is not None and key is None and not keys.is_loopback(kevlar.advertise):
        raise LaunchRefused(
            f"--advertise {kevlar.advertise}: others reach this address, so --cluster-key-file or {keys.ENVIRONMENT} "
            "is needed"
        )


def _check_peers(kevlar: KevlarArgs, batch_notify_size: int) -> None:
    # An output of several messages is recorded as one, and a frontend that goes on with it hands them to its endpoint
    # one after the other: below 2, upstream lets the endpoint take them one by one, and make other events of them.
    if kevlar.peers is not None and batch_notify_size < 2:
        raise LaunchRefused(
            f"--batch-notify-size {batch_notify_size}: with --peers it must be at least 2, or a frontend that goes on "
            "with another one's streams makes other events of them"
        )


def _load_upstream() -> None:
    """Import SGLang with its plug-ins, and make sure it is the one we were made for."""
    from sglang_kevlar.platform import torchvision_shim
    from sglang_kevlar.upstream import contract, patches

    try:
        patches.install()
        torchvision_shim.install()
        from sglang_kevlar.upstream import plugin

        os.environ[plugin.ENABLE] = "1"
        from sglang.srt.plugins import load_plugins

        load_plugins()
        contract.check("prepare")
        plugin.verify_applied()
    except contract.UpstreamMismatch as mismatch:
        raise LaunchRefused(str(mismatch)) from mismatch
    except (ImportError, RuntimeError) as error:
        raise LaunchRefused(f"SGLang could not be loaded: {_describe(error)}") from error


def _parse(argv: list[str]) -> ServerArgs:
    from sglang.srt.server_args import prepare_server_args

    try:
        with _without_usage():
            return prepare_server_args(argv)
    except Exception as error:  # the YAML file of --config, mostly; argparse exits by itself
        raise LaunchRefused(f"the flags could not be read: {_describe(error)}") from error


@contextmanager
def _without_usage() -> Iterator[None]:
    """argparse prints 300 lines of usage before the one line that says what is wrong."""
    print_usage = argparse.ArgumentParser.print_usage
    argparse.ArgumentParser.print_usage = lambda self, file=None: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.print_usage = print_usage  # type: ignore[method-assign]


def _check_supported(server_args: ServerArgs, node: NodeArgs | None, resolved: bool = False) -> None:
    """``resolved``: also what resolution decided and what the model is, not only what was said."""
    from sglang_kevlar import support_matrix

    values = _decided(server_args) if resolved else server_args
    problems = support_matrix.unknown(type(server_args).__struct_fields__)
    ours = {} if node is None else support_matrix.OF_NODES
    problems += support_matrix.refusals(lambda name: ours.get(name, getattr(values, name)), os.environ)
    if resolved and _loads_model_config(server_args):
        from sglang.srt.arg_groups.model_override_base import model_config_of

        problems += support_matrix.model_refusals(model_config_of(server_args))
    if problems:
        raise LaunchRefused("\n  ".join(["not supported:", *problems]) + "\n(--stock runs SGLang's own server)")


def _decided(server_args: ServerArgs) -> Any:
    """The values in effect: what the operator said, and over it what resolution decided."""
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def _loads_model_config(server_args: ServerArgs) -> bool:
    return server_args.model_path.lower() not in ("none", "dummy")


def _resolve(server_args: ServerArgs) -> None:
    """What upstream's ``Engine._launch_subprocesses`` does before it starts the first process, in its order."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.parser.template_detection import resolve_auto_parsers
    from sglang.srt.utils import configure_logger

    configure_logger(server_args)
    try:
        server_args.resolve_once()
        _set_envs_and_config(server_args)
        server_args.check_server_args()
        view = _decided(server_args)
        if view.reasoning_parser == "auto" or view.tool_call_parser == "auto":
            resolve_auto_parsers(server_args)
        if _loads_model_config(server_args):
            model_config_of(server_args)
    except Exception as error:
        if not isinstance(error, (ValueError, AssertionError, OSError, ImportError, RuntimeError)):
            traceback.print_exc()
        if _came_from_model(error):
            raise LaunchRefused(f"cannot load the model {server_args.model_path!r}: {_describe(error)}") from error
        raise LaunchRefused(f"SGLang refuses these flags: {_describe(error)}") from error


def _came_from_model(error: BaseException) -> bool:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any("/transformers/" in f or "hf_transformers" in f or f.endswith("/model_config.py") for f in files)


def _describe(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_port(host: str, port: int, host_flag: str, port_flag: str) -> None:
    """Fail now rather than after the model is loaded. The frontend binds it for good."""
    if not 0 <= port <= 65535:
        raise LaunchRefused(f"{port_flag} {port}: must be between 0 and 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise LaunchRefused(f"cannot listen on {host_flag} {host} {port_flag} {port}: {error}") from error


def _plan(
    paths: Paths, launch_id: str, kevlar: KevlarArgs, server_args: ServerArgs, node: NodeArgs | None
) -> LaunchPlan:
    from importlib.metadata import version

    view = _decided(server_args)
    for field in ("tp_size", "pp_size"):
        if getattr(view, field) < 1:
            raise LaunchRefused(f"--{field.replace('_', '-')} {getattr(view, field)}: must be at least 1")
    ranks = view.tp_size * view.pp_size
    share = ranks if node is None else ranks_of_a_node(view.tp_size, view.pp_size, node.count)
    first = 0 if node is None else node.rank * share
    devices = assign_devices(
        kevlar.worker_groups,
        share,
        base=view.base_gpu_id,
        step=view.gpu_id_step,
        available=_device_count(view.device),
    )
    one_socket = view.weight_cache_mode != "off" and view.weight_cache_socket is not None
    if one_socket and (ranks > 1 or len({*itertools.chain(*devices)}) > 1):
        raise LaunchRefused(
            f"--weight-cache-socket {view.weight_cache_socket}: is one daemon's, which has the weights of one rank on "
            "one device; leave it out, and each rank finds the daemon of its device"
        )
    return LaunchPlan(
        version=PROTOCOL_VERSION,
        upstream=version("sglang"),
        launch_id=launch_id,
        kevlar=kevlar,
        tp_size=view.tp_size,
        pp_size=view.pp_size,
        gpu_ids=[[0] * first + ids + [0] * (ranks - first - share) for ids in devices],
        on_device=view.device != "cpu",
        host=server_args.host,
        port=server_args.port,
        server_args_file=paths.server_args,
    )


def _for_cluster(plan: LaunchPlan, server_args: ServerArgs, argv: list[str], join: JoinArgs | None) -> LaunchPlan:
    """What other launches have to know of this one."""
    from sglang_kevlar.cluster import configuration

    try:
        common = configuration.of(server_args)
    except OSError as error:
        raise LaunchRefused(f"cannot read the model {server_args.model_path!r}: {_describe(error)}") from error
    node = None
    if join is not None and join.node is not None:
        node = configuration.of_node(server_args, common, plan.kevlar)
    # Drawn while resolving, unless it was said.
    decided = ["--random-seed", str(_decided(server_args).random_seed)]
    if os.path.isdir(server_args.model_path):
        decided += ["--model-path", os.path.abspath(server_args.model_path)]
    return msgspec.structs.replace(
        plan, join=join, configuration=common, node_configuration=node, argv=[*for_groups(argv), *decided]
    )


#: flags of the HTTP side, of this host's ports and devices, and secrets: not for other hosts
_NOT_FOR_GROUPS = """
    --host --port --api-key --admin-api-key --ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-keyfile-password
    --base-gpu-id --gpu-id-step --nccl-port --weight-cache-socket --log-level --log-level-http --numa-node
""".split()  # noqa: SIM905 - a list of that would be a page long


def for_groups(argv: Sequence[str]) -> list[str]:
    """The flags of this launch without those that concern only its own host, with the values that follow them."""
    kept: list[str] = []
    skipping = False
    for token in argv:
        if token.startswith("--"):
            skipping = token.partition("=")[0] in _NOT_FOR_GROUPS
        if not skipping:
            kept.append(token)
    return kept


def _device_count(device: str) -> int | None:
    """Devices torch sees; None on CPU, where ranks share what there is."""
    if device == "cpu":
        return None
    import torch

    return torch.get_device_module(device).device_count()


def ranks_of_a_node(tp: int, pp: int, nodes: int) -> int:
    """As upstream spreads them: a node has whole pipeline stages, or a stage whole nodes. Raises LaunchRefused."""
    if pp % nodes and (nodes % pp or tp % (nodes // pp)):
        raise LaunchRefused(
            f"--nnodes {nodes}: must divide --pp-size ({pp}), or be a multiple of it that splits --tp-size ({tp})"
        )
    return tp * pp // nodes


def assign_devices(groups: int, ranks: int, *, base: int, step: int, available: int | None) -> list[list[int]]:
    """Device index of every rank of every group, as upstream counts within one: ``base + rank * step``.

    Groups follow each other. ``available`` None: no devices, all zeros. Raises ``LaunchRefused``.
    """
    if available is None:
        return [[0] * ranks for _ in range(groups)]
    if groups == 0:
        return []
    ids = [[base + (group * ranks + rank) * step for rank in range(ranks)] for group in range(groups)]
    highest = ids[-1][-1]
    if highest >= available:
        where = "" if (base, step) == (0, 1) else f" up to index {highest} (--base-gpu-id {base}, --gpu-id-step {step})"
        alone = ""
        if groups > 1 and ids[0][-1] < available:
            alone = (
                f"; one group needs {ranks}, and can replace a rank that dies on its device: --worker-groups 1 "
                f"--reform on --spare-ranks 1"
            )
        raise LaunchRefused(
            f"--worker-groups {groups} with {ranks} rank(s) each (tp-size x pp-size) needs {groups * ranks} "
            f"GPU(s){where}, but torch sees {available}{alone}"
        )
    return ids


if __name__ == "__main__":
    die_with_parent()
    gc.disable()  # it ends when all is imported and decided
    raise SystemExit(main(sys.argv[1:]))
