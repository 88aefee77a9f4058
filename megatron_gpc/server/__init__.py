"""The embedded rollout server: SGLang's HTTP interface on a CPU, readable alone.

Reading order: protocol (what is asked), app (HTTP), generator (the loop that decodes), sequence,
sampling, cache, loading, weight_receiver.
"""
