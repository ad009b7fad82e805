"""The only source of randomness.

Every draw is a function of (seed, step, stream), never of what was drawn before, so nothing about randomness is saved
and a resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import torch


def key(seed: int, step: int, stream: str) -> int:
    """A 63-bit number that depends on these arguments and on nothing else."""
    digest = hashlib.blake2b(f"{seed}|{step}|{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rng(seed: int, step: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose at one step.

    Args:
        seed: of the run.
        step: index of the step, from 0.
        stream: what it is for, as a path: ``draw``, ``project/model.layers.3.self_attn.q_proj.weight``, ``model/0/1``.
        device: where it will draw.
    """
    return torch.Generator(device).manual_seed(key(seed, step, stream))


def seed_forward(seed: int, step: int, stream: str, device: torch.device) -> None:
    """Seed the global generators, from which dropout draws. Only the step does this, before each forward.

    Args:
        seed, step, stream: as for `rng`.
        device: where the model is.
    """
    if device.type == "cpu":  # 1 µs; torch.manual_seed takes 100 µs on a machine whose other devices are not in use
        torch.default_generator.manual_seed(key(seed, step, stream))
    else:
        torch.manual_seed(key(seed, step, stream))


def secret(seed: int | None) -> int:
    """`seed`, or for None 63 bits that nobody can guess: where what is drawn must stay unknown, as in private training.
    Whoever draws one keeps it in its state, so that a resumed run goes on with it."""
    return secrets.randbits(63) if seed is None else seed


def secret_rng(secret: int, step: int, stream: str) -> np.random.Generator:
    """As `rng`, from a secret. Draws on the CPU; a normal float32 takes some 20 ns.

    torch's CPU generator looks at 32 bits of its seed: few enough to try them all, and two of 10⁵ streams would be the
    same. Philox takes the whole secret.
    """
    digest = hashlib.blake2b(f"{secret}|{step}|{stream}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
