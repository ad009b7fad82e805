"""What is special to GaLore, Fira, APOLLO and APOLLO-Mini: what their updates are, and their released code."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fallline.catalog import find
from fallline.contracts import Change
from fallline.noise import rng
from fallline.optim import create
from fallline.optim.chain import chain
from fallline.optim.clipping import GrowthLimit
from fallline.optim.moments import Adam
from fallline.optim.subspace import Subspace, leading

from .parameters import SHAPES, gradient, make, parameters, through_disk, train
from .rows import Row
from .rows.low_rank import ROWS

IDS = ("galore", "fira", "apollo", "apollo-mini")
LIMITED = ("fira", "apollo", "apollo-mini")
SIZES = [(20, 12), (12, 20), (16, 16)]
"""Tall, wide and square."""

each = pytest.mark.parametrize("id", IDS)
both = pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])


def random(*shape: int, step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=rng(0, step, "g"), dtype=torch.float64).to(dtype)


def updates(id: str, shape: tuple[int, ...], steps: int, *, plain: bool = False, **options: Any) -> Any:
    """Of each update: gradient, what was subtracted from the matrix for a rate of 1, and state."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = create(id, [("a.weight", p)], lr=1.0, **options)
    optimizer.plain = plain
    for step in range(steps):
        before = p.detach().clone()
        p.grad = random(*shape, step=step) * 10.0 ** (-(step % 3))
        optimizer.step()
        yield p.grad, before - p.detach(), optimizer.state_dict()["state"]["a.weight"]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_finds_and_limits_happen_on_the_inputs_of_the_common_tests(row: Row):
    """Else the test of the equation would not see them."""
    o = find("optimizer", row.id).load().Config(**row.options)
    for name, (role, shape) in SHAPES.items():
        if role != "matrix":
            continue
        memory: dict[str, Any] = {"name": name}
        W = np.zeros(shape)
        for step in range(50):
            W = row.reference("matrix", W, gradient(step, name, shape).numpy(), memory, step + 1, 1e-2, o)
        assert 10 <= memory["finds"] <= 11
        if row.id != "galore" and name == "layers.0.up.weight":
            assert 3 <= memory["limits"] <= 47


@both
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("basis", ["iteration", "svd"])
def test_galore_moves_within_its_subspace(shape: tuple[int, int], basis: str, plain: bool):
    for _, U, state in updates("galore", shape, 8, plain=plain, rank=3, refresh_every=3, basis=basis):
        P, X = state["lowrankadam"]["basis"], U if shape[0] >= shape[1] else U.T
        torch.testing.assert_close(X @ P.T @ P, X, rtol=0, atol=1e-10)
        assert torch.linalg.matrix_rank(U) == 3


@both
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_galore_with_all_directions_of_the_coordinates_is_adam(
    shape: tuple[int, int], plain: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Subspace, "find", lambda self, X, before, ctx: torch.eye(X.shape[1], dtype=X.dtype))
    p, q = (nn.Parameter(random(*shape, step=99)) for _ in range(2))
    mine = create("galore", [("a.weight", p)], lr=0.1, rank=99, alpha=1.0, weight_decay=0.1)
    theirs = chain(Adam((0.9, 0.999), 1e-6))([("a.weight", q)], lr=0.1, weight_decay=0.1)
    mine.plain = theirs.plain = plain
    for step in range(20):
        p.grad = random(*shape, step=step)
        q.grad = p.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=0 if plain else 1e-12, atol=0 if plain else 1e-12)


@both
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("basis", ["iteration", "svd"])
def test_fira_beside_the_subspace_is_the_scaled_gradient(shape: tuple[int, int], basis: str, plain: bool):
    """As the paper has it, what is beside is orthogonal to the basis; at a rate of 1 and the first update in full."""
    options = {"rank": 3, "basis": basis, "residual_alpha": False}
    for G, U, state in updates("fira", shape, 1, plain=plain, **options):
        own = state["lowrankadamwithrest"]
        P, X, Y = own["basis"], G if shape[0] >= shape[1] else G.T, U if shape[0] >= shape[1] else U.T
        R = X @ P.T
        N = R.sign() * (R.abs() / (R.abs() + 1e-6 / 0.001**0.5))  # Adam's first step, corrected
        S = Y - 0.25 * N @ P
        assert (S @ P.T).abs().max() < 1e-10
        torch.testing.assert_close(S, N.norm(dim=1, keepdim=True) / R.norm(dim=1, keepdim=True) * (X - R @ P))


@both
def test_fira_without_a_rest_is_galore(plain: bool):
    found = []
    for id, options in (("galore", {}), ("fira", {"residual_alpha": False})):
        found.append([U for _, U, _ in updates(id, (9, 5), 12, plain=plain, rank=5, refresh_every=4, **options)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kappa", [0.25, 0.49, 0.5, 1.0])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_size_of_the_rest_follows_from_norms_of_rows(shape: tuple[int, int], kappa: float):
    options = {"rank": 3, "refresh_every": 4, "alpha": kappa, "betas": (0.9, 0.99)}
    sizes = [
        [
            state["lowrankadamwithrest"]["limit"]["size"].item()
            for _, _, state in updates("fira", shape, 20, plain=p, **options)
        ]
        for p in (False, True)
    ]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-9)


@both
@pytest.mark.parametrize("id", LIMITED)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_size_grows_by_a_hundredth_at_most(id: str, shape: tuple[int, int], plain: bool):
    sizes = []
    for _, _, state in updates(id, shape, 40, plain=plain, refresh_every=7):
        limit = state["growthlimit"] if "growthlimit" in state else state["lowrankadamwithrest"]["limit"]
        sizes.append(limit["size"].clone())
    growth = torch.stack(sizes[1:]) / torch.stack(sizes[:-1])
    assert growth.max() <= 1.01 * (1 + 1e-6)
    assert (growth > 1.009).any()
    assert (growth < 1).any()


def test_the_limit_of_growth():
    limit = GrowthLimit(1.5)
    state = limit.init(torch.zeros(()))
    found = []
    for size in (0.0, 0.0, 2.0, 100.0, 4.0, 1.0, 1.2, 0.0, 7.0):
        found.append(size * limit.factor(state, torch.tensor(size)).item())
    assert found == pytest.approx([0, 0, 2, 3, 4, 1, 1.2, 0, 7])


@both
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_apollo_scales_channels_and_mini_the_whole(shape: tuple[int, int], plain: bool):
    for G, U, _ in updates("apollo", shape, 8, plain=plain, rank=4, refresh_every=3):
        ratio = U / G if shape[0] >= shape[1] else (U / G).T
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
        assert (ratio > 0).all()
        assert ratio[:, 0].std() > 0
    for G, U, _ in updates("apollo-mini", shape, 8, plain=plain, refresh_every=3):
        ratio = U / G
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
        assert ratio[0, 0] > 0


@pytest.mark.parametrize("id", ["apollo", "apollo-mini"])
def test_updates_are_inverse_to_the_size_of_the_random_basis(id: str, monkeypatch: pytest.MonkeyPatch):
    """Adam's direction has a size of its own, so φ = ‖N‖/‖R‖ is by the size of R alone: the 1/√r matters."""
    draw, found = Subspace.find, []
    for factor in (1.0, 1000.0):
        monkeypatch.setattr(Subspace, "find", lambda *args, factor=factor: factor * draw(*args))
        found.append([U * factor for _, U, _ in updates(id, (20, 12), 6, eps=1e-20)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_minis_first_update_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Along the first axis: R is the first column, |N| is 1 once corrected, so φ = √m/‖R‖."""
    axis = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    monkeypatch.setattr(Subspace, "find", lambda self, X, before, ctx: axis)
    for G, U, _ in updates("apollo-mini", (5, 3), 1, eps=1e-20):
        torch.testing.assert_close(U, (128 * 5) ** 0.5 / G[:, 0].norm() * G)


@pytest.mark.parametrize("basis", ["iteration", "svd"])
@pytest.mark.parametrize("id", ["galore", "fira"])
def test_wide_matrices_are_tall_ones_turned(id: str, basis: str):
    found = []
    for turned in (False, True):
        p = nn.Parameter(torch.zeros((12, 20) if turned else (20, 12), dtype=torch.float64))
        optimizer = create(id, [("a.weight", p)], lr=0.1, rank=3, refresh_every=3, basis=basis)
        for step in range(8):
            G = random(20, 12, step=step)
            p.grad = G.T.contiguous() if turned else G
            optimizer.step()
        found.append(p.detach().T if turned else p.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_fast_paths_on_larger_matrices(row: Row):
    """Gradients of full rank, in float32, with finds in between and every kind of shape."""
    found = []
    for plain in (False, True):
        params = {
            f"{i}.weight": nn.Parameter(random(*shape, step=i, dtype=torch.float32))
            for i, shape in enumerate(((64, 48), (48, 64), (48, 48), (33, 70)))
        }
        options = row.options | ({} if row.id == "apollo-mini" else {"rank": 8})
        optimizer = create(row.id, params.items(), **options)
        optimizer.plain = plain
        for step in range(8):
            for p in params.values():
                p.grad = random(*p.shape, step=100 + step, dtype=torch.float32)
            optimizer.step()
        found.append({name: p.detach() for name, p in params.items()})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("id", LIMITED)
def test_a_first_gradient_of_zeros_does_not_stop_it(id: str):
    """As that of a LoRA factor is whose partner begins at zero."""
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = create(id, [("layers.0.lora_A.weight", p)], lr=0.1)
    p.grad = torch.zeros(6, 4)
    optimizer.step()
    p.grad = random(6, 4, dtype=torch.float32)
    optimizer.step()
    assert p.abs().max() > 0.01


@each
@both
@pytest.mark.parametrize("at", [0, 2], ids=["first", "later"])
def test_a_nan_gradient_is_shown_and_nothing_else_is_lost(id: str, plain: bool, at: int):
    p, q = (nn.Parameter(torch.zeros(6, 4)) for _ in range(2))
    options = {"refresh_every": 1, **({"basis": "svd"} if id in ("galore", "fira") else {})}
    optimizer = create(id, [("a.weight", p), ("b.weight", q)], **options)
    optimizer.plain = plain
    for step in range(4):
        p.grad = random(6, 4, step=step, dtype=torch.float32)
        q.grad = p.grad.clone()
        if step == at:
            p.grad[0, 1] = float("nan")
        optimizer.step()
    assert p[0].isnan().any()
    assert q.isfinite().all()
    state = optimizer.state_dict()["state"]["a.weight"]
    basis = next(inner["basis"] for inner in state.values() if isinstance(inner, dict) and "basis" in inner)
    assert basis.isfinite().all()


@each
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_only_hidden_matrices_are_low_rank(id: str, tied: bool):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    optimizer = create(id, model)
    tokens = torch.arange(16).view(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert {name for name, s in state.items() if "adam" not in s} == {
        name for name, _ in model.named_parameters() if "proj" in name
    }
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


@each
def test_the_rest_is_adam_with_epsilon_beside_the_uncorrected_root(id: str):
    p, q = (nn.Parameter(torch.ones(5, 3, dtype=torch.float64)) for _ in range(2))
    mine = create(id, [("embed.weight", p)], lr=0.1, eps=1e-3)
    theirs = chain(Adam((0.9, 0.999), 1e-3))([("embed.weight", q)], lr=0.1)
    theirs.plain = True
    for step in range(20):
        p.grad = 1e-3 * random(5, 3, step=step)
        q.grad = p.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@each
@both
def test_a_replaced_matrix_goes_on_or_begins_anew(id: str, plain: bool):
    """The same in another place keeps its state; one of another shape has a basis from its first update on."""
    params = parameters()
    row = next(row for row in ROWS if row.id == id)
    optimizer = make(id, params, row.options | {"refresh_every": 100})
    optimizer.plain = plain
    train(optimizer, params, 0, 3)
    name = "layers.0.up.weight"
    old, new = params[name][0], nn.Parameter(params[name][0].detach().clone())
    before = through_disk(optimizer.state_dict()["state"][name])
    optimizer.remap([Change(name, old, new)])
    torch.testing.assert_close(through_disk(optimizer.state_dict()["state"][name]), before, rtol=0, atol=0)
    grown, fresh = (nn.Parameter(torch.zeros(9, 5).double()) for _ in range(2))
    optimizer.remap([Change(name, new, grown)])
    anew = make(id, {name: (fresh, "matrix")}, row.options | {"refresh_every": 100})
    for step in range(3):
        grown.grad = random(9, 5, step=step)
        fresh.grad = grown.grad.clone()
        optimizer.step()
        anew.step()
    torch.testing.assert_close(grown, fresh, rtol=1e-9, atol=1e-9)


def same_signs(P: Tensor) -> Tensor:
    """Rows [r, a] with the entry of largest magnitude positive: singular vectors have no sign of their own."""
    return P * P.gather(1, P.abs().argmax(1, keepdim=True)).sign()


def fifty(id: str, shape: tuple[int, int], theirs: Any, make_peer: Any, before: Any = None, **options: Any) -> None:
    """Fifty updates of ours and a peer's, on the same float32 gradients, with a basis found every ten."""
    p, q = (nn.Parameter(random(*shape, step=99, dtype=torch.float32)) for _ in range(2))
    ours = create(id, [("a.weight", p)], lr=0.01, refresh_every=10, spread=False, **options)
    peer = make_peer([{"params": [q], **theirs, "update_proj_gap": 10, "proj_type": "std"}])
    for step in range(50):
        p.grad = random(*shape, step=step, dtype=torch.float32) * 10.0 ** (-(step % 3))
        q.grad = p.grad.clone()
        ours.step()
        if before is not None:
            before(ours.state_dict()["state"]["a.weight"]["adamscaling"]["basis"])
        peer.step()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


@pytest.mark.peer
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_galore_is_the_released_code(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    peer = import_module("galore_torch")
    projector = import_module("galore_torch.galore_projector").GaLoreProjector
    signed(projector, monkeypatch)
    theirs = {"rank": 3, "scale": 0.25}
    fifty(
        "galore",
        shape,
        theirs,
        lambda g: peer.GaLoreAdamW(g, lr=0.01, no_deprecation_warning=True),
        rank=3,
        basis="svd",
    )


@pytest.mark.peer
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_fira_is_the_released_code(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    peer = import_module("fira")
    signed(import_module("fira.gradient_projection").GradientProjector, monkeypatch)
    theirs = {"rank": 3, "alpha": 0.25}
    fifty("fira", shape, theirs, lambda g: peer.FiraAdamW(g, lr=0.01, no_deprecation_warning=True), rank=3, basis="svd")


def signed(projector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released projector, its vectors with the signs of ours; without, momentum would change sign at random."""
    decompose = projector.get_orthogonal_matrix

    def fixed(self: Any, weights: Tensor, rank: int, type: str) -> Tensor:
        found = decompose(self, weights, rank, type)
        return same_signs(found) if type == "right" else same_signs(found.T).T

    monkeypatch.setattr(projector, "get_orthogonal_matrix", fixed)


@pytest.mark.peer
@pytest.mark.parametrize("front", [False, True], ids=["", "front"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(
    ("id", "rank", "scale", "per"), [("apollo", 4, 2.0, "channel"), ("apollo-mini", 1, 128.0, "tensor")]
)
def test_apollo_is_the_released_code(
    id: str, rank: int, scale: float, per: str, shape: tuple[int, int], front: bool, monkeypatch: pytest.MonkeyPatch
):
    """On our random numbers; also with the root of scale before the limit, which makes no difference."""
    peer = import_module("apollo_torch")
    projector = import_module("apollo_torch.random_projector").GradientProjector
    basis: dict[str, Tensor] = {}
    monkeypatch.setattr(
        projector,
        "get_orthogonal_matrix",
        lambda self, weights, rank, type, seed: basis["P"].clone() if type == "right" else basis["P"].T.clone(),
    )
    theirs = {"rank": rank, "scale": scale, "scale_type": per, "proj": "random"}
    options = {"rank": rank, "scale": scale} if id == "apollo" else {"scale": scale}
    fifty(
        id,
        shape,
        theirs,
        lambda g: peer.APOLLOAdamW(g, lr=0.01, scale_front=front),
        before=lambda P: basis.update(P=P),
        **options,
    )


def test_exact_bases_are_singular_vectors_of_the_gradient():
    for G, _, state in updates("galore", (20, 12), 1, rank=3, basis="svd"):
        torch.testing.assert_close(state["lowrankadam"]["basis"], leading(G, 3))


@each
def test_gradients_are_left_as_they_are(id: str):
    p = nn.Parameter(torch.zeros(7, 3))
    optimizer = create(id, [("a.weight", p)], refresh_every=1)
    for step in range(3):
        g = random(7, 3, step=step, dtype=torch.float32)
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
