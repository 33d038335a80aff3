"""An S3 server of the tests' own (moto) that can be told to fail: ``python -m tests.s3 PORT FILE``.

In a process of its own: deltalake holds the interpreter's lock while it waits for an answer.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ERROR = (
    b"<Error><Code>InternalError</Code><Message>We encountered an internal error. Please try again.</Message></Error>"
)
SILENT_SECONDS = 60


class Faults:
    """What the server does to the requests that come, in a file that it reads at each.

    Its text is a kind (``500`` or ``silent``), how many requests it is done to, and a part of their paths.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._counting = path, threading.Lock()
        self.stop()

    def set(self, kind: str, times: int = 1_000, part: str = "/") -> None:
        self._write(f"{kind} {times} {part}")

    def stop(self) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        """At once, as requests read it meanwhile."""
        scratch = self.path.with_name(f"{self.path.name}.{threading.get_ident()}")
        scratch.write_text(text)
        scratch.replace(self.path)

    def next(self, path: str) -> str:
        """The kind that is done to a request; empty: none."""
        with self._counting:
            words = self.path.read_text().split()
            if len(words) < 3 or words[2] not in path or words[1] == "0":
                return ""
            self.set(words[0], int(words[1]) - 1, words[2])
            return words[0]


def serve(port: int, faults: Faults) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    moto: Any = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        kind = faults.next(environ["PATH_INFO"])
        if kind == "500":
            start("500 Internal Server Error", [("content-length", str(len(ERROR)))])
            return [ERROR]
        if kind == "silent":
            time.sleep(SILENT_SECONDS)
        whole: Iterable[bytes] = moto(environ, start)
        return whole

    run_simple("127.0.0.1", port, answer, threaded=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Faults(Path(sys.argv[2])))
