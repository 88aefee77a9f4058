"""Make a tiny Qwen2 with random weights, to try things out: python build_model.py OUT."""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(0)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # one token a byte
tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
model = Qwen2ForCausalLM(
    Qwen2Config(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=alphabet.index("$"),
        bos_token_id=None,
    )
)
model.save_pretrained(sys.argv[1])
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$").save_pretrained(sys.argv[1])
