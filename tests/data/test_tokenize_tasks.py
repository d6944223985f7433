"""`lumi tokenize` in tasks against one process: the same store, byte for byte."""

import pytest
from corpora import CHATS, TEXTS, write_shards
from task_runs import files_of

from lumi.chat.templates import TEMPLATES
from lumi.config import UserError
from lumi.corpus import read_corpus
from lumi.corpus.scale.prepare import Executor
from lumi.data import encoding, tokenize_tasks
from lumi.data.store_manifest import read_store_manifest
from lumi.data.tokenization import tokenize
from lumi.data.tokenize_tasks import tokenize_in_tasks
from lumi.tokenizer.loading import load_tokenizer

pytest.importorskip("datatrove")

LOCAL = Executor(kind="local", num_tasks=3, num_workers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Corpora of several shards, and the tokenizer's folder."""
    folder = tmp_path_factory.mktemp("shards")
    for name, documents, kind in (
        ("texts", TEXTS, "texts"),
        ("held", TEXTS[:30], "texts"),
        ("chats", CHATS, "conversations"),
    ):
        write_shards(folder / name, documents, kind)
        assert read_corpus(folder / name).num_shards > 1
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    ("corpora", "options"),
    [
        (["texts"], {"validation_fraction": 0.2}),
        (["texts", "held"], {"validation_fraction": 0.0}),
        (["texts"], {"validation_corpus_dirs": ["held"]}),
        (["chats"], {"validation_fraction": 0.2, "template": "chatml", "max_tokens": 60}),
    ],
)
def test_the_store_is_that_of_one_process(folders, tmp_path, monkeypatch, corpora, options):
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 1000)
    options = dict(options)
    held = [folders / name for name in options.pop("validation_corpus_dirs", ())]
    template = options.pop("template", None)
    corpora = [folders / name for name in corpora]
    tokenizer = load_tokenizer(folders / "tokenizer")
    tokenize(
        corpora,
        tokenizer,
        tmp_path / "one",
        validation_corpus_dirs=held,
        template=TEMPLATES[template] if template else None,
        num_workers=1,
        **options,
    )
    manifest = tokenize_in_tasks(
        corpora,
        folders / "tokenizer",
        tmp_path / "tasks",
        LOCAL,
        validation_corpus_dirs=held,
        template=template,
        **options,
    )
    assert files_of(tmp_path / "tasks") == files_of(tmp_path / "one")
    assert manifest == read_store_manifest(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "tasks"}


def test_an_interrupted_run_goes_on(folders, tmp_path, monkeypatch):
    encoded = []
    real = tokenize_tasks.encode_all

    def failing(documents, settings, num_workers):
        encoded.append(1)
        if len(encoded) == 4:
            raise UserError("the power", "must stay")
        return real(documents, settings, num_workers)

    monkeypatch.setattr(tokenize_tasks, "encode_all", failing)
    make = lambda fraction=0.2: tokenize_in_tasks(
        [folders / "texts"], folders / "tokenizer", tmp_path / "tasks", LOCAL, validation_fraction=fraction
    )
    with pytest.raises(UserError, match="the power must stay"):
        make()
    (left,) = tmp_path.iterdir()
    assert len(list((left / "parts").iterdir())) == 3
    manifest = make()
    assert len(encoded) == 1 + read_corpus(folders / "texts").num_shards
    assert list(tmp_path.iterdir()) == [tmp_path / "tasks"]
    assert make() == manifest  # already there
    with pytest.raises(UserError, match="holds a token store of other inputs"):
        make(0.3)


def test_in_processes_of_their_own(folders, tmp_path):
    for workers in (1, 2):
        executor = Executor(kind="local", num_tasks=2, num_workers=workers)
        tokenize_in_tasks([folders / "texts"], folders / "tokenizer", tmp_path / str(workers), executor)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_what_another_call_left_is_removed(folders, tmp_path):
    left = tmp_path / ".tasks-tasks-0123456789abcdef"
    left.mkdir()
    tokenize_in_tasks([folders / "texts"], folders / "tokenizer", tmp_path / "tasks", LOCAL)
    assert not left.exists()


def test_a_plan_whose_inputs_have_changed_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="must leave documents to train on"):  # of the last task
        tokenize_in_tasks(
            [folders / "held"], folders / "tokenizer", tmp_path / "t", LOCAL, validation_fraction=0.9999999
        )
    (left,) = tmp_path.iterdir()
    plan = left / "plan.json"
    plan.write_text(plan.read_text().replace("0.9999999", "0.5"))
    with pytest.raises(
        UserError, match=r"must have the tokenizer and the corpora that it was made for, got others"
    ):
        tokenize_tasks.load_work(str(left))
