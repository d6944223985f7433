"""Run folders written by hand."""

import json

from lumi.config import write_json


def train_record(step, loss, **more):
    speed = {"tokens_per_second": 1000.0, "step_seconds": 0.1, "data_wait_seconds": 0.0}
    values = {"loss": loss, "gradient_norm": 0.5, "lr": 0.01, "targets": 64, "skipped": False}
    return {"step": step, "kind": "train", **values, **speed, "tokens": 64 * step, **more}


def write_run(folder, records, config=None, status="finished", tail="", **more):
    """A run folder with these records; `tail`: what stands after them; `more`: of the status."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + tail)
    write_json(folder / "config.json", {"num_steps": 100, "dpo": None} if config is None else config)
    step = records[-1]["step"] if records else 0
    state = {"status": status, "step": step, "time": "2026-01-02T03:04:05+00:00", "host": "h", **more}
    write_json(folder / "status.json", state)
    return folder


def evaluation_results(model):
    """What an evaluation writes: one text, and a smoke test that fails a check."""
    text = {"format": "store", "source": "store: s / validation", "limit": None, "answers_only": False}
    text |= {"token_perplexity": 12.5, "word_perplexity": 90.0, "byte_perplexity": 2.0, "bits_per_byte": 1.25}
    text |= {"documents": 3, "tokens": 30, "words": 20, "bytes": 99, "window_tokens": 8, "stride_tokens": 8}
    answer = {"category": "facts", "prompt": "Who?", "answer": "<b>me</b>", "tokens": 3, "repetition": 0.0}
    smoke = {"style": "chat", "source": "shipped", "categories": {"facts": [0, 1]}}
    smoke["answers"] = [answer | {"checks": {"not_empty": True, "any_of": False}}]
    return {
        **{"model": str(model), "adapter": None, "parameters": 1234, "dtype": "float32", "device": "cpu"},
        **{"date": "2026-01-02", "limit": None, "finished": True, "tasks": {}, "centred_mean": None},
        **{"perplexity": {"text": text}},
        **{"smoke_tests": smoke, "config": {"smoke_tests": {"max_new_tokens": 16}}},
    }
