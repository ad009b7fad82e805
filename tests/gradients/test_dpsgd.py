"""Private training through the real step, against one backward an example in float64."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import MISSING, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fallline import catalog, checkpoint
from fallline.adapters import attach
from fallline.contracts import Batch, Draw
from fallline.data.poisson import Config as SamplerConfig
from fallline.data.poisson import Poisson
from fallline.data.poisson import build as build_sampler
from fallline.errors import InputError
from fallline.gradients.dpsgd import Config, build, check_examples, weights
from fallline.objectives import causal
from fallline.step import Run, take_step
from launcher import Launcher

WORDS, LENGTH, N, BATCH = 40, 12, 30, 8
MODES = ("flat", "automatic", "per-layer", "per-layer-normalised")
IDS = [2, 3, 5, 11, 17, 20, 21]


class Lines:
    """Examples of 2 to 11 labels, so that their gradients are of several sizes."""

    rows, unit = None, "line"

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(5)
        self.ids = torch.randint(WORDS, (N, LENGTH), generator=g)
        self.labels = self.ids.roll(-1, 1)
        self.labels[:, -1] = -100
        for i in range(N):
            self.labels[i, 2 + i % (LENGTH - 2) :] = -100

    def __len__(self) -> int:
        return N

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        return {"input_ids": self.ids[draw.ids], "labels": self.labels[draw.ids]}


class Fixed:
    """A sampler that says it draws by chance, and always draws the same."""

    rate = BATCH / N

    def __init__(self, ids: list[int], weight: float = 1.0) -> None:
        self.ids = torch.tensor(ids, dtype=torch.long)
        self.weight = weight

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        return Draw(self.ids, torch.full((len(self.ids),), self.weight), size=BATCH)


def llama(dtype: torch.dtype = torch.float64, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def make(
    *, model: nn.Module | None = None, sampler: Any = None, optimizer: str = "sgd", micro: int = 16, **words: Any
) -> Run:
    options = {k: words.pop(k) for k in ("noise", "epsilon", "clipping", "max_norm", "delta", "seed") if k in words}
    model = llama() if model is None else model
    module = catalog.find("optimizer", optimizer).load()
    needed = {f.name: 0.5 for f in fields(module.Config) if f.default is MISSING}
    made = module.build(module.Config(**needed), model, seed=0)
    defaults: dict[str, Any] = {
        "objective": causal.build(causal.Config()),
        "source": Lines(),
        "schedule": torch.optim.lr_scheduler.ConstantLR(made, 1.0),
        "steps": 5,
    }
    if "epsilon" not in options:
        options = {"noise": 0.0} | options
    estimator = build(Config(**({"seed": 3} | options)))
    return Run(
        model=model,
        sampler=sampler or Fixed(IDS),
        estimator=estimator,
        optimizer=made,
        micro=micro,
        **(defaults | words),
    )


def gradients(run: Run) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in run.trainable().items() if p.grad is not None}


def one_at_a_time(run: Run, ids: list[int]) -> list[dict[str, Tensor]]:
    """Each example's gradient of the sum of its own negative log-likelihoods, by a plain forward and backward."""
    found = []
    for i in ids:
        run.model.zero_grad()
        logits = run.model(run.source.ids[[i]]).logits[0]
        labels = run.source.labels[i]
        nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").backward()
        found.append(gradients(run))
    run.model.zero_grad()
    return found


def clipped(gs: list[dict[str, Tensor]], C: float, clipping: str) -> list[dict[str, Tensor]]:
    """Each example's part of the sum, as the equations have it."""
    norms = [{name: float(g.norm()) for name, g in example.items()} for example in gs]
    out = []
    for example, norm in zip(gs, norms, strict=True):
        whole, limit = math.hypot(*norm.values()), C / math.sqrt(len(norm))
        c = {
            "flat": lambda n, w=whole: min(1.0, C / w),
            "automatic": lambda n, w=whole: C / (w + 0.01),
            "per-layer": lambda n, li=limit: min(1.0, li / n),
            "per-layer-normalised": lambda n, li=limit: li / n,
        }[clipping]
        out.append({name: c(norm[name]) * g for name, g in example.items()})
    return out


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=rtol * (b[name].abs().max().item() + 1e-12))


@pytest.mark.parametrize("clipping", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_equations(clipping: str, tied: bool) -> None:
    C = 12.0
    run = make(model=llama(tied=tied), clipping=clipping, max_norm=C)
    gs = one_at_a_time(run, IDS)
    parts = clipped(gs, C, clipping)
    if clipping in ("flat", "per-layer"):
        pairs = [
            (p, g) for part, g in zip(parts, gs, strict=True) for p, g in zip(part.values(), g.values(), strict=True)
        ]
        fired = [not torch.equal(p, g) for p, g in pairs]
        assert 0 < sum(fired) < len(fired), "both kinds are there"
    for part in parts:
        assert math.hypot(*(float(g.norm()) for g in part.values())) <= C * (1 + 1e-12)
    take_step(run)
    expected = {name: sum((part[name] for part in parts), torch.zeros(())) / BATCH for name in parts[0]}
    assert_close(gradients(run), expected)


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_without_noise_and_limit_it_is_plain_descent(clipping: str) -> None:
    private = make(clipping=clipping, max_norm=1e9)
    plain = make()
    plain.estimator = catalog.find("estimator", "backprop").load().build(None)
    for run in (private, plain):
        losses = [take_step(run)["loss"] for _ in range(3)]
        assert losses[2] < losses[0]
    assert_close(dict(private.model.named_parameters()), dict(plain.model.named_parameters()))


@pytest.mark.parametrize("clipping", MODES)
def test_micro_batches_change_nothing(clipping: str) -> None:
    runs = [make(clipping=clipping, noise=0.7, micro=micro) for micro in (16, 3, 1)]
    for run in runs:
        take_step(run)
    for run in runs[1:]:
        assert_close(gradients(run), gradients(runs[0]))


def test_clipping_is_to_the_limit() -> None:
    norm = torch.tensor([0.0, 0.5, 2.0, 8.0])
    assert (weights(norm, 2.0, "flat") * norm).tolist() == [0.0, 0.5, 2.0, 2.0]
    assert weights(norm, 2.0, "flat")[0] == 1
    for mode in ("automatic", "per-layer-normalised"):
        moved = weights(norm, 2.0, mode) * norm
        assert moved[0] == 0
        assert bool((moved <= 2.0).all())
        assert bool((moved[1:] > 1.9).all())


def test_noise_has_its_size_and_is_drawn_anew() -> None:
    """An empty draw gives noise alone. Chi-square and correlations, five standard deviations wide."""
    z, C = 0.8, 3.0
    run = make(model=llama(torch.float32), sampler=Fixed([]), noise=z, max_norm=C)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    steps = []
    for _ in range(2):
        assert take_step(run)["loss"].item() == 0
        steps.append({name: g * (BATCH / (z * C)) for name, g in gradients(run).items()})
    assert steps[0].keys() == before.keys()
    assert all(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    first, second = (torch.cat([g.flatten() for g in step.values()]).double() for step in steps)
    n = len(first)
    assert abs(float(first.sum())) < 5 * n**0.5
    assert abs(float(first.square().sum()) - n) < 5 * (2 * n) ** 0.5
    assert abs(float(first @ second)) < 5 * n**0.5
    same = [g.flatten() for g in steps[0].values() if g.numel() == 16 * 24]
    assert len(same) >= 4
    for i, a in enumerate(same):
        for b in same[:i]:
            assert abs(float(a @ b)) < 5 * len(a) ** 0.5


def test_the_noise_is_added_once_and_known_to_the_seed_only() -> None:
    with_noise, without = make(noise=0.5, micro=2), make(micro=2)
    same, other = make(noise=0.5, micro=2), make(noise=0.5, micro=2, seed=None)
    for run in (with_noise, without, same, other):
        take_step(run)
    z = {name: (g - gradients(without)[name]) * BATCH / 0.5 for name, g in gradients(with_noise).items()}
    flat = torch.cat([g.flatten() for g in z.values()])
    assert abs(float(flat.square().sum()) - len(flat)) < 5 * (2 * len(flat)) ** 0.5
    assert_close(gradients(same), gradients(with_noise), 0)
    name = "model.norm.weight"
    assert not torch.allclose(gradients(other)[name], gradients(with_noise)[name])


@pytest.mark.parametrize("optimizer", sorted(i for k, i in catalog.entries() if k == "optimizer"))
@pytest.mark.parametrize("adapted", [False, True])
def test_any_optimizer_and_an_adapter(optimizer: str, adapted: bool) -> None:
    model = llama(torch.float32)
    if adapted:
        attach(model, "lora", rank=2)
    run = make(model=model, optimizer=optimizer, noise=1.0, sampler=Poisson(N, BATCH, 4, False), clip=1.0)
    before = {name: p.detach().clone() for name, p in run.trainable().items()}
    for _ in range(2):
        take_step(run)
    assert all(not torch.equal(p, before[name]) for name, p in run.trainable().items())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert bool(frozen) == adapted


def test_the_record() -> None:
    run = make(noise=1.0, clipping="automatic", max_norm=2.0)
    found = run.estimator.record()["privacy"]
    assert found.pop("accountant").startswith("PLD, dp-accounting")
    assert 1 < found.pop("epsilon") < 4
    assert found == {
        "unit": "line",
        "neighbouring": "add or remove one",
        "delta": 1 / (2 * N),
        "noise_multiplier": 1.0,
        "sampling_rate": BATCH / N,
        "steps": 5,
        "max_norm": 2.0,
        "clipping": "automatic",
        "randomness": "known from the recipe",
    }
    assert make(noise=0.0).estimator.record()["privacy"]["epsilon"] is None


def test_noise_is_calibrated_for_all_steps() -> None:
    sampler = Fixed(IDS)
    sampler.rate = 1.0
    found = make(epsilon=3.0, sampler=sampler, delta=1e-3).estimator.record()["privacy"]
    assert 2.99 < found["epsilon"] <= 3.0
    assert found["noise_multiplier"] > 1


class Coupled(causal.Causal):
    couples = "batch"


class Curious(Fixed):
    reads = frozenset({"grad_norm", "example_loss"})

    def observe(self, run: Run, signals: Any) -> None: ...


class Pieces(Lines):
    unit = ""


def uniform() -> Fixed:
    sampler = Fixed(IDS)
    sampler.rate = None  # type: ignore[assignment]
    return sampler


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sampler": uniform}, "take the sampler 'poisson'"),
        ({"source": Pieces}, "several may be of one document"),
        ({"objective": Coupled}, "couples examples"),
        ({"sampler": lambda: Curious(IDS)}, "acts on the signal 'example_loss'"),
        ({"model": lambda: llama(torch.bfloat16)}, "needs float32 parameters, 'model.embed_tokens.weight' is bfloat16"),
        ({"steps": lambda: None}, "for how many steps"),
        ({"delta": lambda: 1 / N}, "'delta' must be below 1 / 30"),
    ],
)
def test_refused_before_the_first_step(words: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make(**{name: value() for name, value in words.items()})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"epsilon": 1.0, "noise": 1.0}])
def test_one_of_epsilon_and_noise(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="give one of 'epsilon' and 'noise'"):
        Config(**options)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [(lambda: Fixed([1, 2, 1]), "more than once"), (lambda: Fixed([1, 2], 2.0), "weights must be 1")],
)
def test_a_draw_that_moves_the_sum_further_is_refused(sampler: Any, message: str) -> None:
    run = make(sampler=sampler(), micro=1)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(InputError, match=message):
        take_step(run)
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_examples_that_share_a_row_are_refused() -> None:
    batch = {"example_id": torch.arange(2), "weight": torch.ones(2), "segment": torch.tensor([[0, 0, 1, 1]])}
    with pytest.raises(InputError, match="share a row"):
        check_examples([batch])
    check_examples([batch | {"segment": torch.tensor([[0, 0], [1, 1]])}])


class Back:
    """Rewinds the run after its third step."""

    reads: frozenset[str] = frozenset()

    def after_step(self, run: Run, signals: Any) -> tuple[()]:
        if run.step == 0:
            run.mark("start")
        if run.step == 2:
            run.rewind("start")
        return ()


def test_a_step_is_not_given_out_twice_nor_one_that_was_not_counted() -> None:
    run = make(noise=1.0, parts={"back": Back()})
    for _ in range(3):
        take_step(run)
    with pytest.raises(InputError, match="cannot go back or on"):
        take_step(run)
    run = make(noise=1.0, steps=1)
    take_step(run)
    with pytest.raises(InputError, match="steps 0 to 0 were counted"):
        take_step(run)


def private() -> Run:
    """Its secrets are drawn anew by each process."""
    sampler = build_sampler(SamplerConfig(), Lines(), BATCH, seed=0)
    return make(noise=0.5, seed=None, sampler=sampler, micro=3, clipping="per-layer", max_norm=12.0)


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    run = private()
    losses = [take_step(run)["loss"] for _ in range(3)]
    torch.save({"losses": losses, "gradients": gradients(run), "state": run.state_dict()}, f"{folder}/rank{rank}")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.start_processes(work, args=(2, str(tmp_path)), nprocs=2, start_method="forkserver")
    one, two = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    for name, g in one["gradients"].items():
        assert torch.equal(two["gradients"][name], g)
    assert one["state"]["sampler"] == two["state"]["sampler"]
    assert one["state"]["estimator"] == two["state"]["estimator"]
    run = private()
    for word in ("sampler", "estimator"):
        getattr(run, word).load_state_dict(one["state"][word] | {"last": -1})
    for loss in one["losses"]:
        torch.testing.assert_close(take_step(run)["loss"], loss)
    assert_close(gradients(run), one["gradients"])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    lines = [{"prompt": f"What is {i} and {i + 1}?", "completion": f" It is {2 * i + 1}."} for i in range(120)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "private.yaml"
    path.write_text(
        "model: {name: llama, preset: tiny}\n"
        f"data: {{name: jsonl, path: {tmp_path / 'lines.jsonl'}, length: 48, vocab: 300}}\n"
        "sampler: poisson\nestimator: {name: dpsgd, noise: 3.0}\n"
        "steps: 4\nbatch: 6\nmicro: 4\nsample: 0\ncheckpoint: {every: 2}\neval: {every: 2, rows: 4}\n"
    )
    return path


def test_killed_and_resumed_it_ends_the_same(fallline: Launcher, recipe: Path, tmp_path: Path) -> None:
    """The secret is in the checkpoint: from it a second run goes the same way as the first."""
    out = tmp_path / "out"
    arguments = ("train", str(recipe), f"out={out}", "--quiet")
    ended = fallline(*arguments)
    assert ended.code == 0, ended.output
    record = json.loads((out / "run.json").read_text())["privacy"]
    assert record["unit"].startswith("line")
    assert record["steps"] == 4
    assert 0 < record["epsilon"] < 10

    def end() -> dict[str, bytes]:
        folder = checkpoint.find(out)[-1].path
        return {
            name: (folder / name).read_bytes()
            for name in ("model/model.safetensors", "state.safetensors", "state.json")
        }

    first = end()
    shutil.rmtree(checkpoint.find(out)[-1].path)
    assert len(checkpoint.find(out)) == 1
    ended = fallline(*arguments, "--resume")
    assert ended.code == 0, ended.output
    assert end() == first


def test_refused_in_one_line_by_the_command(fallline: Launcher, recipe: Path, tmp_path: Path) -> None:
    ended = fallline("train", str(recipe), f"out={tmp_path / 'out'}", "sampler=uniform")
    assert ended.code == 2
    assert "take the sampler 'poisson'" in ended.output
    assert not (tmp_path / "out").exists()
