"""``python -m sglang_kevlar.worker.detokenizer``: the detokenizer of one epoch of a worker group."""

from __future__ import annotations

from sglang_kevlar.launcher.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

from typing import TYPE_CHECKING, Any

from sglang_kevlar.worker.bootstrap import Incarnation, Membership, argument_parser, run_member

if TYPE_CHECKING:
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager


def _manager_class(incarnation: Incarnation) -> type[DetokenizerManager]:
    """Upstream's manager with a heartbeat around each batch."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager

    heartbeat = incarnation.heartbeat

    class KevlarDetokenizer(DetokenizerManager):  # type: ignore[misc]
        def init_request_dispatcher(self) -> None:
            super().init_request_dispatcher()
            dispatch: Any = self._request_dispatcher

            def watched(message: Any) -> Any:
                heartbeat.detokenize(len(getattr(message, "rids", None) or ()))
                try:
                    return dispatch(message)
                finally:
                    heartbeat.wait()

            self._request_dispatcher: Any = watched

        def event_loop(self) -> None:
            heartbeat.wait()
            incarnation.send({"status": "ready"})
            super().event_loop()

    return KevlarDetokenizer


def _run(membership: Membership) -> bool:
    server_args = membership.load_upstream()
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    incarnation = membership.next_epoch()
    if incarnation is None:
        return True
    run_detokenizer_process(server_args, incarnation.port_args(), _manager_class(incarnation))
    return False  # it has no end of its own; it returns after an exception, once it has logged it


def main() -> None:
    membership = Membership(argument_parser().parse_args(), "detokenizer", "detokenizer")
    run_member(membership, lambda: _run(membership))


if __name__ == "__main__":
    main()
