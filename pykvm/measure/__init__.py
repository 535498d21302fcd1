"""Samples, records and charts: every figure is kept with its raw samples and its machine."""

from pykvm.measure.records import Samples, read_record, typical, unit_of_host, write_record

__all__ = ["Samples", "read_record", "typical", "unit_of_host", "write_record"]
