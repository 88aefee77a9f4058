"""`megatron-gpc doctor`: is this node, or this allocation, fit to train?

Reading order: finding (what is said), software, machine, plan and preflight (what is looked at),
meeting (what processes look at together), report (the table), run (all of it); continued (what a
changed configuration does to a run), memory (what a layout takes).
"""
