"""How fast `lumi tokenize` encodes, beside SentencePiece's own batch encoder on the same text and the same
number of cores.

    python benchmarks/tokenizer_throughput.py [FILES...] [--num-workers N] [--repeats R] [--vocab-size V]

Without files the text is the documentation inside this Python. Files are JSON lines with a "text", or plain
text. The two encoders run in turn, so that other load on the machine meets both; the ratios are those of the
fastest runs, of time and, for machines with other load, of CPU time. Ours does more: it reads Parquet, hashes
every text, deals it to a split, counts, and writes a whole token store.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path


def write_corpus(files: list[str], folder: Path) -> None:
    """A corpus of the texts of the files, or of this Python's documentation."""
    from lumi.config import from_dict
    from lumi.corpus import PrepareConfig, prepare

    source: dict = {"kind": "python_docs", "name": "python"}
    if files:
        records = folder.parent / "records.jsonl"
        with records.open("w", encoding="utf-8") as output:
            for path in map(Path, files):
                text = path.read_text(encoding="utf-8")
                texts = (
                    [json.loads(line)["text"] for line in text.splitlines()]
                    if path.suffix == ".jsonl"
                    else [text]
                )
                output.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        source = {"kind": "jsonl", "name": "files", "paths": [str(records)]}
    prepare(from_dict(PrepareConfig, {"sources": [source]}), folder)


def main() -> None:
    """Parse the command line, measure, print."""
    from lumi.host.workers import num_cores

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*")
    parser.add_argument("--num-workers", type=int, default=num_cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(Path(temporary), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Print seconds, MB/s and tokens/s of both encoders, run in turn."""
    import sentencepiece

    from lumi.corpus import read_corpus
    from lumi.data.tokenization import tokenize
    from lumi.tokenizer.training import TokenizerConfig, train_tokenizer

    corpus = folder / "corpus"
    write_corpus(options.files, corpus)
    texts = [text for text, _ in read_corpus(corpus)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    start = time.perf_counter()
    tokenizer = train_tokenizer(
        TokenizerConfig(vocab_size=options.vocab_size), [corpus], folder / "tokenizer"
    )
    print(
        f"{megabytes:.1f} MB in {len(texts):,} documents; {options.vocab_size} pieces trained "
        f"in {time.perf_counter() - start:.1f} s"
    )
    peer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    runs: dict[str, list[tuple[float, float]]] = {"sentencepiece": [], "lumi": []}
    num_tokens = 0
    for repeat in range(options.repeats):
        before = clocks()
        ids = peer.encode(texts, out_type=int, num_threads=options.num_workers)
        runs["sentencepiece"].append(since(before))
        num_tokens = sum(map(len, ids))
        del ids
        before = clocks()
        manifest = tokenize([corpus], tokenizer, folder / f"tokens-{repeat}", num_workers=options.num_workers)
        runs["lumi"].append(since(before))
        written = sum(split.tokens for split in manifest.splits.values())
        assert written == num_tokens + 2 * len(texts), "every document gains BOS and EOS, nothing else"
    best = {name: [min(column) for column in zip(*values, strict=True)] for name, values in runs.items()}
    for name, (seconds, cpu_seconds) in best.items():
        rate = f"{megabytes / seconds:6.1f} MB/s  {num_tokens / seconds / 1e6:6.2f} M tokens/s"
        each = ", ".join(f"{run[0]:.2f}" for run in runs[name])
        print(f"{name:14} {rate}  {cpu_seconds:6.2f} CPU s  on {options.num_workers} cores  ({each} s)")
    ratios = [peer_cost / cost for peer_cost, cost in zip(best["sentencepiece"], best["lumi"], strict=True)]
    print(f"ratio lumi / sentencepiece: {ratios[0]:.2f} by time, {ratios[1]:.2f} by CPU time")


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and CPU seconds of this process and its finished children."""
    return time.perf_counter(), sum(os.times()[:4])


def since(before: tuple[float, float]) -> tuple[float, float]:
    """What both clocks have counted since `before`."""
    now = clocks()
    return now[0] - before[0], now[1] - before[1]


if __name__ == "__main__":
    main()
