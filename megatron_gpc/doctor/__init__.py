"""`megatron-gpc doctor`: is this node, or this allocation, fit to train?

Reading order: finding (what is said), software, machine and plan (what is looked at on a node),
meeting (what processes look at together), report (the table), run (all of it).
"""
