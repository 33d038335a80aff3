"""The report's plots, as pieces of HTML that wait for plotly.js."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.subplots import make_subplots

MODEL, OTHER, BAD = "#1f77b4", "#9a9a9a", "#d62728"
HEIGHT = 320
"""Pixels of a row of plots."""


def partitions_figure(rows: Mapping[str, tuple[int, int]]) -> Markup:
    """Good and quarantined impressions per partition."""
    figure = go.Figure()
    names = list(rows)
    figure.add_bar(x=names, y=[good for good, _ in rows.values()], name="good", marker_color=MODEL)
    figure.add_bar(x=names, y=[bad for _, bad in rows.values()], name="quarantined", marker_color=BAD)
    figure.update_layout(barmode="stack", yaxis_title="impressions")
    figure.update_xaxes(type="category")
    return _html(figure, "partitions")


def learning_figure(history: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Markup:
    """Loss on the training requests and AUC on those that the epoch is chosen by, per epoch."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("training loss", "validation AUC"))
    epochs = [entry["epoch"] for entry in history]
    figure.add_scatter(x=epochs, y=[entry.get("loss") for entry in history], name="loss", row=1, col=1, mode=_LINE)
    for task in tasks:
        values = [entry.get(f"{task}_auc") for entry in history]
        figure.add_scatter(x=epochs, y=values, name=f"{task} AUC", row=1, col=2, mode=_LINE)
    figure.update_xaxes(title_text="epoch", dtick=max(1, len(epochs) // 10))
    return _html(figure, "learning")


def calibration_figure(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Markup:
    """Observed over predicted rate per task, in bins of equally many impressions, with 95 % intervals."""
    figure = make_subplots(rows=1, cols=len(bins), subplot_titles=list(bins))
    for column, bins_of_task in enumerate(bins.values(), start=1):
        predicted, observed = ([bin_[name] for bin_ in bins_of_task] for name in ("predicted", "observed"))
        errors = [
            1.96 * (bin_["observed"] * (1 - bin_["observed"]) / bin_["impressions"]) ** 0.5 for bin_ in bins_of_task
        ]
        end = max([*predicted, *observed], default=1.0)
        place = {"row": 1, "col": column, "showlegend": False}
        figure.add_scatter(x=[0, end], y=[0, end], mode="lines", line={"dash": "dot", "color": OTHER}, **place)
        bars = {"array": errors, "thickness": 1}
        figure.add_scatter(x=predicted, y=observed, error_y=bars, mode=_LINE, line={"color": MODEL}, **place)
    figure.update_xaxes(title_text="predicted")
    figure.update_yaxes(title_text="observed", col=1)
    return _html(figure, "calibration")


def life_figure(lives: Mapping[str, Sequence[tuple[str, float | None, float | None]]]) -> Markup:
    """Per task the AUC on every new partition, before anything trained on it: of the champion of the time, and of the
    model that never trained again."""
    figure = make_subplots(rows=1, cols=len(lives), subplot_titles=list(lives))
    for column, points in enumerate(lives.values(), start=1):
        names = [partition for partition, _, _ in points]
        for index, (name, colour) in enumerate((("champion", MODEL), ("frozen", OTHER)), start=1):
            values = [point[index] for point in points]
            place = {"row": 1, "col": column, "legendgroup": name, "showlegend": column == 1}
            figure.add_scatter(x=names, y=values, name=name, mode=_LINE, line={"color": colour}, **place)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text="AUC", col=1)
    return _html(figure, "life")


_LINE = "lines+markers"


def _html(figure: go.Figure, name: str) -> Markup:
    figure.update_layout(height=HEIGHT, margin={"t": 30, "b": 40, "l": 60, "r": 10}, template="plotly_white")
    # what comes from the log is escaped by plotly
    options = {"full_html": False, "include_plotlyjs": False, "config": {"displaylogo": False}}
    return Markup(figure.to_html(div_id=f"figure-{name}", **options))
