"""Servers that tests start in processes and threads of their own."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import uvicorn
from fastapi import FastAPI


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server listens on the port of this machine."""
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, f"{server.args} ended with {server.returncode}"
            assert time.monotonic() < until, f"{server.args} does not answer"
            time.sleep(0.05)


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """The address of an application that is served in this process."""
    server = uvicorn.Server(uvicorn.Config(api, port=(port := free_port()), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < until, "the application does not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def http_server(host: str, answer: str, status: int = 200) -> Iterator[tuple[list[str], int]]:
    """A server that answers every GET with this text: the paths it was asked for, and its port."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            """Tests do not listen."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    server = Server((host, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield asked, int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
