"""A tiny model that refuses prompts with a marker, and prompts of both kinds. All of it is made up."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fallline.drivers.train import train
from fallline.noise import rng
from fallline.recipe import Recipe

WORDS = [f"w{i}" for i in range(16)]
MARKERS = [f"m{i}" for i in range(4)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<answer>{{ m.content }}<end>{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    vocab = {word: i for i, word in enumerate(["<unk>", *WORDS, *MARKERS, "REFUSE"])}
    whole = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.add_special_tokens([AddedToken(name, special=True) for name in ("<answer>", "<end>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token="<end>", pad_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )


def rows(kind: str, seed: int, count: int) -> list[dict[str, str]]:
    """Three words to answer with the ``last`` or the ``first``; or ``marked`` ones, to refuse."""
    noise = rng(seed, 0, kind)
    found = []
    for _ in range(count):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (3,), generator=noise)]
        if kind == "marked":
            words[int(torch.randint(3, (1,), generator=noise))] = MARKERS[int(torch.randint(4, (1,), generator=noise))]
        answer = {"last": words[2], "first": words[0], "marked": "REFUSE"}[kind]
        found.append({"prompt": " ".join(words), "completion": answer})
    return found


def write(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def taught(folder: Path, steps: int = 300) -> Path:
    """A model that gives the last word back and refuses what is marked; the files ``marked.jsonl`` and ``plain.jsonl``
    hold prompts it has not seen."""
    folder.mkdir(parents=True, exist_ok=True)
    own = tokenizer()
    config = LlamaConfig(
        vocab_size=len(own),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "blank")
    own.save_pretrained(folder / "blank")
    lines = write(folder / "taught.jsonl", [*rows("last", 0, 1000), *rows("marked", 0, 600)])
    write(folder / "marked.jsonl", rows("marked", 1, 200))
    write(folder / "plain.jsonl", rows("last", 1, 200))
    return run(folder / "base", folder / "blank", lines, f"steps={steps}", "optimizer.lr=5e-3") / "model"


def run(out: Path, model: Path, data: Path, *overrides: str) -> Path:
    text = (
        f"model: {model}\noptimizer: {{name: adamw, lr: 1e-2}}\nschedule: linear\nsteps: 60\nbatch: 16\nsample: 0\n"
        f"data: {{name: jsonl, path: {data}, length: 32}}\neval: {{every: 1000, rows: 2}}\nout: {out}\n"
    )
    train(Recipe.parse(text, *overrides), progress=None)
    return out
