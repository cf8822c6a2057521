"""Everything that training changes on a rank: parameters, gradients, optimizer, master weights, loss scale, and their
checkpoints.

The gradients of a step become new parameters. Read `parameters.py` first.
"""
