"""Which folders a path means, and which tokenizer comes with them."""

import json

import peft
import pytest
import transformers
from crafted_models import save_adapted, save_base

from lumi.config import UserError
from lumi.formats.pretrained import load_pretrained
from lumi.model.lora import LoraConfig


@pytest.fixture
def base_dir(tokenizer, tmp_path):
    return save_base(tokenizer, tmp_path / "base")


def name_base(adapter, base):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def test_an_adapter_without_a_tokenizer_takes_the_base_s(base_dir, tokenizer, tmp_path):
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base_dir),
        peft.LoraConfig(target_modules=["q_proj"]),
    )
    theirs.save_pretrained(tmp_path / "adapter")
    assert load_pretrained(tmp_path / "adapter", device="cpu").tokenizer.fingerprint == tokenizer.fingerprint
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = load_pretrained(tmp_path / "adapter", device="cpu").tokenizer
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_a_path_must_be_what_it_is_given_for(base_dir, tokenizer, tmp_path):
    save_adapted(base_dir, LoraConfig(rank=4), tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match="--adapter-path must hold an adapter"):
        load_pretrained(base_dir, adapter_path=base_dir, device="cpu")
    with pytest.raises(UserError, match="--model-path must be a whole model where --adapter-path is given"):
        load_pretrained(tmp_path / "adapter", adapter_path=tmp_path / "adapter", device="cpu")
    name_base(tmp_path / "adapter", None)
    with pytest.raises(UserError, match="the adapter does not name its base"):
        load_pretrained(tmp_path / "adapter", device="cpu")
    name_base(tmp_path / "adapter", str(base_dir))
    base_dir.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="pass both: the base by --model-path, this by --adapter-path"):
        load_pretrained(tmp_path / "adapter", device="cpu")
    both = load_pretrained(tmp_path / "moved", adapter_path=tmp_path / "adapter", device="cpu")
    assert (both.folder, both.adapter) == (tmp_path / "moved", tmp_path / "adapter")
