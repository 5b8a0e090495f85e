"""``python http_server.py NAME ADDRESS PORT FILE``: answers with its name; unwell while FILE exists.

``POST /stream`` gives a line at once, and another for each SIGUSR1. ``GET /streams``: how many were begun.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME, ADDRESS, PORT, UNWELL = sys.argv[1:]
go_on = threading.Semaphore(0)
streams = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        unwell = self.path == "/health" and os.path.exists(UNWELL)
        body = (str(streams) if self.path == "/streams" else NAME).encode()
        self.send_response(503 if unwell else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        global streams
        streams += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(1000):
            line = f"{NAME} {number}\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            go_on.acquire()

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer((ADDRESS, int(PORT)), Handler)
signal.signal(signal.SIGUSR1, lambda *_: go_on.release())
print(server.server_port, flush=True)
server.serve_forever()
