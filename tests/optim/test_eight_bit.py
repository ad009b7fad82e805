"""Numbers in 8 bits, and transforms that keep their state in them."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fallline.contracts import Change
from fallline.kernels.eight_bit import SLICE, blocks, codebook, dequantise, quantise
from fallline.optim.chain import ChainOptimizer, chain
from fallline.optim.eight_bit import EightBit
from fallline.optim.moments import Adam, Ema, NesterovEma
from fallline.optim.normalise import UnitRms
from fallline.optim.orthogonalise import Orthogonalise
from fallline.optim.transform import Transform

from .parameters import equal, gradient, parameters, tensors, through_disk, train, values
from .rows.rounded import book
from .toy_transforms import NoiseAdaptive

both = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
CPU = torch.device("cpu")


def numbers(*shape: int, signed: bool = True) -> Tensor:
    """Of many sizes, and some zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 5
    x[..., ::7] = 0
    return x if signed else x.abs()


@both
def test_codebook_is_that_of_the_paper(signed: bool):
    c = codebook(signed, CPU, torch.float32)
    assert c[0] == 0
    np.testing.assert_array_equal(c.sort()[0].double().numpy(), book(signed))
    assert len(set(c.tolist())) == 256
    assert c.max() == 1
    assert c.min() == pytest.approx(-0.99297, abs=1e-5) if signed else c.min() == 0
    order = [*range(255, 128, -1), *range(129)] if signed else [*range(256)]
    assert (c[order].diff() > 0).all()


@both
def test_code_is_the_nearest(signed: bool):
    """By brute force: around every midpoint, at all sizes, and at the ends."""
    c = codebook(signed, CPU, torch.float32).double()
    ascending = c.sort()[0].numpy()
    middle = ((ascending[1:] + ascending[:-1]) / 2).astype(np.float32)
    around = (middle.view(np.int32)[:, None] + np.arange(-24, 25, dtype=np.int32)).view(np.float32).ravel()
    spread = 10 ** np.linspace(-46, 0, 20_000).astype(np.float32)
    tiny = np.array([0, 1e-45, 1e-38, 1e-8, 1], np.float32)
    found = np.concatenate([around, spread, tiny, *([-spread, -tiny] if signed else [])])
    x = torch.from_numpy(found[(np.abs(found) <= 1)])
    x = torch.cat([torch.ones(1), x])
    codes, scales = quantise(x[None], signed, block=len(x))
    assert scales.tolist() == [[1.0]]
    distance = (x.double()[:, None] - c).abs()
    if not signed:
        distance[x > 0, 0] = 2
    least = distance.amin(1, keepdim=True)
    assert torch.equal(distance.gather(1, codes[0].long()[:, None]), least)
    ties = (distance == least).sum(1) > 1
    assert ties.sum() > 50
    assert (c[codes[0].long()].abs() > x.abs())[ties].all()


@both
def test_error_is_at_most_half_a_gap(signed: bool):
    """But a whole one below the least, which without sign is not rounded to zero, and at the end that has no −1."""
    x = numbers(60, 250, signed=signed)
    codes, scales = quantise(x, signed)
    found = dequantise(codes, scales, signed)
    y, rounded = ((t / scales).double() for t in (x, found))
    ascending = torch.from_numpy(book(signed))
    above = torch.searchsorted(ascending, y).clamp(1, 255)
    gap = ascending[above] - ascending[above - 1]
    whole = (y < ascending[0]) if signed else (above == 1)
    assert ((y - rounded).abs() <= gap * torch.where(whole, 1, 0.5) + 1e-7).all()
    assert not found[x == 0].any()


def test_blocks_are_of_one_row_and_the_last_may_be_short():
    x = numbers(5, 700)
    codes, scales = quantise(x, True)
    assert scales.shape == (5, 3)
    parts = [quantise(part, True, block=part.shape[1]) for part in x.split(256, dim=1)]
    assert torch.equal(codes, torch.cat([c for c, _ in parts], 1))
    assert torch.equal(scales, torch.cat([s for _, s in parts], 1))


@both
def test_largest_is_exact_and_rounding_twice_is_rounding_once(signed: bool):
    x = numbers(40, 600, signed=signed)
    codes, scales = quantise(x, signed)
    once = dequantise(codes, scales, signed)
    for (part, scale), (rounded, _) in zip(blocks(x, scales, 256), blocks(once, scales, 256), strict=True):
        place = part.abs().argmax(-1, keepdim=True)
        assert torch.equal(part.gather(-1, place), rounded.gather(-1, place))
        assert torch.equal(part.gather(-1, place), scale)
    assert not signed or (scales < 0).any()
    again = quantise(once, signed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_in_slices_as_row_by_row():
    x = numbers(3 * SLICE // 1000, 1000)
    whole = quantise(x, True)
    assert torch.equal(whole[0], torch.cat([quantise(row[None], True)[0] for row in x]))
    assert torch.equal(dequantise(*whole, True), torch.cat([dequantise(*quantise(row[None], True), True) for row in x]))


def test_zeros_have_code_and_scale_zero_and_nan_stays_in_its_block():
    assert not any(t.any() for signed in (True, False) for t in quantise(torch.zeros(3, 300), signed))
    x = numbers(2, 600)
    x[0, 300], x[1, 599] = float("nan"), float("inf")
    for signed in (True, False):
        found = dequantise(*quantise(x if signed else x.abs(), signed), signed)
        assert found[0, 256:512].isnan().all()
        assert found[0, :256].isfinite().all()
        assert found[0, 512:].isfinite().all()
        assert found[1, :512].isfinite().all()
        assert not found[1, 599].isfinite()


@pytest.mark.peer
@both
def test_codes_are_those_of_torchao(signed: bool):
    """But for ties, for blocks whose largest is negative, and for what without sign it rounds to zero."""
    peer = import_module("torchao.optim.quant_utils")
    qmap = torch.tensor(peer.create_dynamic_map(signed))
    torch.testing.assert_close(qmap, codebook(signed, CPU, torch.float32).sort()[0], rtol=2e-7, atol=0)
    x = numbers(200, 512, signed=signed)
    codes, scales = quantise(x, signed)
    flipped = scales.sign().repeat_interleave(256, 1)
    scaled, theirs = peer.scale_tensor(x * flipped, 256)
    torch.testing.assert_close(theirs.view_as(scales), scales.abs(), rtol=0, atol=0)
    expected = qmap[peer.quantize_8bit_with_qmap(scaled, qmap).long()]
    mine = codebook(signed, CPU, torch.float32)[codes.long()]
    apart = (mine - expected).abs() > 1e-6 * mine.abs()
    if not signed:
        lifted = (expected == 0) & (x > 0)
        assert lifted.sum() > 1000
        assert (codes[lifted] == 1).all()
        apart &= ~lifted
    assert apart.float().mean() < 1e-4


def optimizer(
    *transforms: Transform, shape: tuple[int, ...] = (24, 600), dtype: torch.dtype = torch.float32
) -> tuple[nn.Parameter, ChainOptimizer]:
    p = nn.Parameter(gradient(99, "a", shape).to(dtype))
    return p, chain(*transforms)({"a.weight": (p, "matrix")}, lr=0.01, weight_decay=0.1)


def go(p: nn.Parameter, found: ChainOptimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        p.grad = gradient(step, "a.weight", tuple(p.shape)).to(p.dtype)
        found.step()


def state_of(found: ChainOptimizer) -> dict[str, Tensor]:
    return tensors(found.state_dict()["state"]["a.weight"])


@pytest.mark.parametrize(
    ("average", "last"),
    [(NesterovEma(0.95), Orthogonalise("newton-schulz", 5, "match-rms")), (Ema(0.9), UnitRms("row"))],
    ids=["muon", "scale's head"],
)
def test_other_averages_in_8_bits(average: Ema, last: Transform):
    p, exact = optimizer(average, last)
    q, rounded = optimizer(EightBit(average), last)
    start = p.detach().clone()
    go(p, exact, 0, 12)
    go(q, rounded, 0, 12)
    assert 0 < (p - q).norm() < 0.05 * (p - start).norm()
    kept = state_of(rounded)
    assert sum(t.numel() * t.element_size() for t in kept.values()) == 24 * 600 + 4 * 24 * 3
    assert kept["/eightbit/average/codes"].shape == p.shape


def test_what_is_small_or_a_vector_stays_as_it_is():
    for shape in ((4096,), (63, 65), (64, 63)):
        p, found = optimizer(EightBit(Adam((0.9, 0.95), 1e-8)), shape=shape)
        go(p, found, 0, 2)
        assert [t.dtype for t in state_of(found).values()] == [torch.float32] * 2
    p, found = optimizer(EightBit(Adam((0.9, 0.95), 1e-8)), shape=(8, 8, 64))
    go(p, found, 0, 2)
    kept = state_of(found)
    assert kept["/eightbit/exp_avg/codes"].shape == (8, 8, 64)
    assert kept["/eightbit/exp_avg_sq/scales"].shape == (8, 2)


@pytest.mark.parametrize("smallest", [1, 10**9], ids=["", "nothing rounded"])
def test_a_transform_that_measures(smallest: int):
    """Over a group, and writes its state as it does; with nothing rounded, it is as if it were not there."""
    found = []
    for make in (lambda t: t, lambda t: EightBit(t, smallest=smallest)):
        params = {name: (p, role) for name, (p, role) in parameters().items() if p.ndim > 1}
        train(chain(make(NoiseAdaptive(0.1, 0.9)), Ema(0.9))(params, lr=0.1), params, 0, 6)
        found.append(values(params))
    assert equal(*found) == (smallest > 1)
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0.1, atol=0.1)


def test_growth_keeps_codes_of_rows_and_numbers_of_columns():
    p, found = optimizer(EightBit(Adam((0.9, 0.95), 1e-8)))
    go(p, found, 0, 4)
    before = {key: value.clone() for key, value in state_of(found).items()}
    assert (before["/eightbit/exp_avg/scales"] < 0).any()
    taller = nn.Parameter(torch.zeros(30, 600))
    found.remap([Change("a.weight", p, taller)])
    for key, value in state_of(found).items():
        assert torch.equal(value[:24], before[key])
        assert not value[24:].any()
    wider = nn.Parameter(torch.zeros(30, 700))
    found.remap([Change("a.weight", taller, wider)])
    after = state_of(found)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        old, new = (
            dequantise(s[f"/eightbit/{name}/codes"], s[f"/eightbit/{name}/scales"], signed) for s in (before, after)
        )
        assert torch.equal(new[:24, :512], old[:, :512])
        torch.testing.assert_close(new[:24, 512:600], old[:, 512:])
        assert not new[:, 600:].any()
    go(wider, found, 4, 6)
    assert wider.isfinite().all()


def test_growth_over_the_least_size_begins_to_round():
    p, found = optimizer(EightBit(Ema(0.9)), shape=(60, 60))
    go(p, found, 0, 3)
    before = state_of(found)["/eightbit/average"].clone()
    q = nn.Parameter(torch.zeros(70, 60))
    found.remap([Change("a.weight", p, q)])
    kept = state_of(found)
    after = dequantise(kept["/eightbit/average/codes"], kept["/eightbit/average/scales"], True)
    assert 0 < (after[:60] - before).abs().max() < 0.0075 * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_resumed_is_bit_equal(dtype: torch.dtype):
    rule = chain(EightBit(Adam((0.9, 0.95), 1e-8)))
    p, whole = optimizer(*rule.transforms, dtype=dtype)
    go(p, whole, 0, 7)
    q, parts = optimizer(*rule.transforms, dtype=dtype)
    go(q, parts, 0, 3)
    saved = through_disk(parts.state_dict())
    again = rule({"a.weight": (q, "matrix")}, lr=0.01, weight_decay=0.1)
    again.load_state_dict(saved)
    go(q, again, 3, 7)
    assert torch.equal(p, q)
    assert equal(state_of(again), state_of(whole))
