"""Fine-tuning with LoRA on a CPU, against TRL's SFTTrainer with PEFT: trained tokens per second and memory.

    python benchmarks/cpu_finetuning.py [--output-dir benchmarks/results] [--rounds 1]

The model is `configs/pretrain/tiny.json`, tied, with random weights; rank 16 on all linears. 32
conversations of random tokens, 20 to 1,024 long, of which two fifths are trained. Everybody goes through
them once, in steps of about 4,096 tokens. Lumi packs them into rows of 1,024. A step of TRL has four times
four conversations, padded to the longest of the four; the same sorted by length; or four packed rows of
1,024. Each candidate runs in a process of its own, and the first step does not count. dtype: bfloat16 where
the CPU multiplies it, else float32.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from cpu_training import fastest_dtype, memory
from results import Results, main
from training_step import shipped_config

from lumi.data.batches import BatchConfig, Batches
from lumi.data.token_store import Split
from lumi.kernels.bundle import select
from lumi.model.lora import LoraConfig, add_lora
from lumi.model.transformer import Transformer
from lumi.training.optimizer import Optimizer
from lumi.training.optimizer_config import OptimizerConfig

LENGTH, CONVERSATIONS, ROWS = 1024, 32, 4
RANK, LR = 16, 1e-3
TRL_MODES = {
    "trl padded": {},
    "trl by length": {"train_sampling_strategy": "group_by_length"},
    "trl packed": {"packing": True, "per_device_train_batch_size": 1},
}
OVER_TRL, MEMORY_SHARE = 2.0, 0.5
SHAPE = replace(shipped_config("tiny"), tied_embeddings=True, max_positions=LENGTH)


def conversations() -> list[tuple[list[int], list[int]]]:
    """Token ids and loss masks: questions and answers of random tokens."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.1, 0.9, CONVERSATIONS), 20, LENGTH).astype(int)
    return [
        (random.integers(10, SHAPE.vocab_size, n).tolist(), [0] * (n - 2 * n // 5) + [1] * (2 * n // 5))
        for n in lengths
    ]


def run_lumi(dtype: torch.dtype) -> list[tuple[float, int]]:
    """Seconds and trained tokens of each step."""
    texts = conversations()
    ids, mask = (np.concatenate([text[part] for text in texts]) for part in (0, 1))
    offsets = np.cumsum([0, *(len(text[0]) for text in texts)]).astype(np.uint64)
    split = Split(ids.astype(np.uint16), offsets, np.packbits(mask.astype(bool)), 0)
    sizes = BatchConfig(sequence_length=LENGTH, batch_tokens=ROWS * LENGTH, micro_batch_size=ROWS)
    batches = Batches([split], None, sizes, seed=0)
    ops = select("auto", "cpu", SHAPE.head_dim, dtype)
    model = Transformer(SHAPE, ops, compute_dtype=dtype).init_weights(0).train()
    add_lora(model, LoraConfig(rank=RANK, alpha=RANK, base_dtype=str(dtype).removeprefix("torch.")))
    optimizer, steps = Optimizer(model, OptimizerConfig()), []
    for step in range(1, -(-batches.stores[0].rows_per_epoch // ROWS) + 1):
        begin = time.perf_counter()
        batch = batches[step]
        share = 1 / batch.num_targets
        loss = model(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, share)
        (loss * share).backward()
        optimizer.step(LR, optimizer.measure_gradients())
        optimizer.zero_grad()
        steps.append((time.perf_counter() - begin, batch.num_targets))
    return steps


def run_trl(dtype: torch.dtype, mode: dict[str, Any]) -> list[tuple[float, int]]:
    """The same. TRL counts no trained tokens; all steps together train all of them."""
    peers.packages("trl", "peft", "transformers")
    import transformers
    from datasets import Dataset
    from peft import LoraConfig as TheirConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import SFTConfig, SFTTrainer

    words = WordLevel({f"{i}": i for i in range(SHAPE.vocab_size)}, unk_token="0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="1", pad_token="2", unk_token="0"
    )
    texts, moments = conversations(), []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            moments.append(time.perf_counter())

        def on_train_end(self, *args: Any, **options: Any) -> None:
            moments.append(time.perf_counter())

    base = Transformer(SHAPE, select("auto", "cpu", SHAPE.head_dim, dtype)).init_weights(0)
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    } | mode
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conversations.jsonl"
        lines = (json.dumps({"input_ids": ids, "completion_mask": mask}) for ids, mask in texts)
        file.write_text("\n".join(lines))
        config = SFTConfig(
            output_dir=folder,
            max_length=LENGTH,
            num_train_epochs=1,
            learning_rate=LR,
            bf16=dtype == torch.bfloat16,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            disable_tqdm=True,
            **settings,
        )
        trainer = SFTTrainer(
            model=peers.hf_llama(base, dtype),
            args=config,
            train_dataset=Dataset.from_json(str(file), cache_dir=folder),
            processing_class=tokenizer,
            peft_config=TheirConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = np.diff(moments).tolist()
    trained = sum(sum(mask) for _, mask in texts)
    return [(second, trained / len(seconds)) for second in seconds]


def measure_here(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Trained tokens per second after the first step, and the peak of this process in MB."""
    steps = run_lumi(dtype) if name == "lumi" else run_trl(dtype, TRL_MODES[name])
    rate = sum(count for _, count in steps[1:]) / sum(seconds for seconds, _ in steps[1:])
    return {"rate": rate, "megabytes": memory("VmHWM")}


def in_a_process(name: str, dtype: torch.dtype) -> dict[str, float]:
    """`measure_here` in a process of its own. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, __file__, "--measure", name, str(dtype).removeprefix("torch.")]
    printed = subprocess.run(command, capture_output=True, text=True)
    if printed.returncode:
        raise RuntimeError(printed.stderr.strip().splitlines()[-1])
    return json.loads(printed.stdout.splitlines()[-1])


def run(results: Results) -> None:
    dtype = fastest_dtype()
    short = str(dtype).removeprefix("torch.")
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(results.rounds):
        for name in ("lumi", *TRL_MODES):
            with (
                results.case(f"{short}: {name}")
                if name == "lumi"
                else results.leaving_out(f"{short}: {name}")
            ):
                found.setdefault(name, []).append(in_a_process(name, dtype))
                print(f"{name:<14} {found[name][-1]}", flush=True)
    best = {
        name: (max(run["rate"] for run in runs), min(run["megabytes"] for run in runs))
        for name, runs in found.items()
        if runs
    }
    results.note(**{f"{name}: trained tokens/s, MB": pair for name, pair in best.items()})
    theirs = [pair for name, pair in best.items() if name != "lumi"]
    fastest = max(theirs, default=None)
    ours = best["lumi"]
    results.claim(
        f"{short}: trained tokens per second, over TRL's best mode",
        None if fastest is None else ours[0] / fastest[0],
        at_least=OVER_TRL,
    )
    results.claim(
        f"{short}: peak memory, over TRL's in that mode",
        None if fastest is None else ours[1] / fastest[1],
        at_most=MEMORY_SHARE,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure_here(sys.argv[2], getattr(torch, sys.argv[3]))))
    else:
        sys.exit(main("cpu_finetuning", __doc__, run, device_type="cpu", rounds=1))
