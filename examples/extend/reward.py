"""A reward of your own: is the last number of the answer the label, and how wordy is it?

data:
  prompts: prompts.jsonl
  verifier: reward.py:last_number
  verifier_arguments: {per_word: 0.001}
"""

import re


def last_number(text, label, prompt, per_word=0.0):
    """`prompt` has .text, .messages and .row; leave it out if you do not need it."""
    words = len(text.split())
    if "max_words" in prompt.row:  # any other field of the prompt's line
        words = max(0, words - prompt.row["max_words"])
    numbers = re.findall(r"-?\d+", text)
    right = bool(numbers) and int(numbers[-1]) == int(label)
    return {"reward": right - per_word * words, "right": right, "words": words}
