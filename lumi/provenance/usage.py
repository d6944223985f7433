"""How to use a model on the hub: lines that work as they stand."""

from lumi.host.hub_cache import HubModel
from lumi.tokenizer.tokenizer import Tokenizer


def usage(
    target: HubModel, tokenizer: Tokenizer | None, base: HubModel | None, generation_config: bool
) -> list[str]:
    """Markdown with a command of Lumi's, and with Python for transformers, and PEFT for an adapter.

    Args:
        target: the repository, and its branch if that is not the main one.
        tokenizer: decides whether it is talked to; None: the tokenizer is the base's.
        base: of an adapter; None: it is a whole model.
        generation_config: an adapter comes with settings of its own for generation.
    """
    talks = tokenizer is not None and bool(tokenizer.chat_template)
    command = f"lumi chat --model-path {target}"
    if not talks:
        command = f'lumi generate --model-path {target} --prompt "The"'
    settings = target if base is not None and generation_config else None
    code = [*_load(target, tokenizer, base, settings), *_ask(talks, settings)]
    python = f"With {'transformers' if base is None else 'PEFT'}:"
    return ["With Lumi:", "", "```sh", command, "```", "", python, "", "```python", *code, "```"]


def _load(
    target: HubModel, tokenizer: Tokenizer | None, base: HubModel | None, settings: HubModel | None
) -> list[str]:
    imported = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if base is None:
        return [
            imported,
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({_arguments(target)})",
            f"model = AutoModelForCausalLM.from_pretrained({_arguments(target)})",
        ]
    own = [f"settings = GenerationConfig.from_pretrained({_arguments(settings)})"] if settings else []
    return [
        "from peft import PeftModel",
        imported + (", GenerationConfig" if settings else ""),
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_arguments(base if tokenizer is None else target)})",
        f"base = AutoModelForCausalLM.from_pretrained({_arguments(base)})",
        f"model = PeftModel.from_pretrained(base, {_arguments(target)})",
        *own,
    ]


def _arguments(model: HubModel) -> str:
    return f'"{model.repo}"' + (f', revision="{model.revision}"' if model.revision else "")


def _ask(talks: bool, settings: HubModel | None) -> list[str]:
    asked = ['inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)']
    if talks:
        asked = [
            'messages = [{"role": "user", "content": "Who are you?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    own = "generation_config=settings, " if settings else ""
    return [
        *asked,
        f"output = model.generate(**inputs, {own}max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
