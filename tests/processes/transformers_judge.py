"""What an installed transformers makes of a folder; imports nothing of Lumi's.

As a program it hides `protobuf` and `sentencepiece`, which many who install transformers do not have.
"""

import json
import sys
from pathlib import Path

MAX_NEW_TOKENS = 30


def judge(folder, saved, texts, prompts, messages):
    """Open a model folder, use it, and save it to `saved`. Returns what `json` can hold.

    Args:
        texts: to encode, without special tokens in front.
        prompts: lists of ids, all of one length.
        messages: a conversation; None: the folder has no chat template.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    rows = torch.tensor(prompts)
    with torch.no_grad():
        logits = model(rows).logits
        generated = [
            model.generate(
                row[None],
                attention_mask=torch.ones_like(row[None]),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )[0, len(row) :].tolist()
            for row in rows
        ]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    chat = None
    if messages is not None:
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chat = tokenizer.encode(asked, add_special_tokens=False)
    tokenizer.save_pretrained(saved)
    model.save_pretrained(saved)
    return {
        "version": transformers.__version__,
        "ids": ids,
        "decoded": [tokenizer.decode(row) for row in ids],
        "begin": tokenizer.encode("a")[: -len(tokenizer.encode("a", add_special_tokens=False))],
        "roles": [getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")],
        "chat": chat,
        "logits": logits.tolist(),
        "generated": generated,
    }


if __name__ == "__main__":
    sys.modules["sentencepiece"] = sys.modules["google.protobuf"] = None
    request, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(judge(**json.loads(request.read_text()))))
