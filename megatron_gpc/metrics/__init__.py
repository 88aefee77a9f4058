"""What a run measured, from the ranks' sums to what a person looks at.

reduce    sums with their denominators, over micro-batches, updates and ranks
writer    one JSON object a step in metrics.jsonl, the same to TensorBoard
console   live progress
runs      a run directory read back: configuration and series; runs grouped over their seeds
tables    the summary of one run, the comparison of several
plots     the pictures
"""
