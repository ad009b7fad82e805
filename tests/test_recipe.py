"""Recipes: resolved, located, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallline.errors import InputError
from fallline.recipe import Recipe
from fallline.written import dump, plain, read

GOOD = """\
model: {name: llama, preset: tiny}
data: {name: python-docs, length: 64}
optimizer:
  name: sgd
  lr: 1e-2
steps: 30
"""


def test_defaults_fill_in() -> None:
    recipe = Recipe.parse("model: {name: llama, preset: tiny}\ndata: python-docs\nsteps: 3\n")
    assert (recipe.optimizer.id, recipe.objective.id, recipe.estimator.id) == ("adamw", "causal", "backprop")
    assert recipe.settings.steps == 3


def test_options_alone_go_to_the_default_method() -> None:
    schedule = Recipe.parse(GOOD + "schedule: {warmup: 3}\n").schedule
    assert (schedule.id, schedule.options.warmup) == ("linear", 3)


def test_a_zero_before_a_whole_number_changes_nothing() -> None:
    recipe = Recipe.parse(GOOD, "steps=0100", "seed=+09")
    assert (recipe.settings.steps, recipe.settings.seed) == (100, 9)


def test_numbers_like_1e_3_are_numbers_and_yes_is_text() -> None:
    assert Recipe.parse(GOOD).optimizer.options.lr == 0.01
    with pytest.raises(InputError, match=r"'nesterov' must be true or false, got 'yes' \(recipe:4\)"):
        Recipe.parse(
            "model: {name: llama, preset: tiny}\ndata: python-docs\nsteps: 3\n"
            "optimizer: {name: sgd, momentum: 0.9, nesterov: yes}\n"
        )


def test_overrides() -> None:
    recipe = Recipe.parse(GOOD, "optimizer.lr=2e-3", "steps=7", "checkpoint.every=5", "data.length=32")
    assert (recipe.optimizer.options.lr, recipe.settings.steps, recipe.checkpoint.every) == (2e-3, 7, 5)
    assert recipe.data.options.length == 32
    assert Recipe.parse(GOOD, "optimizer=scale").optimizer.options.lr != 0.01, "another method, its own defaults"
    assert Recipe.parse(GOOD, "optimizer=sgd").optimizer.options.lr == 0.01, "the same method keeps its options"
    swapped = Recipe.parse(GOOD, "optimizer=scale", "optimizer.lr=5e-3")
    assert (swapped.optimizer.id, swapped.optimizer.options.lr) == ("scale", 5e-3)
    assert Recipe.parse(GOOD, "probes=[update-ratio]").probes[0].id == "update-ratio"
    assert Recipe.parse(GOOD, "optimizer={name: scale, lr: 0.5}").optimizer.options.lr == 0.5


def test_options_of_an_option_are_overridden_one_by_one() -> None:
    masked = "objective: {name: entangle-mask, width: 64, of: dpo, options: {beta: 0.2}}\n"
    both = Recipe.parse(GOOD + masked, "objective.options.beta=0.3", "objective.options.label_smoothing=0.1")
    assert both.objective.options.options == {"beta": 0.3, "label_smoothing": 0.1}
    assert Recipe.parse(GOOD + masked, "objective.options.label_smoothing=0.1").objective.options.options["beta"] == 0.2
    first = Recipe.parse(GOOD, "objective={name: entangle-mask, width: 64}", "objective.options.beta=0.3")
    assert first.objective.options.options == {"beta": 0.3}
    also = Recipe.parse(GOOD + "eval: {also: {a: {name: python-docs}}}\n", "eval.also.a.length=32")
    assert also.also["a"].options.length == 32


def test_resolved_recipe_reads_back_equal() -> None:
    recipe = Recipe.parse(
        GOOD, "probes=[{name: update-ratio, every: 3}]", "checkpoint.every=5", "clip=1.0", "out=runs/x"
    )
    again = Recipe.parse(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_model_may_be_a_hub_id_or_a_folder(tmp_path: Path) -> None:
    for value in ("someone/some-model", str(tmp_path)):
        recipe = Recipe.parse(GOOD, f"model={value}")
        assert (recipe.model.id, recipe.model.options.path) == ("pretrained", value)


def test_differences_ignore_what_does_not_change_the_result() -> None:
    recipe = Recipe.parse(GOOD)
    assert recipe.differences(Recipe.parse(GOOD, "out=runs/y", "checkpoint.every=9", "sample=0").to_mapping()) == []
    (line,) = Recipe.parse(GOOD, "optimizer.lr=0.5").differences(recipe.to_mapping())
    assert line == "optimizer.lr was 0.01, is 0.5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping of keys to values, this is nothing"),
        ("- a\n- b\n", "this is a list"),
        ("hello", "this is 'hello'"),
        ("a: [1\n", "is not YAML"),
        ("model: &m {name: *m}\n", "alias"),
        (GOOD + "stepz: 3\n", "unknown key 'stepz'; did you mean 'steps'? (r.yaml:7)"),
        (GOOD + "steps: 3\n", "duplicate key 'steps': first (r.yaml:6), again (r.yaml:7)"),
        (
            GOOD.replace("  lr: 1e-2", "  lr: 1e-2\n  lr: 1e-3"),
            "duplicate key 'lr': first (r.yaml:5), again (r.yaml:6)",
        ),
        (GOOD.replace("name: sgd", "name: sdg"), "unknown optimizer 'sdg'; did you mean 'sgd'? (r.yaml:4)"),
        (GOOD.replace("  lr:", "  lrr:"), "optimizer 'sgd' has no option 'lrr'; did you mean 'lr'? (r.yaml:5)"),
        (GOOD.replace("1e-2", "fast"), "optimizer 'sgd': 'lr' must be a number, got 'fast' (r.yaml:5)"),
        (GOOD.replace("1e-2", ".nan"), "'lr' must be a finite number, got nan (r.yaml:5)"),
        (GOOD.replace("1e-2", "-1"), "'lr' must be above 0, got -1.0 (r.yaml:5)"),
        (GOOD.replace("1e-2", "0"), "'lr' must be above 0, got 0.0 (r.yaml:5)"),
        (GOOD.replace("steps: 30", "steps: 0"), "'steps' must be above 0, got 0 (r.yaml:6)"),
        (GOOD.replace("steps: 30", "steps: 1.5"), "'steps' must be a whole number, got 1.5 (r.yaml:6)"),
        (GOOD.replace("steps: 30", ""), "the recipe needs the option 'steps'"),
        (GOOD.replace("model: {name: llama, preset: tiny}", ""), "the recipe needs 'model', such as {name: llama"),
        (GOOD.replace("preset: tiny", "preset: tinny"), "did you mean 'tiny'? (r.yaml:1)"),
        (GOOD + "precision: float23\n", "did you mean 'float32'? (r.yaml:7)"),
        (GOOD + "seed: -1\n", "'seed' must be at least 0, got -1 (r.yaml:7)"),
        (GOOD + "micro: 100\n", "'micro' must be at most batch (8), got 100"),
        (GOOD + "checkpoint: {keep: 3}\n", "checkpoint: 'keep' has no effect unless every > 0; remove it (r.yaml:7)"),
        (GOOD + "checkpoint: 3\n", "'checkpoint' must be a mapping of every, keep, best (r.yaml:7)"),
        (GOOD + "optimizer_: 3\n", "did you mean 'optimizer'? (r.yaml:7)"),
        (GOOD + "schedule: 3\n", "'schedule' must be a method's name or a mapping with its name, got 3 (r.yaml:7)"),
        (GOOD + "schedule: {name: 3}\n", "'schedule.name' must be text, got 3 (r.yaml:7)"),
        (GOOD + "probes: update-ratio\n", "'probes' must be a list of names, got 'update-ratio' (r.yaml:7)"),
        (GOOD + "probes: [update-ratio, update-ratio]\n", "'probes' names update-ratio twice (r.yaml:7)"),
        (GOOD + "? [a]\n: 1\n", "a key must be a name (r.yaml:7)"),
        (GOOD + "out: a\x1bb\n", "'r.yaml' holds a character that YAML does not take: '\\x1b'"),
        (GOOD + "out: !!timestamp x\n", "cannot read 'x'"),
        (GOOD + "out: !!bool x\n", "cannot read 'x'"),
    ],
)
def test_bad_recipes_are_one_line_with_the_place(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.parse(text, origin="r.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "an override is key=value or key.option=value, got 'steps'"),
        ("=3", "an override is key=value"),
        ("optimizer.=3", "an override is key=value"),
        ("a..c=3", "an override is key=value"),
        ("a.b.c=3", "unknown key 'a'"),
        ("optimizer.lr.x=3", "'optimizer.lr' is no mapping, it is 0.01 (in 'optimizer.lr.x=3')"),
        ("optimizer.momentum.x=3", "'momentum' must be a number, got {'x': 3} (in 'optimizer.momentum.x=3')"),
        ("stpes=3", "unknown key 'stpes'; did you mean 'steps'? (in 'stpes=3')"),
        ("steps.x=3", "'steps' has no options"),
        ("optimizer.momentun=0.9", "did you mean 'momentum'? (in 'optimizer.momentun=0.9')"),
        ("optimizer=[", "is not YAML"),
        ("steps=", "'steps' must be a whole number, got None (in 'steps=')"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.parse(GOOD, override)
    assert message in str(error.value)


def test_vocab_is_idle_when_the_model_brings_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'vocab' has no effect, the model has a tokenizer"):
        Recipe.parse(GOOD, f"model={tmp_path}", "data.vocab=512")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert Recipe.load(path).name == "mine"
    with pytest.raises(InputError, match=r"no recipe file .*did you mean"):
        Recipe.load(tmp_path / "mina.yaml")
    with pytest.raises(InputError, match=r"folder without a recipe\.yaml"):
        Recipe.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "binary.yaml")
    (tmp_path / "recipe.yaml").write_text(GOOD)
    assert Recipe.load(tmp_path).name == tmp_path.name


def test_recipes_that_ship_are_valid() -> None:
    for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml"):
        Recipe.load(path)


@pytest.mark.parametrize("text", ["1e3", "09", "0100", "yes", "null", "~", ".inf", "1_000", "2026-01-01", "#", "a:"])
def test_text_that_looks_like_something_else_reads_back_as_text(text: str) -> None:
    given = {"a": text, "b": 3, "c": 1e-5, "d": None}
    assert plain(read(dump(given), "here")) == given
