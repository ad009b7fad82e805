"""SPAM: Adam on gradients whose spikes are clipped element by element, with moments that start afresh now and then.

With gradient G, learning rate η, weight decay λ, and t from 1, element by element:

    clip      G ← sign(G) min(|G|, √(θ V)) where V > 0, V as the update before left it
    reset     at every update ΔT, 2 ΔT, …:   M, V ← 0
    Adam      M ← β₁ M + (1 − β₁) G,   V ← β₂ V + (1 − β₂) G²
              W ← (1 − η λ) W − η s √(1 − β₂ᵗ)/(1 − β₁ᵗ) · M/(√V + ε)

After a reset t goes on, so that the first step would be (1 − β₁)/√(1 − β₂), some three times Adam's; s takes the rate
from a hundredth back to all of it in K updates: s = 1 − 0.99 · ½ (1 + cos(π k/(K + 1))), k the updates since the reset.
At k < `clip_after`, and in the first `clip_after` − 1 updates, V is too small to clip by.

With `density` d < 1, of a hidden matrix only ⌊d n⌋ of n elements are trained, drawn at random at each reset; only for
them are there moments.

State is Adam's: 8 bytes per float32 parameter, and 28 are moved, as AdamW moves. Of a sparse matrix it is 8 d bytes and
a bit, on a CPU at the price of time: elements are gathered and scattered.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..catalog import Card
from ..errors import InputError
from ..kernels.elementwise import Task
from ..kernels.native import in_parallel
from ..kernels.spike_adam import spike_adam_step
from ..options import Options, option
from .adams import SpikeAdam
from .chain import Chain, ChainOptimizer, chain, partition
from .entries import RandomEntries
from .roles import ROLES, Params, Role
from .state import State
from .transform import Context, Members

CARD = Card(
    id="spam",
    kind="optimizer",
    summary="Adam with spikes of single elements clipped and moments reset; on part of the elements if asked.",
    paper="SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
    year=2025,
    repository="TianjinYellow/SPAM-Optimizer",
    equation="G ← sign(G) min(|G|, √(θV)); Adam, M = V = 0 every ΔT updates and the rate warmed up again",
    acts_on="element",
    state_bytes={
        "matrix": "8 * n + (1 > density) * (8 * (density * n // 1) + (n + 7) // 8 - 8 * n)",
        "any": "8 * n",
    },
    traffic_bytes={
        "matrix": "28 * n + (1 > density) * (16 * (density * n // 1) + 2 * ((n + 7) // 8) - 16 * n)",
        "any": "28 * n",
    },
    workspace_bytes={"matrix": "(1 > density) * 13 * n", "any": "0"},
    claim="Llama 60M to 1B on C4: lower perplexity than Adam, also with other kinds of clipping; sparse, lower than "
    "GaLore and Adam-mini with as much memory",
    checked=(
        "the equation in float64, dense and sparse; clip, reset and new elements happen and hold what they "
        "promise; without them Adam; pytorch_optimizer's SPAM to the first reset; with spikes in the "
        "gradients a lower loss than Adam's of a tiny model. Compared once, by no test: the released code "
        "over 120 steps and three resets, dense; effect at 10 M parameters, 64 steps with a reset every 32, "
        "rate tuned alike, three seeds: validation loss 6.738 ± 0.049 where adamw has 6.775 ± 0.040, "
        "difference −0.04 [−0.86, +0.78] (studies/optimizers-early/report.json). One update of a 58 M Llama "
        "on two CPU cores: 1.10 ± 9 % of torch's fused AdamW (python benchmarks/optimizer_step.py elementwise"
        " --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_elementwise.json"),
    departures="weight decay comes before the update, after which the released code has it, and none on vectors; of "
    "sparse matrices it reaches all elements, where in the released code it goes to a copy and is lost. Where V is 0 "
    "nothing is clipped: in the released code an element without a gradient while nothing is clipped is held at 0 by "
    "its limit from then on, such as the row of a word first seen later. Resets go by "
    "each parameter's own updates, not the run's. ⌊d n⌋ elements are drawn always, where the released code keeps each "
    "with probability d at later draws; that they keep the moments of those drawn twice has no effect there, as the "
    "reset follows. The released training script hands over `warmup_steps`, 1000, for K, not the 150 it calls "
    "`warmup_epoch`",
    tags=("adam", "adaptive", "clipping", "reset", "stability", "spikes", "memory", "sparse"),
)


@dataclass(frozen=True)
class Config(Options):
    """SPAM's hyper-parameters."""

    lr: float = option(4e-4, "peak learning rate η", gt=0, source="released scripts, 350M; 8e-4 at 130M, 2e-3 at 1B")
    threshold: float = option(5000.0, "θ, of squares; 0 for no clip", ge=0, source="paper; released code")
    clip_after: int = option(
        20,
        "updates without a clip from a reset on; one fewer at first",
        ge=1,
        source="released code",
        used_if=("threshold > 0", lambda c: c.threshold > 0),
    )
    reset_every: int = option(
        500, "ΔT, updates between resets of the moments; 0 for none", ge=0, source="paper; released code"
    )
    reset_step: bool = option(
        False,
        "t begins at 1 again, too",
        source="released code",
        used_if=("reset_every > 0", lambda c: c.reset_every > 0),
    )
    rewarm: int = option(
        150,
        "K, updates in which the rate comes back after a reset",
        ge=0,
        source="paper; released code",
        used_if=("reset_every > 0", lambda c: c.reset_every > 0),
    )
    density: float = option(
        1.0, "d, part of a hidden matrix's elements that are trained at a time", gt=0, le=1, source="released scripts"
    )
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's β₁ and β₂", ge=0, lt=1, source="released code")
    eps: float = option(1e-6, "Adam's ε, beside the uncorrected root", gt=0, source="released code")
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="released code")

    def check(self) -> None:
        if self.threshold and 0 < self.reset_every <= self.clip_after:
            raise InputError(
                f"'clip_after' must be below 'reset_every' {self.reset_every}, or nothing is ever clipped; "
                f"got {self.clip_after}"
            )


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""
    adam = SpikeAdam(
        config.betas,
        config.eps,
        threshold=config.threshold,
        clip_after=config.clip_after,
        reset_every=config.reset_every,
        reset_step=config.reset_step,
        rewarm=config.rewarm,
    )

    def step(p: Tensor, g: Tensor, moments: State, ctx: Context, lr: float | Tensor, decay: float) -> list[Task]:
        share = adam.share(ctx.step)
        adam.reset(moments, ctx.step)
        return spike_adam_step(
            p,
            g,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            threshold=adam.limit(ctx.step),
            betas=config.betas,
            eps=config.eps,
            t=adam.age(ctx.step),
            lr=lr * share,
            decay=decay / share,
        )

    def dense(members: Members, lr: float | Tensor, decay: float) -> None:
        steps = (step(ctx.param, ctx.grad, state["spikeadam"], ctx, lr, decay) for ctx, state in members)
        in_parallel([task for tasks in steps for task in tasks])

    everything = chain(adam, fused=dense)
    if config.density == 1:
        return dict.fromkeys(ROLES, everything)
    entries = RandomEntries(adam, config.density, config.reset_every)

    def sparse(members: Members, lr: float | Tensor, decay: float) -> None:
        for ctx, state in members:
            where = entries.chosen(state["randomentries"], ctx)
            if decay:
                ctx.param.mul_(1 - lr * decay)
            part = ctx.param.take(where)
            in_parallel(step(part, ctx.grad.take(where), state["randomentries"]["inner"], ctx, lr, 0.0))
            ctx.param.put_(where, part)

    return dict.fromkeys(ROLES, everything) | {"matrix": chain(entries, fused=sparse)}


def build(config: Config, params: Params, *, seed: int = 0) -> ChainOptimizer:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run; which elements of sparse matrices are drawn depends on it.

    Raises:
        InputError: parameters without names.
    """
    return partition(rules(config))(params, lr=config.lr, weight_decay=config.weight_decay, seed=seed)
