"""Errors a user can act on. The command line prints them without a stack trace."""

from __future__ import annotations


class CorankError(Exception):
    """Something failed: the message says what, where, and what to do next. Exit code 1."""

    exit_code = 1


class ConfigError(CorankError):
    """The configuration or the call is wrong. Exit code 2."""

    exit_code = 2


class DataGateError(CorankError):
    """A data-validation gate stopped the run. Exit code 3."""

    exit_code = 3


class UnavailableError(CorankError):
    """The online store does not answer. The message names it; the same call may succeed later."""


class UnreadableError(CorankError):
    """Files of a table are missing, damaged, or of another type than the table. The message names each."""
