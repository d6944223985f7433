"""`lumi prepare` in tasks, stage by stage in this process, and inputs with duplicates of every kind."""

import json
import random
from itertools import islice

from lumi.config import from_dict
from lumi.corpus import PrepareConfig, corpus_writer, deduplication, processing
from lumi.corpus.evaluation_sets import read_evaluation_sets
from lumi.corpus.python_docs import read_python_docs
from lumi.corpus.scale import reading, sharing, signatures
from lumi.corpus.scale.stages import STAGES, tasks_of_stages
from lumi.corpus.scale.work import load_work, plan_work
from lumi.corpus.source_outcomes import source_keys


def make_small(monkeypatch):
    """Every limit so low that a few hundred documents pass it."""
    monkeypatch.setattr(processing, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(corpus_writer, "ROW_GROUP_BYTES", 4_000)
    monkeypatch.setattr(deduplication, "RECENT_BANDS", 100)
    monkeypatch.setattr(reading, "GROUP_OUTCOMES", 20)
    monkeypatch.setattr(reading, "TRANSPOSED", 10)
    monkeypatch.setattr(sharing, "PAIRS", 5)
    monkeypatch.setattr(sharing._Row, "BUFFER", 9)
    monkeypatch.setattr(signatures, "OPEN_UNITS", 1)


def planned(config, output):
    """The work of a config, as its tasks read it."""
    sets = read_evaluation_sets(config.decontamination)
    work = plan_work(output, config, source_keys(config, sets), sets)
    work.save(sets)
    return load_work(str(work.folder))


def run_stages(work, num_tasks, stages=STAGES):
    """The tasks of some stages, the last first: none needs another of its stage."""
    for name, count in tasks_of_stages(STAGES, work, num_tasks).items():
        for rank in reversed(range(count)) if name in stages else ():
            STAGES[name].run(load_work(str(work.folder)), rank, count)


def in_tasks(config, output, num_tasks):
    """Make a corpus in tasks; its files by name."""
    run_stages(planned(config, output), num_tasks)
    return files_of(output)


def files_of(folder):
    """The bytes of the files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def real_texts(count, chars=1_000):
    """Pieces of Python's language reference: English with code."""
    pages = read_python_docs(("topics",))[1]
    pieces = (page[start : start + chars] for page in pages for start in range(0, len(page) - chars, chars))
    return list(islice(pieces, count))


def with_duplicates(texts, seed=0):
    """The texts among duplicates: equal, in capitals, changed in one word, and many of one text."""
    chance = random.Random(seed)
    again = [chance.choice((str, str.upper, change_word))(text) for text in chance.sample(texts, 90)]
    again += [f"{texts[0]} {number}" for number in range(40)]  # more than are compared with each other
    mixed = [*texts, *again]
    chance.shuffle(mixed)
    return mixed


def change_word(text):
    words = text.split(" ")
    words[len(words) // 2] = "zebra"
    return " ".join(words)


def write_files(folder, name, records, count):
    """JSON lines in `count` files, a malformed line at the end of each; the source's paths in a config."""
    size = -(-len(records) // count)
    for number in range(count):
        part = records[number * size : (number + 1) * size]
        lines = [*map(json.dumps, part), '{"text": ']
        (folder / f"{name}[{number}].jsonl").write_text("\n".join(lines) + "\n")
    return [str(folder / f"{name}*.jsonl")]


def texts_config(folder):
    """Texts in three sources, two of them with a budget that ends them within a file."""
    texts = with_duplicates([f"{text} me@example.com" for text in real_texts(220)])
    records = [
        {"text": text, f"field{number % 3}": 1, "score": number % 7, **_labels(number)}
        for number, text in enumerate(texts)
    ]
    third = len(records) // 3
    sources = [
        {"name": "a", "paths": write_files(folder, "a", records[:third], 3), "max_documents": 60},
        {"name": "b", "paths": write_files(folder, "b", records[third : 2 * third], 2)}
        | {"score_field": "score", "min_score": 1, "license_field": "license", "url_field": "url"},
        {
            "name": "c",
            "sample_fraction": 0.9,
            "paths": write_files(folder, "c", records[2 * third :], 4),
            "max_tokens": 10_000,
        },
    ]
    documentation = {"kind": "python_docs", "name": "d", "packages": ["ftfy"], "max_documents": 5}
    return from_dict(
        PrepareConfig,
        {
            "sources": [*({"kind": "jsonl", **source} for source in sources), documentation],
            "cleaning": {"scrub": ["email", "ip", "phone"]},
            "shard_bytes": 30_000,
            "deduplication": {"normalized": True},
        },
    )


def _labels(number):
    return {"license": ("mit", None, "cc0")[number % 3], "url": f"https://example.com/{number}"}


def chats_config(folder):
    """Conversations about pages; the first reasoning comes late."""
    texts = with_duplicates(real_texts(120), seed=1)
    chats = [
        {"messages": [{"role": "user", "content": f"Page {len(text) % 50}?"}, _answer(text, number)]}
        for number, text in enumerate(texts)
    ]
    source = {"kind": "jsonl", "name": "chats", "conversation": {"kind": "messages"}}
    paths = write_files(folder, "chats", chats, 3)
    return from_dict(PrepareConfig, {"sources": [source | {"paths": paths}], "shard_bytes": 30_000})


def _answer(text, number):
    thought = {"reasoning_content": f"Hm, {number}."} if number > 90 and number % 4 == 0 else {}
    return {"role": "assistant", "content": text, **thought}


def pairs_config(folder):
    """Pairs of answers, without near duplicates."""
    records = [
        {"prompt": f"Page {len(text) % 9}?", "chosen": text[:200], "rejected": text[200:300]}
        for text in with_duplicates(real_texts(120), seed=2)
    ]
    source = {"kind": "jsonl", "name": "pairs", "conversation": {"kind": "preference"}}
    paths = write_files(folder, "pairs", records, 2)
    options = {"shard_bytes": 8_000, "deduplication": {"near": False}}
    return from_dict(PrepareConfig, {"sources": [source | {"paths": paths}], **options})
