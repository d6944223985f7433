"""Which folders a path means, and which tokenizer comes with them."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from crafted_models import save_adapted, save_base
from llama_2_tokenizers import train_model

from lumi.config import UserError
from lumi.formats.export import export_model, merge_adapter
from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.pretrained import load_pretrained
from lumi.model.lora import LoraConfig
from lumi.tokenizer.loading import load_tokenizer

TEMPLATE = "own {{ messages[0]['content'] }}"


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


@pytest.fixture
def with_files(base_dir, tmp_path):
    """An adapter of PEFT's, with the tokenizer that transformers saves and a template of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(base_dir)
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "tokenizer.model").exists()
    return tmp_path / "adapter"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_s_own_template_is_used_and_merged(place, with_files, base_dir, tokenizer, tmp_path):
    if place == "tokenizer_config.json":  # where transformers wrote it until 4.43
        (with_files / "chat_template.jinja").unlink()
        edit(with_files / place, lambda data: data.update(chat_template=TEMPLATE))
    loaded = load_pretrained(with_files, device="cpu").tokenizer
    assert (loaded.chat_template, loaded.fingerprint) == (TEMPLATE, tokenizer.fingerprint)
    merge_adapter(with_files, tmp_path / "merged")
    assert load_pretrained(tmp_path / "merged", device="cpu").tokenizer.chat_template == TEMPLATE
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert judge.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "own x"


def test_an_adapter_s_tokenizer_must_have_the_base_s_pieces(with_files, base_dir):
    load_pretrained(with_files, device="cpu")

    def swap(data):
        vocab = data["model"]["vocab"]
        (a, first), (b, second) = list(vocab.items())[-2:]
        vocab[a], vocab[b] = second, first

    edit(with_files / "tokenizer.json", swap)
    message = (
        rf"the tokenizer must be the one it was trained with, of fingerprint .*; {with_files} brings "
        rf"another: was it trained on another base\? It names {base_dir}; pass its base by --model-path"
    )
    with pytest.raises(UserError, match=message):
        load_pretrained(with_files, device="cpu")
    with pytest.raises(UserError, match=f"; pass --tokenizer-path {base_dir}$"):
        load_pretrained(with_files, tokenizer_path=with_files, device="cpu")


def test_a_model_whose_own_tokenizer_was_replaced(base_dir):
    """The remedy does not name the folder that was just refused."""
    edit(base_dir / "config.json", lambda data: data.update(tokenizer_fingerprint="0" * 64))
    with pytest.raises(UserError, match="; it was replaced there: copy the model again, or pass its tok"):
        load_pretrained(base_dir, device="cpu")


def test_a_checkpoint_is_a_model(start, tokenizer, tmp_path):
    """What `final/` is at the last step; of a run that has not finished too."""
    run = start(num_steps=8, keep_last=3)
    middle, last = (run / "checkpoints" / f"step-0000000{step}" for step in (4, 8))
    logits = {path: our_logits(path) for path in (run, middle, last)}
    assert torch.equal(logits[last], logits[run])
    assert not torch.equal(logits[middle], logits[run])
    assert weights_fingerprint(last) == weights_fingerprint(run)
    export_model(middle, tmp_path / "exported")
    assert torch.equal(our_logits(tmp_path / "exported"), logits[middle])
    shutil.rmtree(run / "final")
    assert torch.equal(our_logits(last), logits[run])
    with pytest.raises(UserError, match=r"has no final/ yet; .* or pass one of its checkpoints/step-"):
        load_pretrained(run, device="cpu")
    moved = shutil.copytree(last, tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"moved: the tokenizer must be in the run's folder, .* --tokenizer-path"
    ):
        load_pretrained(moved, device="cpu")
    edit_model(last, tmp_path / "edited")
    with pytest.raises(UserError, match=r"the tokenizer must be the one .*; leave --tokenizer-path out"):
        load_pretrained(last, tokenizer_path=tmp_path / "edited", device="cpu")
    tokenizer.save(tmp_path / "tokenizer")
    assert load_pretrained(moved, tokenizer_path=tmp_path / "tokenizer", device="cpu").folder == moved


def test_a_checkpoint_of_adapters_is_an_adapter(start, tokenizer, tmp_path):
    base = start("base", num_steps=4) / "checkpoints" / "step-00000004"
    lora = {"rank": 4, "targets": ["q_proj", "up_proj"], "tokens": ["<|im_end|>"]}
    run = start("tuned", num_steps=8, keep_last=3, model=None, lora=lora, model_path=base)
    middle, last = (run / "checkpoints" / f"step-0000000{step}" for step in (4, 8))
    loaded = load_pretrained(last, device="cpu")
    assert (loaded.folder, loaded.adapter) == (base, last)
    assert torch.equal(our_logits(last), our_logits(run))
    assert not torch.equal(our_logits(middle), our_logits(run))
    merge_adapter(middle, tmp_path / "merged")
    torch.testing.assert_close(our_logits(tmp_path / "merged"), our_logits(middle))
    both = load_pretrained(base, adapter_path=middle, device="cpu")
    assert both.adapter == middle
    with pytest.raises(UserError, match="the base must be the one that the adapter was trained with"):
        load_pretrained(save_base(tokenizer, tmp_path / "other"), adapter_path=middle, device="cpu")


def test_the_ids_that_end_a_text_are_those_of_the_model(base_dir, start, tokenizer, tmp_path):
    """By its generation_config.json, whichever tokenizer comes with it; nothing that is made of it loses
    them."""
    edit(base_dir / "generation_config.json", lambda data: data.update(eos_token_id=[5, 77]))
    tokenizer.save(tmp_path / "elsewhere")
    ends_of = lambda path, **options: load_pretrained(path, device="cpu", **options).tokenizer.eos_ids
    assert ends_of(base_dir) == ends_of(base_dir, tokenizer_path=tmp_path / "elsewhere") == (2, 5, 77)
    for name, options in (("same", {}), ("another", {"tokenizer_path": tmp_path / "elsewhere"})):
        export_model(base_dir, tmp_path / name, **options)
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert written["eos_token_id"] == [2, 5, 77]
    save_adapted(base_dir, LoraConfig(rank=4), tokenizer, tmp_path / "adapter")
    beside = tmp_path / "adapter" / "generation_config.json"
    assert json.loads(beside.read_text())["eos_token_id"] == [2, 5]
    beside.unlink()  # as older ones are, and PEFT's
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert ends_of(tmp_path / "adapter") == ends_of(tmp_path / "merged") == (2, 5, 77)
    whole = start("whole", model=None, model_path=base_dir, num_steps=4)  # with a tokenizer folder of its own
    checkpoint = whole / "checkpoints" / "step-00000004"
    assert ends_of(whole) == ends_of(checkpoint) == (2, 5, 77)
    assert ends_of(checkpoint, tokenizer_path=tmp_path / "elsewhere") == (2, 5, 77)


@pytest.mark.parametrize("others", [False, True], ids=["a tokenizer of Lumi's", "only tokenizer.model"])
def test_every_folder_with_a_tokenizer_holds_its_json(others, base_dir, tokenizer, start, tmp_path):
    if others:
        train_model(base_dir, vocab_size=384)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (base_dir / name).unlink()
        edit(base_dir / "config.json", lambda data: data.pop("tokenizer_fingerprint"))
        tokenizer = load_tokenizer(base_dir)
    tokenizer.save(tmp_path / "tokenizer")
    export_model(base_dir, tmp_path / "exported")
    save_adapted(base_dir, LoraConfig(rank=4), tokenizer, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    folders = [tmp_path / name for name in ("tokenizer", "exported", "adapter", "merged")]
    if not others:
        run = start(model=None, model_path=base_dir, num_steps=2)
        folders += [run / "tokenizer", run / "final"]
    for folder in folders:
        assert (folder / "tokenizer.json").is_file()
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token_id == tokenizer.eos_id
        assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint


def our_logits(path):
    model = load_pretrained(path, device="cpu", kernels="reference").model
    with torch.no_grad():
        return model.logits(model.hidden(torch.arange(6, 30)[None]))


def edit_model(checkpoint, folder):
    """Another tokenizer: a run's, with an unknown field at the end of its model."""
    shutil.copytree(checkpoint.parent.parent / "tokenizer", folder)
    model = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(model + b"\x98\x3f\x01")
    edit(folder / "tokenizer_config.json", lambda data: data.pop("lumi_fingerprint"))


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


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
