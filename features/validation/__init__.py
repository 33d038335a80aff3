"""The data gate: rules on rows, the layout of tables, and Great Expectations, which judges both."""

from features.validation.gate import Gate, PartitionValidation, validate_partitions
from features.validation.layout import check_tables, columns_read
from features.validation.rules import (
    PROFILE_KEYS,
    Finding,
    ValidationRules,
    any_broken,
    bounds_of,
    distinct_events,
    quarantine,
    row_rules,
)

__all__ = [
    "PROFILE_KEYS",
    "Finding",
    "Gate",
    "PartitionValidation",
    "ValidationRules",
    "any_broken",
    "bounds_of",
    "check_tables",
    "columns_read",
    "distinct_events",
    "quarantine",
    "row_rules",
    "validate_partitions",
]
