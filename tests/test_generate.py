"""Generation with the cache against generation without, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fallline.errors import InputError
from fallline.generate import ends, generate, pick, stream, text_of
from fallline.noise import rng
from talkers import byte_tokenizer

V = 97
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZE),
    "mistral, window 6": lambda: hf.MistralConfig(**SIZE, sliding_window=6),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=0, eos_token_id=0
    ),
}


def make(name="llama"):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)  # confident enough that the likeliest token is no matter of rounding
    return model


def without_cache(model, ids, new_tokens, choose):
    """The whole text through the model for every token."""
    model.eval()
    ids = list(ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids.append(choose(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]))
    return ids


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_generation_without_cache(name):
    model = make(name)
    found = generate(model, [5, 9, 2], 40, generator=rng(0, 0, "sample"), temperature=0)
    assert found == without_cache(model, [5, 9, 2], 40, lambda logits: int(logits.argmax()))


@pytest.mark.parametrize("name", CONFIGS)
def test_sampling_equals_generation_without_cache(name):
    model, generator = make(name), rng(0, 0, "sample")
    found = generate(model, [5], 30, generator=rng(0, 0, "sample"), temperature=3.0, top_k=5)
    assert found == without_cache(model, [5], 30, lambda logits: pick(logits, generator, 3.0, 5))
    assert len(set(found)) > 5
    assert found != generate(model, [5], 30, generator=rng(1, 0, "sample"), temperature=3.0, top_k=5)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, 4), (2.0, 1000)])
def test_draws_follow_the_distribution(temperature, top_k):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, -9.0])
    generator, n = rng(0, 0, "pick"), 4000
    counts = torch.bincount(torch.tensor([pick(logits, generator, temperature, top_k) for _ in range(n)]), minlength=6)
    kept = logits.topk(min(top_k or 6, 6)).indices
    p = torch.zeros(6).index_copy(0, kept, torch.softmax(logits[kept] / temperature, 0))
    assert ((counts / n - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt()).all()  # 0 where p is 0


def test_global_generator_modes_and_gradients_stay():
    model = make("gpt2").train()  # GPT-2 has dropout: a forward in training mode would draw
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = generate(model, [5], 8, generator=rng(0, 0, "sample"))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    torch.rand(7)
    assert generate(model, [5], 8, generator=rng(0, 0, "sample")) == first


def test_modes_are_restored_after_an_error():
    model = make().train()
    with pytest.raises(IndexError):
        generate(model, [V + 1], 2, generator=rng(0, 0, "sample"))
    assert all(module.training for module in model.modules())


def test_ends_at_eos_and_at_the_last_position():
    model = make()
    text = generate(model, [5, 9, 2], 30, generator=rng(0, 0, "sample"), temperature=0)
    eos = text[10]
    cut = generate(model, [5, 9, 2], 30, generator=rng(0, 0, "sample"), temperature=0, eos=eos)
    assert cut == text[: text.index(eos, 3) + 1]
    assert len(generate(model, [5] * 47, 30, generator=rng(0, 0, "sample"))) == 48
    assert generate(model, [5] * 48, 30, generator=rng(0, 0, "sample")) == [5] * 48
    assert generate(model, [5], 0, generator=rng(0, 0, "sample")) == [5]


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([], {}, "'ids' must be 1 to 48 tokens, got 0"),
        ([1] * 49, {}, "'ids' must be 1 to 48 tokens, got 49"),
        ([1], {"temperature": -0.1}, "temperature must be at least 0"),
        ([1], {"top_k": 0}, "top_k at least 1"),
    ],
)
def test_refused(ids, options, words):
    with pytest.raises(InputError, match=words):
        generate(make(), ids, 3, generator=rng(0, 0, "sample"), **options)


def test_a_stream_is_what_generate_returns_and_leaves_the_model_when_closed():
    model = make("gpt2").train()
    whole = generate(model, [5, 9], 12, generator=rng(0, 0, "sample"))
    tokens = stream(model, [5, 9], 12, generator=rng(0, 0, "sample"))
    assert model.training, "nothing is done before the first token is asked for"
    first = [next(tokens) for _ in range(3)]
    assert not model.training
    assert torch.is_grad_enabled()
    tokens.close()
    assert model.training
    assert [5, 9, *first] == whole[:5]
    for token in stream(model, [5, 9], 12, generator=rng(0, 0, "sample")):
        assert token == whole[2]
        break
    assert all(module.training for module in model.modules()), "the reader walked away"


def test_several_tokens_may_end_the_text():
    model = make()
    text = generate(model, [5, 9, 2], 30, generator=rng(0, 0, "sample"), temperature=0)
    for eos in ([text[10], text[15]], {text[15], text[10]}):
        cut = generate(model, [5, 9, 2], 30, generator=rng(0, 0, "sample"), temperature=0, eos=eos)
        assert cut == text[: next(i for i in range(3, len(text)) if text[i] in eos) + 1]
    tokenizer = byte_tokenizer()
    model.generation_config.eos_token_id = [3, 4]
    assert ends(model, tokenizer) == {3, 4, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = None
    assert ends(model, tokenizer) == {tokenizer.eos_token_id}


def test_wrong_arguments_are_told_before_the_first_token():
    with pytest.raises(InputError, match="'ids' must be"):
        stream(make(), [], 3, generator=rng(0, 0, "sample"))


def spaced_tokenizer():
    """Llama 2's way: spaces are ▁, the first is dropped in decoding, and unknown characters are bytes."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"acehndst,",
        "th",
        "▁th",
        "▁the",
    ]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e")]
    whole = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TEXT = "the cat — Zoë's 猫 🐈‍⬛ — sat, the end\n"


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, spaced_tokenizer])
def test_a_stream_of_text_shows_whole_characters_only_and_loses_none(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    for split in (0, 4, 9, len(ids)):  # a space, a letter, and a character of several bytes come first
        before, new = ids[:split], ids[split:]
        read = tokenizer.decode(before, skip_special_tokens=True)
        if read.endswith("\ufffd"):
            continue
        pieces = list(text_of(iter(new), tokenizer, before))
        assert "".join([read, *pieces]) == tokenizer.decode(ids, skip_special_tokens=True)
        assert all("\ufffd" not in piece for piece in pieces)
        assert all(pieces)
    assert len(list(text_of(iter(ids), tokenizer))) > 20, "it streams"
    assert "".join(text_of(iter(ids), tokenizer)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_each_piece_comes_before_the_next_token_is_asked_for():
    tokenizer, taken = byte_tokenizer(), []

    def tokens():
        for token in tokenizer("aë b").input_ids:
            taken.append(token)
            yield token

    seen = [(piece, len(taken)) for piece in text_of(tokens(), tokenizer)]
    assert seen == [("a", 1), ("ë", 3), (" ", 4), ("b", 5)]


def test_bytes_that_are_no_character_are_shown_as_the_tokenizer_does():
    tokenizer = byte_tokenizer()
    cat = tokenizer("🐈").input_ids
    for ids in (cat[:3], [*cat[:2], *tokenizer("no").input_ids], [*cat[1:], *cat], [*cat[:1], *cat[:1]]):
        assert "".join(text_of(iter(ids), tokenizer)) == tokenizer.decode(ids)
    assert list(text_of(iter([]), tokenizer, cat)) == []
