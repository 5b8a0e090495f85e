"""``sglang_kevlar.Engine``: the offline counterpart, a drop-in for ``sglang.Engine`` over several worker groups."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

import msgspec

from sglang_kevlar import config
from sglang_kevlar.launcher.status import StatusReader
from sglang_kevlar.protocol.launch import KevlarArgs, LaunchPlan, Paths

# Before anything imports sglang: this process is one of ours.
os.environ["SGLANG_KEVLAR"] = "1"

from sglang_kevlar.platform import torchvision_shim
from sglang_kevlar.upstream import patches

patches.install()
torchvision_shim.install()

from sglang_kevlar.frontend.groups_engine import GroupsEngine  # noqa: E402
from sglang_kevlar.frontend.language import EngineBackend  # noqa: E402
from sglang_kevlar.frontend.main import load_upstream  # noqa: E402

logger = logging.getLogger(__name__)

_OURS = frozenset(KevlarArgs.__struct_fields__)
#: seconds for the launcher to end the groups
_STOP_TIMEOUT = 15.0


class EngineStartError(RuntimeError):
    """The engine could not be started; the message says what the launcher said."""


class Engine(GroupsEngine):
    """Takes the arguments of ``sglang.Engine`` and ours (``worker_groups=2``, ...).

    This process is the frontend: it holds the journal. The worker groups are processes of a launcher that ends with
    this process. Raises EngineStartError when they cannot be started.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._launcher: subprocess.Popen[bytes] | None = None
        self._language: EngineBackend | None = None
        kwargs.setdefault("log_level", "error")
        self._start_groups(to_flags(kwargs))
        try:
            super().__init__(server_args=load_upstream(type(self).plan))
        except BaseException:
            self._stop_groups()
            raise

    @property
    def endpoint(self) -> EngineBackend:
        """For programs in SGLang's frontend language: ``sglang.set_default_backend(engine)`` looks for this."""
        if self._language is None:
            self._language = EngineBackend(self)
        return self._language

    def _start_groups(self, flags: list[str]) -> None:
        # Errors of our own flags, here rather than in a child.
        if config.split_args(flags)[0].listen is not None:
            raise EngineStartError("listen: worker groups of other hosts join a server, not an Engine")
        status = StatusReader()
        command = [sys.executable, "-m", "sglang_kevlar.launcher.main", "--groups-only"]
        command += ["--owner-pid", str(os.getpid()), "--status-fd", str(status.writer), *flags]
        self._launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[status.writer], start_new_session=True
        )
        os.close(status.writer)
        prepared = status.wait()
        if prepared is None or prepared["status"] != "prepared":
            self._stop_groups()
            raise EngineStartError(str((prepared or {}).get("cause", "the launcher ended; see standard error")))
        paths = Paths(str(prepared["run_dir"]))
        with open(paths.plan, "rb") as file:
            type(self).plan, type(self).paths = msgspec.json.decode(file.read(), type=LaunchPlan), paths
        started = status.wait()
        status.close()
        if started is None or started["status"] != "ready":
            self._stop_groups()
            raise EngineStartError(str((started or {}).get("cause", "the launcher ended; see standard error")))

    def _stop_groups(self) -> None:
        launcher, self._launcher = self._launcher, None
        if launcher is None:
            return
        launcher.terminate()
        try:
            launcher.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            logger.warning("the launcher (pid %d) did not end within %g s", launcher.pid, _STOP_TIMEOUT)
            launcher.kill()
            launcher.wait()

    def shutdown(self) -> None:
        language, self._language = self._language, None
        if language is not None:
            language.close()
        if self._launcher is not None:
            manager = self.tokenizer_manager
            if manager is not None:
                manager.stop()
            self._stop_groups()
            super().shutdown()


def to_flags(arguments: dict[str, Any]) -> list[str]:
    """Keyword arguments as command-line flags, which is how every process gets them."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if name == "lora_paths":
            value = _adapters(value)
        if value is True:
            flags.append(flag)
        elif isinstance(value, dict):
            flags += [flag, json.dumps(value)]
        elif isinstance(value, list | tuple):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags


def _adapters(paths: Any) -> list[str]:
    """Values of ``--lora-paths``: from a dict of paths by name, or a list of ``path``, ``name=path`` and dicts."""
    if isinstance(paths, dict):
        paths = [{"lora_name": name, "lora_path": path} for name, path in paths.items()]
    return [json.dumps(adapter) if isinstance(adapter, dict) else str(adapter) for adapter in paths]
