"""What the candidates of a request attend to: which of the user's events decide their scores.

Shape suffixes: H heads, C candidates, E events.
"""

from __future__ import annotations

import torch
from torch import Tensor

from features.batch import RequestBatch
from models.blocks.attention import observed_weights
from models.protocol import RankingModel


@torch.inference_mode()
def attention_weights(model: RankingModel, batch: RequestBatch) -> dict[str, Tensor]:
    """Attention weights of one request per sequence, [C, E] each: the mean over layers, heads and query tokens.

    Over the events of all sequences that share a softmax a candidate's weights add up to 1, or to 0 where there is
    none. Of events before the window that an encoder keeps the weight is 0.

    Args:
        batch: of one request.
    """
    C = batch.candidates
    timeline_state = model.encode_timelines(batch.timelines)
    user_state = model.encode_users(batch.users, timeline_state)
    with observed_weights() as calls:
        model.score(user_state, batch.items)
    weights = {}
    for index, sequences in enumerate(model.streams):  # a layer asks one stream after the other
        of_stream = [call.unflatten(1, (C, -1)).mean((0, 2)) for call in calls[index :: len(model.streams)]]
        offsets = user_state.streams[index].events.offsets
        for place, sequence in enumerate(sequences):
            events = int(batch.timelines[sequence.name].offsets[1])
            mean_CE = torch.stack(of_stream).mean(0)[:, int(offsets[place, 0]) : int(offsets[place, -1])]
            weights[sequence.name] = torch.cat([mean_CE.new_zeros(C, events - mean_CE.shape[1]), mean_CE], 1)
    return weights
