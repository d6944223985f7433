import io
import json
import sys

import pytest
import torch
import transformers
from crafted_models import speller

from lumi.cli import dispatch
from lumi.command_line import run
from lumi.config import UserError
from lumi.formats.hf_format import save_model
from lumi.inference.generation import SamplingConfig, generate, generate_ids, sample, text_ids
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer

NO_STOP = {"stop_ids": frozenset(), "pad_id": 3}
PROMPTS = [[1, 7, 9, 30, 12], [1], [1, 5, 5, 8, 40, 41, 42, 43, 44]]


def build(**changes):
    shape = {
        "vocab_size": 61,
        "num_layers": 2,
        "model_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_dim": 48,
        "max_positions": 64,
    }
    model = Transformer(ModelConfig(**shape | changes), REFERENCE).init_weights(0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # untrained weights of the usual size would repeat one token for ever
    return model


def greedy(count, **changes):
    return SamplingConfig(max_new_tokens=count, temperature=0.0, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "tied_embeddings": True},
        {"qkv_bias": True, "window": 5, "full_attention_layers": 1},
        {"window": 3, "no_rope_layer_interval": 2},
    ],
    ids=str,
)
def test_the_cache_changes_no_token(changes):
    model = build(**changes)
    for config in (greedy(40), greedy(40, repetition_penalty=2.0)):  # with a penalty, untrained models wander
        with_cache = generate_ids(model, PROMPTS, config, **NO_STOP)
        assert with_cache == generate_ids(model, PROMPTS, config, **NO_STOP, use_cache=False)
        assert [(len(row.ids), row.stopped) for row in with_cache] == [(40, False)] * 3
    assert len(set(with_cache[0].ids)) > 10


def test_greedy_by_hand():
    model = build()
    tokens = list(PROMPTS[0])
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(model.logits(model.hidden(torch.tensor([tokens])))[0, -1].argmax()))
    assert generate_ids(model, [PROMPTS[0]], greedy(6), **NO_STOP) == [(tokens[5:], False)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_a_batch_do_not_touch_each_other(temperature):
    model = build()
    config = SamplingConfig(max_new_tokens=20, temperature=temperature, repetition_penalty=1.3, seed=5)
    batch = generate_ids(model, PROMPTS, config, **NO_STOP)
    assert generate_ids(model, [*PROMPTS[:1], [1, 2, 3]], config, **NO_STOP)[0] == batch[0]
    assert generate_ids(model, [[4], PROMPTS[1]], config, **NO_STOP)[1] == batch[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_computed_for_rows_that_have_ended(temperature, monkeypatch):
    """The batch shrinks, and the rows that go on are the same."""
    model = build()
    config = SamplingConfig(max_new_tokens=20, temperature=temperature, seed=3)
    free = [row.ids for row in generate_ids(model, PROMPTS, config, **NO_STOP)]
    stop = free[0][4]  # ends the first row, so that others take its place
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    sizes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, *a, **k: sizes.append(len(t)) or hidden(t, *a, **k))
    for use_cache in (True, False):
        sizes.clear()
        rows = generate_ids(model, PROMPTS, config, stop_ids=frozenset({stop}), pad_id=3, use_cache=use_cache)
        assert [row.ids for row in rows] == expected
        # A row takes a step for each of its tokens, and one for the stop token.
        steps = [len(ids) + (stop in whole) for ids, whole in zip(expected, free, strict=True)]
        assert sizes == [sum(step < count for count in steps) for step in range(len(sizes))]
    assert sizes[0] == len(PROMPTS) > sizes[-1]


def test_a_token_without_probability_is_never_chosen():
    """Not even by the largest number below one, or by zero."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).clamp(min=-1e30)
    draws = [0.0, 0.25, 0.75, 1 - 2**-53]
    picks = [
        int(sample(logits, torch.zeros(1, 1), torch.ones(1), SamplingConfig(temperature=1.0), draw))
        for draw in torch.tensor(draws, dtype=torch.float64)[:, None]
    ]
    assert picks == [1, 1, 2, 2]


def test_stop_ids_end_a_row_and_are_left_out():
    model = build()
    free = [row.ids for row in generate_ids(model, PROMPTS, greedy(30), **NO_STOP)]
    stop = free[0][7]
    expected = [(ids[: ids.index(stop)], True) if stop in ids else (ids, False) for ids in free]
    assert generate_ids(model, PROMPTS, greedy(30), stop_ids=frozenset({stop}), pad_id=3) == expected
    assert len(expected[0][0]) <= 7
    assert {stopped for _, stopped in expected} == {True, False}


def test_positions_end_a_row():
    model = build(max_positions=12)
    assert [(len(row.ids), row.stopped) for row in generate_ids(model, PROMPTS, greedy(30), **NO_STOP)] == [
        (7, False),
        (11, False),
        (3, False),
    ]
    with pytest.raises(UserError, match="shorter than the model's 12 positions, got 12 tokens"):
        generate_ids(model, [[1] * 12], greedy(1), **NO_STOP)
    with pytest.raises(UserError, match="at least one token"):
        generate_ids(model, [[1], []], greedy(1), **NO_STOP)


def test_ids_beyond_the_tokenizer_are_never_chosen():
    model = build()
    config = SamplingConfig(max_new_tokens=40, temperature=2.0)
    wide = generate_ids(model, PROMPTS, config, **NO_STOP)
    narrow = generate_ids(model, PROMPTS, config, **NO_STOP, vocab_size=20)
    assert max(max(row.ids) for row in wide) >= 20 > max(max(row.ids) for row in narrow)


def test_the_seed_decides():
    model = build()
    one, same, other = (
        generate_ids(model, PROMPTS, SamplingConfig(max_new_tokens=20, seed=seed), **NO_STOP)
        for seed in (1, 1, 2)
    )
    assert one == same != other


LOGITS = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]))


def frequencies(config, tokens=None, count=4000):
    tokens = torch.zeros(count, 1, dtype=torch.int64) if tokens is None else tokens.expand(count, -1)
    draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((count,), tokens.shape[1])
    picks = sample(LOGITS.expand(count, -1), tokens, lengths, config, draws)
    return torch.bincount(picks, minlength=5) / count


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.06, 0.04]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.2, 0.06, 0.04]),
        ({"top_p": 0.7}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        ({"top_p": 0.01}, [1.0, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [16 / 29.52, 9 / 29.52, 4 / 29.52, 0.36 / 29.52, 0.16 / 29.52]),
    ],
    ids=str,
)
def test_sampling_follows_the_distribution(changes, expected):
    got = frequencies(SamplingConfig(**{"temperature": 1.0} | changes))
    assert all((g == 0) == (e == 0) for g, e in zip(got.tolist(), expected, strict=True))
    four_standard_errors = 4 * 0.5 / 4000**0.5
    torch.testing.assert_close(got, torch.tensor(expected), atol=four_standard_errors, rtol=0)


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
    config = SamplingConfig(temperature=0.0, repetition_penalty=1.5)

    def pick(logits, seen):
        padded = torch.tensor([[*seen, 1]])  # the last is beyond the row's length and must not count
        return int(sample(logits, padded, torch.tensor([len(seen)]), config, None))

    assert pick(logits, [3]) == 0
    assert pick(logits, [0]) == 1  # 2.0 / 1.5 < 1.5
    assert pick(logits[:, 2:], [0]) == 1  # -1.0 * 1.5 < -1.2
    assert pick(logits[:, 2:], [1]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1e-4},
        {"top_p": 1e-6},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"temperature": 1e300},
    ],
    ids=str,
)
def test_the_bounds_themselves_can_be_sampled_from(changes):
    tokens, config = torch.tensor([[0, 2]]), SamplingConfig(**{"temperature": 1.0} | changes)
    for scale in (1.0, 1e4):
        for draw in (0.0, 0.5, 1 - 2**-53):
            draws = torch.tensor([draw], dtype=torch.float64)
            pick = sample(LOGITS * scale, tokens, torch.tensor([2]), config, draws)
            assert 0 <= int(pick) < 5


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_model_is_refused(value, temperature):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    message = "the model's output must be finite, got NaN or infinity: its weights are broken"
    tokens, config = torch.zeros(2, 1, dtype=torch.int64), SamplingConfig(temperature=temperature)
    with pytest.raises(UserError, match=message):
        sample(logits, tokens, torch.ones(2), config, torch.zeros(2))


def test_text_is_streamed_in_whole_characters(tokenizer):
    model = build(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():  # a model that spells "é" byte by byte, for ever
        model.token_embedding.weight.zero_()
        ids = [tokenizer.bos_id, *tokenizer.encode("a")]
        first, second = tokenizer.encode("é")
        model.token_embedding.weight[ids[-1], 0] = model.token_embedding.weight[second, 0] = 1
        model.token_embedding.weight[first, 1] = 1
        model.lm_head.weight.zero_()
        model.lm_head.weight[first, 0] = model.lm_head.weight[second, 1] = 50
        for layer in model.layers:
            layer.attention.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    pieces = []
    texts = generate(model, tokenizer, ["a", "a"], greedy(5), lambda row, text: pieces.append((row, text)))
    assert texts == ["éé\ufffd"] * 2
    assert [text for row, text in pieces if row == 0] == ["é", "é", "\ufffd"]


def test_a_short_prompt_is_filled_up_without_a_pad_token(tokenizer, monkeypatch):
    model = build(vocab_size=tokenizer.vocab_size)
    expected = generate(model, tokenizer, ["a", "The river"], greedy(9))
    monkeypatch.setattr(tokenizer, "pad_id", None)
    assert generate(model, tokenizer, ["a", "The river"], greedy(9)) == expected


@pytest.mark.parametrize("data", [b"The river", b"The river\n", b"The river\r\n"])
def test_the_prompt_comes_from_stdin(data, tokenizer, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "final", build(vocab_size=tokenizer.vocab_size), tokenizer)
    command = ["generate", "--model-path", str(tmp_path), "--max-new-tokens", "5", "--temperature", "0"]
    assert run(dispatch, [*command, "--prompt", "The river"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(dispatch, command) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["x" * 300], "a prompt must be shorter than the model's 64 positions, got 30"),
        (["caf\udce9"], "text must be valid Unicode, got the lone surrogate U+DCE9 at character 3"),
        (
            ["The river", "x" * 300],
            "prompt 2: a prompt must be shorter than the model's 64 positions, got 30",
        ),
        (
            ["The river", "\udce9"],
            "prompt 2: text must be valid Unicode, got the lone surrogate U+DCE9 at character 0",
        ),
    ],
    ids=["too long", "no Unicode", "the second too long", "the second no Unicode"],
)
def test_a_prompt_is_checked_before_anything_is_printed(prompts, message, tokenizer, tmp_path, capsys):
    save_model(tmp_path / "final", build(vocab_size=tokenizer.vocab_size), tokenizer)
    assert run(dispatch, ["generate", "--model-path", str(tmp_path), "--prompt", *prompts]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")


def test_an_error_begins_on_a_line_of_its_own(tokenizer, tmp_path, capsys):
    model = build(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.final_norm.weight[3] = float("nan")
    save_model(tmp_path / "final", model, tokenizer)
    assert run(dispatch, ["generate", "--model-path", str(tmp_path), "--prompt", "The river"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "The river\n"
    assert captured.err.startswith("error: the model's output must be finite")


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", "listed", "not listed"])
def test_a_chat_model_continues_a_text_as_far_as_transformers_does(end, tokenizer, tmp_path, capsys):
    """A model that says one word and then a token; which ones end a text stands in generation_config.json."""
    (river,) = tokenizer.encode(" river")
    (last,) = [tokenizer.control_id(end)] if end[0] == "<" else tokenizer.encode("\n")
    save_model(tmp_path / "final", speller(tokenizer, {river: last, None: river}), tokenizer)
    file = tmp_path / "final" / "generation_config.json"
    config = json.loads(file.read_text())
    assert config["eos_token_id"] == [tokenizer.eos_id, tokenizer.control_id("<|im_end|>")]
    if end == "listed":
        config["eos_token_id"].append(last)
        file.write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    prompt = torch.tensor([text_ids(tokenizer, "The")])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    theirs = model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    assert theirs == ([river, last] * 3 if end == "not listed" else [river, last])
    text = tokenizer.decode(theirs if end == "not listed" else theirs[:-1])
    greedy = "--temperature 0 --max-new-tokens 6 --device cpu".split()
    assert dispatch(["generate", "--model-path", str(tmp_path), "--prompt", "The", *greedy]) == 0
    assert capsys.readouterr().out == f"The{text}\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n", "the prompt on stdin must hold text, got none"),
        (b"caf\xe9", "the prompt on stdin must be UTF-8, got"),
    ],
)
def test_what_is_no_prompt_on_stdin(data, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(dispatch, ["generate", "--model-path", "none"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or at least 0.0001, got -0.1"),
        ({"temperature": 1e-40}, r"temperature must be 0 \(greedy\) or at least 0.0001, got 1e-40"),
        ({"temperature": float("nan")}, r"temperature must be 0 \(greedy\) or at least 0.0001, got nan"),
        ({"temperature": float("inf")}, r"temperature must be 0 \(greedy\) or at least 0.0001, got inf"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be between 0.000001 and 1 \(off\), got 0.0"),
        ({"top_p": 1e-320}, r"top_p must be between 0.000001 and 1 \(off\), got 1e-320"),
        ({"top_p": 1.1}, r"top_p must be between 0.000001 and 1 \(off\), got 1.1"),
        (
            {"repetition_penalty": 0.0},
            r"repetition_penalty must be between 0.01 and 100 \(1 is off\), got 0.0",
        ),
        (
            {"repetition_penalty": 1e-300},
            r"repetition_penalty must be between 0.01 and 100 \(1 is off\), got 1e-300",
        ),
        (
            {"repetition_penalty": 101.0},
            r"repetition_penalty must be between 0.01 and 100 \(1 is off\), got 101.0",
        ),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**changes)
