"""The main job in TRL, for tools/bench/loop.py to be held to: seconds of a step and their CPU.

    python tools/bench/trl_loop.py [--steps 10]

Wants an environment with `trl` beside torch and transformers, and the start that `make run` builds.
A step has the same parts: 32 prompts x 8 answers of 16 tokens from the same policy, and 16 updates
on them, with static clipping.  Unlike loop.py's command it has one process and no server, does not
probe whether samples come from the right weights, and evaluates nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from megatron_gpc.cli import Parser, exit_code
from megatron_gpc.commands.arguments import number
from megatron_gpc.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/entropy_control"
UPDATES = 16

sys.path.append(str(EXAMPLE))
from reward import fits  # noqa: E402


class Clock(TrainerCallback):
    """Notes when every step ends."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        """Seconds, and CPU seconds of this process."""

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step % UPDATES == 0:
            self.ends.append((time.perf_counter(), time.process_time()))


def rewards(completions: list[str], label: list[list[int]], **unused: Any) -> list[float]:
    return list(map(fits, completions, label))


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=number(int, 3), default=10)
    steps = parser.parse_args().steps
    start = EXAMPLE / "start"
    if not start.is_dir():
        raise UserError(f"{start} is not there; `make run` builds it")
    prompts = map(json.loads, (start / "train.jsonl").read_text().splitlines())
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = tokenizer.eos_token
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            max_steps=steps * UPDATES,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=1,
            steps_per_generation=4,
            num_iterations=4,
            num_generations=8,
            max_completion_length=16,
            learning_rate=5e-4,
            adam_beta2=0.99,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=UPDATES,
            disable_tqdm=True,
        )
        trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
            reward_funcs=rewards,
            args=settings,
            train_dataset=Dataset.from_list(list(prompts)),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
    taken = zip(clock.ends[1:], clock.ends[2:], strict=False)
    seconds, cpu = zip(*((b[0] - a[0], b[1] - a[1]) for a, b in taken), strict=True)
    print(
        f"TRL {trl.__version__}: {statistics.median(seconds):.3f} s a step, "
        f"{statistics.median(cpu):.3f} s of CPU"
    )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
