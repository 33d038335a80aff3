"""``corank doctor``: what an operator runs first."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.commands.common import ConfigOption, DebugOption, guarded, load


def doctor(
    config: ConfigOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Check this machine and what the config names: versions, disk, clock, tables, stores, Ray, the endpoint's port.

    Nothing is changed. Exit code 1 when something would make a run fail; each finding says what to do.
    """
    with guarded(debug):
        from pipeline.doctor import examine

        findings = []
        for finding in examine(load(config)):
            findings.append(finding)
            if not as_json:
                sign = {"ok": "✓", "warning": "!", "failure": "✗"}[finding.level]
                color = {"ok": None, "warning": "yellow", "failure": "red"}[finding.level]
                remedy = f"\n  → {finding.remedy}" if finding.remedy else ""
                typer.secho(f"{sign} {finding.check:<10} {finding.found}{remedy}", fg=color)
        if as_json:
            typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
        if any(finding.level == "failure" for finding in findings):
            raise typer.Exit(1)
