"""lm-evaluation-harness as the judge of tasks: what it computed is kept in `harness_values.json`.

The tests read that file alone. It is made anew, where lm_eval 0.4.13 is installed, by

    python tests/harness_judge.py

which writes a small model of fixed weights, gives the harness's own task files local records, and keeps each
request with the values that came out.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from lumi.evaluation.likelihood import encode_request
from lumi.formats.hf_format import save_model
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.loading import load_tokenizer

VALUES = Path(__file__).parent / "harness_values.json"
POSITIONS = 160  # some few-shot contexts are longer
_WORDS = (
    " the| of| and| is| in| a| water| river| stone| light| The|Question|Answer|:| no| yes| Anna|ing|ed"
    "| because| what| which| man| woman| book| house| melts| heat| food| plant| sun"
)
_FILES = {  # below lm_eval/tasks
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "sciq": "sciq/sciq.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "blimp": "blimp/adjunct_island.yaml",
}


def write_tokenizer(folder):
    """A byte-level BPE whose merges follow from a list of words: nothing is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {
        piece: i for i, piece in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    merges = []
    for word in _WORDS.replace(" ", "Ġ").split("|"):
        for end in range(1, len(word)):
            if (word[:end], word[end]) not in merges:
                merges.append((word[:end], word[end]))
                vocabulary.setdefault(word[: end + 1], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | roles
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def fixed_model(tokenizer):
    """Weights by SplitMix64 (Steele et al. 2014) from their places: the same wherever integers are."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=64,
        max_positions=POSITIONS,
    )
    model = Transformer(config, REFERENCE).init_weights(0).eval()
    place = 0
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = np.arange(place, place := place + parameter.numel(), dtype=np.uint64)
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(0.7 * _uniform(numbers)).view_as(parameter))
    return model


def _uniform(numbers):
    """Numbers in [-1, 1) that look random."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def _lettered(stem, question, answer, *texts, letters="ABCDE"):
    choices = {"text": list(texts), "label": list(letters[: len(texts)])}
    return {stem: question, "choices": choices, "answerKey": answer}


def _records(model, tokenizer):
    """For each kind what is asked and what becomes examples; some of the latter are also asked."""
    boolq = [
        {"passage": f"{passage} It is known.", "question": question, "label": label}
        for passage, question, label in (
            ("Ice melts in the sun.", "does ice melt in the sun", 1),
            ("The river is old; a café stands there.", "is the river a book", 0),
            ("A stone sinks.", "does a stone swim in water", 0),
            ("Anna reads.", "can anna read", 1),
            ("Plants need light.", "do plants need light", 1),
            ("The house is red.", "is the house blue", 0),
        )
    ]
    hellaswag = [
        {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": endings, "label": str(i % 4)}
        for i, (label, a, b, endings) in enumerate(
            (
                (
                    "Cooking",
                    "A man heats water.",
                    "he",
                    ["adds food.", "sings.", "paints the house.", "is a stone."],
                ),
                (
                    "Home [title] Garden",
                    "[header] How to water a plant [title] Use water. [step] Take care.",
                    "",
                    ["[substeps] Pour.  Wait.", "Burn it.", "Read a book to it.", "Run."],
                ),
                (
                    "Running",
                    "A woman is in the street.",
                    "the woman",
                    ["runs.", "flies away.", "melts.", "is blue."],
                ),
                (
                    "Reading",
                    "Anna has a book.",
                    "she",
                    ["reads it.", "eats it.", "heats it.", "waters it – twice."],
                ),
                ("Walking", "A dog is seen.", "it", ["walks.", "reads.", "writes.", "counts."]),
            )
        )
    ]
    science = (
        ("What melts ice?", "B", "a stone", "the heat of the sun", "a book"),
        ("Which is a plant?", "A", "an oak tree", "a river", "light", "the moon"),
        ("What is naïve in nature?", "C", "water", "stone", "nothing of this"),
        ("What do plants need?", "D", "books", "houses", "stones", "light and water"),
        ("What flows?", "A", "the river", "the house"),
        ("What gives light?", "B", "a wall", "the sun"),
    )
    five = ("water", "the sun", "a book", "a very large house", "food")
    common = (
        "Where is light?",
        "What is read?",
        " What is eaten ?",
        "Where does a man live?",
        "What is wet?",
    )
    winogrande = [
        {"sentence": f"Anna met Bea because _ {rest}", "option1": "Anna", "option2": "Bea", "answer": answer}
        for rest, answer in (
            ("was in the house.", "1"),
            ("had a book.", "2"),
            ("is old, and so is the river.", "1"),
            ("waited.", "2"),
            ("ran.", "2"),
        )
    ]
    piqa = [
        {"goal": goal, "sol1": a, "sol2": b, "label": label}
        for goal, a, b, label in (
            ("heat water", "put it on the stove", "read it a book", 0),
            ("open a jar", "eat the jar", "turn the lid", 1),
            ("see in the dark", "use a light", "use a stone – or two", 0),
            ("find a house", "look for the number", "melt", 0),
            ("water a plant", "use fire", "use water", 1),
        )
    ]
    sciq = [
        {"support": support, "question": question, "correct_answer": right}
        | {f"distractor{i}": text for i, text in enumerate(wrong, 1)}
        for support, question, right, *wrong in (
            (
                "  The sun heats the water.",
                "What heats the water?",
                "the sun",
                "a stone",
                "the river",
                "a book",
            ),
            ("", "What is H2O?", "water", "light", "an old house", "sand"),
            ("Plants need light.", "What do plants need?", "light", "stones", "books", "houses"),
            ("Ice melts.", "What melts?", "ice", "a river", "air", "the light of the sun"),
            ("A river flows.", "What flows?", "a river", "a wall", "a house", "a stone"),
        )
    ]
    blimp = [
        {"sentence_good": good, "sentence_bad": bad}
        for good, bad in (
            ("The man reads a book.", "The man read a books."),
            ("Anna hurt herself.", "Anna hurt itself."),
            ("Which book is the woman reading?", "Which is the woman reading book?"),
            ("These houses are old.", "This houses is old."),
        )
    ]
    return {
        "boolq": (boolq[:4], boolq[2:]),
        "hellaswag": (hellaswag[:4], hellaswag[1:]),
        "arc": ([_lettered("question", *row) for row in science[:4]],
                [_lettered("question", *row) for row in science[2:]]),
        "piqa": (piqa[:4], piqa[1:]),
        "winogrande": (winogrande[:4], winogrande[1:]),
        "openbookqa": ([_lettered("question_stem", *row) for row in science[:4]],
                       [_lettered("question_stem", *row) for row in science[2:]]),
        "commonsense_qa": ([_lettered("question", text, key, *five)
                            for text, key in zip(common, "BCEA", strict=False)],
                           [_lettered("question", text, key, *five)
                            for text, key in zip(common[1:], "CEDA", strict=True)]),
        "sciq": (sciq[:4], sciq[1:]),
        "lambada": (_passages(model, tokenizer),
                    [{"text": f"{row[0]} It is {row[3]}"} for row in science[2:]]),
        "blimp": (blimp, []),
    }  # fmt: skip


def _passages(model, tokenizer):
    """Two passages whose last word the model would say itself, and two where it would not."""
    said = []
    for number in range(2000):
        text = f"The river of {number} is a river, and the woman in the house is"
        [ids] = encode_request(tokenizer, text, [" a"])[:1]
        with torch.no_grad():
            word = tokenizer.decode([int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax())])
        if len(word) > 2 and word[0] == " " and word[1:].isalpha():
            said.append({"text": text + word})
        if len(said) == 2:
            break
    others = ("Anna likes the sun, and the sun likes Anna", "He ate the food at the café near the cafés")
    return [said[0], {"text": others[0]}, said[1], {"text": others[1]}]


def runs():
    """(kind, number of examples, sampler): zero-shot, examples at random, and the first ones."""
    yield from ((kind, 0, None) for kind in _FILES)
    yield from ((kind, 2, "random") for kind in _FILES if kind != "blimp")
    yield from ((kind, 2, "first_n") for kind in ("arc", "hellaswag"))


def _write_task(folder, name, kind, num_fewshot, sampler):
    """The harness's own task file with other data."""
    import lm_eval
    import yaml

    asked, examples = (str(folder / f"{kind}_{part}.jsonl") for part in ("asked", "examples"))
    files = {"test": asked, "validation": asked, "train": asked if kind == "blimp" else examples}
    changes = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / _FILES[kind]),
        "task": name,
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "num_fewshot": num_fewshot,
    }
    if kind == "lambada" and num_fewshot:
        changes["fewshot_split"] = "train"  # it has none: its own test split would give the answers away
    if sampler == "first_n":
        changes["fewshot_config"] = {"sampler": "first_n"}
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(changes))


def _values(found, name):
    """What a run of the harness says of a task: the figures, and each request with its values."""
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    results = {key.removesuffix(",none"): value for key, value in found["results"][name].items()}
    kept = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "perplexity")
    return {
        "results": {key: results[key] for key in kept if key in results},
        "samples": [
            {
                "contexts": [context for context, _ in sample["arguments"]],
                "continuations": [continuation for _, continuation in sample["arguments"]],
                "nats": [float(nats) for [(nats, _)] in sample["resps"]],
                "is_greedy": [str(is_greedy) == "True" for [(_, is_greedy)] in sample["resps"]],
                "acc": sample["acc"],
                "acc_norm": sample.get("acc_norm"),
            }
            for sample in samples
        ],
    }


def main():
    """Write `harness_values.json`."""
    import lm_eval
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = write_tokenizer(folder / "tokenizer")
        model = fixed_model(tokenizer)
        save_model(folder / "model", model, tokenizer)
        records = _records(model, tokenizer)
        (folder / "tasks").mkdir()
        for kind, (asked, examples) in records.items():
            for part, rows in (("asked", asked), ("examples", examples)):
                (folder / f"{kind}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = {f"local_{'_'.join(map(str, run))}": run for run in runs()}
        for task, run in named.items():
            _write_task(folder, task, *run)
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        lm = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=1)
        found = lm_eval.simple_evaluate(model=lm, tasks=list(named), task_manager=manager, bootstrap_iters=2)
    judged = [
        dict(zip(("kind", "num_fewshot", "sampler"), run, strict=True)) | _values(found, task)
        for task, run in named.items()
    ]
    made = (
        f"lm_eval {lm_eval.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    values = {
        "made_by": f"python tests/harness_judge.py with {made}",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "records": {kind: {"asked": both[0], "examples": both[1]} for kind, both in records.items()},
        "runs": judged,
    }
    VALUES.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
