"""What a model is trained on and judged by: cuts in request time.

from scratch:   … │ window: train          │ validation │ test        │   afterwards refitted on validation and test
retraining:     what the champion trained on │ train         │ test   │   the next retraining trains on test first
                                             └ trained_until └ newest share of the newest partition
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from features.errors import CorankError
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source, trainable
from pipeline.training.settings import TooFewError, extent
from pipeline.workspace import Workspace, close_text

if TYPE_CHECKING:
    from pipeline.workspace.registry import ModelVersion


@dataclass(frozen=True)
class Cuts:
    """Chronological split by request ts: train ≤ … < validation ≤ … < test ≤ …, microseconds UTC.

    Where validation = test, no epoch is chosen, and progress is measured on the test set.
    """

    train: int
    validation: int
    test: int


def trained_until(version: ModelVersion) -> int:
    """ts up to which a version, with those it started from, has trained on every request; microseconds UTC."""
    lineage = version.lineage()
    # versions by earlier code name only the requests that they held out
    return int(lineage.get("trained_until", lineage["cuts"]["validation"]))


def cuts_from_scratch(workspace: Workspace) -> Cuts:
    """Cuts by the config's ``holdout`` and ``training.window``; reads only the partitions that hold a cut.

    Raises:
        CorankError: no partition can be trained on yet.
        TooFewError
    """
    requests, holdout = _requests(workspace), workspace.config.holdout
    total = sum(requests.values())
    test = _cut(workspace, requests, FOREVER, total, holdout.test)
    before = _requests_before(workspace, requests, test)
    validation = _cut(workspace, requests, test, before, holdout.validation, total)
    left = _requests_before(workspace, requests, validation)
    if not 0 < left < before < total:
        raise TooFewError(
            f"{total:,} requests in {len(requests)} partitions are too few for holdout.test {holdout.test} and "
            f"holdout.validation {holdout.validation}: {left:,} would be left to train on. Import more partitions, or "
            "hold out a share of the requests (`holdout: {test: 0.1, validation: 0.1}`)"
        )
    window = workspace.config.training.window
    first = workspace.log.bounds(next(iter(requests)))[0]
    train = _cut(workspace, requests, validation, left, window) if window else first
    return Cuts(max(train, first), validation, test)


def cuts_of_retraining(workspace: Workspace, champion: ModelVersion) -> Cuts:
    """All that the champion has not trained on, but for the newest share of the newest partition.

    Raises:
        CorankError: no partition can be trained on yet.
        TooFewError: the newest partition has too few requests that the champion has not trained on, or all at one time.
    """
    low, requests = trained_until(champion), _requests(workspace)
    newest = next(reversed(requests))
    times = [ts for ts in _times(workspace, newest) if ts >= low]
    held_out = int(len(times) * workspace.config.retraining.holdout) or 1
    if len(times) < 2 or times[-held_out] <= low:
        raise TooFewError(
            f"partition {newest} has {len(times):,} requests that champion version {champion.number} has not trained "
            f"on (from {close_text(low)} on): too few to train on and to judge by. Take more partitions."
        )
    return Cuts(low, times[-held_out], times[-held_out])


def _requests(workspace: Workspace) -> dict[str, int]:
    """Requests of every partition that can be trained on and has any, oldest first."""
    counts = {partition: workspace.records.require(SAMPLES, partition).requests for partition in trainable(workspace)}
    if not counts:
        known = workspace.log.bounds(workspace.partitions[0])[1] + workspace.config.schema_.attribution_window
        raise CorankError(
            f"no partition can be trained on yet: the attribution window of {workspace.partitions[0]} ends at "
            f"{close_text(known)}"
        )
    return {partition: count for partition, count in counts.items() if count} or counts


def _cut(
    workspace: Workspace, requests: Mapping[str, int], before: int, rank: int, text: str, total: int | None = None
) -> int:
    """ts such that the requests from it up to another ts are the configured extent.

    Args:
        before: the other ts.
        rank: requests before it.
        total: of which a share is taken; default: ``rank``.
    """
    wanted, log = extent(text), workspace.log
    if wanted.share is not None:
        rank -= round((rank if total is None else total) * wanted.share)
        return _request_ts(workspace, requests, rank) if 0 <= rank < sum(requests.values()) else 0
    known = [partition for partition in requests if log.bounds(partition)[0] < before]
    if wanted.partitions is not None:
        return log.bounds(known[-wanted.partitions])[0] if len(known) >= wanted.partitions else 0
    assert wanted.duration is not None
    return min(before, log.bounds(known[-1])[1]) - wanted.duration if known else 0


def _requests_before(workspace: Workspace, requests: Mapping[str, int], cut: int) -> int:
    """Requests with ts < cut; reads the partition that holds it."""
    count = 0
    for partition, requests_of_partition in requests.items():
        opening, close = workspace.log.bounds(partition)
        if close <= cut:
            count += requests_of_partition
        elif opening < cut:
            count += sum(ts < cut for ts in _times(workspace, partition))
    return count


def _request_ts(workspace: Workspace, requests: Mapping[str, int], rank: int) -> int:
    """ts of the request of this rank (from 0) in time order."""
    for partition, count in requests.items():
        if rank < count:
            return _times(workspace, partition)[rank]
        rank -= count
    raise AssertionError("rank beyond the counted requests")


def _times(workspace: Workspace, partition: str) -> list[int]:
    """ts of a partition's requests, in order."""
    from features.sample_table import request_times

    samples = sample_source(workspace, 0, FOREVER, (partition,))
    return sorted(int(ts) for file in samples.files() for ts in request_times(samples.read(file)))
