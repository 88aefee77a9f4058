"""Contradictory layouts are refused by name, before any process starts."""

from __future__ import annotations

import pytest
from tiny import run_config

from megatron_gpc.config.layout import check_layout, check_world, world_size
from megatron_gpc.errors import UserError
from megatron_gpc.weights.folders import hf_folder, is_converted, read_hf_config

REPLAY = "train.routing_replay=true"
TURNS = "rollout.server.colocated=true"
MODEL = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
}
MOE = {**MODEL, "num_experts": 4, "moe_intermediate_size": 32}
MOE5 = {**MODEL, "num_local_experts": 4, "moe_intermediate_size": 32}  # as transformers 5 writes it


@pytest.mark.parametrize(
    ("overrides", "model", "says"),
    [
        (["parallel.tp=3"], MODEL, "the model's 4 attention heads; set it to 2 or 4"),
        (["parallel.tp=3"], {**MODEL, "num_attention_heads": 6}, "2 key-value heads"),
        (["parallel.tp=4"], {**MODEL, "intermediate_size": 66}, "feed-forward size 66"),
        (["parallel.pp=3"], MODEL, "does not divide the model's 4 layers; set it to 2 or 4"),
        ([], {"num_attention_heads": 4}, "config.json lacks num_hidden_layers"),
        (["parallel.pp=2", "parallel.vpp=4"], MODEL, "parallel.pp * vpp = 8"),
        (["parallel.vpp=2"], MODEL, "needs parallel.pp > 1"),
        (
            ["rollout.server.urls=http://a", "rollout.server.urls_file=b"],
            MODEL,
            "both name the engines",
        ),
        (
            ["rollout.server.port=65535", "rollout.server.engines=2"],
            MODEL,
            "2 engines need as many ports",
        ),
        (["parallel.sequence_parallel=true"], MODEL, "needs parallel.tp > 1"),
        (["megatron.transformer.fp8=e4m3"], MODEL, "megatron.transformer.fp8=e4m3 needs CUDA"),
        (
            ["megatron.transformer.moe_permute_fusion=true"],
            MOE,
            "moe_permute_fusion=True needs CUDA",
        ),
        (["megatron.ddp.nccl_ub=true"], MODEL, "leave it out on a CPU"),
        (["parallel.ep=2", "parallel.dp=2"], MODEL, "has no experts"),
        (
            ["parallel.ep=2"],
            MOE,
            "parallel.ep=2 must divide parallel.dp * cp = 1; set parallel.dp to 2",
        ),
        (["parallel.ep=2", "parallel.dp=3"], MOE, "= 3; set parallel.dp to 2 or 4"),
        (["parallel.tp=5"], MODEL, "attention heads; set it to 4"),
        (["parallel.ep=3", "parallel.dp=3"], MOE, "does not divide the model's 4 experts"),
        (["parallel.ep=3", "parallel.dp=3"], MOE5, "does not divide the model's 4 experts"),
        (["parallel.tp=2"], MOE, "needs parallel.sequence_parallel=true"),
        (["rollout.overlap=true", TURNS], MODEL, "rollout.overlap=true samples while"),
        (["rollout.server.urls=http://h:1", TURNS], MODEL, "rollout.server.urls or urls_file"),
        (["rollout.server.sync=distributed", TURNS], MODEL, "take disk or tensor"),
        (["rollout.server.router=true", TURNS], MODEL, "rollout.server.router=true asks"),
        (["rollout.server.kind=sglang", TURNS], MODEL, "this machine has no GPU"),
        ([REPLAY, "rollout.server.router=true"], MOE, "set rollout.server.router=false"),
        (
            [
                REPLAY,
                "rollout.server.kind=sglang",
                "sglang.args.enable_return_routed_experts=false",
            ],
            MOE,
            "leave sglang.args.enable_return_routed_experts out",
        ),
        (["train.mini_batches=17"], MODEL, "train.mini_batches=17 is more than the samples"),
    ],
)
def test_refused(tmp_path, overrides, model, says):
    config = run_config(tmp_path, tmp_path, *overrides)
    with pytest.raises(UserError) as error:
        check_layout(config, model, cuda=False)
    assert says in str(error.value)


DISTRIBUTED = "rollout.server.sync=distributed"
SGLANG = "rollout.server.kind=sglang"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "engines on the CPU"),
        ([SGLANG, "sglang.args.device=cpu"], "engines on the CPU"),
        ([SGLANG], "the first engine would have GPU 0"),
        ([SGLANG, "sglang.args.base_gpu_id=0"], "the first engine would have GPU 0"),
    ],
)
def test_a_broadcast_that_nccl_would_refuse_is_refused(tmp_path, overrides, says):
    config = run_config(tmp_path, tmp_path, DISTRIBUTED, *overrides)
    with pytest.raises(UserError, match=says):
        check_layout(config, MODEL, cuda=True)
    check_layout(config, MODEL, cuda=False)  # over gloo


@pytest.mark.parametrize(
    "overrides",
    [
        [SGLANG, "sglang.args.base_gpu_id=1"],
        [SGLANG, "sglang.environment.CUDA_VISIBLE_DEVICES=1"],
        ["rollout.server.urls=http://h:1"],
    ],
)
def test_a_broadcast_to_engines_on_gpus_of_their_own_is_accepted(tmp_path, overrides):
    check_layout(run_config(tmp_path, tmp_path, DISTRIBUTED, *overrides), MODEL, cuda=True)


def test_accepted(tmp_path):
    config = run_config(
        tmp_path,
        tmp_path,
        "parallel.tp=2",
        "parallel.pp=2",
        "parallel.vpp=2",
        "parallel.sequence_parallel=true",
        "parallel.dp=3",
    )
    check_layout(config, MODEL, cuda=False)
    assert world_size(config.parallel) == 12
    config = run_config(tmp_path, tmp_path, "parallel.cp=2", "parallel.ep=2")
    check_layout(config, MOE, cuda=False)
    assert world_size(config.parallel) == 2
    fp8 = run_config(tmp_path, tmp_path, "megatron.transformer.fp8=e4m3")
    check_layout(fp8, MODEL, cuda=True)


@pytest.mark.parametrize("diagnosis", ["diagnostics.entropy_change=true", "diagnostics.signal=5"])
def test_what_reads_the_optimizers_weights_needs_them_in_fp32(tmp_path, diagnosis):
    given = (diagnosis, "megatron.optimizer.use_precision_aware_optimizer=true")
    check_layout(run_config(tmp_path, tmp_path, given[1]), MODEL, cuda=True)
    with pytest.raises(UserError, match="leave megatron.optimizer.use_precision_aware_optimizer"):
        check_layout(run_config(tmp_path, tmp_path, *given), MODEL, cuda=True)


def test_one_prompt_has_no_halves(tmp_path):
    given = ("diagnostics.signal=1", "rollout.prompts_per_step=1")
    with pytest.raises(UserError, match=r"rollout\.prompts_per_step=1; set it to 2 or more"):
        check_layout(run_config(tmp_path, tmp_path, *given), MODEL, cuda=False)


def test_the_number_of_started_processes_must_fit(tmp_path):
    parallel = run_config(tmp_path, tmp_path, "parallel.tp=2", "parallel.pp=2").parallel
    check_world(parallel, 8)  # dp = 2 follows
    with pytest.raises(UserError, match="start 4 or 8$"):
        check_world(parallel, 6)
    with pytest.raises(UserError, match="start 4$"):
        check_world(parallel, 3)
    parallel = run_config(tmp_path, tmp_path, "parallel.tp=2", "parallel.dp=2").parallel
    with pytest.raises(
        UserError, match="= 4; start that many, or leave parallel.dp out .4 follows"
    ):
        check_world(parallel, 8)


def test_of_a_converted_checkpoint_the_configuration_inside_is_read(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "qwen2"}')
    assert is_converted(tmp_path) and hf_folder(tmp_path) == tmp_path / "hf"
    assert read_hf_config(tmp_path) == {"model_type": "qwen2"}
    (tmp_path / "config.json").write_text("{}")  # a Hugging Face folder after all
    assert not is_converted(tmp_path) and hf_folder(tmp_path) == tmp_path


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_hf_config(tmp_path)
