"""Machines to inspect, without devices."""
