"""Bearer tokens: who may ask the endpoint. A file names them, so that one is given or revoked without a restart."""

from __future__ import annotations

import hmac
import re
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from features.errors import CorankError

LOOK_SECONDS = 1.0
"""Seconds between two looks at the file."""

LINE = re.compile(r"(?P<name>[\w.@-]+)\s+(?P<token>[\x21-\x7e]{16,})")
"""A holder's name and their token of at least 16 letters."""


class UnauthorizedError(CorankError):
    """A request without a token that the file names."""


@dataclass
class Tokens:
    """The tokens of a file: a line ``name token`` each; empty lines and those that begin with # say nothing.

    Attributes:
        path: of the file.
    """

    path: Path
    _digests: dict[str, bytes] = field(default_factory=dict, repr=False)  # holder → digest of their token
    _stamp: tuple[int, int] | None = None
    _looked: float = float("-inf")

    def holder(self, authorization: str | None) -> str:
        """Who sends a request.

        Args:
            authorization: the header of this name.

        Raises:
            UnauthorizedError: it holds no token that the file names now.
            CorankError: the file cannot be read.
        """
        self._look()
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise UnauthorizedError("send a token of serving.tokens: the header authorization: Bearer TOKEN")
        sent, found = _digest(token.strip()), ""
        for name, digest in self._digests.items():  # all of them: how long it takes tells nothing about the tokens
            if hmac.compare_digest(sent, digest):
                found = name
        if not found:
            raise UnauthorizedError("the token is none of those in serving.tokens; it may have been revoked")
        return found

    def first(self) -> str:
        """A token of the file, for this machine's own requests.

        Raises:
            CorankError: the file cannot be read.
        """
        return next(iter(read_tokens(self.path).values()))

    def _look(self) -> None:
        """Read the file if it has changed."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        try:
            status = self.path.stat()
        except OSError as error:
            raise CorankError(f"serving.tokens: {self.path}: {error.strerror}") from None
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self._digests = {name: _digest(token) for name, token in read_tokens(self.path).items()}
            self._stamp = stamp
        self._looked = time.monotonic()


def read_tokens(path: Path) -> dict[str, str]:
    """Holder → token.

    Raises:
        CorankError: the file is not there, others than its owner can read it, a line is none, or there is no token.
    """
    try:
        lines, mode = path.read_text(encoding="utf-8").splitlines(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise CorankError(f"serving.tokens: {path} cannot be read: {error}") from None
    if mode & 0o077:
        raise CorankError(f"serving.tokens: {path} can be read by other users of this machine; chmod 600 {path}")
    tokens: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        matched = LINE.fullmatch(line.strip())
        if matched is None or matched["name"] in tokens:
            raise CorankError(
                f"serving.tokens: {path}, line {number} is not a new name and a token of at least 16 letters, e.g. "
                "shop-frontend and what `openssl rand -hex 32` prints"
            )
        tokens[matched["name"]] = matched["token"]
    if not tokens:
        raise CorankError(f"serving.tokens: {path} names no token, so nobody could ask")
    return tokens


def _digest(token: str) -> bytes:
    """Of one length, whatever the token's is."""
    return sha256(token.encode()).digest()
