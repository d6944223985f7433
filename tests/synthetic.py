"""A small language of our own: enough structure to learn in seconds, the same on every machine."""

import json
import random
from pathlib import Path

from lumi.chat.messages import Conversation, Message
from lumi.chat.pairs import Pair

_NOUNS = "river stone garden letter engine window teacher forest bridge market winter signal".split()
_VERBS = "finds carries opens measures follows paints repairs remembers".split()
_PLACES = [
    "near the harbour",
    "behind a wall",
    "under the old roof",
    "at noon",
    "in silence",
    "after the storm",
]


def sentence(rng: random.Random) -> str:
    """'The river opens a stone at noon.'"""
    return f"The {rng.choice(_NOUNS)} {rng.choice(_VERBS)} a {rng.choice(_NOUNS)} {rng.choice(_PLACES)}."


def document(seed: int) -> str:
    """Some sentences, a list, and a line of code."""
    rng = random.Random(seed)
    text = " ".join(sentence(rng) for _ in range(rng.randint(3, 12)))
    items = "\n".join(f"  - {rng.choice(_NOUNS)}: {rng.randint(0, 999)}" for _ in range(rng.randint(1, 4)))
    return f"{text}\n\n{items}\n\nif {rng.choice(_NOUNS)}:\n    return {rng.randint(0, 99)}\n"


def conversation(seed: int) -> Conversation:
    """Question and answer, twice."""
    rng = random.Random(seed)
    return tuple(Message(role, sentence(rng)) for role in ("user", "assistant", "user", "assistant"))


def pair(seed: int) -> Pair:
    """Where something is: the chosen answer says it, the rejected one says up to three other sentences."""
    rng = random.Random(seed)
    noun, place = rng.choice(_NOUNS), rng.choice(_PLACES)
    prompt = (Message("user", f"Where is the {noun} of number {seed}?"),)
    if seed % 3 == 0:
        prompt = (Message("user", "Hello!"), Message("assistant", "Hello."), *prompt)
    rejected = " ".join(sentence(rng) for _ in range(rng.randint(1, 3)))
    answers = ((Message("assistant", text),) for text in (f"It is {place}.", rejected))
    return Pair(prompt, *answers)


def write_jsonl(path: Path, count: int, first_seed: int = 0) -> Path:
    """`count` documents, one JSON object a line."""
    lines = [json.dumps({"text": document(first_seed + i)}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
