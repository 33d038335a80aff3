"""One digest of any JSON-like value."""

from __future__ import annotations

import hashlib
import json


def digest(value: object) -> str:
    """128-bit digest of a JSON-like value; equal values in any key order have equal digests."""
    text = json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
