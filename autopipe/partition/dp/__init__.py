"""Dynamic programs: a graph and an order, or windows of down-sets, become the best split or a bound. Read
`interval_dp.py` first.
"""
