"""What a run measured, from the ranks' sums to what a person looks at.

reduce    sums with their denominators, over micro-batches, updates and ranks
step      what a step measures besides its updates
reporter  the console and every sink behind one object
console   live progress
jsonl     metrics.jsonl and eval.jsonl, written and read
sinks/    TensorBoard, and pages of Weights & Biases, MLflow and SwanLab
runs      a run directory read back: configuration and series; runs grouped over their seeds
tables    the summary of one run, the comparison of several
plots     the pictures
status    how a run is doing, from its folder
"""
