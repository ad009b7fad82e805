"""What a parameter is for: one inspectable answer, `roles(model)`, on which every rule that differs by layer relies.

| role | parameters |
|---|---|
| `matrix` | hidden weights of two or more dimensions |
| `embedding` | look-up tables: tokens, positions |
| `head` | the output layer's weight, also where an embedding is tied to it |
| `vector` | anything of no or one dimension: norms, biases |
| `adapter` | factors that change a frozen weight (names with ``.adapters.``, or PEFT's ``lora_``) |
| `objective` | parameters of the objective itself (names beginning with ``objective.``) |

A tied table is a head because rules that treat the last layer apart (its gradient is dense and noisy, that of a plain
embedding is sparse) would otherwise silently lose their subject.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..errors import InputError, nearest

Role = Literal["matrix", "embedding", "head", "vector", "adapter", "objective"]

ROLES: tuple[Role, ...] = get_args(Role)

DECAYED: frozenset[Role] = frozenset({"matrix", "embedding", "head", "adapter"})
"""Roles that weight decay applies to: as GPT-3 and Llama were trained not norms and biases; nor an objective's own."""

HEADS = frozenset({"lm_head", "head", "output", "embed_out", "unembed", "score", "classifier"})
"""Names of modules outside the numbered blocks that are taken for the output layer."""

Params = nn.Module | Mapping[str, tuple[nn.Parameter, Role]] | Iterable[tuple[str, nn.Parameter]]
"""What an optimizer is built from: a model; name → (parameter, role); or (name, parameter) pairs."""


@dataclass(frozen=True)
class Leaves:
    """The parameters of an optimizer.

    Attributes:
        trained: name → (parameter, role), those that require a gradient.
        frozen: name → role of the others, for when they are thawed.
    """

    trained: dict[str, tuple[nn.Parameter, Role]]
    frozen: dict[str, Role]


def roles(model: nn.Module) -> dict[str, Role]:
    """Name → role of every parameter of `model` that requires a gradient.

    A 🤗 model says itself which modules are its input and output embeddings. Of any other, an `nn.Embedding` is an
    embedding, and a linear layer outside the numbered blocks with one of the names in `HEADS` is the head.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: role for name, role in classify(model).items() if name in trained}


def classify(model: nn.Module) -> dict[str, Role]:
    """As `roles`, of frozen parameters too."""
    tables, heads = set(), set()
    linear = set()
    for path, module in model.named_modules():
        own = {id(p) for p in module.parameters(recurse=False) if p.ndim >= 2}
        if isinstance(module, nn.Embedding):
            tables |= own
        elif isinstance(module, nn.Linear):
            linear |= own
            if is_head(path):
                heads |= own
    for found, method in ((tables, "get_input_embeddings"), (heads, "get_output_embeddings")):
        module = getattr(model, method)() if hasattr(model, method) else None
        if isinstance(module, nn.Module):
            found |= {id(p) for p in module.parameters() if p.ndim >= 2}
    heads |= tables & linear  # tied by hand, without 🤗's bookkeeping

    def role(name: str, p: Tensor) -> Role:
        guess = guess_role(name, p.ndim)
        if guess in ("vector", "adapter", "objective"):
            return guess
        return "head" if id(p) in heads else "embedding" if id(p) in tables else "matrix"

    return {name: role(name, p) for name, p in model.named_parameters()}


def is_head(path: str) -> bool:
    """Whether a module's path is that of an output layer."""
    parts = path.split(".")
    return parts[-1] in HEADS and not any(part.isdigit() for part in parts)


def guess_role(name: str, ndim: int) -> Role:
    """The role of a parameter of which only name and number of dimensions are known."""
    path = name.rpartition(".")[0]
    module = path.rpartition(".")[2]
    if name.startswith("objective."):
        return "objective"
    if ndim < 2:
        return "vector"
    if ".adapters." in name or "lora_" in name:
        return "adapter"
    if is_head(path):
        return "head"
    return "embedding" if "embed" in module or module in ("wte", "wpe") else "matrix"


def leaves(params: Params) -> Leaves:
    """Names and roles of what an optimizer was given.

    Of (name, parameter) pairs the roles are guessed from name and shape, and a table without a head beside it is taken
    to be tied: give the model itself where that is wrong.

    Raises:
        InputError: parameters without names, an unknown role, one twice, or nothing to train.
    """
    if isinstance(params, nn.Module):
        known: dict[str, Role] = classify(params)
        pairs = [(name, p, known[name]) for name, p in params.named_parameters()]
    elif isinstance(params, Mapping):
        pairs = [(name, p, role) for name, (p, role) in params.items()]
    else:
        named = [named_parameter(item) for item in params]
        known = {name: guess_role(name, p.ndim) for name, p in named}
        if "head" not in known.values():
            known = {name: "head" if role == "embedding" else role for name, role in known.items()}
        pairs = [(name, p, known[name]) for name, p in named]
    seen: set[str | int] = set()
    for name, p, role in pairs:
        if role not in ROLES:
            raise InputError(f"parameter {name!r} has the unknown role {role!r}; {nearest(role, ROLES)}")
        if name in seen or id(p) in seen:
            raise InputError(f"parameter {name!r} was given twice")
        seen |= {name, id(p)}
    found = Leaves(
        {name: (p, role) for name, p, role in pairs if p.requires_grad},
        {name: role for name, p, role in pairs if not p.requires_grad},
    )
    if not found.trained:
        raise InputError("nothing to train: no parameter requires a gradient")
    return found


def named_parameter(item: Any) -> tuple[str, nn.Parameter]:
    """`item` if it is a (name, parameter) pair.

    Raises:
        InputError: it is something else.
    """
    match item:
        case (str(name), Tensor() as p):
            return name, p  # type: ignore[return-value]
    raise InputError(
        f"an optimizer needs its parameters' names, got a {type(item).__name__}; "
        "pass the model or model.named_parameters()"
    )
