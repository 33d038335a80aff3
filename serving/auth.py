"""Bearer tokens: who may ask the endpoint. A file names them, so that one is given or revoked without a restart."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from features.errors import CorankError

LOOK_SECONDS = 1.0
"""Seconds between two looks at the file."""

LINE = re.compile(r"(?P<name>[\w.@-]+)\s+(?P<token>[\x21-\x7e]{16,})")
"""A holder's name and their token of at least 16 letters."""


class UnauthorizedError(CorankError):
    """A request without a token that the file names."""


class TooOftenError(CorankError):
    """A token came with more requests than one may."""


class Tokens:
    """The tokens that a file names now: a line ``name token`` each; other lines are empty or begin with #."""

    def __init__(self, path: Path, is_allowed: Callable[[str], bool] = lambda _: True) -> None:
        """
        Args:
            is_allowed: whether the holder of a token may ask once more now.

        Raises:
            CorankError: the file cannot be read.
        """
        self._path, self._stamp, self._looked = path, (0, 0), float("-inf")
        self._digests: dict[str, bytes] = {}
        self._is_allowed = is_allowed
        self._look()

    def require(self, authorization: str | None) -> None:
        """
        Args:
            authorization: the header of this name.

        Raises:
            UnauthorizedError: it holds no token that the file names now.
            TooOftenError: this token came with too many requests.
            CorankError: the file cannot be read.
        """
        self._look()
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise UnauthorizedError("send a token of serving.tokens: the header authorization: Bearer TOKEN")
        sent = _digest(token.strip())
        # all of them are compared: how long it takes says nothing about the tokens
        equal = [holder for holder, digest in self._digests.items() if hmac.compare_digest(sent, digest)]
        if not equal:
            raise UnauthorizedError("the token is none of those in serving.tokens; it may have been revoked")
        if not self._is_allowed(equal[0]):
            raise TooOftenError(
                f"the token of {equal[0]} came with more than serving.requests_per_second allows; try again later"
            )

    def _look(self) -> None:
        """Read the file if it has changed."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        try:
            status = self._path.stat()
        except OSError as error:
            raise CorankError(f"serving.tokens: {self._path}: {error.strerror}") from None
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            tokens = read_tokens(self._path)
            self._digests, self._stamp = {holder: _digest(token) for holder, token in tokens.items()}, stamp
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
