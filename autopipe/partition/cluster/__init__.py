"""Strategies for a cluster: profiles and devices become the best plan over layouts, schedules and ZeRO. Read
`strategy_search.py` first.
"""
