"""Searches around the dynamic programs: a `Problem` becomes a split with little load or a short step. Read
`least_load.py` first.
"""
