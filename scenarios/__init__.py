"""What tests and benchmarks share: models, hard cases, random profiles, a launcher, and references.

It imports neither of them.
"""
