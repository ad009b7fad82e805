"""The gradient noise scale: unbiased parts, a known scale found again, and a run that does not notice the probe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fallline import checkpoint
from fallline.drivers.setting import build
from fallline.errors import InputError
from fallline.noise import rng
from fallline.probes.gradient_noise_scale import GradientNoiseScale, estimates
from fallline.recipe import Recipe
from fallline.step import Run, take_step
from fallline.tokens import per_example, token_losses


def make(corpus: Path, probes: str, *overrides: str) -> Run:
    return build(
        Recipe.parse(
            "model: {name: llama, preset: tiny}\nestimator: per-example\n"
            f"data: {{name: text, path: {corpus}, length: 16, vocab: 320, validation: 0.2}}\n"
            f"optimizer: adamw\nschedule: constant\nsteps: 4\nbatch: 4\nprobes: {probes}\n",
            *overrides,
        )
    ).run


def reference(gradients: Tensor) -> tuple[float, float]:
    """tr Σ and |G|² from gradients [B, P]: the sample covariance, and the mean product of two different ones."""
    products = gradients @ gradients.t()
    many = len(gradients)
    apart = (products.sum() - products.trace()) / (many * (many - 1))
    return gradients.var(0, correction=1).sum().item(), apart.item()


def test_the_parts_are_covariance_and_product_of_different_examples() -> None:
    noise = rng(0, 0, "test")
    gradients = torch.randn(6, 50, generator=noise, dtype=torch.float64) + 0.3
    trace, square = estimates(gradients.norm(dim=1), gradients.mean(0).norm())
    assert (trace.item(), square.item()) == pytest.approx(reference(gradients), rel=1e-12)


def test_a_known_scale_is_found_from_batches_below_it() -> None:
    noise, probe = rng(0, 0, "test"), GradientNoiseScale(decay=0.999)
    mean = torch.full((200,), 200**-0.5, dtype=torch.float64)  # |G|² = 1; each of 200 coordinates has variance 0.2
    for _ in range(2000):
        gradients = mean + 0.2**0.5 * torch.randn(8, 200, generator=noise, dtype=torch.float64)
        probe.after_step(
            None,  # type: ignore[arg-type]
            {"example_grad_norm": gradients.norm(dim=1), "grad_norm": gradients.mean(0).norm()},
        )
    found = probe.metrics()
    assert found["gradient_variance"] == pytest.approx(40, rel=0.02)
    assert found["gradient_square"] == pytest.approx(1, rel=0.1)
    assert found["gradient_noise_scale"] == pytest.approx(40, rel=0.1)


def test_too_few_examples_change_nothing_and_pure_noise_has_no_scale() -> None:
    probe = GradientNoiseScale(decay=0.9)
    one = torch.ones(1)
    for norms in (one[:0], one):
        probe.after_step(None, {"example_grad_norm": norms, "grad_norm": one[0]})  # type: ignore[arg-type]
    assert probe.metrics() == {}
    probe.after_step(None, {"example_grad_norm": torch.ones(2), "grad_norm": torch.zeros(())})  # type: ignore[arg-type]
    found = probe.metrics()
    assert found == pytest.approx({"gradient_variance": 2, "gradient_square": -1})


def test_a_run_reports_its_gradients_and_does_not_change(corpus: Path) -> None:
    plain, probed = make(corpus, "[]"), make(corpus, "[gradient-noise-scale]")
    draw = probed.sampler.draw(0, rng(probed.seed, 0, "draw"))
    batch = probed.source(draw, rng(probed.seed, 0, "noise")) | {"example_id": draw.ids, "weight": draw.weight}
    rows = per_example(token_losses(probed.model, batch), batch) / probed.objective.count(batch)["nll"].sum()
    params = [p for p in probed.model.parameters() if p.requires_grad]
    each = [torch.autograd.grad(row * len(rows), params, retain_graph=True) for row in rows]
    expected = reference(torch.stack([torch.cat([g.flatten() for g in one]) for one in each]).double())
    for step in range(4):
        take_step(plain)
        take_step(probed)
        if step == 0:
            found = probed.parts["gradient-noise-scale"].metrics()
            size = expected[0]  # both are differences of squares of about this size
            assert found["gradient_variance"] == pytest.approx(expected[0], rel=1e-4)
            assert found["gradient_square"] == pytest.approx(expected[1], abs=1e-4 * size)
    for (name, a), b in zip(plain.model.named_parameters(), probed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_means_resume(corpus: Path, tmp_path: Path) -> None:
    through, resumed = make(corpus, "[gradient-noise-scale]"), make(corpus, "[gradient-noise-scale]")
    for _ in range(2):
        take_step(through)
    checkpoint.save(tmp_path, through, keep=1)
    saved = checkpoint.latest_good(tmp_path)
    assert saved is not None
    checkpoint.load(saved, resumed)
    for run in (through, resumed):
        for _ in range(2):
            take_step(run)
    one, other = (run.parts["gradient-noise-scale"].metrics() for run in (through, resumed))
    assert one == other
    assert one["gradient_variance"] > 0


def test_a_step_of_one_example_is_warned_about_once(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    several = make(corpus, "[gradient-noise-scale]")
    several.setup()
    take_step(several)
    assert not caplog.records
    one = make(corpus, "[gradient-noise-scale]", "batch=1")
    one.setup()
    for _ in range(2):
        take_step(one)
    assert ["raise 'batch'" in record.message for record in caplog.records] == [True]


def test_draws_of_a_number_left_to_chance_are_refused(corpus: Path) -> None:
    with pytest.raises(InputError, match=r"probe 'gradient-noise-scale' .* take the sampler 'uniform'"):
        make(corpus, "[gradient-noise-scale]", "sampler=poisson")
