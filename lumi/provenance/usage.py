"""How to use a model on the hub: lines that work as they stand."""

from lumi.formats.hub import HubModel
from lumi.tokenizer.tokenizer import Tokenizer


def usage(
    target: HubModel, tokenizer: Tokenizer | None, base: HubModel | None, is_adapter: bool
) -> list[str]:
    """Markdown with a command of Lumi's, and with Python for transformers, and PEFT for an adapter.

    Args:
        target: the repository, and its branch if that is not the main one.
        tokenizer: decides whether it is talked to; None: the tokenizer is the base's.
        base: of an adapter.
    """
    talks = tokenizer is not None and bool(tokenizer.chat_template)
    command = f"lumi chat --model-path {target}"
    if not talks:
        command = f'lumi generate --model-path {target} --prompt "The"'
    libraries = "PEFT" if is_adapter else "transformers"
    code = [*_load(target, tokenizer, base, is_adapter), *_ask(talks)]
    return [
        "With Lumi:",
        "",
        "```sh",
        command,
        "```",
        "",
        f"With {libraries}:",
        "",
        "```python",
        *code,
        "```",
    ]


def _load(
    target: HubModel, tokenizer: Tokenizer | None, base: HubModel | None, is_adapter: bool
) -> list[str]:
    if not is_adapter or base is None:
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({_arguments(target)})",
            f"model = AutoModelForCausalLM.from_pretrained({_arguments(target)})",
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_arguments(base if tokenizer is None else target)})",
        f"base = AutoModelForCausalLM.from_pretrained({_arguments(base)})",
        f"model = PeftModel.from_pretrained(base, {_arguments(target)})",
    ]


def _arguments(model: HubModel) -> str:
    return f'"{model.repo}"' + (f', revision="{model.revision}"' if model.revision else "")


def _ask(talks: bool) -> list[str]:
    asked = ['inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)']
    if talks:
        asked = [
            'messages = [{"role": "user", "content": "Who are you?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    return [
        *asked,
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
