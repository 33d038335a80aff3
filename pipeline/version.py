"""Which code made an asset: the distribution's version and a digest of its sources."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("features", "models", "serving", "pipeline")


@cache
def code_version() -> str:
    """For instance ``0.1.0+3f9c2a71``; stored as lineage, never a reason to work again."""
    root = Path(__file__).parent.parent
    content = hashlib.blake2b(digest_size=4)
    for package in PACKAGES:
        for source in sorted((root / package).rglob("*.py")):
            content.update(source.read_bytes())
    try:
        number = version("corank")
    except PackageNotFoundError:
        number = "0"
    return f"{number}+{content.hexdigest()}"
