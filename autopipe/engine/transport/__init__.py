"""Transport: tensors of one rank arrive on another, over process groups or shared memory. Read `p2p.py` first."""
