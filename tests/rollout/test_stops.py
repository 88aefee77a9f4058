"""What ends an answer: found in tokenizer, generation_config.json and template, or configured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rollout_models import EOS, VOCAB
from tiny import run_config
from transformers import PreTrainedTokenizerBase

from megatron_gpc.config.schema import Config
from megatron_gpc.errors import UserError
from megatron_gpc.evaluate import evaluate
from megatron_gpc.rollout.sampler import sampler_of
from megatron_gpc.rollout.stops import end_of_turn, find_stops
from megatron_gpc.rollout.tokenizer import load_tokenizer

IM_END = 260
"""<|im_end|>; <|im_start|> is 259."""
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
CHATML = TURN + "<|im_end|>\n{% endfor %}"


@pytest.fixture
def folder(model_a: Path, tmp_path: Path) -> Path:
    """A model whose eos is another token than the one its turns end with."""
    folder = shutil.copytree(model_a, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Callable[..., Config]:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "500=", "label": 500}) + "\n")
    (tmp_path / "run").mkdir()
    return lambda *overrides: run_config(tmp_path, folder, *overrides)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, IM_END),
        (TURN + "  <|im_end|>{% endfor %}", IM_END),
        (TURN + "{{ eos_token }}{% endfor %}", EOS),
        # Phi-3 writes both where nothing is to follow
        (CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", IM_END),
        (TURN + "</turn>\n{% endfor %}", "</turn>"),
        (TURN + "</turn> <|im_end|>{% endfor %}", "</turn>"),
        (TURN + "\n\n{% endfor %}", None),
        (TURN + "{% endfor %}", None),
        ("{{ raise_exception('no system message') }}", None),
        ("no messages at all", None),
        ("{% for m in messages %}{{ m.content | lower }}<|im_end|>{% endfor %}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_puts_after_an_answer(tokenizer, template, end):
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer, {}) == end


def test_by_default_an_answer_ends_at_all_that_the_model_names(config, tokenizer, folder):
    stops = find_stops(config(), tokenizer, folder, VOCAB)
    assert stops.token_ids == (EOS, IM_END) and stops.strings == () and stops.sampling == {}
    assert stops.said == (
        "an answer ends at: '<eos>' (257, the tokenizer's eos), "
        "'<|im_end|>' (260, the chat template's end of turn)"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, EOS]}))
    stops = find_stops(config(), tokenizer, folder, VOCAB)
    assert stops.token_ids == (EOS, 256, IM_END)
    assert "257, the tokenizer's eos, generation_config.json" in stops.said
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    assert find_stops(config(), tokenizer, folder, VOCAB).token_ids == (EOS, 256, IM_END)


@pytest.mark.parametrize(
    ("given", "ids", "strings"),
    [
        ("7", (EOS, 7), ()),
        ("[7,<|im_start|>]", (EOS, 7, 259), ()),
        ("$", (EOS, 3), ()),  # a byte, and no other token has it inside
        ("</answer>", (EOS,), ("</answer>",)),
        ("[</answer>,<|im_end|>]", (EOS, IM_END), ("</answer>",)),
        ("a", (EOS,), ("a",)),  # <|im_start|> has it inside as well
        ("[]", (EOS,), ()),
    ],
)
def test_what_is_configured_takes_the_place_of_the_template(
    config, tokenizer, folder, given, ids, strings
):
    stops = find_stops(config(f"rollout.stop={given}"), tokenizer, folder, VOCAB)
    assert stops.token_ids == ids and stops.strings == strings
    assert all(repr(text) in stops.said for text in strings)
    assert stops.sampling == ({"stop": list(strings)} if strings else {})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.stop=264"], "rollout.stop: token 264 is outside the model's vocabulary"),
        (["rollout.stop=['']"], "rollout.stop: an empty string"),
        (["rollout.stop=</a>", "rollout.partial=true"], "rollout.partial=true: an answer cannot"),
    ],
)
def test_stops_that_cannot_be_are_refused(config, tokenizer, folder, overrides, says):
    with pytest.raises(UserError, match=says):
        find_stops(config(*overrides), tokenizer, folder, VOCAB)


def test_wrong_files_and_models_without_an_end_are_refused(config, tokenizer, folder):
    file = folder / "generation_config.json"
    for content, says in (
        ('{"eos_token_id": "<eos>"}', "must be a token's number or a list, got '<eos>'"),
        ('{"eos_token_id": [264]}', "generation_config.json: token 264 is outside"),
        ("{", "generation_config.json: cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=says):
            find_stops(config(), tokenizer, folder, VOCAB)
    file.unlink()
    with pytest.raises(UserError, match="the tokenizer's eos: token 257 is outside"):
        find_stops(config(), tokenizer, folder, 100)
    tokenizer.eos_token, tokenizer.chat_template = None, None
    with pytest.raises(UserError, match="set rollout.stop"):
        find_stops(config(), tokenizer, folder, VOCAB)


@pytest.mark.parametrize("bad", ["-1", "true", "1.5", "[[1]]"])
def test_a_stop_is_a_string_or_a_token(config, bad):
    with pytest.raises(UserError, match=r"rollout\.stop"):
        config(f"rollout.stop={bad}")


def test_training_and_evaluation_ask_for_the_same_ends_and_a_start_names_them(config, capfd):
    given = config("rollout.stop=[</answer>,<|im_end|>]")
    with sampler_of(given) as sampler:
        for collector in (sampler.collector, sampler.evaluator):
            assert collector.stop_token_ids == [EOS, IM_END]
            assert collector.sampling["stop"] == ["</answer>"]
    assert "an answer ends at: '<eos>' (257, the tokenizer's eos)" in capfd.readouterr().err


def test_eval_ends_answers_where_training_does(config, tmp_path, capfd):
    given = config(
        f"eval.prompts={tmp_path / 'prompts.jsonl'}",
        "eval.samples=64",
        "rollout.stop=[0,1,2,3,4,5,6,7,8,9,'0',ab]",
        "rollout.max_response_tokens=200",
    )
    _, found = evaluate(given, None, None)
    assert found["truncated"] < 0.2 and found["mean_tokens"] < 60
    assert "an answer ends at: " in capfd.readouterr().err
