"""The report on a challenger: one HTML file with all that the records say of it, which needs no network."""

from pipeline.report.page import history, report_of, write_report

__all__ = ["history", "report_of", "write_report"]
