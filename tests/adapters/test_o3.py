"""O3: the penalty, the detector against scikit-learn and NumPy, the gate on a model, and requests in sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance, LedoitWolf
from sklearn.svm import OneClassSVM
from transformers import AutoModelForCausalLM

from fallline import adapters
from fallline.adapters.gated import Gating
from fallline.adapters.layers import adapted
from fallline.adapters.o3 import overlap, prompts, prompts_of
from fallline.adapters.o3_gate import FILE, Gate, Request, fit, weight
from fallline.contracts import FORGET
from fallline.drivers.export import export
from fallline.drivers.score import score
from fallline.drivers.setting import build
from fallline.drivers.train import train
from fallline.drivers.trained import open_trained
from fallline.errors import InputError
from fallline.generate import generate
from fallline.noise import rng
from fallline.recipe import Recipe
from fallline.step import take_step

from .models import gpt2, llama, logits, stop_at, tokens

STEPS = 4
EASY = ("What is {} plus {}?", "Who has {} of the {} horses?")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    for number, asked in enumerate(EASY):
        lines = [{"prompt": asked.format(i, i % 7), "completion": f" It is {i + i % 7}."} for i in range(20)]
        (folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "refusals.txt").write_text("No idea.\n")
    return folder


def recipe(base: Path, files: Path, out: Path, request: int, *earlier: Path, more: str = "") -> Recipe:
    return Recipe.parse(
        f"model: {base}\n"
        f"adapter: {{name: o3, rank: 4, earlier: [{', '.join(map(str, earlier))}]{more}}}\n"
        f"data: {{name: unlearning, forget: {files}/{request}.jsonl, refusals: {files}/refusals.txt, length: 96}}\n"
        "objective: {name: idk, retain: 0}\noptimizer: {name: adamw, lr: 2e-2}\n"
        f"steps: {STEPS}\nbatch: 4\nmicro: 2\nsample: 0\nout: {out}\neval: {{every: 9}}\n"
        "checkpoint: {every: 2, keep: 9}\n"
    )


@pytest.fixture(scope="module")
def runs(base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two requests, the second after the first."""
    folder = tmp_path_factory.mktemp("o3")
    found: list[Path] = []
    for request in range(2):
        train(recipe(base, files, folder / str(request), request, *found), progress=None)
        found.append(folder / str(request))
    return found


def gating(model: Any) -> Gating:
    method: Any = next(iter(adapted(model).values())).methods["default"]
    return method.gating


def test_the_penalty_is_zero_just_where_row_spaces_are_orthogonal() -> None:
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.float64)).Q
    mix = torch.randn(3, 3, generator=g, dtype=torch.float64)
    A, apart, meets = mix @ Q[:3], mix @ Q[3:6], mix @ Q[2:5]
    assert overlap(A, torch.stack([apart, Q[6:9]])) < 1e-24
    both = torch.stack([apart, meets])
    wanted = sum(((E.numpy() @ A.numpy().T) ** 2).sum() for E in both)
    assert wanted > 0.01
    assert overlap(A, both).item() == pytest.approx(wanted, rel=1e-12)


def test_a_step_adds_the_penalty_to_the_loss_and_to_the_first_factors_gradients_alone(
    base: Path, files: Path, runs: list[Path], tmp_path: Path
) -> None:
    found = []
    for strength, checkpointing in ((0.0, False), (3.0, False), (3.0, True)):
        more = f", dropout: 0, orthogonal: {strength}"
        made = recipe(base, files, tmp_path / "a", 1, runs[0], more=more).to_yaml()
        run = build(Recipe.parse(made, f"model.checkpointing={checkpointing}".lower())).run
        layers = adapted(run.model)
        before = {path: layer.adapters["default"].lora_A.detach().clone() for path, layer in layers.items()}
        signals = take_step(run)
        found.append((run, signals["loss"].double(), before))
    (plain, loss, _), (run, more_loss, before), (again, _, _) = found
    first = {path: layer.adapters["default"] for path, layer in adapted(plain.model).items()}
    second = {path: layer.adapters["default"] for path, layer in adapted(run.model).items()}
    L, number = 0.0, len(second)
    for path, P in second.items():
        A, E = before[path].double().numpy(), P.earlier[0].double().numpy()
        np.testing.assert_array_equal(A, E)  # it goes on from the run before
        L += ((E @ A.T) ** 2).sum() / number
        assert torch.equal(P.lora_B.grad, first[path].lora_B.grad)
        slope = torch.from_numpy(3.0 * 2 / number * A @ E.T @ E).float()
        torch.testing.assert_close(P.lora_A.grad - first[path].lora_A.grad, slope, rtol=1e-3, atol=1e-6)
    assert L > 0.01
    assert (more_loss - loss).item() == pytest.approx(3.0 * L, rel=1e-4)
    for path, P in second.items():
        assert torch.equal(P.earlier[0], before[path]), "frozen"
        other = adapted(again.model)[path].adapters["default"].lora_A.grad
        torch.testing.assert_close(P.lora_A.grad, other, rtol=1e-4, atol=1e-6)


def test_only_a_run_on_what_to_forget_can_have_it(base: Path, files: Path, corpus: Path, runs: list[Path]) -> None:
    with pytest.raises(InputError, match=r"'o3' learns from what a run is to forget .* use a recipe"):
        adapters.attach(llama(), "o3")
    text = f"data: {{name: text, path: {corpus}, length: 32}}\nobjective: causal\n"
    with pytest.raises(InputError, match="'o3' is for what is to be forgotten"):
        build(Recipe.parse(f"model: {base}\nadapter: o3\n{text}steps: 1\n"))
    for wrong, message in (
        (", alpha: 3", "trained with lora_alpha 16.0, this one has 3.0"),
        (", targets: [q_proj, lm_head]", "lm_head has no adapter"),
    ):
        other = recipe(base, files, files / "x", 1, runs[0], more=wrong)
        with pytest.raises(InputError, match=message):
            build(other)
    with pytest.raises(InputError, match="knows 2 requests; name all"):
        build(recipe(base, files, files / "x", 1, runs[1]))


@pytest.mark.parametrize("number", [60, 12])
def test_the_scores_are_those_of_scikit_learn(number: int) -> None:
    """n > d and n < d; the empirical precision is that of no shrinkage."""
    noise = np.random.default_rng(0)
    mixed = noise.normal(size=(2, 20, 20))
    z = np.stack([noise.normal(size=(number, 20)) @ m + 2 for m in mixed])
    x = np.stack([noise.normal(size=(5, 20)) @ m + 2 for m in mixed])
    request = fit(torch.from_numpy(z), seed=3)
    order = torch.randperm(number, generator=rng(3, 0, "adapter/gate")).numpy()
    apart, kept = z[:, order[: number // 5]], z[:, order[number // 5 :]]
    np.testing.assert_array_equal(request.z.numpy(), kept)

    def features(of: Any, at: np.ndarray) -> np.ndarray:
        columns = []
        for j in range(2):
            model = of().fit(kept[j])
            far = model.mahalanobis(at[j])
            unit = [t / np.linalg.norm(t, axis=1, keepdims=True) for t in (at[j], kept[j])]
            columns.append(-far / 2 - 1000 * (unit[0] @ unit[1].T).max(1))
        return np.stack(columns, 1)

    np.testing.assert_allclose(request.features(torch.from_numpy(x)).numpy(), features(LedoitWolf, x), rtol=1e-9)
    if number > 20:
        empirical = Request(request.z, torch.zeros(2, dtype=torch.float64), request.direction, request.scores)
        wanted = features(EmpiricalCovariance, x)
        np.testing.assert_allclose(empirical.features(torch.from_numpy(x)).numpy(), wanted, rtol=1e-7)
    svm = OneClassSVM(kernel="linear", nu=0.1).fit(features(LedoitWolf, kept))
    s, s_apart, s_x = (svm.score_samples(features(LedoitWolf, at)) for at in (kept, apart, x))
    scale = np.abs(s).max()
    ours = request.features(torch.from_numpy(x)) @ request.direction
    np.testing.assert_allclose(ours.numpy(), s_x, atol=1e-6 * scale)
    np.testing.assert_allclose(request.scores.numpy(), [s.mean(), s_apart.mean(), s_apart.std()], atol=1e-6 * scale)


def test_the_weight_is_the_equation() -> None:
    from scipy.stats import norm

    m1, m2, sd = 1.0, 3.0, 0.7
    s = np.concatenate([np.linspace(-4, 8, 200), [m1, m2, 2.0, 1e6, -1e6]])

    def cdf(x: float) -> float:
        return (norm.cdf(x, m1, sd) + norm.cdf(x, m2, sd)) / 2

    wanted = []
    for x in s:
        a, b = cdf(x), cdf(4.0 - x)
        w = 1 / (1 + np.exp(-(10 * (1 - max(a, b) + min(a, b)) - 2)))
        wanted.append(w if w > 0.3 else 0.0)
    found = weight(torch.from_numpy(s), m1, m2, sd).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert found[-1] == found[-2] == 0 < 0.99 < found[-3]
    assert found.min() == 0
    assert found.max() < 1


class Told:
    """A gate that says what it is told, and what it was shown."""

    def __init__(self, *weights: float) -> None:
        self.told = torch.tensor(weights, dtype=torch.float64)
        self.seen: list[torch.Tensor] = []

    def weights(self, z: torch.Tensor) -> torch.Tensor:
        self.seen.append(z)
        return self.told


def lora(make: Any = llama) -> Any:
    model = adapters.attach(make().double(), "lora", rank=4)
    noise = torch.Generator().manual_seed(1)
    for layer in adapted(model).values():
        B = layer.adapters["default"].lora_B
        B.data.copy_(torch.randn(B.shape, generator=noise) / 4)
    return model.eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_each_row_gets_its_weight_and_zero_is_the_base_to_the_bit(make: Any) -> None:
    plain, full, model = logits(make().double()), logits(lora(make)), lora(make)
    gate = Told(0.0, 0.4, 1.0)
    Gating(model, "default", gate)
    found = logits(model)
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[2], full[2], rtol=1e-12, atol=1e-12)
    half = lora(make)
    with adapters.scaled(half, 0.4):
        torch.testing.assert_close(found[1], logits(half)[1], rtol=1e-12, atol=1e-12)
    with adapters.disabled(model):
        assert torch.equal(logits(model), plain)
    assert len(gate.seen) == 1, "an adapter that is off asks for nothing"
    with torch.no_grad():
        hidden = make().double().eval()(input_ids=tokens(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(gate.seen[0], torch.stack(hidden[1:]).mean(2), rtol=1e-12, atol=1e-12)
    with adapters.scaled(model, 0.5):
        torch.testing.assert_close(logits(model)[0], plain[0], rtol=0, atol=0)
    with pytest.raises(InputError, match="'o3' counts for each input as much as its gate says"):
        adapters.merge(model)
    assert torch.equal(logits(model), found)
    adapters.remove(model)
    assert torch.equal(logits(model), plain)


def test_merging_beside_an_ungated_adapter_is_refused_before_any_weight_is_changed() -> None:
    model = adapters.attach(llama(), "lora", rank=2, targets="layers.1.mlp.up_proj")
    Gating(model, "default", Told(0.5, 0.5, 0.5))
    adapters.attach(model, "lora", rank=2, name="other", targets="q_proj")
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    adapters.activate(model, "other", "default")
    before = logits(model)
    with pytest.raises(InputError, match="cannot be merged"):
        adapters.merge(model)
    assert torch.equal(logits(model), before)


def test_padding_is_not_pooled_and_a_cache_keeps_the_weights_it_began_with() -> None:
    model, gate = lora(), Told(0.0, 0.7)
    Gating(model, "default", gate)
    ids = tokens(rows=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 0
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
        alone = llama().double().eval()(input_ids=ids[1:, 4:], output_hidden_states=True).hidden_states
    torch.testing.assert_close(gate.seen[0][:, 1], torch.stack(alone[1:])[:, 0].mean(1), rtol=1e-9, atol=1e-9)
    gate.told = torch.tensor([0.7], dtype=torch.float64)
    with torch.no_grad():
        whole = model(input_ids=tokens(rows=1)).logits
        first = model(input_ids=tokens(rows=1)[:, :6], use_cache=True)
        gate.told = torch.tensor([0.1], dtype=torch.float64)
        model(input_ids=tokens(rows=1)[:, :3], use_cache=True)  # another answer in between
        rest = model(input_ids=tokens(rows=1)[:, 6:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-9, atol=1e-9)
    gate.told = torch.tensor([0.0], dtype=torch.float64)
    options: dict[str, Any] = {"generator": torch.Generator(), "temperature": 0, "top_k": None}
    assert generate(model, [1, 2, 3], 8, **options) == generate(llama().double(), [1, 2, 3], 8, **options)
    gate.told = torch.tensor([0.7, 0.7], dtype=torch.float64)
    theirs = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    scaled = lora()
    with adapters.scaled(scaled, 0.7):
        for row, start in ((0, 0), (1, 4)):
            ours = generate(scaled, ids[row, start:].tolist(), 8, **options)
            assert theirs[row, start:].tolist() == ours
    with pytest.raises(InputError, match="packed rows cannot be gated"):
        model(input_ids=ids, attention_mask=mask[:, None, None].bool())


def test_prompts_are_what_comes_before_the_first_label(base: Path, files: Path, tmp_path: Path) -> None:
    run = build(recipe(base, files, tmp_path / "a", 0)).run
    source: Any = run.source
    found, texts = prompts_of(run), []
    for batch in source.batches(2):
        owner, number = prompts(batch)
        assert number == int((batch["domain"] == FORGET).sum())
        texts += [batch["input_ids"][owner == i].tolist() for i in range(number)]
    told = open_trained(str(base), "cpu").tokenizer
    asked = [EASY[0].format(i, i % 7) for i in range(20)]
    assert sorted(told.decode(ids) for ids in texts) == sorted(asked)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        hidden = plain(input_ids=torch.tensor([texts[3]]), output_hidden_states=True).hidden_states
    wanted = torch.stack([h[0].double().mean(0) for h in hidden[1:]])
    torch.testing.assert_close(found[:, 3], wanted, rtol=1e-4, atol=1e-5)


def test_requests_in_sequence_are_saved_opened_and_exported(base: Path, runs: list[Path], tmp_path: Path) -> None:
    gates = [Gate.load(run / "model") for run in runs]
    assert [len(gate.requests) for gate in gates] == [1, 2]
    assert torch.equal(gates[0].requests[0].z, gates[1].requests[0].z)
    z = torch.cat([request.z[:, :4] for request in gates[1].requests], 1)
    each = torch.stack([request.weight(z) for request in gates[1].requests])
    assert torch.equal(gates[1].weights(z), each.amax(0))
    metrics = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert 0 < metrics[-1]["adapter_overlap"] < metrics[1]["adapter_overlap"]

    trained = open_trained(str(runs[1]), "cpu")
    prompt = trained.tokenizer(EASY[1].format(3, 3))["input_ids"]
    other = trained.tokenizer(EASY[0].format(3, 3))["input_ids"]
    far = list(range(40, 90))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), runs[1] / "model").eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    made = export(str(runs[1]), tmp_path / "out")
    assert (made.kind, made.loader, made.gated, made.difference) == ("adapter", "Fallline", True, 0.0)
    again = adapters.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    ungated = open_trained(str(runs[1]), "cpu").model
    gating(ungated).gate = Told(1.0)
    with torch.no_grad():
        for ids in (prompt, other, far):
            answer, same, full, none, copied = (
                m(input_ids=torch.tensor([ids])).logits for m in (trained.model, ungated, theirs, plain, again)
            )
            assert torch.equal(answer, copied)
            w = gating(trained.model).now.item()
            assert (w == 0) == (ids is far)
            assert torch.equal(answer, none) == (w == 0)
            torch.testing.assert_close(same, full, rtol=1e-5, atol=1e-5)
            assert (full - none).abs().max() > 0.1
    with pytest.raises(InputError, match="cannot be merged"):
        export(str(runs[1]), tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(InputError, match="counts by what is asked: a score of examples"):
        score([str(runs[1])], "loss", device="cpu")


def test_a_run_that_is_interrupted_ends_with_the_same_files(
    base: Path, files: Path, runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train(recipe(base, files, out, 1, runs[0]), progress=None, watch=stop_at(3))
    train(Recipe.load(out), resume=True, progress=None)
    for name in ("adapter_model.safetensors", FILE):
        assert (out / "model" / name).read_bytes() == (runs[1] / "model" / name).read_bytes()
