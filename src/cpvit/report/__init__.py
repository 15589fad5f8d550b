"""One page about what was measured, from the records that ``--json`` writes."""

from cpvit.report.fields import ReportError
from cpvit.report.page import MAX_BYTES, check_requirements, write_report
from cpvit.report.records import Record, load_record, read_record

__all__ = [
    "MAX_BYTES",
    "Record",
    "ReportError",
    "check_requirements",
    "load_record",
    "read_record",
    "write_report",
]
