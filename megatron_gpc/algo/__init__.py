"""The method: advantages, clip thresholds and their schedules, the objective, entropy regions.

Imports torch only; whatever is distributed (process groups, reductions) belongs to the caller.
"""
