"""A user's parts, found by name: files and modules that work, and those that are refused."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from megatron_gpc.config import parts
from megatron_gpc.errors import PartError, UserError

BUILT_IN = {"static": len}


def find(name):
    return parts.find("some.key", str(name), BUILT_IN)


def refused(name):
    with pytest.raises(UserError) as error:
        find(name)
    text = str(error.value)
    assert text.startswith("some.key: ") and "\n" not in text
    return text


def test_names_lead_to_built_in_parts_modules_and_files(tmp_path):
    (tmp_path / "own.py").write_text("class Own:\n    def twice(self): pass\ndef f(): return 3\n")
    assert find("static") is len
    assert find("os.path:join").__name__ == "join"
    assert find(f"{tmp_path}/own.py:f")() == 3
    assert find(f"{tmp_path}/own.py:Own.twice").__qualname__ == "Own.twice"
    assert find(f"{tmp_path}/own.py:f") is find(f"{tmp_path}/own.py:f")


def test_files_of_one_name_are_different_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my part.1.py").write_text(f"def f(): return {folder!r}\n")
    found = [find(f"{tmp_path}/{folder}/my part.1.py:f")() for folder in ("a", "b")]
    assert found == ["a", "b"]


def test_a_file_can_import_those_beside_it_while_it_loads(tmp_path):
    (tmp_path / "beside_the_part.py").write_text("VALUE = 7\n")
    (tmp_path / "own.py").write_text(
        "import beside_the_part\ndef f(): return beside_the_part.VALUE"
    )
    before = list(sys.path)
    assert find(f"{tmp_path}/own.py:f")() == 7
    assert sys.path == before


def test_a_module_in_the_current_folder_is_found_behind_all_others(tmp_path, monkeypatch):
    (tmp_path / "in_the_current_folder.py").write_text("def f(): return 5\n")
    (tmp_path / "yaml.py").write_text("raise Exception\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert find("in_the_current_folder:f")() == 5
    assert find("yaml:safe_load")
    assert sys.path == before


def test_a_files_function_can_be_pickled_to_processes_that_never_saw_it(tmp_path):
    (tmp_path / "helper_of_pickled.py").write_text("VALUE = 20\n")
    (tmp_path / "own.py").write_text(
        "import dataclasses, helper_of_pickled\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "def f(point): return Point(point.x + helper_of_pickled.VALUE)\n"
    )
    f, point = find(f"{tmp_path}/own.py:f"), find(f"{tmp_path}/own.py:Point")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(f, point(1)).result(timeout=120) == point(21)
    code = "import pickle, sys; f, x = pickle.load(sys.stdin.buffer); print(f(x).x)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((f, point(2))),
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert said.stdout == b"22\n"


def test_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "own.py").write_text("def reward(): pass\nNUMBER = 3\n")
    assert f"{tmp_path}/none.py is not there" in refused(f"{tmp_path}/none.py:f")
    assert f"{tmp_path}/x.py is not there" in refused(f"{tmp_path}/x.py:f")
    assert "has no 'rewrad'; did you mean 'reward'?" in refused(f"{tmp_path}/own.py:rewrad")
    assert "own.py:NUMBER is 3, which cannot be called" in refused(f"{tmp_path}/own.py:NUMBER")
    assert "there is no module 'no_such_package'; install it" in refused("no_such_package.a:f")
    assert "there is no module 'json.nothing'; install it" in refused("json.nothing:f")
    assert "json has no 'nothing'" in refused("json:nothing")


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ("\n1 / 0\n", "ZeroDivisionError: division by zero", 2),
        ("def f(:\n", "SyntaxError: invalid syntax", 1),
        ("import no_such_package\n", "No module named 'no_such_package'", 1),
        ("import json\n\njson.loads('{')\n", "JSONDecodeError: Expecting property name", 3),
        ("exit(3)\n", "SystemExit: 3", 1),
        ("import os\nos._exit(0)\n", "SystemExit: 0", 2),
        ("raise GeneratorExit\n", "GeneratorExit", 1),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines", 1),
    ],
)
def test_files_that_cannot_be_imported_are_refused_by_place(tmp_path, text, says, line):
    (tmp_path / "own.py").write_text(text)
    said = refused(f"{tmp_path}/own.py:f")
    assert "own.py cannot be imported: " in said
    assert says in said and said.endswith(f"({tmp_path}/own.py, line {line})")


def test_an_error_of_a_file_beside_it_is_placed_there(tmp_path):
    (tmp_path / "fails_beside.py").write_text("\n\nint('x')\n")
    (tmp_path / "own.py").write_text("import fails_beside\n")
    assert refused(f"{tmp_path}/own.py:f").endswith(f"({tmp_path}/fails_beside.py, line 3)")


def test_a_module_that_ends_the_process_when_it_is_looked_into_is_refused(tmp_path):
    (tmp_path / "own.py").write_text("def __getattr__(name): exit(0)\n")
    assert "own.py:f cannot be looked up: SystemExit: 0" in refused(f"{tmp_path}/own.py:f")


def test_what_a_part_forks_still_ends_by_os_exit(tmp_path):
    (tmp_path / "own.py").write_text(
        "import os\ndef f():\n    child = os.fork()\n    if not child: os._exit(7)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
    )
    assert find(f"{tmp_path}/own.py:f")() == 7


def takes_two(clip, steps, *, rate=1):
    pass


@pytest.mark.parametrize(
    ("part", "arguments", "says"),
    [
        (takes_two, {"rat": 2}, "called with (clip, steps, rat=): got an unexpected keyword"),
        (takes_two, {"steps": 2}, "multiple values for argument 'steps'"),
        (lambda clip: None, {}, "too many positional arguments"),
        (lambda clip, steps, rate: None, {}, "missing a required argument: 'rate'"),
        (lambda clip, steps, *, rate: None, {}, "missing a required"),
    ],
)
def test_signatures_that_do_not_fit_are_refused(part, arguments, says):
    with pytest.raises(UserError) as error:
        parts.check_call("some.key", "my.py:f", part, ("clip", "steps"), arguments)
    assert str(error.value).startswith("some.key: my.py:f takes (clip") and says in str(error.value)
    assert "is set in some.key_arguments" in str(error.value)


def test_signatures_that_fit_pass():
    for part in (takes_two, lambda *positional, **named: None, dict.update):
        parts.check_call("some.key", "my.py:f", part, ("clip", "steps"), {})
    parts.check_call("some.key", "my.py:f", takes_two, ("clip", "steps"), {"rate": 3})


@pytest.mark.parametrize("error", [ValueError("why"), SystemExit(3)])
def test_errors_of_a_running_part_name_it_and_keep_their_traceback(error):
    expected = pytest.raises(PartError, match="some.key: my.py:f failed at step 3: ")
    with expected as raised, parts.blamed("some.key", "my.py:f", "step 3"):
        raise error
    assert raised.value.__cause__ is error and "test_parts.py, line" in str(raised.value)


def test_an_error_that_says_what_to_do_stays_as_it_is():
    with pytest.raises(UserError, match="^mend it$"), parts.blamed("key", "my.py:f", "step 3"):
        raise UserError("mend it")
