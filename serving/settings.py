"""How the application is run: the config's section ``serving``, and all else that the replicas are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from features.encoding import bucket_of
from features.schema import Declaration
from models.config import Precision
from serving.auth import read_tokens
from serving.ports import is_loopback

if TYPE_CHECKING:
    from features.store.online import FeatureStoreSettings
    from serving.request_log import LogSettings

MOST_BODY_BYTES = 8 << 20
"""Bytes of one body, by default."""

MissingContext = Literal["error", "unknown"]


PARTS = 1_000_000


def share_of_users(user_id: str) -> float:
    """Where a user's hash lies, 0 … 1: a share of all users is those below it."""
    return bucket_of(user_id, PARTS) / PARTS


class SplitConfig(Declaration):
    """A version for a share of users."""

    version: int = Field(description="number in the registry")
    share: float = Field(gt=0, lt=1, description="of users, by hash")


class ServingConfig(Declaration):
    """The section ``serving`` of a config.

    Attributes:
        max_ongoing_requests, max_queued_requests: of one service replica. As many pushes again.
    """

    host: str = Field(
        "127.0.0.1", description="address to listen on; one that other machines reach is refused without tokens"
    )
    port: int = Field(8000, ge=1, le=65_535)
    tokens: str | None = Field(
        None,
        description="file of bearer tokens, a line `name token` each, that only its owner can read; requests without "
        "one of them are answered 401. It is read again when it changes",
    )
    ranker_replicas: int = Field(1, ge=1)
    service_replicas: int = Field(1, ge=1)
    max_candidates: int = Field(10_000, ge=1, description="most candidates of one request")
    chunk_candidates: int = Field(
        1_000,
        ge=1,
        description="candidates that are scored at a time: those of requests that are merged, or so many of a longer "
        "request, which takes turns with others",
    )
    max_batch_requests: int = Field(8, ge=1, description="concurrent requests merged into one batch")
    batch_wait_ms: float = Field(0.0, ge=0, description="longest wait for others to join a batch")
    max_ongoing_requests: int = Field(64, ge=1, description="requests of one service replica that are worked on")
    max_queued_requests: int = Field(128, ge=0, description="beyond these a request is answered 503 at once")
    max_body_bytes: int = Field(MOST_BODY_BYTES, ge=1, description="a larger body of a request is answered 413")
    memo_megabytes: float = Field(
        256.0, ge=0, description="user sides that a ranker remembers per model, in true bytes; 0: none"
    )
    log_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of users, by hash, whose requests are logged in the tables below `served` of the workspace, "
        "with all pushed events and feedback; 0: nothing is logged",
    )
    log_seconds: float = Field(10.0, gt=0, description="until logged rows are written; a killed replica loses them")
    requests_per_second: float | None = Field(
        None, gt=0, description="of one token at one service replica; what is more is answered 429. Default: any number"
    )
    split: SplitConfig | None = Field(None, description="a share of users is answered by another version")
    shadow: int | None = Field(
        None, description="version that is asked, too, and whose scores are compared but not answered"
    )
    weights: dict[str, float] = Field(
        {}, description="rank by this weighted sum of the tasks' scores; default: by the first task"
    )
    store_deadline_ms: float | None = Field(
        1_000.0,
        gt=0,
        description="after which, or when the online store fails, a request is answered as one of an unknown user and "
        "items, and says so (`degraded`); null: it is answered 503",
    )
    precision: Precision = Field(
        "float32",
        description="of the products in a model; bfloat16 is faster for large models on CPUs that have it, and its "
        "scores differ by up to 0.02",
    )
    missing_context: MissingContext = Field("error", description="context that a request lacks: an error, or unknown")

    @field_validator("host")
    @classmethod
    def _host_has_no_brackets(cls, host: str) -> str:
        """An address of IPv6 may be written as in a URL."""
        return host.removeprefix("[").removesuffix("]")

    @field_validator("tokens")
    @classmethod
    def _path_holds_for_all_processes(cls, tokens: str | None) -> str | None:
        return None if tokens is None else str(Path(tokens).expanduser().resolve())

    @model_validator(mode="after")
    def _others_need_a_token(self) -> ServingConfig:
        if self.tokens is None and not is_loopback(self.host):
            raise ValueError(
                f"host: {self.host!r} can be reached from other machines, and anyone there could ask and push; name a "
                "file of tokens in serving.tokens"
            )
        if self.tokens is None and self.requests_per_second is not None:
            raise ValueError("requests_per_second: it is counted per token; name a file of them in serving.tokens")
        return self

    @property
    def own_token(self) -> str | None:
        """A token for requests of the pipeline itself.

        Raises:
            CorankError: the file of tokens cannot be read.
        """
        return None if self.tokens is None else next(iter(read_tokens(Path(self.tokens)).values()))

    @property
    def admitted(self) -> int:
        """Requests to rank, and pushes, that one service replica holds at a time."""
        return self.max_ongoing_requests + self.max_queued_requests


@dataclass(frozen=True)
class ServingSettings:
    """What the application needs to know; plain values, as they are sent to the replicas.

    Attributes:
        artifact: directory of the published model.
        log_delay: microseconds; a request sees events older than this.
        follow: JSON document that names the ``artifact`` to serve from now on, whenever it changes; None: always this.
        ranker_cpus, service_cpus: CPUs that Ray sets aside per replica, not a limit.
        ranker_threads: threads of the model; default: the machine's CPUs shared among the replicas.
        log: where served requests are logged; None: nowhere.
    """

    artifact: str
    store: FeatureStoreSettings
    options: ServingConfig = field(default_factory=ServingConfig)
    log_delay: int = 0
    follow: str | None = None
    ranker_cpus: float = 0.5
    service_cpus: float = 0.1
    ranker_threads: int | None = None
    log: LogSettings | None = None

    @property
    def by_user(self) -> bool:
        """Whether it matters which ranker a request meets."""
        return self.options.ranker_replicas > 1
