"""Failures: the first cause of a failure on any rank reaches every rank as one error. Read `monitor.py` first."""
