"""Measurements: guest programs, runs, records and charts.

Every figure is stored with its raw samples and with the machine on which it was measured.
"""

from pykvm.measure.records import Samples, read_record, typical, unit_of_host, write_record

__all__ = ["Samples", "read_record", "typical", "unit_of_host", "write_record"]
