"""The configuration: frozen dataclasses, filled by config/file.py.

Every default stands here and only here.  Nothing is configured through environment variables.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_gpc.config.types import (
    MOST,
    MOST_SAMPLES,
    Arguments,
    Counts,
    EntropyTarget,
    Factor,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    Part,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Regions,
    Seed,
    Sinks,
    SmallInt,
    StopList,
    Temperature,
    TopK,
    Urls,
    VariableName,
    VariableValue,
    section,
)


@section
class ParallelConfig:
    """How the policy is laid out over processes: tp * pp * cp * dp of them."""

    tp: PositiveInt = 1
    """Tensor parallelism: every matrix is cut into tp parts."""
    pp: PositiveInt = 1
    """Pipeline parallelism: the layers are cut into pp stages."""
    vpp: PositiveInt | None = None
    """Virtual pipeline: model chunks a stage (interleaved schedule); needs pp > 1."""
    cp: PositiveInt = 1
    """Context parallelism: every sequence is cut into cp parts."""
    ep: PositiveInt = 1
    """Expert parallelism, inside the data-parallel ranks; for mixture-of-experts models."""
    dp: PositiveInt | None = None
    """Data parallelism.  Left out it follows from the number of processes; `megatron-gpc train`
    starting its own processes then takes 1."""
    sequence_parallel: bool = False
    """Cut activations between matrices along the sequence; needs tp > 1."""


@section
class ModelConfig:
    """The policy."""

    hf: Path
    """Hugging Face checkpoint folder to start from (config.json, safetensors, tokenizer), or what
    `megatron-gpc convert` made of one."""
    build: Path | None = None
    """Python script that makes that folder if it is missing; called with the folder's path."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations.  The optimizer keeps fp32 either way."""


@section
class DataConfig:
    """Prompts: JSON lines with `prompt` and `label` (for the verifier).

    A prompt that is text is taken as it is; one that is a list of messages ({role, content}) goes
    through the chat template of the model's tokenizer.
    """

    prompts: Path
    """Prompts to train on; shuffled anew every epoch, from the run's seed."""
    verifier: typing.Annotated[str, Part("math", "addition")]
    """What judges answers: `math` compares final answers (docs/mathematics.md), `addition` is the
    example's.  Or a function of your own, as `package.module:name` or `path/to/file.py:name`
    (docs/extend.md)."""
    verifier_arguments: Arguments = dataclasses.field(default_factory=dict)
    """Passed to a verifier of your own by keyword."""
    verifier_timeout_s: PositiveFloat = 60.0
    """How long a call of your own verifier may take [s]; a run whose verifier hangs ends."""
    right_at: FiniteFloat = 1.0
    """An answer is right if its reward is at least this, unless your verifier says `right` itself.
    Right answers count for pass@k, rollout.filter, groups_all_right and groups_all_wrong."""
    max_prompt_tokens: PositiveInt | None = None
    """Most tokens of a prompt, of data.prompts and of eval.prompts; left out, what the context
    (max_position_embeddings of the model, or sglang.args.context_length) has beside
    max_response_tokens.  It is never more than that."""
    too_long: Literal["error", "drop"] = "error"
    """Prompts with more tokens than fit: refuse the file, or leave them out and say how many."""
    chat_template: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false} for Qwen3."""
    changed: Literal["refuse", "accept"] = "refuse"
    """When a run continues and its prompts are not those that it was trained on (other token ids,
    labels or order): `refuse` to, or `accept` the new ones from there on, at the same position."""


@section
class ServerConfig:
    """Where rollouts come from: engines, servers with SGLang's HTTP interface."""

    kind: Literal["embedded", "sglang"] = "embedded"
    """What is started on this machine if neither urls nor urls_file names running servers: the
    project's own server, or SGLang (see the section `sglang`)."""
    engines: SmallInt = 1
    """How many are started."""
    port: typing.Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the first that is started, the others follow it; 0: any that are free."""
    urls: Urls = ()
    """Addresses of running servers, such as http://10.0.0.7:30000; one or a list."""
    urls_file: Path | None = None
    """File with one such address a line, written by whoever starts the servers; waited for."""
    router: bool = False
    """Put sglang-router in front of the engines; weights and pauses go to the engines directly."""
    api_key_file: Path | None = None
    """File with the key that the servers ask for, mode 0600.  Left out: servers that are started
    get a random one; for urls_file the file of that name with `.key` behind it, if it is there."""
    start_timeout_s: PositiveFloat = 180.0
    """How long a server may take to become healthy [s]."""
    request_timeout_s: PositiveFloat = 300.0
    """How long one HTTP request may take [s]."""
    sync_timeout_s: PositiveFloat = 300.0
    """How long one part of a weight update may take [s]."""
    retries: typing.Annotated[int, Field(ge=0, le=100)] = 4
    """How often a failed request is sent again, to another engine if there is one."""
    max_in_flight: SmallInt = 256
    """Samples that an engine is asked for at the same time."""
    max_restarts: NonNegativeInt = 20
    """How often engines that died are started again, over a run."""
    sync: Literal["disk", "tensor", "distributed"] = "disk"
    """How new weights reach the engines: safetensors in a shared folder; as tensors that engines of
    this host read in place (CUDA IPC, or shared memory), a bucket at a time; or by broadcast in a
    process group of trainer and engines (NCCL, or gloo on CPUs)."""
    colocated: bool = False
    """Engines and policy take turns on the same GPUs: engines give up weights and cache while the
    policy trains, and the policy's optimizer state and gradients wait in CPU memory while they
    generate."""
    bucket_mb: SmallInt = 256
    """Most that is gathered and sent at once with `tensor` and `distributed` [MiB]; in the host's
    memory 64 at most."""
    probe_tokens: NonNegativeInt = 256
    """Tokens that every engine samples after an update, to be held against the trainer's log-probs;
    0: none."""
    probe_tolerance: PositiveFloat | None = None
    """Largest mean difference of log-probs in that comparison [nats]; no token may differ by more
    than 50 times as much.  Left out: 0.001 if policy and engines compute in fp32, 0.1 otherwise
    (with bf16 healthy engines differ by 0.01 to 0.04)."""


@section
class SGLangConfig:
    """How SGLang is started, for rollout.server.kind=sglang.

    It has an environment and pins of its own: trainer and SGLang meet over HTTP only.
    """

    python: Path | None = None
    """Interpreter of the environment that SGLang is installed in; left out, this one's."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the installed SGLang by name: {tp_size: 2, disable_overlap_schedule: true} is
    --tp-size 2 --disable-overlap-schedule."""
    environment: dict[VariableName, VariableValue] = dataclasses.field(default_factory=dict)
    """Environment variables of the server."""


@section
class RolloutConfig:
    """What is sampled in one training step."""

    prompts_per_step: PositiveInt = 32
    """P: prompts of a training step."""
    group_size: typing.Annotated[int, Field(ge=2, le=MOST_SAMPLES)] = 8
    """G: samples a prompt; their mean reward is the baseline, so at least 2."""
    max_response_tokens: PositiveInt = 256
    """Responses are cut at this length."""
    temperature: Temperature = 1.0
    """Sampling temperature; log-probs, ratios and entropies are those of this distribution."""
    stop: StopList | None = None
    """What ends an answer besides the tokenizer's eos and generation_config.json's: strings or
    token numbers, one or a list.  Left out: what the model's chat template puts after an answer;
    []: nothing.  A start says what it came to."""
    filter: Literal["none", "mixed"] = "none"
    """`mixed`: groups that are all right or all wrong give no gradient; they are dropped and the
    next prompts asked for instead (dynamic sampling, DAPO)."""
    refill_limit: Factor = 4.0
    """With filter=mixed at most so many times prompts_per_step are asked for; what is then missing
    is filled with uniform groups."""
    oversample: Factor = 1.0
    """Ask for so many times prompts_per_step, train on the groups that end first, abort the rest;
    their prompts come back in the next step."""
    partial: bool = False
    """Aborted samples go on in the next step, under the next weights, instead of starting anew."""
    overlap: bool = False
    """Sample for the next step while this one trains: samples are one weight version older."""
    max_staleness: NonNegativeInt = 1
    """Weight versions that a sample's oldest token may lie behind; older ones are made anew."""
    overlong: Literal["keep", "drop", "penalty"] = "keep"
    """Responses cut at max_response_tokens: `keep` trains on them as they were judged, `drop` does
    not train on them (they still count in their group's baseline), `penalty` takes up to 1 from the
    reward over the last overlong_buffer tokens (DAPO, eq. 13)."""
    overlong_buffer: PositiveInt = 64
    """Tokens over which `penalty` grows from 0 to 1."""
    save_samples: bool = False
    """Keep every step's samples as run_dir/samples/step_NNNNNN.parquet: to be looked at
    (`megatron-gpc samples`) and to be trained on again (rollout.replay)."""
    replay: Path | None = None
    """Folder of a run whose saved samples are trained on, step by step, instead of new ones; no
    server is needed then, and nothing is evaluated."""
    server: ServerConfig = ServerConfig()


@section
class TrainConfig:
    """One training step: a rollout, then mini_batches * epochs updates of the policy."""

    steps: PositiveInt = 100
    """T: training steps of the run.  The clip schedule stretches over them, as does a learning rate
    that decays; both jump if a continued run gets another number."""
    mini_batches: PositiveInt = 4
    """Updates an epoch: the rollout is cut into so many mini-batches, of equal size or one sample
    more."""
    epochs: PositiveInt = 2
    """Passes over the rollout."""
    micro_batch_size: PositiveInt = 8
    """Most sequences of one forward pass on one data-parallel rank; changes memory, never
    numbers."""
    micro_batch_tokens: PositiveInt | None = None
    """Most tokens of one forward pass, prompts included; a longer sequence goes alone.  Left out,
    micro_batch_size is the only limit."""
    loss: typing.Annotated[str, Part("clip", "gspo", "cispo", "clip-cov")] = "clip"
    """The objective.  `clip`: PPO's, each token's ratio bounded by the section `clip`; `gspo`: a
    sequence's ratio bounded (arXiv 2507.18071); `cispo`: the importance weight bounded, every
    gradient kept (arXiv 2506.13585); `clip-cov`: `clip` without a few tokens of high covariance of
    log-prob and advantage (arXiv 2505.22617).  Or your own, as `package.module:name` or
    `path/to/file.py:name` (docs/extend.md)."""
    loss_arguments: Arguments = dataclasses.field(default_factory=dict)
    """Passed to the loss by keyword.  `clip` takes none.  `gspo`: eps_low (default 3e-4) and
    eps_high (4e-4), how far a sequence's ratio may go below and above 1, and average (`sequence`:
    all sequences weigh the same; or `token`).  `cispo`: eps_low (default none) and eps_high
    (default: the upper threshold of the section `clip`), how far the weight may go below and above
    1.  `clip-cov`: share (2e-4) of all tokens that are left out, drawn among those with a
    covariance between low (1.0) and high (5.0)."""
    routing_replay: bool = False
    """Send every token to the experts that the rollout's routers sent it to (R3, arXiv 2510.11370),
    in every pass over a step's samples but the reference model's.  Numbers of trainer and engines
    differ in their last bits, so that their routers differ now and then, and log-probs jump where
    they do.  Needs a mixture of experts, and engines that tell (docs/rollouts.md)."""
    experts: Literal["auto", "grouped", "each"] = "auto"
    """How a rank computes the experts that it has of a layer.  `each`: one after another, with two
    matrix products an expert; `grouped`: with two for all of them; `auto`: grouped on a GPU."""
    advantage: Literal["std", "mean"] = "std"
    """Reward minus the group's mean, divided by the group's standard deviation (GRPO) or not
    (`mean`, Dr. GRPO)."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Denominator of the importance ratio: recomputed by the trainer before the first update, or
    as the server returned it."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Importance weight for samples that other numbers or older weights made, w = exp(old log-prob
    - rollout's log-prob): `truncate` takes min(w, correction_cap), `mask` w if it lies within
    [1 / correction_cap, correction_cap] and 0 elsewhere."""
    correction_level: Literal["token", "sequence"] = "token"
    """w of each token, or the product over a response, the same for all of its tokens."""
    correction_cap: typing.Annotated[float, Field(gt=1, le=MOST)] = 2.0
    """Where weights are truncated or masked."""
    entropy_coef: FiniteFloat = 0.0
    """Weight of an entropy bonus in the objective; 0 keeps no state for its gradient."""
    head: Literal["auto", "logits", "fused"] = "auto"
    """How the LM head's logits become log-probs and entropies.  `fused`: a chunk of the vocabulary
    at a time, which the backward pass makes again, so that T x V logits never exist.  `auto`: the
    same, but logits of at most 1 GiB a forward pass are kept, which saves a quarter of the matrix
    products.  `logits`: all logits and their gradient, by megatron-core's output layer; the
    reference that the others are held to."""
    logit_chunk_tokens: PositiveInt = 1024
    """With head=logits: most tokens whose fp32 logits exist at the same time in log-prob and
    entropy; on a CPU fewer, so that they fit its cache."""


@section
class KLConfig:
    """A penalty for leaving a reference model, added to any loss."""

    coef: NonNegativeFloat = 0.0
    """Weight of the mean over all response tokens of k3 = r - 1 - ln r with r = p_reference / p,
    whose mean over samples is the KL divergence (GRPO, arXiv 2402.03300, equation 4).  Above 0
    the reference scores every rollout once, and its weights wait in CPU memory meanwhile."""
    reference: Path | None = None
    """The reference, in the formats of model.hf and of the same architecture; left out, model.hf
    itself, also in a run that is continued."""


@section
class OptimConfig:
    """Adam (megatron-core's).  Everything else it offers is under `megatron.optimizer`."""

    lr: PositiveFloat = 1e-6
    """Learning rate after warm-up."""
    min_lr: NonNegativeFloat = 0.0
    """Where cosine and linear decay end."""
    warmup_updates: NonNegativeInt = 0
    """Updates in which the learning rate rises from 0."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate over all updates of the run."""
    beta1: typing.Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of its mean of gradients that Adam keeps at an update."""
    beta2: typing.Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Share of its mean of squared gradients that Adam keeps at an update."""
    eps: PositiveFloat = 1e-8
    """Added to the root of that mean before Adam divides by it."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (AdamW): lr times this share of a weight is taken off at an update."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 turns clipping of the gradient off."""
    distributed: bool = True
    """Cut optimizer state over data-parallel ranks (megatron-core's distributed optimizer)."""


@section
class ClipConfig:
    """Flexible entropy control (arXiv 2602.09782): how far the importance ratio may move."""

    schedule: typing.Annotated[str, Part("static", "hi", "lo", "id", "did", "od", "target")] = "id"
    """`static`: [1 - eps_low, 1 + eps_high] throughout (PPO, GRPO; DAPO with eps_high 0.28);
    `hi` and `lo`: Hi(p) above or Lo(p) below throughout, the other side standard; `id`: entropy up,
    then down; `did`: down, up, down; `od`: oscillation that decays; `target`: along the curve that
    clip.target draws.  Or your own, as `package.module:name` or `path/to/file.py:name`
    (docs/extend.md)."""
    schedule_arguments: Arguments = dataclasses.field(default_factory=dict)
    """Passed to a schedule of your own by keyword."""
    target: EntropyTarget | None = None
    """What clip.schedule=target steers entropy to (docs/entropy.md): nats a token (`0.9`, at most
    ln V), a share of the first step's entropy (`80%`, 0.1 to 1000), or a curve through points
    [share of the run, either], such as `[[0, 100%], [0.5, 115%], [1, 70%]]`: straight between
    them, level before and after."""
    target_gain: PositiveFloat = 20.0
    """How much lambda `target` gives for a relative error of 1: at 20, entropy that is 5 % off its
    target opens a threshold fully."""
    target_integral_gain: NonNegativeFloat = 4.0
    """How much lambda grows every step for a relative error of 1 that stays; 0: not at all."""
    eps_low: PositiveShare = 0.2
    """Standard lower threshold (eps_std in the paper)."""
    eps_high: PositiveFloat = 0.2
    """Standard upper threshold (eps_std in the paper)."""
    phase_split: PositiveShare = 0.5
    """s: share of the run that phase 1 of `id` and `did` takes."""
    hi_slope: FiniteFloat = -0.25
    """a_hi in Hi(p) = a_hi p + b_hi, the upper threshold that raises entropy."""
    hi_intercept: PositiveFloat = 0.5
    """b_hi."""
    lo_slope: FiniteFloat = -0.13
    """a_lo in Lo(p) = a_lo p + b_lo, the lower threshold that lowers entropy."""
    lo_intercept: PositiveShare = 0.3
    """b_lo."""
    od_floor: PositiveShare = 0.2
    """H_min / H_init: the entropy at which `od` turns to raising it, as a share of the first."""
    regions: Regions = ("e1", "e2", "e3", "e4")
    """Entropy regions (docs/entropy.md) whose tokens give gradient, one or a list; for controlled
    runs.  The loss is still divided by the number of ALL response tokens.  With fewer than four,
    tokens of no region give none either."""

    def __post_init__(self) -> None:
        if self.schedule == "target" and self.target is None:
            raise ValueError("schedule=target follows clip.target, which is not set")


@section
class DiagnosticsConfig:
    """Measurements that cost a step further passes over its samples."""

    entropy_change: bool = False
    """How much the step's updates changed mean entropy on the step's own samples (`dh_measured`),
    its exact directional derivative along the way the weights went (`dh_directional`), and that
    with the second-order term (`dh_second_order`).  A forward and backward pass before the updates
    and another after them, a forward pass, and memory for two more fp32 copies of the weights."""
    signal: NonNegativeInt = 0
    """At the first step and every so many after it, how much of the gradient is signal
    (`signal_share`): the cosine of the gradients of two halves of the step's prompts, before the
    updates.  One forward and backward pass, and memory for two more fp32 gradients; 0: never."""


@section
class EvalConfig:
    """Sampling on held-out prompts, before the first and after the last step."""

    prompts: Path | None = None
    """Held-out prompts, in the format of data.prompts.  Left out, nothing is evaluated."""
    samples: SmallInt = 64
    """Samples a prompt."""
    every: NonNegativeInt = 0
    """Evaluate every so many steps as well; 0: only before and after."""
    temperature: Temperature | None = None
    """Sampling temperature; left out, rollout.temperature."""
    top_p: typing.Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that have this probability together; 1: among all."""
    top_k: TopK = -1
    """Draw among so many likeliest tokens; -1: among all."""
    max_response_tokens: PositiveInt | None = None
    """Responses are cut at this length; left out, rollout.max_response_tokens."""
    pass_k: Counts = ()
    """pass@k is given for these k, one or a list, each at most `samples`; left out, for the
    powers of two up to it."""


@section
class CheckpointConfig:
    """What is kept to continue from."""

    every: NonNegativeInt = 20
    """Save every so many training steps, and after the last; 0: only after the last."""
    keep: PositiveInt = 2
    """How many of the newest are kept.  An old one is removed only after a new one is complete."""
    keep_every: NonNegativeInt = 0
    """Those of every so many-th step are kept for good; 0: none."""
    asynchronous: bool = False
    """Write in the background while training goes on; see docs/checkpoints.md for what it costs."""


@section
class LogConfig:
    """Where the metrics of steps and evaluations go; docs/extend.md has more."""

    sinks: Sinks = ("jsonl", "tensorboard")
    """`jsonl`: metrics.jsonl and eval.jsonl, from which plots, tables and `megatron-gpc status` are
    made; `tensorboard`: events in run_dir/tensorboard; `wandb`, `mlflow`, `swanlab`: pages of these
    services, local ones unless a key or a server is there (`pip install 'megatron-gpc[wandb]'`).
    Or your own, as `package.module:name` or `path/to/file.py:name`."""
    sinks_arguments: dict[str, Arguments] = dataclasses.field(default_factory=dict)
    """What sinks take by keyword, by their names, such as {wandb: {project: mine}}; that of your
    own is what follows the colon."""
    baseline: Path | None = None
    """A record of other runs, which `megatron-gpc plot RUN... --record FILE` writes: the table at
    the end says in one sentence how the run differs from them."""

    def __post_init__(self) -> None:
        names = [name.rpartition(":")[2] for name in self.sinks]
        unknown = [name for name in self.sinks_arguments if name not in names]
        if unknown:
            raise ValueError(f"sinks_arguments: {unknown[0]} is none of the sinks: {names}")


@section
class GuardConfig:
    """When a run ends itself instead of going on in vain."""

    max_skipped_updates: NonNegativeInt = 3
    """An update whose loss or gradient is not finite is left out and its mini-batch is saved in
    run_dir/skipped; one more of them than this, over the whole run, ends it."""
    silent_minutes: typing.Annotated[float, Field(ge=0, le=1e6)] = 30.0
    """How long one part of a step (rollout, evaluation, an update, a checkpoint) may take [min].
    A rank that is silent for longer writes the stacks of its threads to run_dir/logs and ends the
    run; 0: never."""


@section
class MegatronConfig:
    """megatron-core's own settings, by the names of its dataclasses, for what has no key above."""

    transformer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of megatron.core.transformer.TransformerConfig."""
    ddp: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of megatron.core.distributed.DistributedDataParallelConfig."""
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of megatron.core.optimizer.OptimizerConfig."""


@section
class Config:
    """A run."""

    run_dir: Path
    """Folder of the run: resolved configuration, metrics, plots, checkpoints."""
    model: ModelConfig
    data: DataConfig
    seed: Seed = 0
    """Decides every random choice: prompt order, samples, mini-batches."""
    resume: Literal["auto", "none"] = "auto"
    """`auto`: continue from run_dir's newest checkpoint; `none`: set an old run_dir aside and
    start over."""
    timeout_s: PositiveFloat = 600.0
    """How long a rank waits for the others before the run ends with an error [s]."""
    plots: bool = True
    """Draw plots.png at the end, which takes seconds; `megatron-gpc plot` draws it at any time."""
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    sglang: SGLangConfig = SGLangConfig()
    train: TrainConfig = TrainConfig()
    kl: KLConfig = KLConfig()
    optim: OptimConfig = OptimConfig()
    clip: ClipConfig = ClipConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    megatron: MegatronConfig = MegatronConfig()
