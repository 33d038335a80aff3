"""Errors a user can act on. The command line prints them without a stack trace."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile
from typing import Any, get_args

from pydantic import BaseModel


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
    """A store does not answer, or refuses this user. The message names it; the same call may succeed later."""


class NoSpaceError(CorankError):
    """A disk is full. The message names what was to be written, and its size where that is known."""


class UnreadableError(CorankError):
    """Files of a table are missing, damaged, or of another type than the table. The message names each."""


# --- errors of others -----------------------------------------------------------------------------------

FREE_SPACE = "Free some of the disk, or choose another (`workspace`, `local`; Ray's own files lie in /tmp/ray)."

ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), FREE_SPACE),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "Give the user who runs corank the right to read and write there, or choose another folder.",
    ),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
        "A file lies where a folder is needed, or a folder where a file is: move it away.",
    ),
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`).",
}
"""What to do about an error of the operating system."""

WRITTEN_REFUSED = re.compile("attempt to write a readonly database")
"""How SQLite says that this user may not write a file, or one beside it."""

WRITTEN_UNOPENED = "unable to open database file"
"""How SQLite says that it could not even look at a file, for whichever reason."""

COLOURS = re.compile("\x1b\\[[0-9;]*m")

WRITTEN_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]|Os \{ code: (\d+)")
"""How messages of Rust and Arrow write the number of the operating system's error."""

WRITTEN_FULL = re.compile("No space left on device|Disk quota exceeded|database or disk is full|OutOfDiskError")
"""How libraries say that a disk is full, SQLite and Ray among them."""


WRITTEN_S3 = re.compile("Generic S3 error|AWS Error")
"""How deltalake, Polars and Arrow begin what S3 says, or what became of the way to it."""

WRITTEN_NOT_THERE = re.compile(
    "404 Not Found|416 Range Not Satisfiable|416 Requested Range|NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND"
)
"""What S3 says of a file that is gone or shorter than it was: it does answer."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it, each once: errors that Ray carries from other processes, the one it was raised
    from, and the one being handled then. Chains may be circles (Dagster raises E from X, whose context is E)."""
    waiting, seen = [error], set[int]()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            handled = None if cause.__suppress_context__ else cause.__context__
            waiting += [*_carried(cause), *filter(None, (cause.__cause__, handled))]


def raised(error: BaseException) -> BaseException:
    """The error as it was raised, in whichever process; Ray's wrappers have the trace of the task as their text."""
    seen = set[int]()
    while id(error) not in seen and (inner := _carried(error)):
        seen.add(id(error))
        error = inner[0]
    return error


def known_cause(error: BaseException) -> CorankError | None:
    """The first error among the causes that says what to do."""
    return next((cause for cause in map(raised, causes(error)) if isinstance(cause, CorankError)), None)


def no_space(error: BaseException) -> BaseException | None:
    """The cause that says that a disk is full, if one does; :class:`NoSpaceError` first, as it says where."""
    full = [cause for cause in map(raised, causes(error)) if _number_of(cause) in (errno.ENOSPC, errno.EDQUOT)]
    return min(full, key=lambda cause: not isinstance(cause, NoSpaceError), default=None)


@contextmanager
def writing(path: object, size: int | None = None) -> Iterator[None]:
    """Raise a full disk in the block as an error that names what was written, and its bytes where they are known.

    Raises:
        NoSpaceError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if no_space(error) is None or isinstance(error, NoSpaceError):
            raise
        needed = "" if size is None else f" for {size:,} bytes"
        raise NoSpaceError(f"{path}: No space left on device{needed}. {FREE_SPACE}") from error


def out_of_reach(error: BaseException) -> str | None:
    """What an error says, if it tells nothing of the files: this user may not read them, or their storage does not
    answer. None: they may be damaged."""
    text = str(error)
    refused = _number_of(error) in (errno.EACCES, errno.EPERM) or WRITTEN_UNOPENED in text
    hindered = refused or _is_silence_of_s3(text) or isinstance(error, TimeoutError)
    return message_of(error) if hindered else None


def _is_silence_of_s3(text: str) -> bool:
    return bool(WRITTEN_S3.search(text)) and not WRITTEN_NOT_THERE.search(text)


@contextmanager
def in_reach(what: str) -> Iterator[None]:
    """Raise the error of a storage that is out of reach, in the block, as one that names what was read.

    Raises:
        UnavailableError: its storage does not answer, or refuses this user.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CorankError) or not (reason := out_of_reach(error)):
            raise
        raise UnavailableError(f"{what}: {reason}") from error


def _number_of(error: BaseException) -> int | None:
    """The number of the operating system's error, even if only a library's message has it."""
    if isinstance(error, NoSpaceError):
        return errno.ENOSPC
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = f"{type(error).__name__}: {error}"
    if written := WRITTEN_NUMBER.search(text):
        return int(next(filter(None, written.groups())))
    if WRITTEN_FULL.search(text):
        return errno.ENOSPC
    return errno.EACCES if WRITTEN_REFUSED.search(text) else None


def message_of(error: BaseException) -> str:
    """What an unforeseen error says, without a trace: its type and whole text, and what to do where that is known."""
    error = raised(error)
    number = _number_of(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = without_trace(f"{type(error).__name__}: {error}".strip().removesuffix(":"))
    advice = ADVICE.get(number) if number is not None else None
    if "↳" in text:  # deltalake's errors are trees
        text = " ".join(text.replace("↳", "").split())
    if _is_silence_of_s3(text):
        advice = _advice_on_s3()
    return f"{text.removesuffix('.')}. {advice}" if advice else text


def _advice_on_s3() -> str:
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    which = f"S3 at {where}" if where else "S3"
    return (
        f"See that {which} is up, that this machine reaches it, and that the credentials hold; then run the same "
        "command again: it goes on from here."
    )


def without_trace(text: str) -> str:
    """The message in a text with stack traces: all lines after the last frame, without the error's type where the
    message says what to do."""
    lines = COLOURS.sub("", text).strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    after = lines[frames[-1] + 1 :] if frames else lines
    message = list(dropwhile(lambda line: line.startswith("    "), after))  # drops the frame's code and its marks
    return re.sub(rf"^{CorankError.__module__}\.\w+: ", "", "\n".join(message))


def _carried(error: BaseException) -> list[BaseException]:
    """The errors of other processes inside one of Ray's: of a task, of a worker or the controller of a training."""
    inner = [getattr(error, name, None) for name in ("cause", "_base_exc", "controller_failure")]
    failures = getattr(error, "worker_failures", None)
    inner += failures.values() if isinstance(failures, dict) else ()
    return [cause for cause in inner if isinstance(cause, BaseException)]


# --- errors of a declaration --------------------------------------------------------------------------


def explain(problem: Any, root: type[BaseModel], whole: str = "") -> str:
    """One of pydantic's errors in a declaration, for people: the key, its value, and what is allowed.

    Args:
        whole: what is named where the problem lies in no single key.
    """
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        *path, unknown = problem["loc"]
        return f"{key}: there is no such key. {allowed_keys(str(unknown), _model_at(tuple(path), root))}"
    if problem["type"] == "missing":
        return f"{key}: is missing"
    if not key:
        return f"{whole}: {message}" if whole else message
    value = problem["input"]
    shown = "" if isinstance(value, (dict, list, tuple, BaseModel)) else f" is {value!r}:"
    return f"{key}:{shown} {message}"


def _model_at(location: tuple[Any, ...], root: type[BaseModel]) -> type[BaseModel]:
    model = root
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            found = _models_in(model.model_fields[part].annotation)
            model = found[0] if found else model
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def allowed_keys(key: str, model: type[BaseModel]) -> str:
    """Advice on a key that does not exist: the keys that do, or the new name of one of ``former_keys``."""
    now = getattr(model, "former_keys", {}).get(key)
    close = difflib.get_close_matches(key, model.model_fields, n=1)
    hint = f"It is called {now}. " if now else f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(model.model_fields)}"


def first_line(error: BaseException) -> str:
    """The first line of a library's error; the rest is for its developers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
