"""Strong references beside a model: scores from the declared numbers alone."""

from __future__ import annotations

import numpy as np
import polars as pl

from features.sample_table import label_column
from features.schema import Schema, Task
from models.metrics import auc
from pipeline.evaluation.impressions import Impressions, declared_numbers


def references(impressions: Impressions, schema: Schema, task: Task) -> dict[str, np.ndarray]:
    """Scores of the test set, [C], of the best declared number alone and of gradient boosting on all of them.

    Impressions before the test set decide which number is best and whether more of it is better; the booster
    (scikit-learn's histogram-based one, with its defaults) is fitted to them, too. A missing best number is replaced by
    their mean. Empty where their labels have not both classes, or no number is declared.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    numbers = declared_numbers(schema)
    fitted = impressions.before.drop_nulls(label_column(task))
    labels = fitted[label_column(task)].to_numpy().astype(np.float64)
    if not numbers or len(np.unique(labels)) < 2:
        return {}
    before, test = (_matrix(frame, list(numbers.values())) for frame in (fitted, impressions.test))
    whole = np.where(np.isnan(before), _means(before), before)
    alone = np.array([auc(labels, column) for column in whole.T])
    best = int(np.argmax(np.abs(alone - 0.5)))
    sign = 1.0 if alone[best] >= 0.5 else -1.0
    column = np.where(np.isnan(test[:, best]), _means(before)[best], test[:, best])
    with threadpool_limits(1):  # its threads spin while they wait: on a busy machine two are many times slower than one
        booster = HistGradientBoostingClassifier(random_state=0).fit(before, labels)
        boosted = booster.predict_proba(test)[:, 1]
    return {f"{list(numbers)[best]} alone": sign * column, f"boosting on {len(numbers)} numbers": boosted}


def _matrix(frame: pl.DataFrame, columns: list[str]) -> np.ndarray:
    """[C, columns]; a missing number is NaN."""
    return frame.select(pl.col(columns).cast(pl.Float64)).to_numpy().astype(np.float64)


def _means(values: np.ndarray) -> np.ndarray:
    """Mean of every column over the values that are there; 0 where there are none."""
    known = ~np.isnan(values)
    means: np.ndarray = np.where(known, values, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return means
