"""Log-probability and entropy over a sharded vocabulary, from hidden states or from logits."""

KEPT_LOGITS_BYTES = 2**30
"""Logits of one forward pass that `train.head=auto` keeps for the backward pass, at most."""
CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
"""Logits that exist at a time where none are kept: on a CPU they should stay in its cache, on a GPU
the matrix products should fill it."""
LEAST_CHUNK = 512
"""Entries of the vocabulary in a chunk, at least: narrower products are slow."""


def keeps_logits(logits_bytes: float) -> bool:
    """Whether `train.head=auto` keeps the logits of a forward pass that takes so many bytes."""
    return logits_bytes <= KEPT_LOGITS_BYTES


def chunk_vocab(tokens: int, device_type: str) -> int:
    """How many entries of the vocabulary a chunk has, for so many tokens: a power of two.

    Not where a GPU keeps the logits, which then are made, and become a gradient, all at once.
    """
    logits = CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cuda"])
    return max(LEAST_CHUNK, 2 ** ((logits // max(tokens, 1)).bit_length() - 1))
