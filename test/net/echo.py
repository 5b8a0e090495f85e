"""``python echo.py``: says a port, for TCP, whose bytes come back, and for UDP, where a datagram does.

``python echo.py sink``: TCP bytes are counted until their end, then the sender is told how many; UDP is silent, until
a datagram ``report`` asks which numbers have come, in their order.
"""

from __future__ import annotations

import json
import socket
import sys
import threading

SINK = sys.argv[1:] == ["sink"]


def serve(connection: socket.socket) -> None:
    received = 0
    while data := connection.recv(1 << 20):
        received += len(data)
        if not SINK:
            connection.sendall(data)
    connection.sendall(str(received).encode())
    connection.close()


def datagrams(udp: socket.socket) -> None:
    came: list[int] = []
    while True:
        data, sender = udp.recvfrom(2048)
        if data == b"report":
            data = json.dumps(came).encode()
        elif SINK:
            came.append(int(data))
            continue
        udp.sendto(data, sender)


tcp = socket.create_server(("0.0.0.0", 0))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(tcp.getsockname())
print(tcp.getsockname()[1], flush=True)
threading.Thread(target=datagrams, args=(udp,), daemon=True).start()
while True:
    threading.Thread(target=serve, args=(tcp.accept()[0],), daemon=True).start()
