"""The data gate: rules on rows, the layout of tables, and Great Expectations, which judges both."""

from features.validation.gate import Gate, PartitionValidation, validate_partitions
from features.validation.layout import check_tables
from features.validation.rules import Finding, ValidationRules, any_broken, quarantine, row_rules

__all__ = [
    "Finding",
    "Gate",
    "PartitionValidation",
    "ValidationRules",
    "any_broken",
    "check_tables",
    "quarantine",
    "row_rules",
    "validate_partitions",
]
