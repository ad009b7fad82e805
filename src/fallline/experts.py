"""Mixtures of experts in a 🤗 model: how tokens are routed, and one expert that is trained alone.

    g = softmax(r(h)) over all E experts of a layer; a token goes to the k experts whose g are largest

🤗 Transformers keeps the weights of a layer's experts in stacks [E, …]. An optimizer that is given a stack moves all of
it: weight decay takes from experts without a gradient, and a rule for matrices sees [E, …] as something else. So an
expert that is to be trained alone becomes parameters of its own (`split_off`). These lie in the memory of the stacks:
what is written to them is in the model at once, and state and export of the model are as before.

Shared experts, which every token passes, lie outside the stacks and are none of those meant here.

Cost of a split: none in the forward; the backward forms the gradient of the layer's stacks and keeps a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Mixture:
    """The routed experts of a layer.

    Attributes:
        router: answers (scores of all experts [N, E], weights [N, k], experts [N, k]) for N tokens.
        experts: holds stacks.
        number: E.
    """

    router: nn.Module
    experts: nn.Module
    number: int


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    """Path of the experts → their mixture, in forward order; those that are built as 🤗 Transformers builds them."""
    found = {}
    for path, module in model.named_modules():
        inside = dict(module.named_children())
        experts, router = inside.get("experts"), inside.get("gate", inside.get("router"))
        if experts is None or router is None:
            continue
        stacks = list(experts.parameters(recurse=False))
        if stacks and all(p.ndim > 1 and len(p) == len(stacks[0]) for p in stacks):
            found[f"{path}.experts".lstrip(".")] = Mixture(router, experts, len(stacks[0]))
    return found


@contextmanager
def overheard(of: Mapping[str, Mixture]) -> Iterator[dict[str, Any]]:
    """Inside, what each router answered in the last forward is put under its mixture's name."""
    told: dict[str, Any] = {}

    def listen(name: str, mixture: Mixture) -> torch.utils.hooks.RemovableHandle:
        return mixture.router.register_forward_hook(lambda router, args, answer: told.update({name: answer}))

    hooks = [listen(name, mixture) for name, mixture in of.items()]
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()


def probabilities(answer: Any) -> Tensor:
    """g [N, E] in float32 at least, of a router's answer: of all experts, not of the chosen ones alone."""
    scores: Tensor = answer[0]
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


@torch.no_grad()
def is_softmax(answer: Any, number: int) -> bool:
    """Is a router's answer what `probabilities` takes it for? The weights of the chosen experts must be their g, or
    these over their sum, times a constant; those of a router that scores experts one by one (sigmoid) are not."""
    match answer:
        case (Tensor() as scores, Tensor() as weights, Tensor() as chosen, *_):
            pass
        case _:
            return False
    if scores.shape[-1] != number or weights.shape != chosen.shape or len(scores) != len(chosen):
        return False
    g, w = probabilities(answer).double().gather(-1, chosen), weights.double()
    allowed = max(8 * torch.finfo(weights.dtype).eps, 1e-4)  # of whatever else was rounded on the way

    def constant(x: Tensor) -> bool:
        return bool((x.amax() - x.amin()) <= allowed * x.abs().amax())

    total = w.sum(-1, keepdim=True)
    return constant(w / g) or (constant(total) and constant(w / total * g.sum(-1, keepdim=True) / g))


class Expert(nn.Module):
    """One expert's parameters, which lie in the stacks: no part of the model's state a second time."""

    def _save_to_state_dict(self, *args: Any) -> None: ...

    def _load_from_state_dict(self, *args: Any) -> None: ...


class Stack(torch.autograd.Function):
    """The stack as it is, whose gradient goes to one expert's part of it."""

    @staticmethod
    def forward(stack: Tensor, part: Tensor, expert: int) -> Tensor:
        return stack.view_as(stack)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.expert = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0][ctx.expert].clone(), None  # a copy, so that the others' may go


def split_off(mixture: Mixture, expert: int) -> Expert:
    """Make parameters of one expert's slices of the stacks, in place, and freeze the stacks. It becomes the module
    ``expert_I`` beside them, and stays."""
    name, home, made = f"expert_{expert}", mixture.experts, Expert()
    for key, stack in home.named_parameters(recurse=False):
        stack.requires_grad_(False)
        made.register_parameter(key, nn.Parameter(stack.detach()[expert]))
    home.add_module(name, made)

    def give(module: nn.Module, args: Any) -> None:
        for key, part in module.get_submodule(name).named_parameters():
            stack = module.get_parameter(key)
            assert part.data_ptr() == stack[expert].data_ptr(), "a copied or moved model has parts of its own"
            vars(module)[key] = Stack.apply(stack, part, expert)

    def take(module: nn.Module, args: Any, output: Any) -> None:
        for key, _ in module.get_submodule(name).named_parameters():
            vars(module).pop(key, None)

    home.register_forward_pre_hook(give)
    home.register_forward_hook(take, always_call=True)
    return made
