"""What is refused before anything starts: by `train`, `--dry-run`, `doctor`, `eval`, `serve` and
tools/estimate_memory.py alike, in one line, with nothing touched."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from common_part import common
from damage import cut
from tiny import byte_tokenizer, run_config, tiny_qwen2
from tools.tool_scripts import call

from megatron_gpc.cli import main
from megatron_gpc.config.file import load
from megatron_gpc.doctor.plan import plan
from megatron_gpc.engines.keys import write_secret
from megatron_gpc.errors import UserError
from megatron_gpc.rollout.prompt_reader import PromptReader, context_length
from megatron_gpc.rollout.prompts import PromptSource
from megatron_gpc.types import TrainState
from megatron_gpc.weights.folders import read_hf_config
from megatron_gpc.weights.hf_files import SINGLE

CONTEXT, RESPONSE = 128, 8
"""Of the model, and rollout.max_response_tokens."""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 128 positions whose tokens are the 256 bytes."""
    folder = tmp_path_factory.mktemp("start")
    tiny_qwen2(folder, vocab_size=256, num_hidden_layers=1, max_position_embeddings=CONTEXT)
    return byte_tokenizer(folder, chat_template=TEMPLATE)


class Job:
    """A run that could start: a model, prompts, held-out prompts, a configuration."""

    def __init__(self, folder: Path, start: Path):
        self.folder, self.model, self.run_dir = folder, folder / "model", folder / "run"
        shutil.copytree(start, self.model)
        self.prompts, self.held_out = folder / "prompts.jsonl", folder / "held_out.jsonl"
        self.ask("1+1=")
        self.held_out.write_text('{"prompt": "2+2=", "label": 4}\n')
        run_config(folder, self.model)
        self.config = folder / "config.yaml"
        self.overrides = [f"eval.prompts={self.held_out}", "eval.samples=2"]

    def ask(self, *prompts: object, file: Path | None = None) -> None:
        rows = [json.dumps({"prompt": prompt, "label": 2}) for prompt in prompts]
        (file or self.prompts).write_text("\n".join(rows))

    def template(self, text: object) -> None:
        """Make it the chat template, and the second prompt a list of messages."""
        if isinstance(text, str):
            (self.model / "chat_template.jinja").write_text(text)
        else:
            (self.model / "chat_template.jinja").unlink()
            self.change("tokenizer_config.json", chat_template=text)
        self.ask("1+1=", [{"role": "user", "content": "2+2?"}])

    def change(self, name: str, **values: object) -> None:
        """Change a JSON file of the model's."""
        content = json.loads((self.model / name).read_text())
        (self.model / name).write_text(json.dumps({**content, **values}))

    def command(self, *words: str) -> int:
        name, *options = words
        return main([name, str(self.config), *self.overrides, *options])


@pytest.fixture
def job(start: Path, tmp_path: Path) -> Iterator[Job]:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    yield Job(tmp_path, start)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def to_parquet(file: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1="], "label": [2]}), file)


def as_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def tokenizer_without(job: Job, *patterns: str) -> None:
    for pattern in patterns:
        for file in job.model.glob(pattern):
            file.unlink()


LONG = f"prompts.jsonl:2: the prompt has {{}} tokens, and {CONTEXT - RESPONSE} fit"
PROMPTS: dict[str, tuple[Callable[[Job], object], str]] = {
    "longer than the context": (lambda j: j.ask("a", "b" * 131), LONG.format(131)),
    "no room for the response": (lambda j: j.ask("a", "b" * 123), LONG.format(123)),
    "much longer, as messages": (
        lambda j: j.ask("a", [{"role": "user", "content": "b" * 2000}]),
        LONG.format(2006),
    ),
    "several too long": (lambda j: j.ask("a", *["b" * 130] * 3), "and 2 more prompts are too long"),
    "longer than the user wants": (
        lambda j: (j.ask("a", "b" * 5), j.overrides.append("data.max_prompt_tokens=4")),
        "prompts.jsonl:2: the prompt has 5 tokens, and 4 fit (data.max_prompt_tokens=4)",
    ),
    "nothing left": (
        lambda j: (j.ask("b" * 121), j.overrides.append("data.too_long=drop")),
        "no prompts are left",
    ),
    "a response as long as the context": (
        lambda j: j.overrides.append("rollout.max_response_tokens=128"),
        "no prompt fits: rollout.max_response_tokens=128, max_position_embeddings=128",
    ),
    "bad JSON": (lambda j: j.prompts.write_text('{"prompt": "a", "label": 1}\n{'), ":2: not JSON"),
    "empty": (lambda j: j.prompts.write_text("\n \n"), "no prompts in it"),
    "other columns": (
        lambda j: j.prompts.write_text('{"question": "a", "answer": 1}'),
        'prompts.jsonl:1: expected an object with "prompt"',
    ),
    "no label": (lambda j: j.prompts.write_text('{"prompt": "a"}'), "jsonl:1: expected an object"),
    "empty text": (lambda j: j.ask("a", ""), ":2: the prompt has no tokens"),
    "half a character": (lambda j: j.ask("a", "\ud800"), ":2: the prompt is no valid text"),
    "Parquet": (lambda j: to_parquet(j.prompts), "is a Parquet file; make JSON lines of it"),
    "Latin-1": (
        lambda j: j.prompts.write_bytes(b'{"prompt": "a", "label": 1}\n"\xe9"'),
        ":2: cannot read",
    ),
    "absent": (lambda j: j.prompts.unlink(), "prompts: "),
    "a folder": (lambda j: as_folder(j.prompts), "prompts.jsonl is a folder; name a file"),
    "messages without a role": (
        lambda j: j.ask("a", [{"content": "hi"}]),
        ":2: expected an object with",
    ),
    "messages in parts": (
        lambda j: j.ask("a", [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
        ":2: expected an object with",
    ),
    "no messages": (lambda j: j.ask("a", []), ":2: expected an object with"),
    "no template": (
        lambda j: (j.template(TEMPLATE), tokenizer_without(j, "chat_template.jinja")),
        "prompts.jsonl:2: the prompt is a list of messages, but",
    ),
    "template: syntax": (lambda j: j.template("a\n{% if %}"), "(line 2 of the template)"),
    "template: undefined": (
        lambda j: j.template("a\n\n{{ messages[0].name.first }}"),
        "UndefinedError: 'dict object' has no attribute 'name' (line 3 of the template)",
    ),
    "template: its own refusal": (
        lambda j: j.template("{{ raise_exception('no\nsystem') }}"),
        "prompts.jsonl:2: the chat template in",
    ),
    "template: wrong types": (lambda j: j.template("{{ messages + 1 }}"), "TypeError: "),
    "template: division": (lambda j: j.template("{{ 1 // 0 }}"), "ZeroDivisionError: "),
    "template: endless": (
        lambda j: j.template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "RecursionError",
    ),
    "template: nothing": (lambda j: j.template("{% if false %}{% endif %}"), "makes nothing of"),
    "template: no text": (lambda j: j.template({"tools": "a"}), "prompts.jsonl:2: the chat templ"),
    "template: a number": (lambda j: j.template(7), "the chat template in"),
    "template: binary": (
        lambda j: (j.template("a"), (j.model / "chat_template.jinja").write_bytes(b"\xff\x00")),
        "cannot load the tokenizer: UnicodeDecodeError",
    ),
    "template: variables that collide": (
        lambda j: j.overrides.append("data.chat_template={messages: 1}"),
        "data.chat_template: messages cannot be set",
    ),
    "stop: beyond the vocabulary": (
        lambda j: j.overrides.append("rollout.stop=[256]"),
        "rollout.stop: token 256 is outside the model's vocabulary, 0 to 255",
    ),
    "stop: the model's own, beyond the vocabulary": (
        lambda j: (j.model / "generation_config.json").write_text('{"eos_token_id": [36, 999]}'),
        "generation_config.json: token 999 is outside the model's vocabulary",
    ),
    "stop: generation_config.json damaged": (
        lambda j: (j.model / "generation_config.json").write_text("{"),
        "generation_config.json: cannot be read",
    ),
    "tokenizer: none": (lambda j: tokenizer_without(j, "tokenizer*"), "has no tokenizer"),
    "tokenizer: damaged": (
        lambda j: (j.model / "tokenizer.json").write_text('{"version": "1.0"}'),
        "cannot load the tokenizer: ",
    ),
    "tokenizer: cut": (lambda j: cut(j.model / "tokenizer.json", 900), "cannot load the tokenizer"),
    "tokenizer: its configuration damaged": (
        lambda j: (j.model / "tokenizer_config.json").write_text("{"),
        "cannot load the tokenizer",
    ),
}
WITHOUT_PROMPTS: dict[str, tuple[Callable[[Job], object], str]] = {
    "no config.json": (lambda j: (j.model / "config.json").unlink(), "no config.json"),
    "weights: cut": (lambda j: cut(j.model / SINGLE, 9000), "truncated"),
    "weights: header cut": (lambda j: cut(j.model / SINGLE, 100), "truncated"),
    "weights: none": (lambda j: (j.model / SINGLE).unlink(), "has neither model.safetensors"),
    "weights: another model's": (
        lambda j: j.change("config.json", intermediate_size=65),
        "but config.json says",
    ),
    "weights: a damaged index": (
        lambda j: (
            (j.model / SINGLE).unlink(),
            (j.model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
        ),
        "index.json names b (for a), which is absent",
    ),
    "a layout that does not divide": (
        lambda j: j.overrides.append("parallel.tp=3"),
        "parallel.tp=3 does not divide",
    ),
    "more ranks than samples": (
        lambda j: j.overrides.extend(["parallel.dp=256", "rollout.prompts_per_step=32"]),
        "parallel.dp=256 is more than the 128 samples of a mini-batch",
    ),
    "run_dir: in /proc": (lambda j: j.overrides.append("run_dir=/proc/x"), "run_dir: /proc/x"),
    "run_dir: a file": (
        lambda j: j.overrides.append(f"run_dir={j.prompts}"),
        "prompts.jsonl is a file",
    ),
    "run_dir: below a file": (
        lambda j: j.overrides.append(f"run_dir={j.prompts}/run"),
        "prompts.jsonl is a file",
    ),
    "run_dir: a name too long": (
        lambda j: j.overrides.append(f"run_dir={'x' * 300}"),
        "is too long",
    ),
    "run_dir: a link to nothing": (
        lambda j: j.run_dir.symlink_to("nowhere"),
        "is a link to nothing",
    ),
    "model.hf: a file": (lambda j: j.overrides.append(f"model.hf={j.prompts}"), "is a file"),
    "model.hf: absent": (lambda j: j.overrides.append("model.hf=/nowhere"), "is not there"),
    "model.build: absent": (
        lambda j: j.overrides.extend(["model.hf=/nowhere", "model.build=/nowhere.py"]),
        "model.build: /nowhere.py is not there",
    ),
    "model.build: a folder": (
        lambda j: j.overrides.extend(["model.hf=/nowhere", f"model.build={j.model}"]),
        "is a folder; name a file",
    ),
    "a NUL": (lambda j: j.overrides.append('data.prompts="a\\0b"'), "data.prompts: 'a\\x00b' can"),
    "a NUL in a folder": (lambda j: j.overrides.append('run_dir="a\\0/b"'), "run_dir: 'a\\x00/b'"),
    "replay: absent": (
        lambda j: j.overrides.append("rollout.replay=/nowhere"),
        "rollout.replay: /nowhere is not",
    ),
    "replay: nothing saved": (
        lambda j: j.overrides.append(f"rollout.replay={j.folder}"),
        "has no samples of step 1",
    ),
    "routing replay: no experts": (
        lambda j: j.overrides.append("train.routing_replay=true"),
        "train.routing_replay=true needs a mixture of experts",
    ),
    "api key: absent": (
        lambda j: j.overrides.append("rollout.server.api_key_file=/nowhere"),
        "api_key_file: /now",
    ),
    "api key: a folder": (
        lambda j: j.overrides.append(f"rollout.server.api_key_file={j.model}"),
        "cannot be read",
    ),
    "api key: empty": (
        lambda j: (
            write_secret(j.folder / "key", "\n"),
            j.overrides.append(f"rollout.server.api_key_file={j.folder / 'key'}"),
        ),
        "is empty",
    ),
    "urls_file: a folder": (
        lambda j: j.overrides.append(f"rollout.server.urls_file={j.model}"),
        "is a folder",
    ),
    "clip.target: above ln V": (
        lambda j: j.overrides.extend(["clip.schedule=target", "clip.target=[[0,100%],[1,19.5]]"]),
        "clip.target: 19.5 nats; a policy of ",
    ),
    "baseline: absent": (
        lambda j: j.overrides.append("log.baseline=/nowhere"),
        "log.baseline: /no",
    ),
    "baseline: something else": (
        lambda j: j.overrides.append(f"log.baseline={j.prompts}"),
        "is no record of runs",
    ),
    "SGLang: not installed": (
        lambda j: j.overrides.extend(
            ["rollout.server.kind=sglang", f"sglang.python={sys.executable}"]
        ),
        "has no package sglang; set sglang.python to",
    ),
    "SGLang: no interpreter": (
        lambda j: j.overrides.extend(["rollout.server.kind=sglang", "sglang.python=/nowhere"]),
        "sglang.python: /nowhere cannot be run: No such file",
    ),
    "SGLang: a folder": (
        lambda j: j.overrides.extend(["rollout.server.kind=sglang", f"sglang.python={j.model}"]),
        "cannot be run: Permission denied",
    ),
}


def refused(job: Job, capsys: pytest.CaptureFixture[str], says: str, *words: str) -> None:
    before = sorted(job.folder.rglob("*"))
    assert job.command(*words) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and len(said.err) < 1000, said.err
    assert not said.out
    assert sorted(job.folder.rglob("*")) == before, "nothing was touched"


@pytest.mark.parametrize("name", [*PROMPTS, *WITHOUT_PROMPTS])
def test_train_dry_run_and_doctor_refuse_the_same(job, capsys, name):
    change, says = (PROMPTS | WITHOUT_PROMPTS)[name]
    change(job)
    refused(job, capsys, says, "train", "--dry-run")
    refused(job, capsys, says, "train")
    try:
        config = load(job.config, job.overrides)
    except UserError:  # doctor reads it the same way
        return
    found = list(plan(config, whole=True))
    assert [finding.status for finding in found] == ["problem"] and says in found[0].found


@pytest.mark.parametrize("name", PROMPTS)
def test_held_out_prompts_are_held_to_the_same_and_eval_refuses_them(job, capsys, name):
    change, says = PROMPTS[name]
    job.prompts, job.held_out = job.held_out, job.prompts
    change(job)
    job.overrides += [f"data.prompts={job.held_out}", f"eval.prompts={job.prompts}"]
    says = says.replace("prompts.jsonl", "held_out.jsonl")
    refused(job, capsys, says, "train", "--dry-run")
    refused(job, capsys, says, "eval")


def test_what_fits_to_the_last_token_is_accepted(job, capsys):
    job.ask("a" * (CONTEXT - RESPONSE))
    assert job.command("train", "--dry-run") == 0
    said = capsys.readouterr()
    assert "max_prompt_tokens: null" in said.out and "left out" not in said.err


def test_prompts_that_do_not_fit_can_be_left_out(job, capsys):
    job.ask("a", "b" * 121, "c", "d" * 999)
    job.ask("e" * 124, "f", file=job.held_out)
    job.overrides += ["data.too_long=drop", "eval.max_response_tokens=4"]
    assert job.command("train", "--dry-run") == 0
    said = capsys.readouterr().err
    assert "prompts.jsonl: 2 of 4 prompts are left out" in said and "line 2 has 121 tokens" in said
    assert "held_out.jsonl" not in said, "124 + 4 fit"
    reader = PromptReader(load(job.config, job.overrides), job.model)
    assert [(p.index, p.text) for p in reader.training()] == [(0, "a"), (1, "c")]
    assert [len(p.token_ids) for p in reader.held_out()] == [124, 1]
    notes = [f for f in plan(load(job.config, job.overrides), whole=True) if f.status == "note"]
    assert any("2 of 4 prompts are left out" in note.found for note in notes)


def test_prompts_other_than_those_of_the_run_so_far_are_refused_before_it_continues(job, capsys):
    job.ask("1+1=", "2+2=")
    so_far = PromptSource(PromptReader(load(job.config), job.model).training(), seed=0).digest
    folder = job.run_dir / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    state = TrainState(step=3, sampling={"prompts": so_far})
    torch.save(common() | {"train_state": dataclasses.asdict(state)}, folder / "common.pt")
    assert job.command("train", "--dry-run") == 0
    job.ask("2+2=", "1+1=")
    before = sorted(job.run_dir.rglob("*"))
    for command in (("train",), ("train", "--dry-run")):
        assert job.command(*command) == 2
        assert "does not have the prompts that this run was trained on" in capsys.readouterr().err
    assert sorted(job.run_dir.rglob("*")) == before
    for way_out in ("data.changed=accept", "resume=none"):
        assert job.command("train", "--dry-run", way_out) == 0
    (folder / "common.pt").write_bytes(b"damaged")
    assert job.command("train", "--dry-run") == 0, "which checkpoint counts is for resuming to say"


def test_a_token_beyond_the_vocabulary_is_an_error_also_where_prompts_may_be_left_out(
    start, tmp_path, capsys
):
    small = tiny_qwen2(tmp_path / "small", vocab_size=100, num_hidden_layers=1)
    job = Job(tmp_path, byte_tokenizer(small))
    job.ask("1+1=", "\u00ff")
    job.overrides.append("data.too_long=drop")
    capsys.readouterr()
    refused(job, capsys, "prompts.jsonl:2: the prompt has token", "train", "--dry-run")


ROPE = {
    "none": ({}, CONTEXT),
    "linear": ({"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}, 3 * CONTEXT),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, 4 * CONTEXT),
    "yarn with its original length": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        },
        CONTEXT,
    ),
}


@pytest.mark.parametrize("name", ROPE)
def test_the_context_is_what_the_engines_make_of_the_configuration(job, name):
    rope, sglangs = ROPE[name]
    hf = {**read_hf_config(job.model), "rope_parameters": rope or None, "rope_theta": 1e4}
    assert context_length(load(job.config), hf)[0] == CONTEXT, "the embedded server takes it as is"
    for remote in ("rollout.server.kind=sglang", "rollout.server.urls=http://10.0.0.1:1"):
        assert context_length(load(job.config, [remote]), hf)[0] == sglangs
    old = {**hf, "rope_parameters": None, "rope_scaling": rope or None}
    assert context_length(load(job.config, ["rollout.server.kind=sglang"]), old)[0] == sglangs


def test_sglangs_own_context_length_counts_if_it_would_start_with_it(job):
    hf = read_hf_config(job.model)

    def found(*arguments: str) -> int:
        config = load(job.config, ["rollout.server.kind=sglang", *arguments])
        return context_length(config, hf)[0]

    assert found("sglang.args.context_length=64") == 64
    assert found("sglang.args.context-length=64") == 64
    with pytest.raises(UserError, match="context_length=200 is more than max_position_embedd"):
        found("sglang.args.context_length=200")
    longer = "sglang.environment.SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1"
    assert found("sglang.args.context_length=200", longer) == 200
    with pytest.raises(UserError, match="expected a whole number, got 'long'"):
        found("sglang.args.context_length=long")


def test_a_port_that_is_in_use_is_refused_before_anything_starts(job, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job.overrides += [f"rollout.server.port={port - 1}", "rollout.server.engines=2"]
        says = f"rollout.server.port: nothing can listen on 127.0.0.1:{port} (Address already in"
        for words in (["train", "--dry-run"], ["train"], ["eval"]):
            refused(job, capsys, says, *words)
        job.overrides.append("rollout.server.urls=http://10.0.0.1:1")  # nothing is started then
        assert job.command("train", "--dry-run") == 0


@pytest.mark.parametrize("name", [n for n in WITHOUT_PROMPTS if n.startswith(("SGL", "api", "ur"))])
def test_eval_refuses_engines_that_cannot_start(job, capsys, name):
    change, says = WITHOUT_PROMPTS[name]
    change(job)
    refused(job, capsys, says, "eval")


SERVED = ("SGL", "api", "run_dir", "model.hf: a file", "weights")


@pytest.mark.parametrize("name", [n for n in WITHOUT_PROMPTS if n.startswith(SERVED)])
def test_serve_refuses_what_it_cannot_serve(job, capsys, name):
    change, says = WITHOUT_PROMPTS[name]
    job.overrides.append(f"rollout.server.urls_file={job.folder / 'urls'}")
    change(job)
    refused(job, capsys, says, "serve")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("no file", "rollout.server.urls_file: say where"),
        ("model", "is a folder; name a file"),
        ("prompts.jsonl/urls", "prompts.jsonl is a file; name a folder"),
    ],
)
def test_serve_refuses_a_file_for_addresses_that_it_cannot_write(job, capsys, file, says):
    if file != "no file":
        job.overrides.append(f"rollout.server.urls_file={job.folder / file}")
    refused(job, capsys, says, "serve")


def test_a_file_that_is_no_configuration_is_refused_in_one_line(job, capsys):
    to_parquet(job.folder / "p.parquet")
    broken = job.folder / "broken.yaml"
    broken.write_text("a: [1,\nb: {")
    for config, says in (
        (job.folder / "p.parquet", "p.parquet: is no text file"),
        (broken, "broken.yaml: not valid YAML: "),
        (job.model, "cannot be read: Is a directory"),
        (job.folder / "absent.yaml", "No such file"),
        (Path("a\0b"), "cannot be a path"),
        (job.prompts, "unknown key 'prompt'"),
    ):
        job.config = config
        for words in (["train", "--dry-run"], ["train"], ["eval"], ["serve"]):
            refused(job, capsys, says, *words)


def test_estimate_memory_refuses_a_layout_that_train_refuses(job, capsys):
    job.change("config.json", num_attention_heads=28, num_key_value_heads=4, hidden_size=112)
    assert call("estimate_memory", job.config, "parallel.tp=8") == 2
    assert "parallel.tp=8 does not divide the model's 28 attention heads" in capsys.readouterr().err
    assert call("estimate_memory", job.config, "parallel.dp=256") == 2
    assert "more than the 16 samples of a mini-batch" in capsys.readouterr().err
    assert call("estimate_memory", job.config, "parallel.tp=4") == 0


def test_a_model_that_a_script_makes_is_checked_once_it_is_there(job, capsys, tmp_path):
    """The script makes prompts too, of which one is too long; the run's folder is not made."""
    script, made = tmp_path / "build.py", tmp_path / "made"
    script.write_text(
        "import pathlib, shutil, sys\n"
        f"shutil.copytree({str(job.model)!r}, sys.argv[1])\n"
        "pathlib.Path(sys.argv[1], 'p.jsonl').write_text('{\"prompt\": \"' + 'a' * 200 + '\", "
        '"label": 1}\')\n'
    )
    job.overrides += [f"model.hf={made}", f"model.build={script}", f"data.prompts={made}/p.jsonl"]
    assert job.command("train", "--dry-run") == 0, "what is not there yet is taken on trust"
    assert not made.exists()
    capsys.readouterr()
    assert job.command("train") == 2
    assert "p.jsonl:1: the prompt has 200 tokens" in capsys.readouterr().err
    assert made.exists() and not job.run_dir.exists()
    refused(job, capsys, "p.jsonl:1: the prompt has 200 tokens", "train", "--dry-run")
