"""Small models that can be talked to: a byte-level tokenizer with a chat template, a Llama beside it, runs of both."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fallline.drivers.train import Result, train
from fallline.noise import rng
from fallline.recipe import Recipe

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token for each byte, so that most characters that are not English take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def save_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    positions: int = 256,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A Llama of 60 000 parameters with random weights, saved with its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:  # sure enough of its tokens that the likeliest is no matter of rounding
                p.copy_(torch.empty(p.shape).normal_(0, 0.1, generator=rng(seed, 0, name)))
    model.to(dtype).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def full_run(out: Path, corpus: Path, *overrides: str) -> Result:
    """Six steps of a Llama from scratch."""
    return _run(out, corpus, "model={name: llama, preset: tiny}", "data.vocab=300", *overrides)


def adapter_run(out: Path, base: Path, corpus: Path, *overrides: str) -> Result:
    """Six steps of a LoRA on a saved model, at a rate that changes it plainly."""
    return _run(out, corpus, f"model={base}", "adapter={name: lora, rank: 4}", "optimizer.lr=3e-2", *overrides)


def _run(out: Path, corpus: Path, *overrides: str) -> Result:
    text = (
        "optimizer: {name: adamw, lr: 3e-3}\nschedule: constant\nsteps: 6\nbatch: 2\nsample: 0\neval: {rows: 2}\n"
        f"data: {{name: text, path: {corpus}, length: 64}}\nout: {out}\n"
    )
    return train(Recipe.parse(text, *overrides), progress=None)
