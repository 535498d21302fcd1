"""Fuzz targets: what guests, clients and files can say to pykvm, tried with coverage as a guide.

A target is an entry in targets.py with a folder of its own: a harness that feeds an input to the
code under test and checks what must hold, corpus.txt to begin with, and findings.txt, which holds
what was found before.
"""
