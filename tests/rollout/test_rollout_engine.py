"""The engine: what a sequence gets does not depend on what else runs, and nothing is half done."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rollout_models import VOCAB, greedy, logprobs
from transformers import Qwen2ForCausalLM, Qwen3MoeForCausalLM

from megatron_gpc.errors import UserError
from megatron_gpc.server import generator as engine_module
from megatron_gpc.server.generator import Generator, GeneratorEnded
from megatron_gpc.server.sampling import SamplingParams
from megatron_gpc.server.sequence import Request, Result

TIMEOUT_S = 30
PROMPT = (84, 104, 101, 32)
LONG = SamplingParams(max_new_tokens=900, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(model_a: Path) -> Iterator[Generator]:
    running = Generator(model_a, max_running=24)
    yield running
    running.close()


def run(engine: Generator, *requests: Request) -> list[Result]:
    return engine.submit(requests).result(TIMEOUT_S)


def mixed_requests(count: int) -> list[Request]:
    """Prompts of 1 to 60 tokens, some equal, limits of 1 to 70 tokens, all kinds of draws."""
    rng = random.Random(0)
    prompts = [tuple(rng.choices(range(VOCAB), k=rng.randint(1, 60))) for _ in range(count // 2)]
    draws = [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.9}, {"top_k": 5}]
    return [
        Request(
            str(i),
            rng.choice(prompts),
            SamplingParams(
                max_new_tokens=rng.randint(1, 70), sampling_seed=i, ignore_eos=True, **draws[i % 4]
            ),
        )
        for i in range(count)
    ]


def test_a_sample_is_the_same_alone_and_in_changing_company(engine, reference_a):
    """24 rows, 120 sequences that come in sevens: rows are merged, moved, dropped and reused."""
    requests = mixed_requests(120)
    futures = [engine.submit(requests[i : i + 7]) for i in range(0, 120, 7)]
    together = [result for future in futures for result in future.result(TIMEOUT_S)]
    for request, result in zip(requests, together, strict=True):
        assert len(result.token_ids) == request.params.max_new_tokens
        expected = logprobs(
            reference_a, request.input_ids, result.token_ids, request.params.temperature or 1.0
        )
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=5e-5, rtol=0)
    for request, result in list(zip(requests, together, strict=True))[::5]:
        assert run(engine, request)[0].token_ids == result.token_ids


def test_routes_are_those_of_a_forward_pass_whatever_the_company(model_moe):
    model = Qwen3MoeForCausalLM.from_pretrained(model_moe).eval()
    asked = mixed_requests(24)
    requests = [dataclasses.replace(r, routes=i % 4 > 0) for i, r in enumerate(asked)]
    running = Generator(model_moe, max_running=8)
    try:
        future = running.submit(requests)
        running.pause("retract").result(TIMEOUT_S)  # some are computed again, from their tokens
        running.resume().result(TIMEOUT_S)
        results = future.result(TIMEOUT_S)
    finally:
        running.close()
    for request, result in zip(requests, results, strict=True):
        if not request.routes:
            assert result.routes is None
            continue
        ids = torch.tensor([[*request.input_ids, *result.token_ids[:-1]]])
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        assert result.routes is not None and result.routes.shape == (ids.shape[1], 3, 2)
        assert not result.routes[:, 1].any(), "the second layer has no experts"
        for layer, logits_SE in zip((0, 2), logits, strict=True):
            got = result.routes[:, layer].long().sort(-1).values
            assert torch.equal(got, logits_SE.topk(2).indices.sort(-1).values)


def test_prefill_passes_may_be_small(engine, monkeypatch):
    requests = mixed_requests(30)
    wide = run(engine, *requests)
    monkeypatch.setattr(engine_module, "MAX_PREFILL_TOKENS", 64)
    assert [r.token_ids for r in run(engine, *requests)] == [r.token_ids for r in wide]


def test_one_seed_gives_n_different_samples_again_and_again(engine):
    params = SamplingParams(max_new_tokens=16, n=3, sampling_seed=11)
    first = [r.token_ids for r in run(engine, Request("a", PROMPT, params))]
    again = [r.token_ids for r in run(engine, Request("b", PROMPT, params))]
    single = run(engine, Request("c", PROMPT, SamplingParams(max_new_tokens=16, sampling_seed=11)))
    assert first == again and len(set(first)) == 3
    assert single[0].token_ids == first[0]


def test_min_new_tokens_holds_stop_tokens_back(engine, reference_a):
    stop = greedy(reference_a, PROMPT, 1)[0]
    early, late = (
        run(
            engine,
            Request(
                "r",
                PROMPT,
                SamplingParams(
                    temperature=0.0, max_new_tokens=40, min_new_tokens=least, stop_token_ids=(stop,)
                ),
            ),
        )[0]
        for least in (0, 7)
    )
    assert early.token_ids == (stop,) and early.finish == {"type": "stop", "matched": stop}
    assert len(late.token_ids) >= 7 and stop not in late.token_ids[:7]


def test_a_stop_token_at_the_limit_counts_as_length_like_sglang(engine, reference_a):
    stop = greedy(reference_a, PROMPT, 1)[0]
    params = SamplingParams(temperature=0.0, max_new_tokens=1, stop_token_ids=(stop,))
    assert run(engine, Request("r", PROMPT, params))[0].finish == {"type": "length", "length": 1}


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "must not be empty"),
        ((VOCAB,), {}, "vocabulary"),
        ((-1,), {}, "vocabulary"),
        ((5,), {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ((5,) * 1000, {"max_new_tokens": 25}, "context length"),
    ],
)
def test_bad_request_is_refused_before_it_is_queued(engine, prompt, params, message):
    with pytest.raises(UserError, match=message):
        engine.submit([Request("r", prompt, SamplingParams(**params))])


def test_aborting_a_waiting_request_gives_an_empty_sample(engine):
    engine.pause("in_place").result(TIMEOUT_S)
    future = engine.submit([Request("waiting-1", PROMPT, LONG), Request("other", PROMPT, LONG)])
    engine.abort("waiting").result(TIMEOUT_S)
    assert engine.load().result(TIMEOUT_S) == (0, 1)
    engine.abort(None).result(TIMEOUT_S)
    engine.resume().result(TIMEOUT_S)
    for result in future.result(TIMEOUT_S):
        assert result.finish["type"] == "abort" and result.token_ids == ()
        assert result.weight_versions == () and result.weight_version == "default"


def test_dropping_ends_these_requests_only(engine):
    gone, kept = Request("gone", PROMPT, LONG), Request("gone-not", PROMPT, LONG)
    futures = [engine.submit([gone]), engine.submit([kept])]
    engine.drop([gone]).result(TIMEOUT_S)
    assert futures[0].result(TIMEOUT_S)[0].finish["type"] == "abort"
    assert futures[1].result(TIMEOUT_S)[0].finish["type"] == "length"


def test_an_id_is_free_again_as_soon_as_its_own_sample_has_ended(engine):
    both = engine.submit([Request("short", PROMPT, SHORT), Request("long", PROMPT, LONG)])
    while engine.load().result(TIMEOUT_S) != (1, 0):
        assert not both.done()
    assert engine.submit([Request("short", PROMPT, SHORT)]).result(TIMEOUT_S)
    with pytest.raises(UserError, match="Duplicate request ID detected: long"):
        engine.submit([Request("fresh", PROMPT, SHORT), Request("long", PROMPT, SHORT)]).result(
            TIMEOUT_S
        )
    assert engine.load().result(TIMEOUT_S) == (1, 0), "nothing of what was refused runs"
    engine.abort(None).result(TIMEOUT_S)


def test_cache_memory_is_given_back_when_idle_only(engine):
    future = engine.submit([Request("r", PROMPT, LONG)])
    while engine.load().result(TIMEOUT_S) != (1, 0):
        assert not future.done()
    assert engine.flush_cache().result(TIMEOUT_S) is False
    engine.abort(None).result(TIMEOUT_S)
    future.result(TIMEOUT_S)
    assert engine.flush_cache().result(TIMEOUT_S) is True
    assert len(run(engine, Request("r", PROMPT, SHORT))[0].token_ids) == 3


def test_released_memory_is_gone_and_old_weights_do_not_come_back(model_a, reference_a):
    engine = Generator(model_a)
    request = Request("r", PROMPT, SamplingParams(max_new_tokens=3, temperature=0.0))
    want = run(engine, request)[0].token_ids
    future = engine.submit([Request("r", PROMPT, LONG)])
    with pytest.raises(UserError, match="only when server is idle"):
        engine.release({"weights", "kv_cache"}).result(TIMEOUT_S)
    engine.abort(None).result(TIMEOUT_S)
    future.result(TIMEOUT_S)
    engine.release({"weights", "kv_cache"}).result(TIMEOUT_S)
    assert sum(p.untyped_storage().nbytes() for p in engine._model.parameters()) == 0
    for refused in (
        lambda: engine.submit([request]),
        lambda: engine.release({"weights"}).result(TIMEOUT_S),
        lambda: engine.update_from_folder(model_a, "1").result(TIMEOUT_S),
    ):
        with pytest.raises(UserError):
            refused()
    engine.restore({"weights"}).result(TIMEOUT_S)
    assert all(p.isnan().all() for p in engine._model.parameters())
    named = list(reference_a.state_dict().items())
    for i in range(0, len(named), 5):  # in parts, as they come
        engine.update_from_tensors(named[i : i + 5], "1").result(TIMEOUT_S)
    with pytest.raises(UserError, match="kv_cache are released"):
        engine.submit([request])
    engine.restore({"kv_cache"}).result(TIMEOUT_S)
    assert run(engine, request)[0].token_ids == want
    engine.close()


def test_repeated_version_changes_are_reported_without_empty_spans(engine):
    future = engine.submit([Request("r", PROMPT, LONG)])
    for version in ("1", "2", "3"):
        time.sleep(0.05)
        engine.pause("in_place").result(TIMEOUT_S)
        engine.set_version("never used").result(TIMEOUT_S)
        engine.set_version(version).result(TIMEOUT_S)
        engine.resume().result(TIMEOUT_S)
    spans = future.result(TIMEOUT_S)[0].weight_versions
    engine.set_version("default").result(TIMEOUT_S)
    assert [version for version, _, _ in spans] == ["default", "1", "2", "3"]
    assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
    assert spans[-1][2] == 900


def test_output_that_is_not_finite_fails_its_request_and_nothing_else(engine, model_a):
    name = "model.norm.weight"
    engine.update_from_tensors([(name, torch.full((32,), torch.nan))], "nan").result(TIMEOUT_S)
    with pytest.raises(FloatingPointError, match="request broken: .* token 0 .*'nan'"):
        run(engine, Request("broken", PROMPT, SamplingParams(max_new_tokens=5, n=2)))
    engine.update_from_folder(model_a, "default").result(TIMEOUT_S)
    assert len(run(engine, Request("r", PROMPT, SHORT))[0].token_ids) == 3


def test_a_refused_update_keeps_weights_and_version(engine, reference_a, tmp_path):
    for update in (
        engine.update_from_folder(tmp_path, "bad"),
        engine.update_from_tensors([("model.norm.weight", torch.zeros(3))], "bad"),
    ):
        with pytest.raises(UserError):
            update.result(TIMEOUT_S)
    result = run(engine, Request("r", PROMPT, SamplingParams(max_new_tokens=5)))[0]
    assert result.weight_version == "default"
    torch.testing.assert_close(
        torch.tensor(result.logprobs),
        logprobs(reference_a, PROMPT, result.token_ids),
        atol=5e-5,
        rtol=0,
    )


def test_a_tied_model_follows_its_embedding(model_tied):
    reference = Qwen2ForCausalLM.from_pretrained(model_tied).eval()
    engine = Generator(model_tied)
    new = torch.randn_like(reference.model.embed_tokens.weight) * 0.3
    reference.model.embed_tokens.weight.data.copy_(new)
    engine.update_from_tensors([("model.embed_tokens.weight", new)], "1").result(TIMEOUT_S)
    result = run(engine, Request("r", PROMPT, SamplingParams(max_new_tokens=12)))[0]
    engine.close()
    torch.testing.assert_close(
        torch.tensor(result.logprobs),
        logprobs(reference, PROMPT, result.token_ids),
        atol=5e-5,
        rtol=0,
    )


def test_requests_in_flight_fail_when_the_engine_is_closed(model_a):
    engine = Generator(model_a)
    future = engine.submit([Request("r", PROMPT, LONG)])
    engine.close()
    with pytest.raises(GeneratorEnded):
        future.result(TIMEOUT_S)
    with pytest.raises(GeneratorEnded):
        engine.submit([Request("r", PROMPT, LONG)])


def test_decoding_is_fast(model_a):
    """256 samples of 8 tokens take some 30 ms on one core; this guards the order of magnitude."""
    engine = Generator(model_a)
    requests = [
        Request(str(i), (i // 8, 7, 8), SamplingParams(max_new_tokens=8, ignore_eos=True))
        for i in range(256)
    ]
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        run(engine, *requests)
        seconds.append(time.perf_counter() - started)
    engine.close()
    assert min(seconds) < 0.3


def test_a_stop_text_ends_the_sample_with_the_token_that_completes_it(model_a, reference_a):
    tokens = greedy(reference_a, PROMPT, 12)

    def decode(ids):
        return "".join(f"[{token}]" for token in ids)

    engine = Generator(model_a, decode=decode)
    text = decode(tokens[4:6])[1:-1]  # from within a token to within the next
    params = SamplingParams(temperature=0.0, max_new_tokens=12, stop=("never", text))
    (result,) = run(engine, Request("r", PROMPT, params))
    made = next(n for n in range(13) if text in decode(tokens[:n]))
    assert result.token_ids == tuple(tokens[:made])
    assert result.finish == {"type": "stop", "matched": text}
    engine.close()


def test_stop_texts_need_a_tokenizer(engine):
    with pytest.raises(UserError, match="no tokenizer"):
        engine.submit([Request("r", PROMPT, SamplingParams(stop=("x",)))])
