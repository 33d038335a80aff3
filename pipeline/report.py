"""The evaluation report: one Markdown page per candidate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.log import close_text

METRICS = ("auc", "uauc", "gauc", "query_auc", "logloss")


def write_report(folder: Path, config: Config, candidate: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Write the report so that it appears whole; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    cuts = candidate["cuts"]
    lines = [
        f"# {config.name}: candidate {candidate['version']}",
        "",
        f"{config.model.name}, preset {config.model.preset}; {evaluation['impressions']:,} held-out impressions of "
        f"requests from {close_text(cuts['test'])} on.",
        f"Trained on requests from {close_text(candidate['trained_from'])} to {close_text(cuts['validation'])}"
        + (f", starting from version {candidate['warm_start']}." if candidate["warm_start"] else "."),
        f"Gate: {'passed' if evaluation['passed'] else 'failed: ' + '; '.join(evaluation['reasons'])}.",
        "",
    ]
    for task, entry in evaluation["tasks"].items():
        others = {"baseline": entry["baseline"], f"champion (version {evaluation['champion']})": entry["champion"]}
        rows = {"candidate": entry} | {name: row for name, row in others.items() if row}
        lines += [
            f"## {task}",
            "",
            "| | " + " | ".join(metric.replace("_", " ") for metric in METRICS) + " |",
            "|---|" + "---|" * len(METRICS),
            *[
                f"| {name} | " + " | ".join(number_text(row[metric]) for metric in METRICS) + " |"
                for name, row in rows.items()
            ],
            "",
        ]
        for other in ("baseline", "champion"):
            gain = entry[f"auc_gain_over_{other}"]
            if gain:
                lines.append(
                    f"AUC − {other}: {gain['difference']:+.4f}, 95 % interval over resampled users "
                    f"{gain['low']:+.4f} … {gain['high']:+.4f}."
                )
        lines += [classes_text(entry) + ".", ""]
    path = folder / f"{candidate['version']}.md"
    scratch = path.with_suffix(".tmp")
    scratch.write_text("\n".join(lines), encoding="utf-8")
    os.replace(scratch, path)
    return str(path)


def number_text(value: float | None) -> str:
    """A metric, or a dash where it cannot be told."""
    return "–" if value is None else f"{value:.4f}"


def classes_text(entry: Mapping[str, Any]) -> str:
    """What the metrics of a task are made of: positives, and the share of users and requests behind UAUC and so on."""
    if not entry["impressions"]:
        return "no label is known"
    return (
        f"{entry['impressions']:,} known labels, {entry['positives']:.1%} positive; {entry['user_share']:.1%} of users "
        f"and {entry['query_share']:.1%} of requests have both classes"
    )
