"""What the hub says against a push, and what is there already."""

import huggingface_hub.constants
import pytest
from crafted_models import save_base
from hub_server import TOKEN
from pushing import card_of, push, refusal

from lumi.formats.fingerprint import weights_fingerprint
from lumi.formats.hub import local_folder


@pytest.fixture(autouse=True)
def here(hub, base_dir):
    """The names are relative: `base`."""


class TestRefusals:
    def test_no_token(self, hub, monkeypatch, capsys):
        monkeypatch.delenv("HF_TOKEN")
        assert refusal(capsys, "base", "me/base") == (
            "the hub's token must be here, with leave to write, got none; "
            "use `hf auth login`, or set HF_TOKEN"
        )
        assert hub.requests == []

    def test_a_token_that_the_hub_does_not_know(self, monkeypatch, capsys):
        monkeypatch.setenv("HF_TOKEN", "hf_another")
        said = refusal(capsys, "base", "me/base")
        assert said.startswith("me/base: the hub refuses: 401 ")
        assert said.endswith("; use another token: `hf auth login`, or set HF_TOKEN")
        assert "hf_another" not in said

    def test_somebody_else_s_name(self, hub, capsys):
        hub.refused.add("you/base")
        said = refusal(capsys, "base", "you/base")
        assert "you/base: the hub refuses: 403 [token] may not write to you/base" in said
        assert "choose a name of your own" in said
        assert TOKEN not in said

    def test_no_network(self, monkeypatch, capsys):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        assert refusal(capsys, "base", "me/base").startswith("the hub must be reachable, got ")

    def test_offline(self, monkeypatch, capsys):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert refusal(capsys, "base", "me/base").endswith("; connect; HF_HUB_OFFLINE must not be 1")

    def test_a_card_that_the_hub_does_not_take(self, hub, capsys):
        hub.yaml_errors.append('"license" must be one of [apache-2.0]')
        said = refusal(capsys, "base", "me/base", "--license", "no-such")
        assert 'Invalid metadata in README.md. - "license" must be one of [apache-2.0]' in said
        assert hub.files("me/base").keys() == {".gitattributes"}

    def test_a_public_repository_does_not_become_private(self, hub, capsys):
        push("base", "me/base")
        said = refusal(capsys, "base", "me/base", "--private")
        assert said.startswith(
            "--private must be of a private or a new repository, got me/base, which is public"
        )


def test_private(hub):
    push("base", "me/base", "--private")
    assert hub.told[0]["visibility"] == "private"
    push("base", "me/base", "--private")


def test_a_branch(hub, tokenizer, tmp_path):
    push("base", "me/base")
    before = hub.files("me/base")
    other = save_base(tokenizer, tmp_path / "other", qk_norm=True)
    push(other, "me/base", "--branch", "next")
    assert hub.files("me/base") == before
    assert weights_fingerprint(local_folder("me/base@next")) == weights_fingerprint(other)
    assert 'from_pretrained("me/base", revision="next")' in card_of(hub, "me/base", "next").text
    assert "--model-path me/base@next" in card_of(hub, "me/base", "next").text


class TestWhatIsThereAlready:
    def test_the_same_again_is_no_commit(self, hub):
        push("base", "me/base")
        number = len(hub.messages)
        push("base", "me/base")
        assert len(hub.messages) == number

    def test_files_of_the_model_before_are_deleted_and_others_stay(self, hub, capsys):
        others = ["adapter_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
        hub.commit("me/base", dict.fromkeys([*others, "notes.md", "model.gguf"], b"x"))
        push("base", "me/base")
        assert not set(others) & hub.files("me/base").keys()
        assert {"notes.md", "model.gguf"} <= hub.files("me/base").keys()
        shown = capsys.readouterr().out
        for name in others:
            assert f"{name}: is deleted in me/base; it belongs to the model that was there before" in shown

    def test_our_own_card_is_replaced(self, hub, base_dir):
        push("base", "me/base")
        push("base", "me/base", "--license", "mit")
        assert card_of(hub, "me/base").data.license == "mit"

    def test_a_card_that_was_edited_stays(self, hub, capsys):
        push("base", "me/base")
        files = hub.files("me/base")
        edited = files["README.md"].replace(b"# base", b"# My base")
        hub.commit("me/base", files | {"README.md": edited})
        push("base", "me/base", "--license", "mit")
        assert hub.files("me/base")["README.md"] == edited
        assert "README.md: that of me/base stays" in capsys.readouterr().out
        push("base", "me/base", "--license", "mit", "--replace-card")
        assert card_of(hub, "me/base").data.license == "mit"
