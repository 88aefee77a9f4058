"""Inputs that cannot be: every one is refused with code 2 and one line that names it.

A row is (what is done to a job that could start, what the line says).  Nothing is left behind.  How
many inputs were tried, and what became of them, is said at the end (conftest.py).
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import threading
from pathlib import Path

import jinja2
import pytest
import torch
from damage import rewrite_tensors
from hostile.outcomes import CONFIG, DEEP, DEEP_OBJECT, Change, refused, saying
from tools.tool_scripts import call
from unit.test_preflight import Job, job, start  # noqa: F401 - fixtures

from megatron_gpc.cli import main
from megatron_gpc.rollout import tokenizer
from megatron_gpc.weights.hf_files import SINGLE


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def write_index(model: Path, content: object) -> None:
    (model / SINGLE).unlink()
    (model / f"{SINGLE}.index.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


NUMBERS = {
    "seed": ("18446744073709551616", "-1", "1e300", ".nan", "[1]"),
    "train.steps": ("1000000000000000000000000000000", "1e308", "0", ".inf"),
    "rollout.group_size": ("1000000000000", "1"),
    "rollout.prompts_per_step": ("1000000000000",),
    "rollout.server.engines": ("1000000000",),
    "rollout.server.retries": ("1000000",),
    "rollout.server.max_in_flight": ("1000000000000",),
    "rollout.server.bucket_mb": ("1000000000",),
    "rollout.refill_limit": ("1e300", ".inf", "0.5"),
    "rollout.oversample": ("1e300",),
    "rollout.temperature": ("1e300", "1e-320", ".nan", "0"),
    "rollout.max_response_tokens": ("1000000000000", "129"),
    "eval.samples": ("1000000000000",),
    "eval.max_response_tokens": ("500",),
    "optim.lr": ("1e308", ".inf", "5e-324"),
    "optim.weight_decay": ("1e300",),
    "clip.eps_high": ("1e300",),
    "clip.hi_slope": ("-1e300",),
    "timeout_s": ("1e300", ".nan"),
    "guard.silent_minutes": ("1e8",),
    "parallel.tp": ("1000000000",),
    "train.entropy_coef": ("1e300",),
}
LEAVES = (
    "import os\nclass Own:\n    def __init__(self, *given): os._exit(0)\n"
    "    def write(self, step, values): pass\n"
    "    def write_evaluation(self, step, values): pass\n    def close(self, ok): pass\n"
)
"""A part that would end whoever tries it, with 0."""


def own_part(j: Job, override: str, text: str) -> None:
    """Give it a part of the user's; FILE stands for its file."""
    (j.folder / "own.py").write_text(text)
    j.overrides.append(override.replace("FILE", f"{j.folder}/own.py"))


INPUTS: dict[str, tuple[Change, str]] = {
    **{
        f"{key}: ends the process{where}": (
            lambda j, override=f"{key}=FILE:Own", text=text: own_part(j, override, text),
            f"{key}: ",
        )
        for key in ("data.verifier", "train.loss", "clip.schedule", "log.sinks")
        for where, text in {"": LEAVES, " at import": "import os\nos._exit(0)\n"}.items()
    },
    **{
        f"{key}={value}": (saying(f"{key}={value}"), key)
        for key, values in NUMBERS.items()
        for value in values
    },
    **{
        f"{key}={path[:20]}": (saying("kl.coef=0.1", f"{key}={path}"), key)
        for key in (
            *("run_dir", "model.hf", "data.prompts", "eval.prompts", "kl.reference"),
            *("rollout.replay", "rollout.server.urls_file", "rollout.server.api_key_file"),
        )
        for path in ("/dev/null/x", "x" * 256, "x/" * 3000)
        if (key, path) != ("rollout.server.urls_file", "/dev/null/x")  # it may come later
    },
    **{
        f"index: {says}": (lambda j, index=index: write_index(j.model, index), says)
        for says, index in {
            "expected a JSON object": [1],
            "no weight_map": {},
            "weight_map must be a mapping": {"weight_map": None},
            "1 is not the name of a file": {"weight_map": {"a": 1}},
            "which is absent": {"weight_map": {"a": "x"}},
            "'../x' is not the name": {"weight_map": {"a": "../x"}},
            "'/dev/zero' is not the name": {"weight_map": {"a": "/dev/zero"}},
            "'' is not the name": {"weight_map": {"a": ""}},
            "xx is not the name": {"weight_map": {"a": "x" * 5000}},
            "'\\ud800' is not the name": {"weight_map": {"a": "\ud800"}},
            "'a' is given twice": '{"weight_map": {"a": "x", "a": "y"}}',
        }.items()
    },
    "processes": (saying("parallel.tp=2048", "parallel.pp=2048"), "parallel.tp * pp * cp * dp"),
    **{
        f"sglang.environment: {name!r}={value}": (
            saying(f"sglang.environment={json.dumps({name: value})}"),
            "sglang.environment",
        )
        for name, value in {"a=b": "1", "": "1", "a b": "1", "a": "\0", "é": "1", "b": [1]}.items()
    },
    "samples of a step": (
        saying("rollout.prompts_per_step=1000000", "rollout.group_size=1000"),
        "rollout.prompts_per_step * group_size",
    ),
    "a name with a dot beside a shorter one": (
        saying("sglang.args={'': null, '.': null}"),
        "sglang.args..: '' holds None also",
    ),
    **{
        f"a sink that fails: {says}": (
            lambda j, text=text: own_part(
                j,
                "log.sinks=[jsonl, FILE:Own]",
                f"class Own:\n    def __init__(self, run_dir, config, step):\n        {text}\n"
                "    def write(self, step, values): pass\n"
                "    def write_evaluation(self, step, values): pass\n"
                "    def close(self, ok): pass\n",
            ),
            f"own.py:Own failed at its start: {says}",
        )
        for says, text in {
            "ValueError": "raise ValueError('no')",
            "SystemExit": "raise SystemExit(0)",
            "KeyError": "config['sglang']['environment']",
            "OSError": "raise OSError(28, 'No space left')",
            "FileNotFoundError": "open(run_dir / 'absent')",
        }.items()
    },
    "half a character in a name": (
        saying('log.sinks_arguments={"\\ud800": {}}'),
        "has half of a character",
    ),
    "a NUL alone": (saying('run_dir="\\0"'), "run_dir: '\\x00' cannot be a path"),
    **{
        f"urls_file: {text}": (
            lambda j, text=text: (
                (j.folder / "urls").write_text(text),
                j.overrides.append(f"rollout.server.urls_file={j.folder / 'urls'}"),
            ),
            "expected one address a line",
        )
        for text in ("http://h:99999", "http://[::1", "http://", "ftp://h", "http://h:-1", "", "h")
    },
    "urls_file: a pipe": (
        lambda j: (
            pipe(j.folder / "urls"),
            j.overrides.append(f"rollout.server.urls_file={j.folder / 'urls'}"),
        ),
        "is no regular file",
    ),
    "key file: a pipe": (
        lambda j: (
            pipe(j.folder / "key"),
            j.overrides.append(f"rollout.server.api_key_file={j.folder / 'key'}"),
        ),
        "api_key_file",
    ),
    "sglang.python: no Python": (
        saying("rollout.server.kind=sglang", "sglang.python=/bin/true"),
        "is no Python that runs",
    ),
    **{
        f"{name}: a file": (
            lambda j, name=name: (j.run_dir.mkdir(), (j.run_dir / name).write_text("x")),
            f"run/{name} is a file",
        )
        for name in ("logs", "tensorboard", "checkpoints", "samples", "skipped", "sync")
    },
    **{
        f"{name}: a folder": (
            lambda j, name=name: (j.run_dir / name).mkdir(parents=True),
            f"run/{name} is a folder",
        )
        for name in ("config.yaml", "metrics.jsonl", "eval.jsonl", "lock")
    },
    "metrics.jsonl: damaged": (
        lambda j: (j.run_dir.mkdir(), (j.run_dir / "metrics.jsonl").write_text("x\n")),
        "metrics.jsonl, line 1",
    ),
    **{
        f"{file}: {kind}": (lambda j, file=file, write=write: write(j.model / file), file)
        for file in ("config.json", "generation_config.json", "tokenizer_config.json", SINGLE)
        for kind, write in {
            "a list": lambda f: f.write_text("[1]"),
            "deep": lambda f: f.write_text(DEEP_OBJECT),
            "a pipe": pipe,
            "binary": lambda f: f.write_bytes(b"\xff\xfe\x00"),
            "a number of 5000 digits": lambda f: f.write_text('{"eos_token_id": ' + "9" * 5000),
        }.items()
        if (file, kind) != ("tokenizer_config.json", "binary")
    },
    "tokenizer.json: a pipe": (lambda j: pipe(j.model / "tokenizer.json"), "is no regular file"),
    **{
        f"config.json: {key}={value!r:.20}": (
            lambda j, key=key, value=value: j.change("config.json", **{key: value}),
            key,
        )
        for key, values in {
            "num_hidden_layers": (10**9, 0, -1, 1.5, "2", [1], True, 10**400),
            "hidden_size": (10**12, "x", {}),
            "vocab_size": (10**30, -5),
            "max_position_embeddings": (10**20, "64"),
            "rms_norm_eps": (-1.0, "a", 10**400),
            "eos_token_id": (256, -1, [36, 10**9], "x", [[1]]),
            "tie_word_embeddings": ("yes", 1),
            "num_attention_heads": (10**10,),
        }.items()
        for value in values
    },
    "rope_theta below 0": (
        lambda j: j.change(
            "config.json",
            rope_theta=None,
            rope_parameters={"rope_type": "default", "rope_theta": -1},
        ),
        "rope_theta",
    ),
    "rope_type a list": (
        lambda j: j.change("config.json", rope_parameters={"rope_type": [], "rope_theta": 1e4}),
        "rope type",
    ),
    **{
        f"weights: {value}": (
            lambda j, value=value: rewrite_tensors(
                j.model, lambda t: t["model.norm.weight"].view(-1).__setitem__(3, value)
            ),
            "tensor model.norm.weight holds nan or infinity",
        )
        for value in (float("nan"), float("inf"))
    },
    **{
        f"label: {label!r:.20}": (
            lambda j, label=label: j.prompts.write_text(
                json.dumps({"prompt": "1+1=", "label": 2})
                + "\n"
                + json.dumps({"prompt": "1+1=", "label": label})
            ),
            "prompts.jsonl:2: label ",
        )
        for label in (None, {"target": 500}, "500", [5], 1, 0, -3, 2.5, True, 10**30)
    },
    **{
        f"label of math: {label!r}": (
            lambda j, label=label: (
                j.overrides.append("data.verifier=math"),
                j.prompts.write_text(json.dumps({"prompt": "1+1=", "label": label})),
            ),
            "prompts.jsonl:1: label ",
        )
        for label in (None, {}, [], "", " ", True)
    },
    **{
        f"prompts: {line}": (
            lambda j, line=line: j.prompts.write_text('{"prompt": "1+1=", "label": 2}\n' + line),
            f"prompts.jsonl:2: not JSON: {says}",
        )
        for line, says in {
            '{"prompt": "a", "label": 2, "label": 3}': "'label' is given twice",
            '{"prompt": "a", "label": 2, "x": [{"a": 1, "a": 1}]}': "'a' is given twice",
            '{"prompt": "a", "label": NaN}': "NaN is no finite number",
            '{"prompt": "a", "label": [-Infinity]}': "-Infinity is no finite number",
            '{"prompt": "a", "label": 1e999}': "1e999 is no finite number",
            '{"prompt": "a", "label": 2, "x": Infinity}': "Infinity is no finite number",
        }.items()
    },
    **{
        f"{name}: a key twice": (
            lambda j, name=name: (j.model / name).write_text(
                '{"eos_token_id": 1, "eos_token_id": 2}'
            ),
            f"{name}: cannot be read as JSON: 'eos_token_id' is given twice",
        )
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    },
    **{
        f"config.json: {key}={dtype!r}": (
            lambda j, key=key, dtype=dtype: j.change("config.json", **{"dtype": None, key: dtype}),
            f"config.json: dtype={dtype!r}: expected bfloat16, float16, float32",
        )
        for key in ("dtype", "torch_dtype")
        for dtype in ("auto", "torch.bfloat16", "bf16", "half", "float64", "", 16, ["float32"])
    },
    "prompts: a book": (
        lambda j: j.ask("1+1=", "a" * 10**7),
        "prompts.jsonl:2: the prompt has 10000000 characters",
    ),
    "prompts: deep": (lambda j: j.prompts.write_text(DEEP), "prompts.jsonl:1: not JSON"),
    "prompts: a pipe": (lambda j: pipe(j.prompts), "is no regular file"),
    "a surrogate in a message": (
        lambda j: (
            j.template("{{ messages[0].content }}"),
            j.ask([{"role": "u", "content": "\ud800"}]),
        ),
        "prompts.jsonl:1: the prompt is no valid text",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_dry_run_refuses_what_cannot_be(job, capsys, name):  # noqa: F811
    change, says = INPUTS[name]
    change(job)
    before = sorted(job.folder.rglob("*"))
    refused(capsys, says, lambda: job.command("train", "--dry-run"))
    assert sorted(job.folder.rglob("*")) == before


HARMLESS = {"architectures", "transformers_version"}
"""Keys of config.json that nobody reads."""


def test_no_key_of_config_json_takes_what_is_no_value_of_it(job, capsys):  # noqa: F811
    whole = (job.model / "config.json").read_text()
    values = itertools.cycle(["x", [[]], {"x": 1}])
    for key, value in zip(sorted({*json.loads(whole)} - HARMLESS), values, strict=False):
        (job.model / "config.json").write_text(whole)
        job.change("config.json", **{key: value})
        says = "rope" if key == "rope_parameters" else key
        refused(capsys, says, lambda: job.command("train", "--dry-run"))


WORDS = [
    (["status", "{run}", "--lead", "nan"], "--lead"),
    (["status", "{run}", "--lead", "-1"], "--lead"),
    (["status", "a\0b"], "NUL"),
    (["status", "/nowhere"], "/nowhere"),
    (["samples", "{run}", "--limit", "-5"], "--limit"),
    (["samples", "{run}", "--step", "-1"], "--step"),
    (["samples", "{run}", "--step", "9" * 400], "--step"),
    (["doctor", "--port", "99999"], "--port"),
    (["doctor", "--port", "x"], "--port"),
    (["doctor", "--timeout", "nan"], "--timeout"),
    (["doctor", "--timeout", "1e300"], "--timeout"),
    (["plot", "/nowhere"], "/nowhere"),
    *(([command, "x" * 256], "xxx") for command in ("train", "status", "samples", "plot", "eval")),
    (["samples", "/nowhere"], "/nowhere is no folder; give the folder of a run"),
    (["samples", "{run}"], "has none; a run saves them with rollout.save_samples=true"),
    (["convert"], "convert what?; there are convert hf-to-megatron, convert megatron-to-hf"),
    (["convert", "x"], "there is no command 'convert x'; there are convert hf-to-megatron"),
    (["train"], "config"),
    (["nothing"], "nothing"),
]


@pytest.mark.parametrize(("words", "says"), WORDS, ids=lambda value: str(value)[:40])
def test_words_that_cannot_be_are_refused(tmp_path, capsys, words, says):
    refused(capsys, says, lambda: main([word.format(run=tmp_path) for word in words]))


OUTS = {
    "convert prompts": ("--data", "{job.prompts}", "--label", "label", "--out", "{out}"),
    "plot": ("{job.run_dir}", "--out", "{out}"),
    "plot and record": ("{job.run_dir}", "--record", "{out}"),
    "init": ("{out.parent}",),
    "convert hf-to-megatron": ("--hf", "{job.model}", "--out", "{out}"),
}


@pytest.mark.parametrize("what", ["a file", "a link to nothing", "a pipe"])
@pytest.mark.parametrize("name", OUTS)
def test_no_command_writes_over_what_is_there(job, capsys, name, what):  # noqa: F811
    out, aim = job.folder / "out" / "config.yaml", job.folder / "aim"
    out.parent.mkdir()
    if what == "a file":
        out.write_text("mine")
    elif what == "a pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(aim)
    words = [word.format(job=job, out=out) for word in OUTS[name]]
    command = name.removesuffix(" and record").split()
    refused(capsys, str(out), lambda: main([*command, *words]))
    assert not aim.exists() and os.listdir(out.parent) == [out.name]
    assert out.is_symlink() or out.is_fifo() or out.read_text() == "mine"


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "1e300", "x"])
def test_a_size_of_shards_that_cannot_be_is_refused(tmp_path, capsys, value):
    words = ("--checkpoint", tmp_path, "--out", tmp_path / "out", "--max-shard-gb", value)
    refused(capsys, "--max-shard-gb", lambda: call("convert_megatron_to_hf", *words))


LINES = {
    "400 digits": '{"step": 1, "loss": ' + "9" * 400 + "}",
    "5000 digits": '{"step": 1, "loss": ' + "9" * 5000 + "}",
    "deep": '{"step": ' + DEEP,
    "a step of 400 digits": '{"step": ' + "9" * 400 + "}",
    "a step below 0": '{"step": -1}',
    "text": '{"step": 1, "loss": "x"}',
    "a list": "[1]",
    "a surrogate": '{"step": 1, "loss": "\\ud800"}',
}


@pytest.mark.parametrize("command", ["status", "plot"])
@pytest.mark.parametrize("name", LINES)
def test_metrics_that_cannot_be_are_refused(tmp_path, capsys, name, command):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_text(LINES[name] + "\n")
    refused(capsys, "metrics.jsonl, line 1", lambda: main([command, str(tmp_path)]))


@pytest.mark.parametrize(
    "text", ["[" * 500, "\x00", "train: {steps: .inf}", "a: 1", "[1]", CONFIG + "x: [", ""]
)
def test_a_damaged_configuration_of_a_run_is_refused(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("")
    for command in ("status", "plot"):
        refused(capsys, "config.yaml", lambda command=command: main([command, str(tmp_path)]))


@pytest.mark.parametrize(
    "text",
    [DEEP, "[]", "{}", '{"message": 1}', '{"message": {"extraInfo": {"timestamp": "x"}}}', "\x00"]
    + ['{"message": {"extraInfo": {"timestamp": ' + "9" * 400 + ', "py_callstack": "a"}}}'],
)
def test_a_damaged_traceback_is_passed_over(tmp_path, capsys, text):
    (tmp_path / "rank_0.error.json").write_text(text)
    words = ["status", str(tmp_path), "--traceback"]
    refused(capsys, "no rank left a traceback", lambda: main(words))


def test_a_folder_whose_name_is_nearly_a_steps_is_no_checkpoint(job, capsys):  # noqa: F811
    for name in ("step_²", "step_٣", "step_" + "9" * 100, "step_-1", "step_"):
        (job.run_dir / "checkpoints" / name).mkdir(parents=True)
    assert job.command("train", "--dry-run") == 0
    (job.run_dir / "config.yaml").write_text(CONFIG)
    assert main(["status", str(job.run_dir)]) == 0
    assert "newest checkpoint: none" in capsys.readouterr().out


def test_a_verifier_of_the_users_may_check_labels(job, capsys):  # noqa: F811
    (job.folder / "own.py").write_text(
        "def judge(text, label): return 0.0\n"
        "def check(label):\n    assert label == 3, 'not three'\n"
        "judge.check_label = check\n"
    )
    job.overrides.append(f"data.verifier={job.folder}/own.py:judge")
    refused(capsys, "prompts.jsonl:1: label 2 can", lambda: job.command("train", "--dry-run"))


def test_a_chat_template_without_an_end_is_refused(job, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tokenizer, "RENDER_S", 0.3)
    loop = "{% for i in range(99999) %}"
    job.template(f"{loop}{loop}{{% endfor %}}{{% endfor %}}")
    refused(capsys, "it has not ended after 0.3 s", lambda: job.command("train", "--dry-run"))


HUGE = {
    "a product": ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
    "a width": ("{{ 'a'.ljust(10 ** 11) }}", "MemoryError"),
    "a format": ("{{ '%99999999999d' % 1 }}", "Error"),
    "doubled": (
        "{% set ns = namespace(x='aaaa') %}"
        "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "MemoryError",
    ),
    "a long text": ("{{ 'a' * 10 ** 8 }}", "the prompt has 100000000 characters"),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_chat_template_that_would_fill_the_memory_is_refused(job, capsys, name):  # noqa: F811
    text, says = HUGE[name]
    job.template(text)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    refused(capsys, says, lambda: job.command("train", "--dry-run"))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_chat_template_has_its_deadline_in_a_thread_too(monkeypatch):
    monkeypatch.setattr(tokenizer, "RENDER_S", 0.2)
    found: list[str] = []

    def render() -> None:
        loop = "{% for i in range(99999) %}"
        text = jinja2.Template(f"{loop}{loop}{{% endfor %}}{{% endfor %}}")
        try:
            with tokenizer.rendering():
                text.render()
        except TimeoutError as error:
            found.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert found == ["it has not ended after 0.2 s"]


@pytest.mark.parametrize("name", ["config.json: deep", "config.json: a pipe", "weights: nan"])
def test_conversion_refuses_the_same(job, capsys, name):  # noqa: F811
    change, says = INPUTS[name]
    change(job)
    out = job.folder / "out"
    words = ("--hf", job.model, "--out", out)
    refused(capsys, says, lambda: call("convert_hf_to_megatron", *words))
    assert not out.exists()


def test_weights_that_are_nan_behind_the_beginning_are_refused_when_they_are_read(tmp_path):
    from safetensors.torch import save_file

    from megatron_gpc.errors import UserError
    from megatron_gpc.weights.hf_files import HFReader

    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / SINGLE)
    with pytest.raises(UserError, match="tensor a holds nan"):
        HFReader(tmp_path).get("a")
