"""How good an epoch's model is on the validation samples."""

from __future__ import annotations

import numpy as np
import torch

from features.batch import collate
from features.errors import CorankError
from features.samples.source import SampleSource
from models.metrics import task_metrics
from models.protocol import RankingModel
from models.scoring import probabilities
from pipeline.training.job import TrainingJob


def validate(
    job: TrainingJob, source: SampleSource, model: RankingModel, device: torch.device
) -> dict[str, float | None]:
    """AUC and UAUC of every task on the validation set; None where they are not defined.

    Raises:
        CorankError: a score is not finite, or of the gate's task there is no AUC.
    """
    model.eval()
    labels, masks, scores, users, requests = [], [], [], [], []
    budget = 4 * job.pace.batch_candidates, 4 * job.training.batch_events
    for rows in source.batches(*budget, in_process=device.type == "cpu"):
        batch = collate(rows, job.schema)
        scores.append(probabilities(model, batch.to(device)))
        labels.append(batch.labels.numpy())
        masks.append(batch.label_mask.numpy())
        counts = batch.items.request.numpy()
        users.append(batch.user_id[counts])
        requests.append(batch.request_id[counts])
    metrics: dict[str, float | None] = {}
    for index, task in enumerate(job.schema.tasks if scores else ()):
        known = np.concatenate(masks)[:, index]
        label, score, user, request = (np.concatenate(parts)[known] for parts in (labels, scores, users, requests))
        found = task_metrics(label[:, index], score[:, index], user, request)
        metrics |= {f"{task.name}_auc": found.auc, f"{task.name}_uauc": found.uauc}
    if metrics.get(f"{job.gate_task}_auc") is None:
        raise CorankError(f"task {job.gate_task} has not both classes, so that no epoch can be chosen by its AUC")
    return metrics
