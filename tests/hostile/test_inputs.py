"""Inputs that cannot be: every one is refused with code 2 and one line that names it.

A row is (what is done to a job that could start, what the line says).  Nothing is left behind.  How
many inputs were tried, and what became of them, is said at the end (conftest.py).
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from damage import rewrite_tensors
from tools.tool_scripts import call
from unit.test_preflight import Job, job, start  # noqa: F401 - fixtures

from megatron_gpc.cli import main
from megatron_gpc.config.file import keys
from megatron_gpc.rollout import tokenizer
from megatron_gpc.rollout.samples import SavedStep, samples_file, write_samples
from megatron_gpc.types import Prompt, Sample
from megatron_gpc.weights.hf_files import SINGLE

DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 100_000
Change = Callable[[Job], object]
OUTCOMES: Counter[str] = Counter()


def saying(*overrides: str) -> Change:
    return lambda j: j.overrides.extend(overrides)


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
LEAVES = "import os\nclass Own:\n    def __init__(self, *given): os._exit(0)\n"
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
        for key in ("data.verifier", "train.loss", "clip.schedule")
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


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """No job of Slurm's or torchrun's around the tests."""
    for name in [*os.environ]:
        if name.startswith("SLURM") or name in VARIABLES:
            monkeypatch.setenv(name, "")  # so that what a command sets is undone
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")


def refused(capsys: pytest.CaptureFixture[str], says: str, run: Callable[[], int]) -> None:
    """`run` ends with code 2 and one line that says it; OUTCOMES counts what happens."""
    capsys.readouterr()
    outcome, code = "hang", None
    try:
        code = run()
        outcome = "wrong accept" if code == 0 else "unclear"
        said = capsys.readouterr()
        assert code == 2, (code, said.err)
        assert says in said.err and said.err.count("\n") == 1 and len(said.err) < 2000, said.err
        assert not said.out
        outcome = "refused well"
    except (Exception, SystemExit):
        outcome = outcome if code is not None else "traceback"
        raise
    finally:  # pytest's timeout is no Exception
        OUTCOMES[outcome] += 1


@pytest.mark.parametrize("name", INPUTS)
def test_a_dry_run_refuses_what_cannot_be(job, capsys, name):  # noqa: F811
    change, says = INPUTS[name]
    change(job)
    before = sorted(job.folder.rglob("*"))
    refused(capsys, says, lambda: job.command("train", "--dry-run"))
    assert sorted(job.folder.rglob("*")) == before


CANNOT = (".nan", "-1000000000000000000000000000000", "[[]]", "[{a: b}]")
"""Values that no key takes."""


@pytest.mark.parametrize("key", keys())
def test_no_key_takes_what_is_no_value_of_it(tmp_path, capsys, key):
    kind, text = keys()[key], str(keys()[key])
    words = [] if "str" in text or "Path" in text else ['"²"', '""']
    words += [] if kind is bool else ["true"]
    words += [] if "dict" in text else ["{a: b}"]
    file = tmp_path / "config.yaml"
    file.write_text("run_dir: run\nmodel: {hf: m}\ndata: {prompts: p, verifier: addition}\n")
    for value in (*CANNOT, *words):
        command = ["train", str(file), f"{key}={value}", "--dry-run"]
        refused(capsys, key, lambda command=command: main(command))


LAUGHS = "x: &a [a, a, a, a, a, a, a, a]\n" + "".join(
    f"x{n}: &{n} [{', '.join([f'*{n - 1 if n else chr(97)}'] * 8)}]\n" for n in range(10)
)
YAMLS = {
    "laughs": (LAUGHS, "not valid YAML: its aliases stand for more than"),
    "laughs as arguments": (f"{LAUGHS}sglang: {{args: {{y: *9}}}}", "its aliases stand for more"),
    "no end": ("seed: &a [*a]", "its aliases stand for more than"),
    "no end of arguments": ("sglang: {args: {x: &a {b: *a}}}", "its aliases stand for more than"),
    "a key twice": ("seed: 1\nseed: 2", "'seed' is given twice"),
    "a long text": (f"seed: {'x' * 10**5}", "seed: input should be a valid integer"),
    "deep": ("seed: " + "[" * 500, "not valid YAML"),
    "a tag": ("seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
    "a list": ("[1]", "expected a mapping of keys"),
    "two documents": ("seed: 1\n---\nseed: 2", "not valid YAML"),
    "a tab": ("train:\n\tsteps: 1", "not valid YAML"),
    "a NUL": ("seed: \0", "not valid YAML"),
    "extends itself": ("extends: config.yaml", "extends itself"),
    "extends a folder": ("extends: .", "cannot read the configuration"),
    "extends a number": ("extends: 3", "expected the name of a file"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_configuration_files_that_cannot_be_are_refused(tmp_path, capsys, name):
    text, says = YAMLS[name]
    (tmp_path / "config.yaml").write_text(text)
    refused(capsys, says, lambda: main(["train", str(tmp_path / "config.yaml"), "--dry-run"]))


@pytest.mark.parametrize("value", ["&a [*a]", "{x: &a [*a]}", "{x: 1, x: 2}"])
def test_overrides_are_held_to_the_same(tmp_path, capsys, value):
    (tmp_path / "config.yaml").write_text("run_dir: run\nmodel: {hf: m}\n")
    words = ["train", str(tmp_path / "config.yaml"), f"sglang.args={value}", "--dry-run"]
    refused(capsys, "sglang.args", lambda: main(words))


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


TORCHRUN = {
    **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}
ENVIRONMENT = {
    **{f"no {name}": ({**TORCHRUN, name: None}, name) for name in TORCHRUN if name != "RANK"},
    **{
        f"{name}={value!r}": ({**TORCHRUN, name: value}, name)
        for name, values in {
            "RANK": ("1", "-1", "x", "", "²", "1" * 5000, "0.0"),
            "WORLD_SIZE": ("0", "-4", "x", "1000000000000"),
            "LOCAL_RANK": ("-1", "x"),
            "MASTER_PORT": ("x", "0", "99999", "-1"),
            "MASTER_ADDR": ("", " ", "http://h", "a b"),
        }.items()
        for value in values
    },
    "tasks of srun without a node": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"},
        "SLURM_NODEID is not set",
    ),
    "tasks of srun, no number": ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x'"),
}


@pytest.mark.parametrize("entrance", [("train", "--dry-run"), ("train",)])
@pytest.mark.parametrize("name", ENVIRONMENT)
def test_an_environment_that_cannot_be_is_refused(job, capsys, monkeypatch, name, entrance):  # noqa: F811
    values, says = ENVIRONMENT[name]
    if "of srun" in name:
        job.overrides.append("parallel.dp=4")
    for variable, value in values.items():
        if value is not None:
            monkeypatch.setenv(variable, value)
    refused(capsys, says, lambda: job.command(*entrance))


def saved(folder: Path, **changed: object) -> Path:
    """A step that could be replayed, with columns changed."""
    prompts = [Prompt(n, "1+1=", (49, 43), 2) for n in range(4)]
    versions = (("0", 0, 2),)
    samples = [
        Sample(prompt, k, (49, 36), (-0.5, -1.0), "1$", "stop", versions, float(k))
        for prompt in prompts
        for k in range(4)
    ]
    write_samples(folder, 1, SavedStep(samples, [*range(4)], [0.0] * 16))
    file = samples_file(folder, 1)
    table = pq.read_table(file)
    for name, value in changed.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array([value] * 16))
    pq.write_table(table, file)
    return file


REPLAY = {
    "NaN log-prob": {"logprobs": [float("nan"), -1.0]},
    "positive log-prob": {"logprobs": [0.5, -1.0]},
    "infinite log-prob": {"logprobs": [-float("inf"), -1.0]},
    "null log-prob": {"logprobs": [None, -1.0]},
    "too few log-probs": {"logprobs": [-1.0]},
    "infinite reward": {"reward": float("inf")},
    "NaN reward": {"reward": float("nan")},
    "reward beyond fp32": {"reward": 1e300},
    "log-prob beyond fp32": {"logprobs": [-1e30, -1.0]},
    "advantage whose square is beyond fp32": {"advantage": 1e20},
    "scores are a list": {"scores": "[1]"},
    "score is text": {"scores": '{"a": "b"}'},
    "no reward": {"reward": None},
    "reward is text": {"reward": "good"},
    "NaN advantage": {"advantage": float("nan")},
    "empty prompt": {"prompt_token_ids": []},
    "null prompt": {"prompt_token_ids": None},
    "empty response": {"token_ids": []},
    "negative token": {"token_ids": [-1, 3]},
    "token beyond the vocabulary": {"token_ids": [256, 3]},
    "token is text": {"token_ids": ["a", "b"]},
    "label no JSON": {"label": "{"},
    "label too deep": {"label": DEEP},
    "scores no JSON": {"scores": "["},
    "finish_reason": {"finish_reason": "tired"},
    "one prompt": {"position": 0},
    "position is text": {"position": "x"},
    "weight_versions": {"weight_versions": [{"version": "0", "start": 1, "end": 2}]},
    "weight version no number": {"weight_versions": [{"version": "x", "start": 0, "end": 2}]},
    "weight version ²": {"weight_versions": [{"version": "²", "start": 0, "end": 2}]},
    "weight_versions null": {"weight_versions": None},
    "negative number": {"sample_index": -1},
}


@pytest.mark.parametrize("name", REPLAY)
def test_replay_is_held_to_what_a_sample_can_be(job, capsys, name):  # noqa: F811
    overrides = [f"rollout.replay={job.folder}", "train.steps=1"]
    saved(job.folder)
    assert job.command("train", "--dry-run", *overrides) == 0, "unchanged it is accepted"
    saved(job.folder, **REPLAY[name])
    refused(capsys, str(job.folder), lambda: job.command("train", "--dry-run", *overrides))


@pytest.mark.parametrize("damage", ["columns", "empty", "cut", "text", "many", "many steps"])
def test_replay_files_that_are_damaged_are_refused(job, capsys, damage):  # noqa: F811
    file, steps = saved(job.folder), 10**9 if damage == "many steps" else 1
    if damage == "columns":
        pq.write_table(pq.read_table(file).drop_columns(["logprobs"]), file)
    elif damage == "empty":
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "many":
        pq.write_table(pa.table({"right": pa.nulls(10**7, pa.bool_())}), file)
    elif damage == "text":
        file.write_text("PAR1")
    overrides = [f"rollout.replay={job.folder}", f"train.steps={steps}"]
    refused(capsys, str(job.folder), lambda: job.command("train", "--dry-run", *overrides))


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
CONFIG = (
    "run_dir: a\nseed: 0\nmodel: {hf: a}\ntrain: {steps: 3}\n"
    "clip: {schedule: id, phase_split: 0.5}\n"
)


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


FOLDERS = {
    "resume=none of a folder of one's own": (
        lambda j: j.overrides.extend([f"run_dir={j.folder}", "resume=none"]),
        "is no run's folder, and resume=none would rename it",
    ),
    "resume=none of /": (saying("run_dir=/", "resume=none"), "/ is no run's folder"),
    "resume=none, with the prompts in it": (
        lambda j: (
            j.run_dir.mkdir(),
            (j.run_dir / "lock").touch(),
            (j.run_dir / "p").write_bytes(j.prompts.read_bytes()),
            j.overrides.extend([f"data.prompts={j.run_dir / 'p'}", "resume=none"]),
        ),
        "resume=none would set aside data.prompts=",
    ),
    "the folder of the configuration": (
        lambda j: j.overrides.append(f"run_dir={j.folder}"),
        "config.yaml is no run's, and would be replaced by one",
    ),
    **{
        f"a link as {name}": (
            lambda j, name=name: (
                (j.run_dir / "checkpoints").mkdir(parents=True),
                (j.run_dir / name).symlink_to("../prompts.jsonl"),
            ),
            f"{name} is a link, where a run has a file",
        )
        for name in ("lock", "launch.lock", "metrics.jsonl", "eval.jsonl", "config.yaml")
    },
    "a link without an end as metrics.jsonl": (
        lambda j: (j.run_dir.mkdir(), (j.run_dir / "metrics.jsonl").symlink_to("metrics.jsonl")),
        "metrics.jsonl is a link",
    ),
}


@pytest.mark.parametrize("entrance", [("train", "--dry-run"), ("train",)])
@pytest.mark.parametrize("name", FOLDERS)
def test_no_folder_or_file_of_anyone_elses_is_renamed_or_replaced(job, capsys, name, entrance):  # noqa: F811
    change, says = FOLDERS[name]
    change(job)
    before = {file: os.lstat(file).st_mtime_ns for file in job.folder.rglob("*")}
    refused(capsys, says, lambda: job.command(*entrance))
    after = {file: os.lstat(file).st_mtime_ns for file in job.folder.rglob("*")}
    assert {f: t for f, t in after.items() if not f.is_dir()} == {
        f: t for f, t in before.items() if not f.is_dir()
    }


def test_a_chat_template_without_an_end_is_refused(job, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tokenizer, "RENDER_S", 0.3)
    loop = "{% for i in range(99999) %}"
    job.template(f"{loop}{loop}{{% endfor %}}{{% endfor %}}")
    refused(capsys, "it has not ended after 0.3 s", lambda: job.command("train", "--dry-run"))


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
