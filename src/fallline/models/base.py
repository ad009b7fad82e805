"""What the models share: the options that change how a model computes, not what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers import PreTrainedModel

from ..errors import InputError
from ..options import Options, option
from ..quantised import quantise


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Options of every model.

    Attributes:
        brings_tokenizer: whether the model comes with a tokenizer of its own.
    """

    brings_tokenizer: ClassVar[bool]

    attention: Literal["sdpa", "eager"] = option(
        "sdpa", "torch's fused attention, or plain matrix products for models that sdpa cannot express"
    )
    checkpointing: bool = option(
        False, "keep only each layer's input and compute the layer again in the backward: less memory, 1/3 more FLOPs"
    )
    compile: bool = option(False, "compile the decoder with torch.compile: a minute at first, then faster")


@dataclass(frozen=True, kw_only=True)
class LoadedOptions(ModelOptions):
    """Options of models that come with weights."""

    quantise: Literal["nf4", "int8"] | None = option(
        None,
        "hold the weights of linear layers in few bits, for an adapter beside them: nf4, 4.5 bits each, or int8; "
        "needs the package bitsandbytes",
    )

    def check(self) -> None:
        if self.quantise and self.compile:
            raise InputError("quantised weights cannot be compiled; leave out 'compile' or 'quantise'")


def finish(model: PreTrainedModel, config: ModelOptions) -> PreTrainedModel:
    """Switch on what the options ask for, in place; parameter names stay.

    Raises:
        InputError: the architecture does not support activation checkpointing, or cannot be quantised.
    """
    if isinstance(config, LoadedOptions) and config.quantise:
        quantise(model, config.quantise)
    if config.checkpointing:
        # the second name is the one before transformers 5.23
        switch: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            switch({"use_reentrant": False})
        except ValueError:
            raise InputError(
                f"{type(model).__name__} cannot checkpoint activations; set checkpointing: false"
            ) from None
    if config.compile:
        model.get_decoder().compile()
    return model
