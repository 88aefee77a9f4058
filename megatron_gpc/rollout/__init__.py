"""Rollouts: prompts go to an inference server, checked samples come back.

`client` talks to any server with SGLang's HTTP interface.  `server` (with `engine`, `cache`,
`sampling`, `sequence`, `loading`) is a small one of our own for tests and small machines, and
`launcher` starts it.  Only `server` and what belongs to it import torch.
"""
