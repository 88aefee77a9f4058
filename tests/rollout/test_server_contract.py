"""What any server of rollouts promises, said over HTTP: the embedded one and the real SGLang alike.

The key sets are those of SGLang 0.5.2x.
"""

from __future__ import annotations

import base64
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import sglang_cpu
import torch
import torch.distributed as dist
from rollout_models import CONTEXT, EOS, greedy, logprobs, logprobs_over_old_cache
from transformers import Qwen2ForCausalLM

from megatron_gpc.engines.weight_group import join_group, leave_group
from megatron_gpc.rollout.tokenizer import load_tokenizer
from megatron_gpc.weights.handles import FORMAT, Bucket, NamedMemory, Rooms

pytestmark = pytest.mark.timeout(900)  # SGLang's start, beside other work
PROMPT = [84, 104, 101, 32]
ANSWER_KEYS = {"text", "output_ids", "meta_info"}
META_KEYS = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "weight_version",
    "num_retractions",
    "reasoning_tokens",
    "completion_tokens",
    "cached_tokens",
    "weight_versions",
    "cached_tokens_details",
    "dp_rank",
    "e2e_latency",
    "response_sent_to_client_ts",
}
LOGPROB_KEYS = {"input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length"}
GREEDY = {"temperature": 0, "ignore_eos": True}
LONG = GREEDY | {"max_new_tokens": 600}


def generate(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids_and_logprobs(answer: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    entries = answer["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in entries] == answer["output_ids"]
    assert all(entry[2] is None for entry in entries)
    return answer["output_ids"], torch.tensor([entry[0] for entry in entries])


def post_ok(http: httpx.Client, path: str, **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json() if response.content and response.text[0] in "{[" else response.text


def in_background(http: httpx.Client, running: int = 1, **body: Any) -> Callable[[], Any]:
    """Start a generation; the returned function waits for its answer.

    Returns once the server decodes `running` sequences; 0: after a moment, it is to wait.
    """
    box: list[Any] = []
    thread = threading.Thread(target=lambda: box.append(generate(http, **body)), daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while running and in_decode(http) < running:
        assert thread.is_alive() and time.monotonic() < deadline, "the generation did not begin"
        time.sleep(0.01)
    time.sleep(0.0 if running else 0.5)

    def wait() -> Any:
        thread.join(240)
        assert box, "the generation did not end"
        return box[0]

    return wait


def in_decode(http: httpx.Client) -> int:
    """Sequences that are being decoded; SGLang says it every 15 tokens."""
    if sglang_cpu.PYTHON is None:
        loads = http.get("/server_info").json()["internal_states"]
    else:
        loads = http.get("/v1/loads").json()["loads"]
    return sum(load["num_running_reqs"] for load in loads)


# ---- shapes ----


def test_answer_has_sglangs_keys_with_and_without_logprobs(http):
    params = GREEDY | {"max_new_tokens": 3}
    plain = generate(http, input_ids=PROMPT, sampling_params=params)
    full = generate(http, input_ids=PROMPT, sampling_params=params, return_logprob=True)
    assert set(plain) == set(full) == ANSWER_KEYS
    ours = {"weight_loads"}  # of the embedded server
    assert set(plain["meta_info"]) - ours == META_KEYS
    assert set(full["meta_info"]) - ours == META_KEYS | LOGPROB_KEYS
    meta = full["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 3)
    assert meta["output_token_logprobs_length"] == 3 and meta["input_token_logprobs"] == []
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]


def test_batch_keeps_order_and_takes_parameters_of_each_prompt(http):
    answers = generate(
        http,
        input_ids=[[84, 104], [101, 32, 5]],
        rid=["one", "two"],
        return_logprob=[True, False],
        sampling_params=[GREEDY | {"max_new_tokens": 3}, GREEDY | {"max_new_tokens": 4}],
    )
    assert [len(answer["output_ids"]) for answer in answers] == [3, 4]
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [2, 3]
    assert [answer["meta_info"]["id"] for answer in answers] == ["one", "two"]
    assert ["output_token_logprobs" in a["meta_info"] for a in answers] == [True, False]


def test_n_gives_a_list_of_independent_samples(http):
    answers = generate(http, input_ids=PROMPT, sampling_params={"max_new_tokens": 8, "n": 4})
    assert len(answers) == 4 and all(set(answer) == ANSWER_KEYS for answer in answers)
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 4
    assert len({answer["meta_info"]["id"] for answer in answers}) == 4


def test_text_prompt_is_tokenized_and_text_answer_detokenized(http):
    params = GREEDY | {"max_new_tokens": 5}
    by_text = generate(http, text="The ", sampling_params=params)
    assert by_text["meta_info"]["prompt_tokens"] == 4
    assert isinstance(by_text["text"], str) and by_text["text"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"sampling_params": {}}, "Either text, input_ids or input_embeds should be provided."),
        (
            {"input_ids": [5], "sampling_params": {"temperature": -1}},
            "temperature must be a non-negative finite number, got -1.",
        ),
        (
            {"input_ids": [5] * (CONTEXT + 76)},
            "The input (1100 tokens) is longer than the model's context length (1024 tokens).",
        ),
        ({"input_ids": []}, None),
    ],
)
def test_bad_request_is_400_with_a_message(http, body, message):
    response = http.post("/generate", json=body)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    found = response.json()["error"]["message"]
    assert found == message if message else found


def test_unknown_field_is_ignored(http):
    generate(http, input_ids=[5], sampling_params={"max_new_tokens": 2}, bogus=1)


def test_state_endpoints_answer(http):
    for path in ("/health", "/health_generate", "/ping"):
        response = http.get(path)
        assert (response.status_code, response.text) == (200, ""), path
    for path in ("/model_info", "/get_model_info"):
        info = http.get(path).json()
        assert {
            "model_path",
            "tokenizer_path",
            "is_generation",
            "weight_version",
            "model_type",
            "architectures",
        } <= set(info), path
        assert info["architectures"] == ["Qwen2ForCausalLM"] and info["is_generation"] is True
    info = http.get("/server_info").json()
    assert {"model_path", "dtype", "tp_size", "version", "internal_states"} <= set(info)
    assert info["tp_size"] == 1 and info["dtype"] == "float32"
    for method in ("GET", "POST"):
        response = http.request(method, "/flush_cache")
        assert response.status_code == 200 and response.text.startswith("Cache flushed.\n")


# ---- numbers ----


@pytest.mark.parametrize("prompt", [[7], PROMPT, list(range(40))])
def test_greedy_tokens_and_logprobs_are_transformers(http, reference_a, prompt):
    answer = generate(
        http, input_ids=prompt, return_logprob=True, sampling_params=GREEDY | {"max_new_tokens": 24}
    )
    tokens, found = ids_and_logprobs(answer)
    assert tokens == greedy(reference_a, prompt, 24)
    torch.testing.assert_close(found, logprobs(reference_a, prompt, tokens), atol=5e-5, rtol=0)


def test_sampled_logprobs_are_temperature_scaled_and_not_renormalised(http, reference_a):
    params = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "max_new_tokens": 24,
        "ignore_eos": True,
        "sampling_seed": 5,
    }
    answer = generate(http, input_ids=PROMPT, sampling_params=params, return_logprob=True)
    tokens, found = ids_and_logprobs(answer)
    torch.testing.assert_close(
        found, logprobs(reference_a, PROMPT, tokens, temperature=0.7), atol=5e-5, rtol=0
    )


def test_top_k_1_is_greedy_and_sampling_without_a_seed_varies(http, reference_a):
    params = {"temperature": 1.0, "ignore_eos": True, "max_new_tokens": 12}
    tokens = generate(http, input_ids=PROMPT, sampling_params=params | {"top_k": 1})["output_ids"]
    assert tokens == greedy(reference_a, PROMPT, 12)
    free = {
        tuple(generate(http, input_ids=PROMPT, sampling_params=params)["output_ids"])
        for _ in range(3)
    }
    assert len(free) == 3


# ---- ends ----


def test_stop_token_ends_the_sample_is_returned_and_is_not_in_the_text(http, reference_a):
    tokens = greedy(reference_a, PROMPT, 12)
    stop = next(token for token in tokens if token < 256)
    cut = tokens.index(stop) + 1
    answer = generate(
        http,
        input_ids=PROMPT,
        return_logprob=True,
        sampling_params={"temperature": 0, "max_new_tokens": 12, "stop_token_ids": [stop]},
    )
    assert answer["output_ids"] == tokens[:cut]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["meta_info"]["output_token_logprobs_length"] == cut
    limited = generate(
        http,
        input_ids=PROMPT,
        sampling_params={"temperature": 0, "max_new_tokens": max(cut - 1, 1), "ignore_eos": True},
    )
    if cut > 1:
        assert answer["text"] == limited["text"]


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_text_ends_the_sample_and_is_not_in_the_text(http, reference_a, model_a, as_list):
    decode = load_tokenizer(model_a).decode
    # Two plain tokens that both read as ASCII.  The tokens before them must be text too: SGLang
    # writes "!", the text of token 0, for a token that the tokenizer does not have.
    prompt, tokens, at = next(
        (prompt, tokens, at)
        for prompt in ([*PROMPT, last] for last in range(50))
        for tokens in [greedy(reference_a, prompt, 40)]
        for at in range(3, 38)
        if decode(tokens[at : at + 2]).isascii() and max(tokens[: at + 2]) < EOS
    )
    stop = decode(tokens[at : at + 2])
    made = next(n for n in range(41) if stop in decode(tokens[:n]))
    answer = generate(
        http,
        input_ids=prompt,
        sampling_params={
            "temperature": 0,
            "max_new_tokens": 40,
            "stop": [stop] if as_list else stop,
        },
    )
    assert answer["output_ids"] == tokens[:made]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    # SGLang leaves what it had passed on, with an earlier token, of the stop string itself.
    before, text = decode(tokens[:made]).partition(stop)[0], answer["text"]
    assert text.startswith(before) and stop.startswith(text[len(before) :]) and stop not in text


def test_the_models_end_token_ends_the_sample(http):
    answers = generate(http, input_ids=PROMPT, sampling_params={"max_new_tokens": 300, "n": 16})
    ended = [a for a in answers if a["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended, "at random one token in 264 is the end token"
    for answer in ended:
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
        assert answer["output_ids"][-1] == EOS
    for answer in answers:
        assert EOS not in answer["output_ids"][:-1]


# ---- pause, continue, abort ----


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_weights_updated_during_a_pause_make_the_tokens_after_it(
    http, model_b, reference_a, reference_b, mode
):
    wait = in_background(http, input_ids=PROMPT, sampling_params=LONG, return_logprob=True)
    paused = post_ok(http, "/pause_generation", mode=mode)
    assert paused == {"message": "Generation paused successfully.", "status": "ok"}
    if mode == "retract":  # SGLang takes 20 s to say no
        assert http.get("/health").status_code == 503
    flush = http.post("/flush_cache", json={})
    assert flush.status_code == (200 if mode == "retract" else 400)
    update = post_ok(
        http,
        "/update_weights_from_disk",
        model_path=str(model_b),
        weight_version="mid",
        flush_cache=mode == "retract",
    )
    assert update["success"] is True
    continued = post_ok(http, "/continue_generation")
    assert continued == {"message": "Generation continued successfully.", "status": "ok"}
    answer = wait()
    meta = answer["meta_info"]
    tokens, found = ids_and_logprobs(answer)
    assert meta["num_retractions"] == (1 if mode == "retract" else 0)
    assert meta["weight_version"] == "mid" and len(tokens) == 600
    first, second = meta["weight_versions"]
    boundary = first["end"]
    assert first == {"version": "default", "start": 0, "end": boundary}
    assert second == {"version": "mid", "start": boundary, "end": 600}
    torch.testing.assert_close(
        found[:boundary], logprobs(reference_a, PROMPT, tokens[:boundary]), atol=1e-4, rtol=0
    )
    recomputed = logprobs(reference_b, PROMPT, tokens)[boundary:]
    if mode == "in_place":
        kept = logprobs_over_old_cache(reference_a, reference_b, PROMPT, tokens, boundary)
        assert (kept - recomputed).abs().max() > 1e-2, "the two cannot be told apart here"
        torch.testing.assert_close(found[boundary:], kept, atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(found[boundary:], recomputed, atol=1e-4, rtol=0)


def test_pause_abort_ends_what_is_in_flight_and_new_requests_wait(http):
    wait = in_background(http, input_ids=PROMPT, sampling_params=LONG, return_logprob=True)
    post_ok(http, "/pause_generation", mode="abort")
    answer = wait()
    reason = answer["meta_info"]["finish_reason"]
    assert set(reason) == {"type", "message", "status_code", "err_type"}
    assert reason["type"] == "abort" and 0 < len(answer["output_ids"]) < 600
    short = GREEDY | {"max_new_tokens": 2}
    later = in_background(http, running=0, input_ids=PROMPT, sampling_params=short)
    post_ok(http, "/continue_generation")
    assert len(later()["output_ids"]) == 2


def test_abort_request_ends_one_request_or_all(http):
    waits = [
        in_background(http, count, input_ids=PROMPT, sampling_params=LONG, rid=rid)
        for count, rid in enumerate(("first", "second"), start=1)
    ]
    assert post_ok(http, "/abort_request", rid="second") == ""
    second = waits[1]()
    assert second["meta_info"]["finish_reason"]["type"] == "abort"
    assert second["meta_info"]["id"] == "second"
    post_ok(http, "/abort_request", abort_all=True)
    first = waits[0]()
    assert first["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(first["output_ids"]) < 600


def test_an_id_in_flight_is_refused_and_what_has_it_goes_on(http):
    short = GREEDY | {"max_new_tokens": 2}
    wait = in_background(http, input_ids=PROMPT, sampling_params=LONG, rid="taken")
    for body in (
        {"input_ids": PROMPT, "rid": "taken"},
        {"input_ids": [[5], [6]], "rid": ["free", "taken"]},
        {"input_ids": [[5], [6]], "rid": ["free", "free"]},
    ):
        refused = http.post("/generate", json=body | {"sampling_params": short})
        assert refused.status_code == 400, refused.text
        assert "duplicate request id" in refused.json()["error"]["message"].lower()
    assert len(wait()["output_ids"]) == 600
    for rid in ("taken", "free"):
        answer = generate(http, input_ids=PROMPT, sampling_params=short, rid=rid)
        assert answer["meta_info"]["id"] == rid


# ---- weights ----


def test_update_from_disk_takes_effect_and_a_bad_path_keeps_the_weights(
    http, model_b, reference_b, tmp_path
):
    done = post_ok(http, "/update_weights_from_disk", model_path=str(model_b), weight_version="v1")
    assert done == {
        "success": True,
        "num_paused_requests": 0,
        "message": "Succeeded to update model weights. Weight version updated to v1.",
    }
    bad = http.post(
        "/update_weights_from_disk",
        json={"model_path": str(tmp_path / "none"), "weight_version": "v2"},
    )
    assert bad.status_code == 400 and bad.json()["success"] is False
    assert set(bad.json()) == {"success", "message", "num_paused_requests"}
    answer = generate(
        http, input_ids=PROMPT, return_logprob=True, sampling_params=GREEDY | {"max_new_tokens": 12}
    )
    tokens, found = ids_and_logprobs(answer)
    torch.testing.assert_close(found, logprobs(reference_b, PROMPT, tokens), atol=5e-5, rtol=0)
    assert answer["meta_info"]["weight_versions"] == [{"version": "v1", "start": 0, "end": 12}]
    assert http.get("/model_info").json()["weight_version"] == "v1"


@pytest.mark.parametrize("way", ["inside requests", "in place"])
def test_update_from_tensors_takes_effect_between_begin_and_end_only(http, reference_b, way):
    rooms = Rooms(NamedMemory)

    def body(reference: Qwen2ForCausalLM, version: str) -> dict[str, Any]:
        named = [(name, tensor.clone()) for name, tensor in reference.state_dict().items()]
        if way == "in place":
            given = {
                "serialized_named_tensors": [Bucket(named, rooms).payload()],
                "load_format": FORMAT,
            }
        else:
            packed = base64.b64encode(pickle.dumps(named)).decode()
            given = {"serialized_named_tensors": [packed]}
        return given | {"weight_version": version, "flush_cache": True}

    early = http.post("/update_weights_from_tensor", json=body(reference_b, "early"))
    assert early.status_code == 400
    assert early.json() == {
        "success": False,
        "message": (
            "update_weights_from_tensor must run between begin_weight_update() and "
            "end_weight_update()"
        ),
    }
    opened = post_ok(http, "/begin_weight_update")
    done = post_ok(http, "/update_weights_from_tensor", **body(reference_b, "t1"))
    closed = post_ok(http, "/end_weight_update")
    assert opened == closed == {"success": True, "message": "Success"}
    assert done == {"success": True, "message": "Success Weight version updated to t1."}
    for memory in rooms.held:
        memory.flat_B.zero_()  # the server has its own copy
    rooms.close()
    answer = generate(
        http, input_ids=PROMPT, return_logprob=True, sampling_params=GREEDY | {"max_new_tokens": 12}
    )
    tokens, found = ids_and_logprobs(answer)
    torch.testing.assert_close(found, logprobs(reference_b, PROMPT, tokens), atol=5e-5, rtol=0)
    assert answer["meta_info"]["weight_version"] == "t1"


def test_update_by_broadcast_takes_effect_between_begin_and_end_only(http, reference_b):
    named = {name: tensor.clone() for name, tensor in reference_b.state_dict().items()}
    body = {
        "names": list(named),
        "dtypes": ["float32"] * len(named),
        "group_name": "contract",
        "shapes": [list(tensor.shape) for tensor in named.values()],
        "weight_version": "d1",
    }
    joined: list[Any] = []
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    join = threading.Thread(
        target=lambda: joined.append(
            post_ok(
                http,
                "/init_weights_update_group",
                master_address="127.0.0.1",
                master_port=store.port,
                rank_offset=1,
                world_size=2,
                group_name="contract",
                backend="gloo",
            )
        )
    )
    join.start()
    group = join_group(store, "contract", 0, 2, "gloo", 240.0)
    join.join(240)
    assert joined == [{"success": True, "message": "Succeeded to initialize custom process group."}]
    early = http.post("/update_weights_from_distributed", json=body)
    assert early.status_code == 400 and early.json()["success"] is False
    post_ok(http, "/begin_weight_update")
    done: list[Any] = []
    update = threading.Thread(
        target=lambda: done.append(post_ok(http, "/update_weights_from_distributed", **body))
    )
    update.start()
    for tensor in named.values():
        dist.broadcast(tensor, src=0, group=group)
    update.join(240)
    assert done == [
        {
            "success": True,
            "message": "Succeeded to update parameter online. Weight version updated to d1.",
        }
    ]
    post_ok(http, "/end_weight_update")
    answer = generate(
        http, input_ids=PROMPT, return_logprob=True, sampling_params=GREEDY | {"max_new_tokens": 12}
    )
    tokens, found = ids_and_logprobs(answer)
    torch.testing.assert_close(found, logprobs(reference_b, PROMPT, tokens), atol=5e-5, rtol=0)
    assert answer["meta_info"]["weight_version"] == "d1"
    left = post_ok(http, "/destroy_weights_update_group", group_name="contract")
    assert left == {"success": True, "message": "Succeeded to destroy custom process group."}
    again = http.post("/destroy_weights_update_group", json={"group_name": "contract"})
    assert again.status_code == 400
    leave_group(group)


def test_memory_is_given_up_and_taken_again_around_new_weights(http, model_b, reference_b):
    """In the order of engines/colocation.py.  SGLang frees nothing on a CPU."""
    both = {"tags": ["kv_cache", "weights"]}
    post_ok(http, "/release_memory_occupation", **both)
    post_ok(http, "/resume_memory_occupation", tags=["weights"])
    post_ok(
        http,
        "/update_weights_from_disk",
        model_path=str(model_b),
        weight_version="r1",
        flush_cache=True,
    )
    post_ok(http, "/resume_memory_occupation", tags=["kv_cache"])
    answer = generate(
        http, input_ids=PROMPT, return_logprob=True, sampling_params=GREEDY | {"max_new_tokens": 12}
    )
    tokens, found = ids_and_logprobs(answer)
    torch.testing.assert_close(found, logprobs(reference_b, PROMPT, tokens), atol=5e-5, rtol=0)


def test_weight_version_can_be_renamed(http):
    done = post_ok(http, "/update_weight_version", new_version="v9")
    assert done == {"success": True, "message": "Weight version updated to v9", "new_version": "v9"}
    answer = generate(http, input_ids=PROMPT, sampling_params={"max_new_tokens": 1})
    assert answer["meta_info"]["weight_version"] == "v9"


def test_update_without_a_version_keeps_the_version(http, model_b: Path):
    done = post_ok(http, "/update_weights_from_disk", model_path=str(model_b))
    assert done["message"] == "Succeeded to update model weights."
    assert http.get("/model_info").json()["weight_version"] == "default"
