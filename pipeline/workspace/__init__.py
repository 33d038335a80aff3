"""The place where a pipeline works, and what lies in it."""

from pipeline.workspace.log import close_text, now_us, read_lineage
from pipeline.workspace.workspace import DATA_SECTIONS, Workspace, exclusive, holder, typed_command

__all__ = ["DATA_SECTIONS", "Workspace", "close_text", "exclusive", "holder", "now_us", "read_lineage", "typed_command"]
