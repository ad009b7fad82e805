"""What `--over` makes of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallline.catalog import entries
from fallline.drivers.compare.choices import make_choices
from fallline.drivers.compare.run import ask
from fallline.errors import InputError

RECIPE = "recipes/tiny.yaml"


def test_choices_are_combined_in_order():
    found = make_choices(RECIPE, ["steps=7"], ["optimizer=adamw,sgd", "schedule=cosine,wsd"])
    assert [c.label for c in found] == ["adamw cosine", "adamw wsd", "sgd cosine", "sgd wsd"]
    assert [(c.recipe.optimizer.id, c.recipe.schedule.id) for c in found if c.recipe] == [
        ("adamw", "cosine"),
        ("adamw", "wsd"),
        ("sgd", "cosine"),
        ("sgd", "wsd"),
    ]
    assert {c.recipe.settings.steps for c in found if c.recipe} == {7}


def test_the_recipes_method_keeps_its_options():
    adamw, sgd = make_choices(RECIPE, [], ["optimizer=adamw,sgd"])
    assert adamw.recipe is not None
    assert sgd.recipe is not None
    assert adamw.recipe.optimizer.options.lr == 3e-3  # of the recipe
    assert sgd.recipe.optimizer.options.lr == 0.1  # its own default


def test_an_option_for_all_is_for_all_but_the_choice_that_sets_it():
    found = make_choices(RECIPE, ["optimizer.lr=5e-3", "steps=7"], ["optimizer=adamw,sgd,{name: scale, lr: 2e-3}"])
    assert [c.recipe.optimizer.options.lr for c in found if c.recipe] == [5e-3, 5e-3, 2e-3]
    lone = make_choices(RECIPE, ["optimizer=sgd", "optimizer.lr=5e-3"], ["optimizer.lr=1e-3,2e-3"])
    assert [c.recipe.optimizer.options.lr for c in lone if c.recipe] == [1e-3, 2e-3]
    with pytest.raises(InputError, match="'sgd' has no option 'betas'"):
        make_choices(RECIPE, ["optimizer.betas=[0.9, 0.9]"], ["optimizer=adamw,sgd"])


def test_a_choice_may_have_options_and_commas():
    found = make_choices(RECIPE, [], ["optimizer={name: adamw, lr: 2e-3, betas: [0.9, 0.99]},scale"])
    assert [c.label for c in found] == ["adamw lr=2e-3 betas=[0.9, 0.99]", "scale"]
    assert found[0].recipe is not None
    assert found[0].recipe.optimizer.options.betas == (0.9, 0.99)
    assert found[0].folder != found[0].label  # a name that any file system takes
    assert found[1].folder == "scale"


def test_settings_can_be_compared():
    found = make_choices(RECIPE, [], ["batch=4,8", "optimizer.lr=1e-3,3e-3"])
    assert [c.label for c in found] == ["batch=4 lr=1e-3", "batch=4 lr=3e-3", "batch=8 lr=1e-3", "batch=8 lr=3e-3"]
    assert len(make_choices(RECIPE, [], ["threads=1,2"])) == 2


def test_all_takes_the_catalogue_and_keeps_what_cannot_be_run():
    found = make_choices(RECIPE, [], ["optimizer=all"])
    assert [c.label for c in found] == [id for kind, id in entries() if kind == "optimizer"]
    data = {c.label: c for c in make_choices(RECIPE, [], ["data=all"])}
    assert data["hub"].recipe is None  # needs an id
    assert "'id'" in data["hub"].error
    assert data["python-source"].recipe is not None
    with pytest.raises(InputError, match="did you mean 'wsd'"):
        make_choices(RECIPE, [], ["optimizer=all", "schedule=cosine,wdd"])  # what was typed must be right
    sgd_only = {c.label: c.error for c in make_choices(RECIPE, [], ["optimizer=all"], ["optimizer.nesterov=true"])}
    assert "nesterov" in sgd_only["adamw"]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "nothing to compare"),
        (["optimizer=adamw"], "nothing to compare 'adamw' with"),
        (["optimizer=adamw,adamv"], "did you mean 'adamw'"),
        (["optimiser=adamw,sgd"], "did you mean 'optimizer'"),
        (["optimizer"], "key=a,b"),
        (["optimizer="], "key=a,b"),
        (["optimizer=adamw,,sgd"], "empty value"),
        (["optimizer=adamw,adamw"], "are the same"),
        (["optimizer=adamw,{name: adamw}"], "are the same"),
        (["optimizer=adamw,sgd", "optimizer=scale,sgd"], "twice"),
        (["seed=1,2"], "--seeds"),
        (["out=a,b"], "cannot be about 'out'"),
        (["optimizer.lr=1,x"], "must be a number"),
    ],
)
def test_what_cannot_be_compared_is_one_line(over: list[str], message: str):
    with pytest.raises(InputError) as error:
        make_choices(RECIPE, [], over)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_tuned_must_suit_every_choice_and_be_all_that_it_changes():
    rates = ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    assert len(make_choices(RECIPE, [], ["optimizer=adamw,sgd"], rates)) == 2
    with pytest.raises(InputError, match="are the same"):
        make_choices(RECIPE, [], ["optimizer={name: sgd, lr: 0.1},{name: sgd, lr: 0.2}"], rates)
    with pytest.raises(InputError, match="whole number"):
        make_choices(RECIPE, [], ["optimizer=muon,{name: muon, nesterov: false}"], ["optimizer.ns_steps=5.5"])


@pytest.mark.parametrize(
    ("over", "tune", "message"),
    [
        ("optimizer.lr=1e-3,1e-2", "optimizer.lr=1e-4:1e-2", "are the same"),
        ("optimizer={name: adamw, lr: 2e-3},scale", "optimizer.lr=1e-4:1e-2", "both compared and tuned"),
        ("optimizer=adamw,scale", "steps=10:1000:3", "'steps': it would change what is held equal"),
        ("optimizer=adamw,scale", "seed=1:100:3", "'seed'"),
        ("optimizer=adamw,scale", "data.length=10:1000:3", "'data': trials are judged by their loss"),
        ("objective=causal,dco", "objective.samples=1:100:3", "'objective'"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(over: str, tune: str, message: str):
    with pytest.raises(InputError, match=message):
        ask(Path(RECIPE), [], [over], 1, tune, "tokens", 1, "")
