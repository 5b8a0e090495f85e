"""Planned moves: a group is emptied, and started anew when it is empty; several of them one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from sglang_kevlar.ctl.server import Failed, Server, Unreachable
from sglang_kevlar.ctl.tables import progress

Group = dict[str, Any]
#: seconds between two looks at the status
POLL = 0.25
#: seconds in which requests that were told to move have moved
MOVE_TIME = 10.0
_SERVING = ("ready", "suspect")


class Moves:
    """``say`` is told of each step. ``timeout``: seconds for each wait, besides ``grace``, that for requests to end."""

    def __init__(
        self,
        server: Server,
        say: Callable[[str], None],
        grace: float,
        timeout: float,
        force: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._server = server
        self._say = say
        self._grace = grace
        self._timeout = timeout
        self._force = force
        self._clock = clock
        self._sleep = sleep

    def drain(self, number: int) -> None:
        """Until it runs nothing. Raises Failed, and then it drains on."""
        self._others_serve(self._group(number))
        self._empty(number)

    def undrain(self, number: int) -> None:
        self._group(number)
        self._server.maintain(number, "undrain")

    def restart_all(self) -> list[dict[str, Any]]:
        """Raises Failed at the first that does not come back; the others are left alone."""
        numbers = [int(group["id"]) for group in self._server.status()["groups"]]
        done: list[dict[str, Any]] = []
        for number in numbers:
            try:
                done.append(self.restart(number))
            except Failed as failure:
                left = ", ".join(map(str, numbers[len(done) + 1 :])) or "none"
                stopped = type(failure)(f"{failure} (restarted: {len(done)} of {len(numbers)}; left alone: {left})")
                raise stopped from failure
        return done

    def restart(self, number: int) -> dict[str, Any]:
        """Returns when it serves again. Raises Failed."""
        group = self._group(number)
        if group["state"] not in (*_SERVING, "draining"):
            raise Failed(f"group {number} is {group['state']}: it is started by itself ({group.get('cause') or '-'})")
        self._others_serve(group)
        before, begun = int(group["epoch"]), self._clock()
        was_draining = group["state"] == "draining"
        try:
            if not self._force:
                self._empty(number)
            # Refused when it was lost just now, for instance, which empties it too.
            self._server.maintain(number, "restart")
        except BaseException:
            if not self._force and not was_draining:
                # It goes on as it was, whatever stopped this.
                self._server.maintain(number, "undrain")
            raise
        self._say(f"group {number}: starts anew")
        for now in self._looks(self._timeout):
            if now is None:
                continue
            group = next((g for g in now["groups"] if g["id"] == number), {})
            if group.get("state") == "ready" and int(group["epoch"]) > before:
                took = self._clock() - begun
                self._say(f"group {number}: ready, epoch {group['epoch']}, after {took:.1f} s")
                return {"group": number, "epoch": group["epoch"], "seconds": round(took, 3)}
        cause = group.get("cause") or group.get("state") or "not in the status"
        raise Failed(f"group {number} is not back after {self._timeout:g} s: {cause}")

    def roll_weights(self, model_path: str, version: str | None, load_format: str | None) -> dict[str, Any]:
        """Returns when all groups have them. Raises Failed; a wait that is over does not end the update."""
        fields = {"model_path": model_path, "weight_version": version, "load_format": load_format}
        self._server.roll_weights(**fields, deadline=self._grace)
        said, waited_since = "", self._clock()
        # Until nothing has changed for so long: how often it is waited for depends on the number of groups.
        while self._clock() - waited_since < self._grace + self._timeout:
            self._sleep(POLL)
            try:
                now = self._server.status()
            except Unreachable:
                continue
            update = now.get("weights")
            if update is None:
                raise Failed("the frontend started anew in the middle of it; `status` says which weights groups have")
            if update["state"] == "failed":
                raise Failed(f"no group has the weights: {update['error']}")
            if update["state"] == "done":
                for group in now["groups"]:
                    if group["state"] not in _SERVING:
                        self._say(f"group {group['id']} is {group['state']}, and gets them before it serves")
                done: dict[str, Any] = update
                return done
            doing = f"{update['doing']}; {progress(update)}"
            if doing != said:
                self._say(doing)
                said, waited_since = doing, self._clock()
        raise Failed(f"nothing has changed for {self._grace + self._timeout:g} s: {said}")

    def _empty(self, number: int) -> None:
        self._server.maintain(number, "drain", deadline=self._grace)
        said, running = -1, 0
        for now in self._looks(self._grace + MOVE_TIME + self._timeout):
            if now is None:
                continue
            group = next((g for g in now["groups"] if g["id"] == number), None)
            if group is not None and group.get("moves_in_s", 0.0) is None:
                raise Failed(
                    f"group {number} drains no more: the frontend started anew, it has joined again, or was undrained"
                )
            running = 0 if group is None else int(group["running"])
            if running != said:
                self._say(f"group {number}: drains, {running} requests run")
                said = running
            if not running:
                return
        raise Failed(
            f"group {number}: {running} requests still run there: they cannot be moved, or no other group serves"
        )

    def _looks(self, seconds: float) -> Iterator[dict[str, Any] | None]:
        """The status again and again for so long; None while nobody answers, as when the frontend starts anew."""
        end = self._clock() + seconds
        while True:
            last = self._clock() >= end
            try:
                yield self._server.status()
            except Unreachable:
                if last:
                    raise
                yield None
            if last:
                return
            self._sleep(POLL)

    def _others_serve(self, group: Group) -> None:
        others = [g for g in self._server.status()["groups"] if g["id"] != group["id"] and g["state"] in _SERVING]
        if not others and not self._force:
            raise Failed(
                f"no other group serves than {group['id']}: requests would wait until it is back, and new ones too; "
                "--force does it all the same"
            )

    def _group(self, number: int) -> Group:
        groups = self._server.status()["groups"]
        found: Group | None = next((group for group in groups if group["id"] == number), None)
        if found is None:
            known = ", ".join(str(group["id"]) for group in groups) or "none"
            raise Failed(f"there is no group {number}; there are: {known}")
        return found
