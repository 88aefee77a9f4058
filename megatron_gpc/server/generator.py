"""The embedded generator: transformers' model, continuous batching, one thread.

The generator's thread owns the model, the cache and the running sequences.  Everything that others
want of it, new requests as well as pauses and new weights, goes through one inbox and is done
between two decode steps, so that nothing is ever seen half done.  A turn of the thread:

    obey the inbox -> prefill waiting sequences and merge them into the batch -> one decode step

All public methods return at once, most of them with a Future.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from megatron_gpc.errors import UserError
from megatron_gpc.server import loading, sampling
from megatron_gpc.server.cache import RowCache
from megatron_gpc.server.routes import RouteTap
from megatron_gpc.server.sequence import (
    ABORTED,
    Job,
    LiveSequence,
    Request,
    RequestFailed,
    Result,
)

PauseMode = Literal["abort", "retract", "in_place"]
MEMORY = {"weights", "kv_cache"}
"""What can be released."""
_Entry = tuple[Callable[[Future], None], Future]
"""An entry of the inbox: work to do, and the Future that gets its result."""
MAX_PREFILL_TOKENS = 16384
"""Tokens, padding included, of one prefill pass; a longer prompt is prefilled alone."""


class GeneratorEnded(RuntimeError):
    """The generator's thread has ended, by `close` or an error; it makes nothing any more."""


class Generator:
    """Generates samples in its own thread.

    Args:
        model_path: Hugging Face checkpoint folder.
        dtype: of weights and activations, such as "float32"; "auto" takes the checkpoint's.
        threads: CPU threads of one operation.
        max_running: sequences that are decoded at the same time; more wait.
        end_tokens: tokens that end a sample, besides those that the checkpoint names.
        decode: tokens -> text, special tokens kept; None: requests may not have stop texts.

    Raises:
        UserError: the folder does not hold a model that the generator can run.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: str = "auto",
        threads: int = 1,
        max_running: int = 256,
        end_tokens: Sequence[int] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
    ):
        self._use(loading.load_folder(Path(model_path), dtype))
        self.config = self._model.config
        self.context_length: int = self.config.max_position_embeddings
        self.vocab_size: int = self.config.vocab_size
        self.num_parameters = sum(tensor.numel() for tensor in self._model.parameters())
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.max_running = max_running
        self.weight_version = "default"
        self.weight_loads = 0
        """How often weights were replaced; a name can be given twice."""
        self.paused = False
        self.released: set[str] = set()
        """Of MEMORY."""
        self._end_tokens = _end_tokens(self._model) | {*end_tokens}
        self._decode_text = decode
        self._threads = threads
        self._cache = RowCache(self.config.num_hidden_layers)
        self._running: list[LiveSequence] = []  # number i owns row i of the cache
        self._waiting: deque[LiveSequence] = deque()
        self._inbox: queue.SimpleQueue[_Entry] = queue.SimpleQueue()
        self._lock = threading.Lock()  # no entry into the inbox after its last reading
        self._ended: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> Future[list[Result]]:
        """Generate; the requests enter the batch together.

        Returns:
            One result a sample, request after request, `n` of each.

        Raises:
            UserError: a prompt is empty, too long or has ids outside the vocabulary; in the Future:
                a request's id is in flight.
            RequestFailed, FloatingPointError: in the Future: the model or the draw failed on it.
        """
        for request in requests:
            self._check(request)
        return self._put(
            lambda future: self._enqueue(Job(requests, self._end_tokens, self._decode_text, future))
        )

    def pause(self, mode: PauseMode) -> Future[None]:
        """Stop decoding after the step in progress, until `resume`; new requests wait.

        Args:
            mode: what becomes of the sequences in flight.  `abort`: they end here; `retract`: they
                wait, and their keys and values are computed anew from their tokens; `in_place`:
                they stay as they are, keys and values of the old weights included.
        """
        if mode not in get_args(PauseMode):
            raise UserError(f"mode must be one of {', '.join(get_args(PauseMode))}, got {mode!r}.")
        return self._call(lambda: self._pause(mode))

    def resume(self) -> Future[None]:
        """Go on after `pause`."""
        return self._call(self._resume)

    def abort(self, rid: str | None) -> Future[None]:
        """End all sequences whose request id starts with `rid` (as SGLang matches); None: all."""
        return self._call(
            lambda: self._abort(
                lambda sequence: rid is None or sequence.request.rid.startswith(rid)
            )
        )

    def drop(self, requests: Sequence[Request]) -> Future[None]:
        """End these very requests: nobody waits for them any more."""
        return self._call(lambda: self._abort(lambda sequence: sequence.request in requests))

    def flush_cache(self) -> Future[bool]:
        """Give the cache's memory back; False, and nothing done, while sequences are using it."""
        return self._call(self._flush)

    def update_from_folder(self, folder: Path, version: str | None) -> Future[None]:
        """Take a checkpoint folder's weights.  A UserError in the Future: the old ones stay."""
        return self._call(
            lambda: self._set_weights(lambda: loading.reloaded(self._model, folder), version)
        )

    def update_from_tensors(
        self, named: list[tuple[str, torch.Tensor]], version: str | None
    ) -> Future[None]:
        """Replace some or all weights.  A UserError in the Future: none was replaced."""
        return self._call(
            lambda: self._set_weights(lambda: loading.with_tensors(self._model, named), version)
        )

    def set_version(self, version: str) -> Future[None]:
        """Rename the weights, from the next token on."""
        return self._call(lambda: self._set_version(version))

    def release(self, tags: set[str]) -> Future[None]:
        """Free the memory of weights or cache, until `restore`; sequences must not be in flight."""
        return self._call(lambda: self._release(tags))

    def restore(self, tags: set[str]) -> Future[None]:
        """Allocate it again.  Weights are then NaN: they must be set anew."""
        return self._call(lambda: self._restore(tags))

    def load(self) -> Future[tuple[int, int]]:
        """(running, waiting) sequences."""
        return self._call(lambda: (len(self._running), len(self._waiting)))

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread; requests in flight fail with GeneratorEnded."""
        self._call(self._close)
        self._thread.join(timeout_s)

    # ---- on the caller's thread ----

    def _call(self, work: Callable[[], Any]) -> Future:
        return self._put(lambda future: future.set_result(work()))

    def _put(self, work: Callable[[Future], None]) -> Future:
        future: Future = Future()
        future.set_running_or_notify_cancel()  # nobody can cancel it under the generator now
        with self._lock:
            if self._ended is not None:
                raise GeneratorEnded(f"the generator has ended: {self._ended!r}")
            self._inbox.put((work, future))
        return future

    def _check(self, request: Request) -> None:
        if self.released:
            raise UserError(f"{' and '.join(sorted(self.released))} are released; resume first.")
        length, wanted = len(request.input_ids), request.params.max_new_tokens
        if length == 0:
            raise UserError("input_ids must not be empty.")
        if length >= self.context_length:
            raise UserError(
                f"The input ({length} tokens) is longer than the model's context "
                f"length ({self.context_length} tokens)."
            )
        if length + wanted > self.context_length:
            raise UserError(
                f"The input ({length} tokens) and max_new_tokens={wanted} together are "
                "longer than the model's context length "
                f"({self.context_length} tokens)."
            )
        if request.params.stop and self._decode_text is None:
            raise UserError("stop: this generator has no tokenizer and takes stop_token_ids only.")
        for name, ids in (
            ("input_ids", request.input_ids),
            ("stop_token_ids", request.params.stop_token_ids),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                raise UserError(
                    f"{name} has values outside the vocabulary, 0 to {self.vocab_size - 1}."
                )
        held_back = self._end_tokens.union(request.params.stop_token_ids)
        if request.params.min_new_tokens and len(held_back) >= self.vocab_size:
            raise UserError("stop_token_ids has all tokens, and min_new_tokens holds them back.")

    # ---- on the generator's thread ----

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._obey()
                    if not self.paused:
                        self._guard(self._admit, self._next_batch())
                        self._guard(self._decode, self._running)
            self._end(GeneratorEnded("it was closed"))
        except Exception as error:  # a thread's boundary: those who wait must hear of it
            self._end(error)
            raise

    def _guard(self, work: Callable[[list[LiveSequence]], None], batch: list[LiveSequence]) -> None:
        """A pass over these sequences; if it fails, the thread and all other sequences go on.

        A sequence that fails alone fails its request.  Of several nobody knows whose fault it is:
        they are prefilled again one by one.  What the cache holds is not trusted any more.
        """
        if not batch:
            return
        batch = list(batch)
        try:
            work(batch)
            return
        except Exception as error:  # whatever the model, torch or the tokenizer raises
            traceback.print_exc()
            if len(batch) == 1:
                (culprit,) = batch
                culprit.job.fail(RequestFailed(f"request {culprit.request.rid}: {error!r}"))
        for sequence in batch:
            sequence.alone = True
        self._retract([sequence for sequence in batch if sequence not in self._running])
        self._cache.clear()
        self._settle()

    def _obey(self) -> None:
        """Do what is in the inbox; if there is nothing else to do, wait for an entry."""
        idle = self.paused or not (self._running or self._waiting)
        while idle or not self._inbox.empty():
            work, future = self._inbox.get()
            try:
                work(future)
            except Exception as error:  # belongs to whoever asked for the work
                future.set_exception(error)
            idle = False

    def _end(self, error: Exception) -> None:
        with self._lock:
            self._ended = error
        while not self._inbox.empty():
            self._inbox.get()[1].set_exception(GeneratorEnded(repr(error)))
        for sequence in [*self._running, *self._waiting]:
            sequence.job.fail(GeneratorEnded(repr(error)))

    def _close(self) -> None:
        self._closing = True

    def _enqueue(self, job: Job) -> None:
        """Raises UserError if a request's id is in flight already, or comes twice in the job."""
        rids = [request.rid for request in job.requests]
        taken = {sequence.request.rid for sequence in [*self._running, *self._waiting]}
        twice = {rid for rid, count in Counter(rids).items() if count > 1} | taken & {*rids}
        if twice:
            raise UserError(f"Duplicate request ID detected: {', '.join(sorted(twice))}")
        for sequence in job.sequences:
            sequence.versions.append((self.weight_version, 0))
        self._waiting.extend(job.sequences)

    def _next_batch(self) -> list[LiveSequence]:
        """Take out the waiting sequences of one prefill pass, first come first served."""
        batch: list[LiveSequence] = []
        contexts: set[tuple[int, ...]] = set()
        longest = 0
        while self._waiting and len(self._running) + len(batch) < self.max_running:
            context = self._waiting[0].context
            longest = max(longest, len(context))
            if batch and (
                batch[-1].alone
                or self._waiting[0].alone
                or len(contexts | {context}) * longest > MAX_PREFILL_TOKENS
            ):
                break
            contexts.add(context)
            batch.append(self._waiting.popleft())
        return batch

    def _admit(self, batch: list[LiveSequence]) -> None:
        """One prefill pass; equal contexts, as of samples of one prompt, are computed once."""
        rows: dict[tuple[int, ...], int] = {}  # context -> its row in the pass
        for sequence in batch:
            rows.setdefault(sequence.context, len(rows))
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        for context, row in rows.items():
            ids[row, longest - len(context) :] = context
        sources = [rows[sequence.context] for sequence in batch]
        self._cache.open_prefill([len(context) for context in rows], copies=len(batch))
        logits_BV = self._forward(torch.from_numpy(ids))
        self._cache.replicate(sources)
        self._running += batch
        self._keep_routes(batch, sources)
        self._take(batch, logits_BV[sources])

    def _decode(self, batch: list[LiveSequence]) -> None:
        """One more token for every running sequence."""
        self._cache.open_step()
        last_B = torch.tensor([sequence.tokens[-1] for sequence in batch])
        logits_BV = self._forward(last_B[:, None])
        self._keep_routes(batch, range(len(batch)))
        self._take(batch, logits_BV)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows, V] fp32 logits of the last column of `ids`; the cache's window gets its keys."""
        return (
            self._model(
                input_ids=ids,
                attention_mask=self._cache.mask(),
                position_ids=self._cache.positions(),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )

    def _keep_routes(self, sequences: list[LiveSequence], rows: Sequence[int]) -> None:
        """Give sequences that want them their routes of the last pass, from its rows."""
        if self.routes_tokens and any(sequence.request.routes for sequence in sequences):
            found = self._tap.last(max(rows) + 1)
            for sequence, row in zip(sequences, rows, strict=True):
                if sequence.request.routes:
                    sequence.route(found[row])

    def _take(self, sequences: list[LiveSequence], logits_BV: torch.Tensor) -> None:
        """Draw a token for each of these running sequences; let the finished ones go."""
        for row, sequence in enumerate(sequences):
            if len(sequence.tokens) < sequence.request.params.min_new_tokens:
                logits_BV[row, list(sequence.stop)] = -torch.inf
        tokens, logprobs = sampling.draw(
            logits_BV,
            [sequence.request.params for sequence in sequences],
            np.array([sequence.uniforms[len(sequence.tokens)] for sequence in sequences]),
        )
        for sequence, token, logprob in zip(
            sequences, tokens.tolist(), logprobs.tolist(), strict=True
        ):
            try:
                sequence.append(token, logprob)
            except Exception as error:  # of the tokenizer, which looks for stop texts
                rid = sequence.request.rid
                sequence.job.fail(RequestFailed(f"request {rid}: stop: {error!r}"))
        self._settle()

    def _settle(self) -> None:
        """Answer for sequences that are over and take them out."""
        alive = [row for row, sequence in enumerate(self._running) if not sequence.over]
        if len(alive) < len(self._running):
            done = [sequence for sequence in self._running if sequence.over]
            self._running = [self._running[row] for row in self._cache.keep(alive)]
            for sequence in done:
                sequence.job.one_finished()
        ended = [sequence for sequence in self._waiting if sequence.over]
        if ended:
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.over)
            for sequence in ended:
                sequence.job.one_finished()

    def _pause(self, mode: PauseMode) -> None:
        self.paused = True
        if mode == "abort":
            self._abort(lambda sequence: True)
        elif mode == "retract":
            self._retract([])

    def _retract(self, others: list[LiveSequence]) -> None:
        """Have running sequences, and these others, wait again, before all that wait."""
        for sequence in self._running:
            sequence.num_retractions += 1
        self._waiting.extendleft(reversed([*self._running, *others]))
        self._running = []
        self._cache.keep([])

    def _resume(self) -> None:
        self.paused = False

    def _abort(self, chosen: Callable[[LiveSequence], bool]) -> None:
        for sequence in [*self._running, *self._waiting]:
            if chosen(sequence):
                sequence.finish = ABORTED
        self._settle()

    def _flush(self) -> bool:
        if self._running:
            return False
        self._cache.clear()
        return True

    def _release(self, tags: set[str]) -> None:
        if not tags <= MEMORY - self.released:
            raise UserError(f"cannot release {sorted(tags)}: {sorted(self.released)} are already.")
        if self._running or self._waiting:
            raise UserError("release_memory_occupation should be called only when server is idle.")
        self.released |= tags
        if "kv_cache" in tags:
            self._cache.clear()
        if "weights" in tags:
            self._shapes = {p: p.shape for p in self._model.parameters()}
            self._fill_weights(lambda shape: (0,))

    def _restore(self, tags: set[str]) -> None:
        if not tags <= self.released:
            raise UserError(f"cannot resume {sorted(tags)}: released are {sorted(self.released)}.")
        self.released -= tags
        if "weights" in tags:
            self._fill_weights(lambda shape: shape)

    def _fill_weights(self, size: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
        with torch.inference_mode(False):
            for parameter, shape in self._shapes.items():
                parameter.data = parameter.new_full(size(shape), torch.nan)

    def _set_weights(self, load: Callable[[], PreTrainedModel], version: str | None) -> None:
        if "weights" in self.released:
            raise UserError("weights are released; resume them before an update.")
        with torch.inference_mode(False):
            model = load()
        if model is not self._model:
            self._use(model)
        self.weight_loads += 1
        if version is not None:
            self._set_version(version)

    def _use(self, model: PreTrainedModel) -> None:
        self._model, self._tap = model, RouteTap(model)
        self.routes_tokens = bool(self._tap)

    def _set_version(self, version: str) -> None:
        self.weight_version = version
        for sequence in [*self._running, *self._waiting]:
            sequence.versions.append((version, len(sequence.tokens)))


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end a sample, by config.json and generation_config.json."""
    found: set[int] = set()
    for source in (model.config, model.generation_config):
        ids = source.eos_token_id
        found |= {ids} if isinstance(ids, int) else {*(ids or ())}
    return frozenset(found)
