"""The tokenizer of a model folder."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gpc.errors import UserError
from megatron_gpc.rollout.prompts import Message
from megatron_gpc.run.files import read_json
from megatron_gpc.run.imports import many_imports

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_S = 10.0
"""How long a chat template may compute for one prompt [s of CPU]."""
RENDER_BYTES = 2**29
"""How much memory it may take for one."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A Hugging Face folder's tokenizer.

    Raises:
        UserError: no tokenizer in the folder, or a damaged one.
    """
    with many_imports():  # seconds, which only rank 0 spends
        from transformers import AutoTokenizer

    try:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                read_json(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except UserError as error:
        raise UserError(f"{folder}: cannot load the tokenizer: {error}") from None
    except BaseException as error:  # it does not check what it reads; a panic in Rust is one, too
        raise UserError(f"{folder}: cannot load the tokenizer: {_said(error)}") from None
    # Without files it is made from the model's class and knows nothing but special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.json); copy the tokenizer's files there"
        )
    return tokenizer


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> token ids of each, with nothing added before or after."""
    ids_only: Any = {"return_attention_mask": False, "return_token_type_ids": False}
    return lambda texts: tokenizer(texts, add_special_tokens=False, **ids_only)["input_ids"]


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Token ids -> their text, special tokens included."""
    return lambda token_ids: str(tokenizer.decode(list(token_ids)))


def eos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of the tokenizer's end token, in a list of one or none."""
    eos: Any = tokenizer.eos_token_id
    return [] if eos is None else [eos]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer holds to be no text, such as the ends of a turn and of a document."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted({*tokenizer.all_special_tokens, *(t.content for t in added if t.special)})


def chat_renderer(
    tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> Callable[[list[Message]], str]:
    """Messages -> what the model is to go on from, by the tokenizer's chat template.

    Args:
        variables: of the template.

    Raises:
        UserError: a variable has the name of what is given anyway.  From the renderer: there is no
            template, it cannot be run on these messages, or makes nothing of them.
    """
    taken = sorted({"conversation", "messages", "tokenize", "add_generation_prompt"} & {*variables})
    if taken:
        raise UserError(f"data.chat_template: {taken[0]} cannot be set: the prompt decides it")

    def render(messages: list[Message]) -> str:
        if not tokenizer.chat_template:
            raise UserError(
                f"the prompt is a list of messages, but {tokenizer.name_or_path} has no chat "
                "template; add one, or make prompts text (megatron-gpc convert prompts --text)"
            )
        try:
            with rendering():
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **variables
                )
        except Exception as error:  # it is a program, of whatever quality
            raise UserError(
                f"the chat template in {_template_file(tokenizer)} fails on these messages: "
                f"{_template_error(error)}"
            ) from None
        if not isinstance(text, str) or not text:
            made = "nothing" if not text else type(text).__name__
            raise UserError(
                f"the chat template in {_template_file(tokenizer)} makes {made} of these messages"
            )
        return text

    return render


@contextmanager
def rendering() -> Iterator[None]:
    """Around a chat template: a TimeoutError once it has computed for RENDER_S, a MemoryError if it
    wants RENDER_BYTES more than this process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + RENDER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(soft, most), hard))
    main = threading.current_thread() is threading.main_thread()
    try:
        with _deadline_by_signal() if main else _deadline_by_trace():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _deadline_by_trace() -> Iterator[None]:
    """For a thread, which gets no signals: looked at in every line of Python."""
    end, before = time.thread_time() + RENDER_S, sys.gettrace()

    def look(*_: object) -> Any:
        if time.thread_time() > end:
            raise TimeoutError(f"it has not ended after {RENDER_S:g} s")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _deadline_by_signal() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"it has not ended after {RENDER_S:g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _template_file(tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = Path(tokenizer.name_or_path)
    own = folder / "chat_template.jinja"
    return own if own.is_file() else folder / "tokenizer_config.json"


def _template_error(error: Exception) -> str:
    """`TypeError: why (line 3 of the template)`, in one line."""
    lines: list[int | None] = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == "<template>"
    ]
    lines.append(getattr(error, "lineno", None))  # a syntax error's
    line = next((line for line in reversed(lines) if line), None)
    return _said(error) + (f" (line {line} of the template)" if line else "")


def _said(error: BaseException) -> str:
    """What a library has to say, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
