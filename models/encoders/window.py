"""The input of an encoding that depends on the whole visible window.

Shape suffixes: E events, A of them that ask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from features.schema import Sequence
from models.blocks.attention import Plan, Seen, plan_attention
from models.blocks.draws import current_draws, joined_keys


@dataclass
class Window:
    """Each request's own visible events, request after request.

    Attributes:
        rows: positions of the windows' events among the events of the timelines, [E].
        asking: of these rows, the newest of each window, which attend to all of it and become H, [A].
        plan: of their attention to the windows.
        seen: H as events, of which each request sees those of its own window.
    """

    rows: Tensor
    asking: Tensor
    plan: Plan | None
    seen: Seen


def make_window(seen: Seen, newest: int | None, device: torch.device) -> Window:
    """Windows of these requests; ``newest``: how many events of each become H, None: all."""
    rows, offsets = seen.rows()
    event_ts, counts = seen.event_ts[rows], offsets.diff()
    request = torch.repeat_interleave(torch.arange(len(counts)), counts)
    asking, asking_counts = torch.arange(len(rows)), counts
    if newest is not None:
        # the windows of merged sequences lie side by side: newest is by time, not by place
        by_time = event_ts.argsort(stable=True)
        by_time = by_time[request[by_time].argsort(stable=True)]
        asking = by_time[asking - offsets[request] >= (counts - newest)[request]]
        asking_counts = counts.clamp(max=newest)
    all_of_it = Seen(
        timeline=request[asking],
        ts=event_ts[asking],
        first=offsets[None, request[asking]],
        last=offsets[None, request[asking] + 1],
        event_ts=event_ts,
        timelines=len(counts),
    )
    ends = asking_counts.cumsum(0)
    window_seen = Seen(
        timeline=torch.arange(len(counts)),
        ts=seen.ts,
        first=(ends - asking_counts)[None],
        last=ends[None],
        event_ts=event_ts[asking],
        timelines=len(counts),
    )
    return Window(rows.to(device), asking.to(device), plan_attention(all_of_it, None, device), window_seen)


def window_keys(sequences: tuple[Sequence, ...], window: Window) -> Tensor | None:
    """Keys of the draws for the rows that become H, [A]: of the event and the request that sees it; None: none are
    keyed."""
    draws = current_draws()
    if draws is None:
        return None
    of_events = torch.cat([draws.keys.events[sequence.name] for sequence in sequences])
    request = torch.repeat_interleave(torch.arange(len(draws.keys.requests)), (window.seen.last - window.seen.first)[0])
    return joined_keys(of_events[window.rows][window.asking], draws.keys.requests[request.to(of_events.device)])
