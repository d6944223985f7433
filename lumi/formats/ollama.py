"""The `Modelfile` with which Ollama runs a GGUF file.

https://docs.ollama.com/modelfile
"""

from lumi.chat.rendering import template_of
from lumi.chat.templates import Control, Parts, Template
from lumi.formats.hf_config import end_ids
from lumi.tokenizer.tokenizer import Tokenizer

MODELFILE = "Modelfile"


def modelfile(file_name: str, tokenizer: Tokenizer) -> str:
    """The text of a `Modelfile`.

    Layouts of Lumi's own are written as templates of Ollama's. For others Ollama looks at the chat template
    in the file.
    """
    lines = [f"FROM ./{file_name}"]
    names = {token_id: name for name, token_id in tokenizer.control_ids.items()}
    template = template_of(tokenizer)
    if isinstance(template, Template):
        lines.append(f'TEMPLATE """{_template(template, names[tokenizer.eos_id])}"""')
        if template.default_system is not None:
            lines.append(f'SYSTEM """{template.default_system}"""')
    elif template is not None:
        lines.append(
            "# Ollama finds the layout of conversations by the chat template in the file, if it knows it."
        )
    lines += [f'PARAMETER stop "{names[token_id]}"' for token_id in end_ids(tokenizer) if token_id in names]
    return "\n".join([*lines, ""])


def _template(template: Template, eos: str) -> str:
    """A layout in Go's template language. The BOS is not in it: it is put before every text."""
    turns = []
    for number, (role, turn) in enumerate(template.turns.items()):
        condition = "if" if number == 0 else "else if"
        before, after = (_text(parts, eos) for parts in (turn.before, turn.after))
        turns.append(f'{{{{ {condition} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    asks = _text(template.turns["assistant"].before, eos)
    return f"{{{{ range .Messages }}}}{''.join(turns)}{{{{ end }}}}{{{{ end }}}}{asks}"


def _text(parts: Parts, eos: str) -> str:
    names = {Control.EOS: eos, Control.IM_START: "<|im_start|>", Control.IM_END: "<|im_end|>"}
    return "".join(part if isinstance(part, str) else names[part] for part in parts)
