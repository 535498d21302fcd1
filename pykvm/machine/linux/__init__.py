"""Machines that run Linux."""
