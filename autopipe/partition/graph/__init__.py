"""The graph that is cut, in the forms that the searches need: orders, a smaller equal graph, down-sets. Read
`orders.py` first.
"""
