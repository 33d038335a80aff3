"""Names and sizes of the models; imports nothing, so that a config is checked without loading PyTorch."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"heads": 8, "head_dim": 32, "layers": 2, "dropout": 0.1, "tower": 64},
    "base": {"heads": 16, "head_dim": 64, "layers": 4, "dropout": 0.1, "tower": 128},
}
MODELS: dict[str, dict[str, Any]] = {"mixformer": {"user_heads": 0}, "ui-mixformer": {}}
