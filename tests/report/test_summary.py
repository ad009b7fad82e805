"""The sentences: each verdict and caveat is said, and nothing that no interval allows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fallline.report import analyse, figures

from .records import ALL, apart, choice, many, measured, nothing, plain, record, run, study, time, tuned


def said(made: dict[str, Any], part: str | None = None) -> str:
    parts = analyse(made)["analysis"]["summary"]
    return "\n".join(s for name, sentences in parts.items() if part in (None, name) for s in sentences)


def test_the_answer_comes_first() -> None:
    answer = analyse(study())["analysis"]["summary"]["answer"]
    assert answer[0] == "scale ended with a lower validation loss than adamw: −0.215 [−0.229, −0.201]."
    assert answer[1] == "sgd ended with a higher validation loss than adamw: +0.68 [+0.53, +0.82]."
    assert answer[2].startswith("No difference from adamw was shown for muon −0.008 [−0.107, +0.091];")
    assert "second-order-with-a-long-name failed: optimizer.rank: 512 is more than" in answer[3]
    assert "The 3 intervals in brackets hold all at once with 95 % confidence (each with 98.33 %)" in answer[4]
    assert "Other pairs of choices were not tested." in answer[4]


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_claimed_without_an_interval_beside_zero(name: str) -> None:
    analysed = analyse(ALL[name]())
    for sentence in analysed["analysis"]["summary"]["answer"]:
        claim = re.search(r"\b(lower|higher)\b", sentence)
        for about in analysed["analysis"]["choices"]:
            if (
                not claim
                or about["verdict"] == "baseline"
                or not re.search(re.escape(about["label"]) + r" ([+−]|ended)", sentence)
            ):
                continue
            low, high = about["difference"]["low"], about["difference"]["high"]
            assert high < 0 if claim[1] == "lower" else low > 0
            assert about["seeds"]["failed"] == 0
    text = "\n".join(said(ALL[name](), part) for part in ("answer", "memory", "time"))
    assert not re.search(r"\b(better|best|worse|superior|outperforms?|wins?|faster|smaller)\b", text)
    if not analysed["analysis"]["intervals"]:
        assert not re.search(r"\b(lower|higher)\b", text)


def test_several_claims_are_one_sentence_and_long_lists_are_cut() -> None:
    answer = analyse(many())["analysis"]["summary"]["answer"]
    assert answer[1].startswith(
        "These ended with a higher validation loss than adamw: optimizer=rule-9,rank=512 +0.114"
    )
    assert answer[1].endswith("; the other 7 are in the table.")


def test_one_seed_makes_no_claim() -> None:
    text = said(plain(), "answer")
    assert text.startswith("One seed, so no claim is made: the final validation losses are adamw 4.8659; scale 4.6527,")
    assert "interval" not in text


def test_lost_seeds_void_timings_and_other_data_are_said() -> None:
    text = said(apart())
    assert "1 of 3 seeds diverged; its mean is of the others, and no claim is made." in text
    assert "The losses of vocab=4096 cannot be compared with adamw's" in text
    assert re.search(r"The timing of .*owned.* is void", text)
    assert "90 ms" not in text
    assert "scale was not timed in turns with the others" in text
    assert text.endswith("Two records were merged: the runs of scale were made later.")


def test_the_reason_of_a_failed_seed_is_said() -> None:
    made = choice("a", [], runs=[run(4.5, 1), run(4.6, 2), run(None, 3, status="failed", error="killed by signal 9")])
    text = said(record([choice("adamw", [4.86, 4.87, 4.85]), made], [1, 2, 3]))
    assert "a: 1 of 3 seeds failed (killed by signal 9); its mean is of the others" in text


def test_unfinished_seeds_are_said() -> None:
    made = choice("a", [4.5, 4.6], status="partial")
    text = said(record([choice("adamw", [4.86, 4.87, 4.85]), made], [1, 2, 3]))
    assert "a: 1 of 3 seeds did not finish." in text


def test_seeds_that_change_nothing_are_said() -> None:
    text = said(record([choice("adamw", [4.5, 4.5]), choice("a", [4.25, 4.25])], [1, 2]))
    assert "Seeds changed nothing in the difference of a −0.2500 from adamw" in text


def test_when_everything_failed() -> None:
    text = said(nothing())
    assert text.startswith("No choice finished, so there is nothing to compare.")
    assert "adamw diverged with each of its 2 seeds: loss is not finite at step 7." in text
    assert "scale failed: out of memory." in text
    assert "Memory was not measured.\nStep times were not measured." in text


def test_a_baseline_without_loss_is_said() -> None:
    text = said(record([choice("adamw", [None]), choice("a", [4.5])], [1]))
    assert text.startswith("The baseline adamw has no final loss, so no differences were computed.")


def test_tuning_is_described_with_its_limits() -> None:
    text = said(study(), "caveats")
    assert "optimizer.lr, with 7 trials for each choice over 3 decades (0.0001 to 0.1), on seed 0." in text
    assert "widened, because the best value was on its edge: adamw 8 trials, sgd 10 trials." in text
    assert "A trial was given up when it lagged far behind" in text
    assert "The intervals cover seeds and not the choice of optimizer.lr" in text
    assert "sgd's tuned optimizer.lr, 1.8, is on the edge of what was tried" in text
    assert "scale's tuned" not in text
    assert "not tuned" not in text


def test_a_seed_that_tuned_and_measured_is_said() -> None:
    made = study()
    assert "both chose the values" not in said(made)
    made["tune"]["seed"] = 2
    assert "Seed 2 both chose the values and is among the final seeds" in said(made)


def test_a_choice_left_untuned_is_said() -> None:
    made = study()
    made["choices"][3]["tuned"] = None
    assert "muon ran without tuning." in said(made)


def test_without_tuning_rates_are_suspect() -> None:
    text = said(plain(), "caveats")
    assert (
        "Learning rates were not tuned here: each choice ran at its recipe's or default rate, so a difference may be "
        "one of rates, not of methods." in text
    )
    assert text.endswith(
        "This holds for this model (1.33 M parameters), this data (python-docs) and this length (500 steps) only."
    )


def test_memory_is_a_multiple_of_the_baselines() -> None:
    text = said(study(), "memory")
    assert "adamw 51.5 MiB (optimizer state 10.2 MiB)" in text
    assert "scale 42.3 MiB, 0.82 times adamw's (optimizer state 1.00 MiB)" in text
    assert said(plain(), "memory").endswith("Memory was not measured for scale.")


def test_peaks_of_two_kinds_are_not_divided() -> None:
    made = study()
    made["choices"][2]["memory"]["kind"] = "allocated"
    text = said(made, "memory")
    assert "Peak memory, allocated by torch: scale 42.3 MiB (optimizer state 1.00 MiB)." in text
    assert "cannot be compared" in text


def test_time_is_a_multiple_of_the_baselines_and_its_spread_is_heeded() -> None:
    text = said(study(), "time")
    assert "adamw's step takes 71.2 ms (± 3 %)." in text
    assert "muon's step takes 1.31 times adamw's (± 4 %)." in text
    assert "No difference from adamw's step time beyond the spread: scale 1.03 (± 4 %); sgd 0.97 (± 4 %)." in text


def test_without_a_valid_timing_of_the_baseline_there_are_no_ratios() -> None:
    made = study()
    made["choices"][0]["time"]["void"] = True
    text = said(made, "time")
    assert "Without a timing of adamw no ratios are given." in text
    assert "times" not in text.replace("Step times", "")
    assert "muon's step takes 93.3 ms (± 3 %)" in text


def test_what_was_held_equal() -> None:
    assert "Held equal: tokens." in said(study())
    made = record([choice("adamw", [4.8]), choice("a", [4.7], steps=382, time=time(0.1, void=True))], [1], equal="time")
    text = said(made)
    assert (
        "training seconds, as steps × measured step time, without evaluation and start-up; steps: adamw 500, a 382."
        in text
    )
    assert "As the timing of a is void, these seconds are not known to be equal." in text
    assert "Held equal: peak memory" in said(study() | {"equal": "memory"})


def test_an_analysed_record_can_be_analysed_again() -> None:
    analysed = analyse(study())
    assert analyse(analysed) == analysed


def test_the_mean_curve_is_of_the_seeds_that_finished() -> None:
    about = analyse(apart())["analysis"]["choices"]
    assert about[2]["curve"]["seeds"] == 2
    assert about[2]["curve"]["mean"][-1] == pytest.approx(4.51)
    assert about[2]["curve"]["low"][-1] == pytest.approx(4.50)
    assert about[2]["curve"]["seconds"] is None, "its timing is void"
    assert about[0]["curve"]["seconds"][-1] == pytest.approx(500 * 0.0712)
    assert analyse(nothing())["analysis"]["choices"][0]["curve"] is None


def test_only_steps_that_every_seed_evaluated_have_a_mean() -> None:
    made = choice("a", [4.5, 4.6])
    made["runs"][0]["curve"] = {"step": [0, 100, 500], "tokens": [0, 1, 2], "val_loss": [7.0, None, 4.5]}
    made["runs"][1]["curve"] = {"step": [0, 100, 300, 500], "tokens": [0, 1, 3, 2], "val_loss": [8.0, 5.0, 4.9, 4.6]}
    curve = analyse(record([choice("adamw", [4.8, 4.9]), made], [1, 2]))["analysis"]["choices"][1]["curve"]
    assert curve["step"] == [0, 100, 500]
    assert curve["mean"] == [7.5, None, pytest.approx(4.55)]


def test_order_and_what_is_shown_at_first() -> None:
    analysis = analyse(apart())["analysis"]
    assert analysis["order"] == [0, 2, 3, 1], "by loss, what cannot be compared after the rest"
    assert analysis["shown"] == [0, 2, 3]
    assert len(analyse(many())["analysis"]["shown"]) == 9


def test_a_rule_without_a_full_stop_gets_one() -> None:
    made = record([tuned(choice("adamw", [4.8]), 1e-3, {1e-3: 4.8})], [1], tune=study()["tune"] | {"rule": "No rule"})
    assert "No rule.\n" in said(made)


def test_figures_have_the_digits_they_are_good_for() -> None:
    assert figures.loss(4.652741, 0.00001) == "4.6527 ± 0.0000"
    assert figures.difference(-0.2, -31.0, 31.0) == "0 [−31, +31]"
    assert figures.difference(0.5, 0.003, 0.997) == "+0.500 [+0.003, +0.997]", (
        "a bound beside zero does not become zero"
    )
    assert figures.difference(0.0, 0.0, 0.0) == "0 [0, 0]"
    assert figures.size(2**30) == "1.00 GiB"
    assert figures.milliseconds(0.0000123) == "0.0123 ms"


def test_measures_are_claimed_as_their_intervals_allow() -> None:
    analysed = analyse(measured())
    exact, docs, meaning = analysed["analysis"]["summary"]["measures"]
    assert exact.startswith("exact: adamw 0.510 ± 0.010; higher for dco +0.11")
    assert "ldr" not in exact
    assert docs.startswith("docs/nll: adamw 3.4033 ± 0.0058; higher for ldr +0.2")
    assert "elsewhere" not in exact + docs, "it was measured on other rows"
    assert "the intervals of each measure hold all at once" in meaning
    assert "dco 2.36 M" in said(measured(), "memory")
    of = {c["label"]: c["measures"] for c in analysed["analysis"]["choices"]}
    assert of["elsewhere"]["exact"]["difference"] is None
    assert of["dco"]["exact"]["path"][-1] == pytest.approx(0.62)
    assert analysed["analysis"]["trade_off"] == ["docs/nll", "exact"]
    assert analyse(analysed)["analysis"] == analysed["analysis"]


@pytest.mark.parametrize("lost", [("dco", "lost"), ("adamw", "failed"), ("dco", "not a number")])
def test_no_measure_is_claimed_of_the_seeds_that_came_through(lost: tuple[str, str]) -> None:
    record = measured()
    run = next(c for c in record["choices"] if c["label"] == lost[0])["runs"][-1]
    if lost[1] == "not a number":
        run["measures"]["exact"] = None
    else:
        run |= {"status": lost[1], "loss": None}
    analysis = analyse(record)["analysis"]
    dco = next(c for c in analysis["choices"] if c["label"] == "dco")
    assert dco["measures"]["exact"]["difference"]["low"] is None
    docs = analysis["summary"]["measures"][1]
    assert ("higher for ldr" in docs) is (lost[0] == "dco"), "of other choices it is"
