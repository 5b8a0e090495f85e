"""Connections between the frontends and gateways of `session_sim`.

A connection is a pair of ways, each in order, as TCP is; what is held up is held up for all that comes behind it. To
see what numbers are worth, single frames are lost, doubled and overtaken all the same. An end that closes is seen by
the other when all that was sent before has arrived; or never, when a host goes.
"""

from __future__ import annotations

from collections import deque

from faults import Faults

from sglang_kevlar.protocol.cluster import FromGroup, ToGroup, encode

#: seconds that something is on its way, when nothing is cut
LONGEST_DELAY = 1.4


class Way:
    """``None`` among the data: the other end has closed."""

    def __init__(self, faults: Faults, connection: Connection, kind: str) -> None:
        self.faults, self.connection, self.kind = faults, connection, kind
        self._moving: deque[tuple[float, bytes | None]] = deque()
        self.cut = False
        self.ended = False

    def send(self, data: bytes | None, now: float) -> None:
        faults, connection = self.faults, self.connection
        if self.ended or connection.gone:
            return
        at = max(now, self._moving[-1][0] if self._moving else 0.0)
        if data is None:
            self.ended = True
        elif faults.strike(f"{self.kind} lost", 0.002):
            connection.harmed = connection.hindered = True
            return
        elif faults.strike(f"{self.kind} doubled", 0.002):
            connection.harmed = True
            self._moving.append((at, data))
        elif faults.strike(f"{self.kind} overtaken", 0.002) and self._moving and self._moving[-1][1] is not None:
            connection.harmed = True
            self._moving.insert(len(self._moving) - 1, (self._moving[-1][0], data))
            return
        if faults.strike(f"{self.kind} delayed", 0.05):
            connection.hindered = True
            # What drips in for longer than a lease would keep a session that is long over.
            at = max(at, min(at + faults.random.choice([0.05, 0.2, 1.0]), now + LONGEST_DELAY))
        self._moving.append((at, data))

    def arrive(self, now: float) -> list[bytes | None]:
        arrived: list[bytes | None] = []
        if not self.cut and not self.connection.gone:
            while self._moving and self._moving[0][0] <= now:
                arrived.append(self._moving.popleft()[1])
        return arrived


class Connection:
    def __init__(self, faults: Faults, sender: bytes, group: str, frontend: int, at: float) -> None:
        self.sender, self.group, self.frontend = sender, group, frontend
        self.up = Way(faults, self, "from group")
        self.down = Way(faults, self, "to group")
        #: when it is there for both
        self.at: float | None = at
        self._told = False
        self._left = False
        #: what happened to it: a cause for silence, for a wrong number, an end of it, of its session at either end
        self.hindered = self.harmed = self.closed = self.ended = False
        #: nothing passes any more, and nobody is told
        self.gone = False

    def news(self, now: float) -> bool:
        """Whether the group learns just now that it is there."""
        if self._told or self.gone or self.at is None or now < self.at or self.down.cut:
            return False
        self._told = True
        return True

    def send_up(self, message: FromGroup, now: float) -> None:
        self.up.send(encode(message), now)

    def send_down(self, message: ToGroup, now: float) -> None:
        self.down.send(encode(message), now)

    def arrived_up(self, now: float) -> list[bytes | None]:
        """Of one on which the frontend has hung up only the end is read."""
        arrived = self.up.arrive(now)
        return [data for data in arrived if data is None] if self._left else arrived

    def arrived_down(self, now: float) -> list[bytes | None]:
        return self.down.arrive(now)

    def close_up(self, now: float) -> None:
        """The group's end closes."""
        self.closed = self.ended = True
        self.up.send(None, now)

    def hang_up_down(self, now: float) -> None:
        """The frontend's end reads no more, and closes after a while."""
        self.closed = self.ended = self._left = True
        self.down.send(None, now + 1.0)

    def die_up(self, now: float) -> None:
        """The group's process dies: its host's system closes for it, unless the host dies as well."""
        self.hindered = True
        if self.up.faults.strike("host dies", 0.3):
            self.gone = True
        else:
            self.close_up(now)


class Network:
    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.connections: list[Connection] = []
        self._new: list[Connection] = []
        self._count = 0
        #: frontends whose process is there
        self._absent: set[str] = set()
        self._cuts: dict[tuple[str, int, str], int] = {}

    def dial(self, group: str, frontend: int, now: float) -> Connection:
        self._count += 1
        sender = b"\0" + self._count.to_bytes(4, "big")
        late = self.faults.random.choice([0.0, 0.1, 0.5])
        connection = Connection(self.faults, sender, group, frontend, now + late)
        self.connections.append(connection)
        self._new.append(connection)
        self._apply(connection)
        return connection

    def accepted(self, frontend: int) -> list[Connection]:
        new = [connection for connection in self._new if connection.frontend == frontend]
        self._new = [connection for connection in self._new if connection.frontend != frontend]
        return new

    def die(self, frontend: str, now: float) -> None:
        """A frontend's process; the next one comes at once as far as those are concerned that dial meanwhile."""
        host = self.faults.strike("frontend's host dies", 0.3)
        self._new = [c for c in self._new if f"frontend{c.frontend}" != frontend]
        for connection in self.connections:
            if f"frontend{connection.frontend}" == frontend:
                connection.hindered = connection.closed = True
                if host:
                    connection.gone = True
                else:
                    connection.down.send(None, now)

    def hinder(self, name: str) -> None:
        for connection in self.connections:
            if name in (connection.group, f"frontend{connection.frontend}"):
                connection.hindered = True

    def hinder_all(self) -> None:
        for connection in self.connections:
            connection.hindered = True

    def move(self, now: float) -> None:
        """Forget what is over."""
        if len(self.connections) > 100:
            self.connections = [c for c in self.connections if not (c.gone or (c.up.ended and c.down.ended))]

    def strike(self, now: float, groups: list[str]) -> None:
        faults = self.faults
        for key in list(self._cuts):
            self._cuts[key] -= 1
            if self._cuts[key] <= 0 or faults.over:
                del self._cuts[key]
        for group in groups:
            for frontend in (0, 1):
                for way in ("up", "down"):
                    if faults.strike(f"cut {way}", 0.002):
                        self._cuts[group, frontend, way] = faults.random.choice([4, 20, 60, 150])
        for connection in self.connections:
            self._apply(connection)
            if connection.closed or connection.gone:
                continue
            if faults.strike("connection dropped", 0.002):
                # Each end is told when it is told.
                connection.closed = True
                connection.up.send(None, now)
                connection.down.send(None, now)
            elif faults.strike("connection lost unseen", 0.001):
                connection.hindered = connection.gone = True

    def _apply(self, connection: Connection) -> None:
        connection.up.cut = (connection.group, connection.frontend, "up") in self._cuts
        connection.down.cut = (connection.group, connection.frontend, "down") in self._cuts
        if connection.up.cut or connection.down.cut:
            connection.hindered = True
