"""Configuration files and overrides that cannot be (see test_inputs.py)."""

from __future__ import annotations

import pytest
import yaml
from hostile.outcomes import refused
from unit.test_preflight import job, start  # noqa: F401 - fixtures

from megatron_gpc.cli import main
from megatron_gpc.config.file import dump, keys, load

CONFIG = "run_dir: run\nmodel: {hf: m}\ndata: {prompts: p, verifier: addition}\n"

CANNOT = (".nan", "-1000000000000000000000000000000", "[[]]", "[{a: b}]")
"""Values that no key takes."""


@pytest.mark.parametrize("key", keys())
def test_no_key_takes_what_is_no_value_of_it(tmp_path, capsys, key):
    kind, text = keys()[key], str(keys()[key])
    words = [] if "str" in text or "Path" in text else ['"²"', '""']
    words += [] if kind is bool else ["true"]
    words += [] if "dict" in text else ["{a: b}"]
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
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
    "a number of a hundred thousand digits": ("seed: 0x" + "f" * 10**5, "more than 300 digits"),
    "sixty to the power of many": ("seed: 1" + ":59" * 20_000, "seed: input should be"),
    "a time of day": ("train: {steps: 1:30}", "train.steps: input should be a valid integer"),
    "a date": ("seed: 2001-01-01", "seed: input should be a valid integer"),
    "a tag that does not fit": ("plots: !!bool x", "a tag does not fit its value"),
    "a tag without a value": ('seed: !!int ""', "a tag does not fit its value"),
    "a tag of dates": ("seed: !!timestamp x", "could not determine a constructor"),
    "bytes": ("sglang: {args: {a: !!binary /////w==}}", "could not determine a constructor"),
    "a set": ("sglang: {args: {a: !!set {x}}}", "could not determine a constructor"),
    "pairs": ("sglang: {args: {a: !!omap [x: 1]}}", "could not determine a constructor"),
    "a number for a key": ("sglang: {args: {1: 2}}", "'1' is no text, as keys are"),
    "a switch for a key": ("sglang: {args: {yes: 2}}", "'yes' is no text"),
    "nothing for a key": ("sglang: {args: {~: 2}}", "'~' is no text"),
    "a list for a key": ("? [a]\n: 1", "is no text, as keys are"),
    "merged twice": ("train:\n  <<: {steps: 1}\n  <<: {steps: 2}", "'<<' is given twice"),
    "in two ways": ("train.steps: 1\ntrain: {steps: 2}", "'train.steps' is given twice"),
    "no number": ("sglang: {args: {a: [.nan]}}", "sglang.args.a: nan is no finite number"),
    "a switch among numbers": ("eval: {pass_k: [yes]}", "eval.pass_k: is no switch"),
    "a count twice": ("eval: {pass_k: [1, 1]}", "eval.pass_k: 1 is named twice"),
    "a region twice": ("clip: {regions: [e1, e1]}", "clip.regions: e1 is named twice"),
    "a book for a variable": (
        f"sglang: {{environment: {{A: {'x' * 10**5}}}}}",
        "sglang.environment.A: String should have at most",
    ),
    **{
        f"target {target}": (f"clip: {{target: '{target}'}}", "clip.target: expected an entropy")
        for target in ("８０%", "8_0%", "%")
    },
    **{
        f"address {url}": (
            f'rollout: {{server: {{urls: ["{url}"]}}}}',
            "rollout.server.urls.0: expected an address such as",
        )
        for url in (
            *(
                "http://h:1/x?y",
                "http://h:1#z",
                "http://é:1",
                "http://\\ud800:1",
                "http://[::1]x:1",
            ),
            *(f"http://{'a' * 64}:1", "http://a..b:1", "http://h:", "http://-a:1", "http://h:١"),
        )
    },
    "an address of no number": ("rollout: {server: {urls: ['http://[x]:1']}}", "server.urls.0: "),
    "an address twice": (
        'rollout: {server: {urls: ["http://h", "http://h"]}}',
        "rollout.server.urls: http://h is named twice",
    ),
    "a stop text like a book": (f"rollout: {{stop: {'a' * 10**5}}}", "should have at most 4096"),
    "many stop texts": (f"rollout: {{stop: [{'a, ' * 300}]}}", "should have at most 256"),
    "half a character to stop at": ('rollout: {stop: "\\ud800"}', "rollout.stop"),
    "extends itself": ("extends: config.yaml", "extends itself"),
    "extends a folder": ("extends: .", "cannot be read: Is a directory"),
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


OVERRIDES = {
    "train=": "train is a section; set its keys",
    f"seed={'9' * 5000}": "seed: ",
    f"seed=0x{'f' * 100_000}": "seed: ",
    f"seed={'[' * 500}": "seed: ",
    f"{'x.' * 3000}y=1": "unknown key 'x'",
    "clip.schedule=\x1b[31mred": "\\x1b[31mred",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:20])
def test_overrides_that_cannot_be_are_refused(tmp_path, capsys, override):
    (tmp_path / "config.yaml").write_text("seed: 1")
    words = ["train", str(tmp_path / "config.yaml"), override, "--dry-run"]
    refused(capsys, OVERRIDES[override], lambda: main(words))


NUMBERS = {"017": 17, "1_000": 1000, "1e3": 1000, "0x1F": 31, "+5": 5}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_mean_what_they_seem_to(tmp_path, text):
    (tmp_path / "config.yaml").write_text(f"{CONFIG}seed: {text}\nmegatron: {{ddp: {{a: 1e-5}}}}")
    config = load(tmp_path / "config.yaml")
    assert config.seed == NUMBERS[text] and config.megatron.ddp == {"a": 1e-5}


@pytest.mark.parametrize("value", ["1e-5", "1:30", "017", "2001-01-01", "yes", "~", "1_0", ".5e1"])
def test_text_that_looks_like_something_else_stays_text(tmp_path, value):
    (tmp_path / "config.yaml").write_text(f"{CONFIG}sglang: {{args: {{a: '{value}'}}}}")
    config = load(tmp_path / "config.yaml")
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml").sglang.args == config.sglang.args == {"a": value}
    assert yaml.safe_load(dump(config))["sglang"]["args"] == {"a": value}
