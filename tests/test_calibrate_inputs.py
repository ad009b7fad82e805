"""Principal directions of layer inputs: exact, batch by batch, shared, dealt out by what they explain."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from sklearn.decomposition import IncrementalPCA
from torch import Tensor, nn

from fallline.calibrate import Data
from fallline.calibrate_inputs import Directions, allocate, directions
from fallline.errors import InputError

N = 12


def noise(path: str = "") -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows(count: int, seed: int = 0) -> Tensor:
    """[count, N], of decaying variance about a mean that is not zero."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, N, generator=g, dtype=torch.float64) * 0.8 ** torch.arange(N) @ turn() + 3


def turn() -> Tensor:
    return torch.linalg.qr(torch.randn(N, N, generator=noise(), dtype=torch.float64)).Q


def fitted(parts: Any, k: int, tau: float = 0.99) -> Directions:
    found = Directions(k, tau, noise())
    for part in parts:
        found.add(part)
    return found


def test_one_batch_gives_its_principal_components() -> None:
    X = rows(40)
    found = fitted([X], 5)
    _, S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    torch.testing.assert_close((found.V * Vh[:5]).sum(1).abs(), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found.V @ found.V.t(), torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(found.shares(), (S.square() / S.square().sum())[:5])
    assert (found.V.gather(1, found.V.abs().argmax(1, keepdim=True)) > 0).all()
    assert not found.steady.any(), "nothing to compare with yet"


@pytest.mark.parametrize("cuts", [(1, 4, 30, 25), (25, 30, 4, 1), (60,)])
def test_batches_of_any_size_and_order_give_the_whole_when_nothing_is_dropped(cuts: tuple[int, ...]) -> None:
    X = rows(60)
    parts = list(X.split(list(cuts)))
    found = fitted(parts, N)
    C = X - X.mean(0)
    _, S, Vh = torch.linalg.svd(C, full_matrices=False)
    torch.testing.assert_close(found.S, S)
    torch.testing.assert_close((found.V * Vh).sum(1).abs(), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(found.mean, X.mean(0))
    torch.testing.assert_close(found.spread, C.square().sum())


def test_it_is_the_incremental_analysis_of_scikit_learn() -> None:
    parts = [rows(n, seed) for seed, n in enumerate((9, 20, 7, 15))]
    found, theirs = fitted(parts, 4), IncrementalPCA(4)
    for part in parts:
        theirs.partial_fit(part.numpy())
    V = torch.from_numpy(theirs.components_)
    torch.testing.assert_close((found.V * V).sum(1).abs(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found.S, torch.from_numpy(theirs.singular_values_))
    torch.testing.assert_close(found.shares(), torch.from_numpy(theirs.explained_variance_ratio_))


def test_moments_keep_their_digits_in_float32_far_from_zero() -> None:
    parts = [rows(30, seed).float() * 1e-2 + 100 for seed in range(20)]
    found = fitted(parts, 3)
    X = torch.cat(parts).double()
    assert found.V.dtype == torch.float32
    torch.testing.assert_close(found.spread, (X - X.mean(0)).square().sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.mean, X.mean(0), rtol=1e-12, atol=0)


def test_a_direction_is_steady_when_a_batch_turns_it_by_less_than_asked() -> None:
    parts = [rows(30, seed) for seed in range(2)]
    before = fitted(parts[:1], 2).V
    turned = (fitted(parts, 2).V * before).sum(1).abs()
    assert turned[0] != turned[1]
    tau = float(turned.mean())
    assert fitted(parts, 2, tau).steady.tolist() == (turned >= tau).tolist() != [True, True]
    assert fitted(parts * 9, 2).steady.tolist() == [True, True]
    assert fitted([rows(1)] * 3, 2).shares().tolist() == [0, 0], "without variance there is no share"


def test_the_budget_goes_to_the_best_and_among_equals_to_the_first() -> None:
    scores = {"a": [0.5, 0.2], "b": [0.5, 0.2], "c": [0.3, 0.1], "d": [0.05]}
    tensors = {path: torch.tensor(each) for path, each in scores.items()}
    assert allocate(tensors, 4) == {"a": 2, "b": 1, "c": 1, "d": 0}
    assert allocate(tensors, 99) == {"a": 2, "b": 2, "c": 2, "d": 1}


class Net(nn.Module):
    """`left` and `right` see the same tensor, with `inner` between them; `flat` sees multiples of one vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.inner, self.right = (nn.Linear(N, N, bias=False) for _ in range(3))
        self.flat = nn.Linear(N, N, bias=False)
        self.unused = nn.Linear(N, N)
        self.seen: list[int] = []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.left._forward_pre_hooks) + 10 * len(self.flat._forward_pre_hooks))
        y = self.left(x) + self.inner(x.tanh()) + self.right(x)
        return y.sum() + self.flat(x[..., :1] * torch.ones(N, dtype=x.dtype)).sum()

    def layers(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in ("left", "inner", "right", "flat")}


def looked(model: Net, xs: list[Tensor], keep: list[Tensor] | None = None, **more: Any) -> dict[str, Tensor]:
    batches = [{"x": x} | ({} if keep is None else {"keep": keep[i]}) for i, x in enumerate(xs)]
    data = Data(lambda: iter(batches), lambda batch: model(batch["x"]), lambda batch: batch.get("keep"))
    settings: dict[str, Any] = {"count": 6, "budget": 12, "tau": 0.99, "noise": noise} | more
    return directions(model, settings.pop("layers", model.layers()), data, **settings)


def test_shared_inputs_are_seen_once_and_the_model_stays_as_it_is(monkeypatch: Any) -> None:
    adds: list[int] = []
    before_it: list[weakref.ref[Tensor]] = []
    add = Directions.add

    def noting(self: Directions, X: Tensor) -> None:
        assert all(gone() is None for gone in before_it), "one input at a time"
        before_it.append(weakref.ref(X))
        adds.append(len(X))
        add(self, X)

    monkeypatch.setattr(Directions, "add", noting)
    model = Net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    X = rows(40).view(4, 10, N)
    found = looked(model, [X])
    assert adds == [40] * 3, "left and right are one"
    whole = fitted([X.flatten(0, 1)], 6)
    assert {path: len(V) for path, V in found.items()}.pop("flat") == 1, "its input has one direction"
    assert sum(map(len, found.values())) == 12
    for path in ("left", "right"):
        assert torch.equal(found[path], whole.V[: len(found[path])])
    torch.testing.assert_close(found["inner"], fitted([X.flatten(0, 1).tanh()], 6).V[: len(found["inner"])])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_only_tokens_that_count_are_seen_and_batches_without_any_do_not_run() -> None:
    X = rows(40).view(4, 10, N)
    keep = torch.rand(4, 10, generator=noise()) < 0.7
    model = Net()
    masked = looked(model, [X + 100, X], [torch.zeros(4, 10, dtype=torch.bool), keep])
    assert len(model.seen) == 2, "once to see which inputs are the same, and once for the one batch"
    cut = looked(Net(), [X[keep]])
    assert all(torch.equal(masked[path], cut[path]) for path in cut)


def test_layers_are_left_alone_once_their_directions_are_steady() -> None:
    model = Net()
    found = looked(model, [rows(50, seed) for seed in range(60)])
    seen = model.seen[1:]
    assert seen[:2] == [11, 11]
    assert 1 in seen, "the input with one direction is done first"
    assert len(seen) < 60, "and all before the data end"
    assert sum(map(len, found.values())) == 12


def test_compiled_models_are_looked_at_too() -> None:
    X = [rows(20, seed) for seed in range(2)]
    compiled = Net()
    compiled.compile(backend="eager")
    compiled(X[0])
    found, plain = looked(compiled, X), looked(Net(), X)
    assert all(torch.equal(found[path], plain[path]) for path in plain)


def test_what_cannot_be_looked_at_is_refused() -> None:
    model, X = Net(), rows(40).view(4, 10, N)
    none = torch.zeros(4, 10, dtype=torch.bool)
    cases: list[tuple[Any, str]] = [
        (lambda: looked(model, []), "no data to begin from"),
        (lambda: looked(model, [X], [none]), "no token of it is a label"),
        (lambda: looked(model, [X[:1, :6]]), "6 directions cannot be told from 6 tokens"),
        (lambda: looked(model, [X], [none[:, :9].logical_not()]), r"left sees an input of \[4, 10, 12\], which is not"),
        (lambda: looked(model, [X * float("nan")]), "the loss on the data to begin from is nan"),
        (lambda: looked(model, [X], layers={"unused": model.unused}), "unused does not run on the data"),
    ]
    for case, message in cases:
        with pytest.raises(InputError, match=message):
            case()
        assert not any(module._forward_pre_hooks for module in model.modules())
