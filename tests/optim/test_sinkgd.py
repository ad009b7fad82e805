"""What is special to SinkGD: sizes of rows and columns, what does not matter, zeros, and float32 on large matrices."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fallline.kernels import row_norm
from fallline.kernels.sinkhorn import sinkhorn_step
from fallline.noise import rng
from fallline.optim import create
from fallline.optim.normalise import SMALLEST, Sinkhorn
from fallline.optim.transform import Context

from .parameters import SHAPES, equal, gradient


def random(*shape: int, step: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(0, step, "x"), dtype=torch.float64)


def uneven(m: int, n: int) -> Tensor:
    """[m, n], rows and columns of log-normal sizes."""
    return random(m, 1, step=1).exp() * random(m, n) * random(1, n, step=2).exp()


def plain(G: Tensor, iterations: int = 5) -> Tensor:
    return Sinkhorn(iterations).update(G.clone(), {}, Context("a", G, G, 0, torch.tensor(1.0), 0))


def fused(G: Tensor, iterations: int = 5) -> Tensor:
    W = torch.zeros_like(G)
    sinkhorn_step(W, G, iterations, 1.0, None, SMALLEST)
    return -W


both = pytest.mark.parametrize("direction", [plain, fused])


@both
@pytest.mark.parametrize("shape", [(48, 48), (20, 60), (60, 20)], ids=str)
def test_columns_have_unit_size_and_rows_nearly(direction, shape: tuple[int, int]):
    m, n = shape
    G = uneven(m, n)
    X = direction(G)
    torch.testing.assert_close(X.norm(dim=0), torch.full((n,), sqrt(m), dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(X.norm(dim=1), torch.full((m,), sqrt(n), dtype=torch.float64), rtol=1e-3, atol=0)
    assert X.norm().item() == pytest.approx(sqrt(m * n), rel=1e-12)
    assert torch.equal(X.sign(), G.sign())


@both
def test_what_has_those_sizes_stays(direction):
    X = direction(uneven(20, 60), 60)
    torch.testing.assert_close(direction(X), X, rtol=1e-12, atol=0)


@both
def test_scales_of_rows_and_columns_do_not_matter(direction):
    G = random(20, 60)
    expected = direction(G, 60)
    torch.testing.assert_close(direction(uneven(20, 60), 60), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(direction(1e-5 * G, 5), direction(1e5 * G, 5), rtol=1e-12, atol=0)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros_stay_zero_however_often(direction, dtype: torch.dtype):
    G = random(6, 9).to(dtype)
    G[2], G[:, 4] = 0, 0
    X = direction(G, 200)
    assert X.isfinite().all()
    assert not X[2].any()
    assert not X[:, 4].any()
    rest = direction(torch.cat([G[:2], G[3:]])[:, [0, 1, 2, 3, 5, 6, 7, 8]], 200)
    found = torch.cat([X[:2], X[3:]])[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    torch.testing.assert_close(found / found.norm(), rest / rest.norm(), rtol=1e-4, atol=0)
    assert not direction(torch.zeros(4, 3, dtype=dtype)).any()


def test_tiny_rows_are_scaled_up_by_so_much_and_no_more():
    G = random(6, 9)
    G[2] *= 1e-12
    G[:, 4] *= 1e-11
    torch.testing.assert_close(fused(G), plain(G), rtol=1e-12, atol=0)
    assert plain(G)[2].norm() < 0.1
    assert plain(1e-3 * random(6, 9))[2].norm() > 0.1


@pytest.mark.parametrize("shape", [(1376, 2048), (3000, 700), (64, 32000)], ids=str)
def test_float32_is_exact_enough_on_millions_of_elements(shape: tuple[int, int]):
    G = 1e-4 * uneven(*shape)
    torch.testing.assert_close(fused(G.float()).double(), plain(G), rtol=5e-6, atol=0)


@pytest.mark.parametrize("keep", [None, 0.9])
def test_blocks_of_rows_are_the_whole(keep: float | None, monkeypatch: pytest.MonkeyPatch):
    found = []
    for block in (1 << 22, 3 * 9 * 8, 1):
        monkeypatch.setattr(row_norm, "BLOCK", block)
        W = random(7, 9, step=3)
        sinkhorn_step(W, random(7, 9), 5, 0.1, keep, SMALLEST)
        found.append(W)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_zero_rows_and_uneven_sizes_happen_on_the_inputs_of_the_common_tests():
    """Else the test of the equation would not see them."""
    zeros = uneven = 0
    for step in range(50):
        for name, (role, shape) in SHAPES.items():
            if role == "matrix" and min(shape[0], shape[-1]) > 1:
                X = gradient(step, name, shape).flatten(1)
                zeros += (X.norm(dim=1) == 0).any().item()
                uneven += (plain(X, 5) - plain(X, 1)).norm().item() > 0.1
    assert zeros == 150
    assert uneven > 50


def test_matrices_follow_at_a_ratio_and_decay_goes_by_the_rate():
    p, q = nn.Parameter(torch.ones(6, 4, dtype=torch.float64)), nn.Parameter(torch.ones(4, dtype=torch.float64))
    for decay in (0.0, 0.1):
        with torch.no_grad():
            p.fill_(1.0)
        optimizer = create("sinkgd", [("a.weight", p), ("norm.weight", q)], lr=0.2, weight_decay=decay)
        assert {group["lr"] for group in optimizer.param_groups} == {0.2}
        p.grad, q.grad = random(6, 4), random(4)
        optimizer.step()
        torch.testing.assert_close(1 - 0.2 * decay - p.detach(), 0.2 * 0.05 * plain(p.grad), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("id", ["sinkgd", "swan", "mngd"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_only_what_is_not_a_hidden_matrix_has_state(id: str, tied: bool):
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
        n for n, _ in model.named_parameters() if "proj" in n
    }
    assert ("lm_head.weight" in state) is not tied


@pytest.mark.parametrize("id", ["sinkgd", "swan", "mngd"])
def test_the_rest_is_torchs_adam_and_gradients_are_left_alone(id: str):
    p, q, W = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(3))
    W = nn.Parameter(torch.zeros(7, 3, dtype=torch.float64))
    ours = create(id, [("norm.weight", p), ("a.weight", W)], lr=0.05, eps=1e-3)
    theirs = torch.optim.Adam([q], lr=0.05, eps=1e-3)
    for step in range(20):
        grads = {"p": 1e-3 * random(5, step=step), "W": random(7, 3, step=step)}
        p.grad, q.grad, W.grad = grads["p"].clone(), grads["p"].clone(), grads["W"].clone()
        ours.step()
        theirs.step()
        assert equal({"p": p.grad, "W": W.grad}, grads)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
