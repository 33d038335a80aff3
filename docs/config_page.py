"""Writes ``docs/config.md`` from the declaration of the config: ``python docs/config_page.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import Config

HEAD = """# The config

One YAML file, checked whole before anything starts. Scalars mean what is written: `NO` is a text, not a boolean. Any
key can be overridden by an environment variable, `CORANK_` and the path of the key joined by double underscores:
`CORANK_TRAINING__EPOCHS=2`. A mistake is answered with the file, the key, the value and what is allowed.

This page is written from the code by `python docs/config_page.py`.
"""

LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def page() -> str:
    """The page, one table per section, in the order in which the config reaches them."""
    schema = Config.model_json_schema()
    sections, waiting, seen = [HEAD], [("Config", schema)], {"Config"}
    while waiting:
        name, section = waiting.pop(0)
        sections.append(_section(name, section))
        for reference in _references(section.get("properties", {})):
            if reference not in seen and "properties" in schema["$defs"][reference]:
                seen.add(reference)
                waiting.append((reference, schema["$defs"][reference]))
    return "\n".join(sections)


def _section(name: str, section: dict[str, Any]) -> str:
    required = section.get("required", [])
    lines = [f"## {name}", "", section.get("description", "").split("\n\n")[0].replace("\n", " "), ""]
    lines += ["| key | value | default | |", "|---|---|---|---|"]
    for key, value in section["properties"].items():
        default = "required" if key in required else _default(value)
        cells = [f"`{key}`", _kind(value), default, value.get("description", "").replace("\n", " ")]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    if default is None:
        return ""
    return "as its section says" if isinstance(default, dict) and default else f"`{json.dumps(default)}`"


def _kind(value: dict[str, Any]) -> str:
    """What may be written, for people to read."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in value or "oneOf" in value:
        kinds = [_kind(one) for one in value.get("anyOf", value.get("oneOf")) if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "allOf" in value:
        return _kind(value["allOf"][0])
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        return f"list of {_kind(value.get('items', {}))}"
    if value.get("type") == "object":
        inner = value.get("additionalProperties")
        return f"mapping to {_kind(inner)}" if isinstance(inner, dict) else "mapping"
    limits = [f"{sign} {value[key]:,}" for key, sign in LIMITS.items() if key in value]
    return " ".join([value.get("type", "any"), *limits])


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"].rsplit("/", 1)[1]] if "$ref" in value else []
        return own + [name for inner in value.values() for name in _references(inner)]
    return [name for inner in value for name in _references(inner)] if isinstance(value, list) else []


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(page(), encoding="utf-8")
