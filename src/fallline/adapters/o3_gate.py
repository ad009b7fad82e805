"""How much an input looks like what was to be forgotten: the gate of `o3`, without the adapter.

    z_j [D]        mean of hidden state j = 1 … L of the base model over the tokens of an input
    q_j(x)         −½ (z_j − μ_j)ᵀ P_j (z_j − μ_j) − 1000 max_i cos(z_j, z_ij)
                   P_j⁻¹ = (1 − δ_j) S_j + δ_j (tr S_j/D) I
    s(x)           v · q(x), of a linear one-class SVM on the q of what was to be forgotten, ν = 0.1
    u(x)           1 − |F(s) − F(2 x₀ − s)|,   F = ½ N(m₁, σ²) + ½ N(m₂, σ²),   x₀ = (m₁ + m₂)/2
    w(x) in [0, 1] σ(10 u − 2) where that is above 0.3, else 0;   of several requests the largest

μ_j, S_j (mean and covariance) and z_ij are of four fifths of a request's prompts, m₁ is the mean of their s; m₂ and σ
are mean and deviation of the s of the last fifth. δ is Ledoit's and Wolf's: there are often fewer prompts than
dimensions. s is neither least nor greatest where an input is as prompts of the request are, so w falls on both sides.

Cost: in use 2 D² + 2 n D floating-point operations a layer, request and input, in float64 on the CPU, beside the base
model's forward of the input; D² numbers a layer and request in memory, and n D on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..noise import rng

FILE = "gate.safetensors"
LEAST = 10
"""Prompts without which a request is refused: two of them are left to tell how scores spread."""

STEEP, SHIFT, CUT, COSINE, NU = 10.0, 2.0, 0.3, 1000.0, 0.1


@dataclass(frozen=True)
class Request:
    """What is kept of a request's prompts. All float64, on the CPU.

    Attributes:
        z: [L, n, D], their means of hidden states. shrinkage: [L], δ. direction: [L], v.
        scores: [3], m₁, m₂ and σ.
    """

    z: Tensor
    shrinkage: Tensor
    direction: Tensor
    scores: Tensor

    @cached_property
    def precision(self) -> Tensor:
        """P, [L, D, D]."""
        x = self.z - self.z.mean(1, keepdim=True)
        S = x.mT @ x / x.shape[1]
        d, one = self.shrinkage[:, None, None], torch.eye(x.shape[2], dtype=x.dtype)
        mean = S.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        return torch.linalg.inv((1 - d) * S + d * mean * one)

    def features(self, z: Tensor) -> Tensor:
        """q, [B, L], of inputs z [L, B, D]."""
        x = z - self.z.mean(1, keepdim=True)
        far = ((x @ self.precision) * x).sum(2)
        near = (unit(z) @ unit(self.z).mT).amax(2)
        return (-far / 2 - COSINE * near).t()

    def weight(self, z: Tensor) -> Tensor:
        """w, [B], of inputs z [L, B, D]."""
        return weight(self.features(z) @ self.direction, *self.scores.tolist())


def unit(z: Tensor) -> Tensor:
    return torch.nn.functional.normalize(z, dim=-1)


def weight(s: Tensor, m1: float, m2: float, sd: float) -> Tensor:
    """w of scores s, of any shape; see the module docstring."""
    both, middle = torch.distributions.Normal(s.new_tensor([m1, m2]), sd), (m1 + m2) / 2
    F, mirrored = (both.cdf(x.unsqueeze(-1)).mean(-1) for x in (s, 2 * middle - s))
    w = torch.sigmoid(STEEP * (1 - (F - mirrored).abs()) - SHIFT)
    return torch.where(w > CUT, w, 0)


def fit(z: Tensor, seed: int) -> Request:
    """A request's detector.

    Args:
        z: [L, N, D] float64, of its prompts, at least `LEAST`.
        seed: of which fifth is left to tell how scores spread.

    Raises:
        InputError: the prompts are too few, or too much alike to tell how they vary.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage
    from sklearn.svm import OneClassSVM

    number = z.shape[1]
    if number < LEAST:
        raise InputError(
            f"adapter 'o3' learns to tell what is to be forgotten from {LEAST} prompts at least, got {number}"
        )
    order = torch.randperm(number, generator=rng(seed, 0, "adapter/gate"))
    apart, kept = z[:, order[: number // 5]], z[:, order[number // 5 :]]
    if not bool((kept.var(1).sum(1) > 0).all()):
        raise InputError("adapter 'o3': all prompts to forget are the same; give different ones")
    shrinkage = torch.tensor([ledoit_wolf_shrinkage(layer.numpy()) for layer in kept], dtype=torch.float64)
    request = Request(kept.contiguous(), shrinkage, z.new_zeros(len(z)), z.new_zeros(3))
    q, q_apart = request.features(kept), request.features(apart)
    svm = OneClassSVM(kernel="linear", nu=NU).fit(q.numpy())
    direction = torch.tensor(svm.coef_[0], dtype=torch.float64)
    s = q_apart @ direction
    scores = torch.stack([(q @ direction).mean(), s.mean(), s.std(correction=0)])
    if not bool(scores.isfinite().all()) or not scores[2] > 0:
        raise InputError("adapter 'o3': the prompts to forget are too much alike to tell how they vary; give more")
    return Request(request.z, shrinkage, direction, scores)


@dataclass(frozen=True)
class Gate:
    """The detectors of all requests so far, oldest first."""

    requests: tuple[Request, ...]

    def weights(self, z: Tensor) -> Tensor:
        """w, [B], of inputs z [L, B, D] float64."""
        return torch.stack([request.weight(z) for request in self.requests]).amax(0)

    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor, from which `of` makes it again."""
        return {
            f"{i}.{name}": t for i, each in enumerate(self.requests) for name, t in vars(each).items() if name in KEPT
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Gate:
        number = len({name.partition(".")[0] for name in tensors})
        return cls(tuple(Request(*(tensors[f"{i}.{name}"] for name in KEPT)) for i in range(number)))

    def save(self, folder: Path) -> None:
        save_file({name: t.contiguous() for name, t in self.tensors().items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Gate:
        """
        Raises:
            InputError: there is none, or it is damaged.
        """
        try:
            return cls.of(load_file(folder / FILE))
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"cannot read {folder / FILE}, the gate of an adapter 'o3': {error}") from None


KEPT = ("z", "shrinkage", "direction", "scores")


def pooled(hidden: Sequence[Tensor], owner: Tensor, number: int) -> Tensor:
    """Means over the tokens of each input.

    Args:
        hidden: L hidden states [R, T, D].
        owner: [R, T] int64, whose each token is, −1 for nobody's.
        number: how many inputs.

    Returns:
        [L, number, D] float64, on the CPU.
    """
    place = owner.flatten() + 1  # the first is nobody's
    wide = torch.promote_types(hidden[0].dtype, torch.float32)
    count = torch.bincount(place, minlength=number + 1)[1:].clamp(min=1).unsqueeze(1)
    found = []
    for h in hidden:
        sums = h.new_zeros(number + 1, h.shape[-1], dtype=wide).index_add(0, place, h.flatten(0, 1).to(wide))
        found.append((sums[1:] / count).double().cpu())
    return torch.stack(found)


def states(model: Any, **inputs: Any) -> tuple[Tensor, ...]:
    """Hidden states 1 … L [R, T, D] of a 🤗 model's decoder, which is in the mode in which it shall answer."""
    asked = inputs | {"use_cache": False, "output_hidden_states": True, "return_dict": True}
    found: tuple[Tensor, ...] = model.get_decoder()(**asked).hidden_states[1:]
    return found
