"""What is sampled: prompts, the groups of a training step, samples that are kept, evaluation."""
