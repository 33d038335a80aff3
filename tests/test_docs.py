"""The documents say what is there: every path, page, section and command that they name exists."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from pipeline.commands.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/**/*.md")])
CODE = sorted(
    path for folder in ("features", "models", "serving", "pipeline", "tests") for path in (ROOT / folder).rglob("*.py")
)
OURS = ("features", "models", "serving", "pipeline", "tests", "docs")


def commands() -> list[tuple[str, str]]:
    """Every line of a code block that calls corank, and the page that has it."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                call = re.match(r"(?:[A-Z_]+=\S+ )*(corank .+?)(?:\s+#.*)?$", line)
                if call:
                    found.append((page.name, call.group(1)))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_that_a_page_shows_is_one_that_help_describes(page: str, command: str) -> None:
    group: click.Command = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    name = "corank"
    while isinstance(group, click.Group):
        assert words, f"{page}: {command} names no command"
        name, inner = words[0], group.get_command(click.Context(group), words[0])
        assert inner is not None, f"{page}: {command}: there is no command {name}"
        group, words = inner, words[1:]
    group.make_context(name, words, resilient_parsing=True)  # an option that does not exist is an error here, too


def test_every_file_that_is_named_is_there() -> None:
    missing = []
    for path in (*PAGES, *CODE):
        text = path.read_text()
        for name, section in re.findall(rf"\b((?:{'|'.join(OURS)})/[\w./-]+\.(?:py|md|yaml))(?:#([\w-]+))?", text):
            if not (ROOT / name).is_file() or (section and section not in sections(ROOT / name)):
                missing.append(f"{path.relative_to(ROOT)} names {name}{section and '#' + section}")
        for module in re.findall(r"python -m (tests\.[\w.]+)", text):
            if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
                missing.append(f"{path.relative_to(ROOT)} names {module}")
    assert [one for one in missing if "NAME" not in one] == []


def test_every_link_of_a_page_leads_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            name, _, section = target.partition("#")
            linked = (page.parent / name) if name else page
            if "://" not in target and (not linked.exists() or (section and section not in sections(linked))):
                broken.append(f"{page.relative_to(ROOT)} links to {target}")
    assert broken == []


def sections(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_the_page_of_the_config_is_what_the_code_declares() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "config_page.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text() == page, "run `make docs`"


@pytest.mark.timeout(120)
def test_the_docs_build_without_a_broken_link(tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    assert (tmp_path / "site" / "design.html").is_file()
