"""The feature store: Feast's registry and online store over Delta tables.

Feast has its constructors' arguments checked at run time, by code that is made anew at every import: six of the ten
seconds that importing Feast takes, in every command and replica. mypy checks our calls; so Feast comes without.
"""

from __future__ import annotations

from typing import Any

import typeguard


def _unchecked(target: Any = None, **_: Any) -> Any:
    return target if target is not None else _unchecked


_checked, typeguard.typechecked = typeguard.typechecked, _unchecked
try:
    import feast  # noqa: F401
finally:
    typeguard.typechecked = _checked
