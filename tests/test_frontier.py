"""The front of a search over cost, and the power law along it."""

import math
import re
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from ctbprn_lib import InputError, frontier, published, report, search
from ctbprn_lib.audit import samplers
from ctbprn_lib.evidence import BETTER, UNDECIDED, Answer, Schedule
from ctbprn_lib.report import budgets
from ctbprn_lib.tasks import RoutingTask
from ctbprn_lib.train import Hyperparameters, training_cost


def trials(costs, errors, states=None):
    """A table as search.records makes it."""
    n = len(costs)
    rows = pd.DataFrame({"trial": range(n), "state": states or ["complete"] * n, "cost": costs, "val_ce": errors})
    for name, value in dict(lr=1e-3, d=8, rank=2, temperature=1.0, batch_size=4, seq_len=4, n_layers=1).items():
        rows[name] = value
    return rows.assign(weight_decay=0.0, n_steps=range(10, 10 + n))


def test_the_front_holds_what_nothing_beats_in_both():
    rng = np.random.default_rng(0)
    costs, errors = rng.lognormal(size=60), rng.lognormal(size=60)
    states = ["pruned" if i % 7 == 0 else "complete" for i in range(60)]
    found = set(frontier.front(trials(costs, errors, states))["trial"])
    alive = [i for i in range(60) if i % 7]
    beaten = {i for i in alive for j in alive if costs[j] < costs[i] and errors[j] < errors[i]}
    assert found == set(alive) - beaten
    with pytest.raises(InputError, match="no complete trial"):
        frontier.front(trials([1.0], [1.0], ["pruned"]))


def test_a_thinned_front_keeps_the_dearest_and_a_factor_between_costs():
    costs = np.array([1, 1.5, 1.9, 2.1, 4, 7, 7.9, 8.0])
    kept = frontier.thinned(trials(costs, 1 / costs))
    assert kept["cost"].iloc[-1] == 8 and kept["cost"].is_monotonic_increasing
    assert (kept["cost"].to_numpy()[1:] / kept["cost"].to_numpy()[:-1] >= 2).all()
    with pytest.raises(InputError, match="no point of the front costs so little"):
        frontier.thinned(kept[kept["cost"] < 0])
    for cost in set(costs) - set(kept["cost"]):  # each that went has a dearer one near it that stayed
        assert ((kept["cost"] > cost) & (kept["cost"] < 2 * cost)).any()


def test_rivals_cost_the_same_and_one_question_is_asked_of_each(small_task):
    found, rivals = frontier.runs(trials([5.0, 9.0, 40.0], [3.0, 2.0, 1.0]), small_task, [])
    assert [run.n_steps for run in found] == [10, 11, 12]
    two = training_cost(rivals[0].hyperparameters, small_task, 1)
    for run, rival in zip(found, rivals, strict=True):
        expected = training_cost(run.hyperparameters, small_task, run.n_steps)
        assert abs(rival.n_steps * two - expected) <= max(two, expected) / 2 or rival.n_steps == 1
        assert rival.hyperparameters.d == published.hyperparameters(2).d
    questions = frontier.plan(found, rivals, Schedule((2, 4), (0.5, 0.5))).questions
    assert [q.contrasts[0].a for q in questions] == [run.name for run in found]
    hp = Hyperparameters(d=8, rank=2, batch_size=4, seq_len=4)
    for steps in (1, 7, 1000):
        assert frontier.steps_for(hp, small_task, training_cost(hp, small_task, steps)) == steps


def test_a_law_is_found_and_agrees_with_scipy():
    costs = np.geomspace(1e9, 1e12, 9)
    exact = frontier.PowerLaw.fit(costs, 50 * costs**-0.4)
    assert exact.slope == pytest.approx(-0.4) and exact.predict(1e13)[0] == pytest.approx(50 * 1e13**-0.4)
    assert exact.cost_for(50 * 1e14**-0.4)[0] == pytest.approx(1e14, rel=0.01)
    errors = 50 * costs**-0.4 * np.exp(0.2 * np.random.default_rng(0).normal(size=9))
    law, other = frontier.PowerLaw.fit(costs, errors), stats.linregress(np.log(costs), np.log(errors))
    assert (law.slope, law.level) == pytest.approx((other.slope, other.intercept))
    # far away the interval of the line is that of the slope
    _, low, high = (np.log(value) for value in law.predict(math.exp(500), of_mean=True))
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 7) * other.stderr * (500 - law.at), rel=0.01)


def test_prediction_intervals_hold_what_they_promise():
    rng, inside, reached = np.random.default_rng(1), [], []
    costs = np.geomspace(1e9, 1e11, 6)
    for _ in range(1000):
        law = frontier.PowerLaw.fit(costs, costs**-0.3 * np.exp(0.1 * rng.normal(size=6)))
        new = 1e12**-0.3 * math.exp(0.1 * rng.normal())
        _, low, high = law.predict(1e12)
        inside.append(low <= new <= high)
        _, low, high = law.cost_for(1e12**-0.3)
        reached.append(low <= 1e12 * 1.01 and high * 1.01 >= 1e12)
    assert 0.93 < np.mean(inside) < 0.97 and 0.93 < np.mean(reached) < 0.975


def test_what_no_law_can_be_fitted_to_is_refused():
    for costs, errors, said in (
        ([1, 2], [1, 2], "three points"),
        ([1, 2, 3], [1, 0, 2], "above 0"),
        ([2, 2, 2], [1, 2, 3], "different costs"),
    ):
        with pytest.raises(InputError, match=said):
            frontier.PowerLaw.fit(costs, errors)
    flat = frontier.PowerLaw.fit([1e3, 1e4, 1e5, 1e6], [0.5, 0.6, 0.5, 0.6])
    assert flat.cost_for(1e-9)[2] == math.inf


def test_the_objective_keeps_its_scores_beside_its_values(reports, small_task):
    space = search.cost_space(small_task) | {"d": [8], "rank": [2], "batch_size": [4], "n_layers": [1]}
    space["n_steps"] = {"low": 2, "high": 6, "log": True}
    budget = search.Budget(6, 2, n_validation=64)
    how = dict(task=small_task, space=space, budget=budget)
    study = search.open_study("cost", objective="ce_cost", pruner="none", **how)
    search.run_trials(study, 3, **how)
    table = search.records(study).set_index("trial")
    for trial in study.trials:
        of = table.loc[trial.number]
        assert trial.values == pytest.approx([math.log10(of["val_ce"]), math.log10(of["cost"])])
    assert len(frontier.front(search.records(study))) == len(study.best_trials)


def points(errors, ces=None):
    """A table as frontier.points makes it: a front over costs that double, and rivals that are a little worse."""
    rows = []
    for kind, worse in ((frontier.FRONT, 1.0), (frontier.RIVAL, 1.2)):
        for i, error in enumerate(errors):
            name = f"trial {i}" if kind == frontier.FRONT else f"published trial 2, {i + 1} steps"
            row = dict(name=name, kind=kind, without="", n_steps=100 * 2**i, cost=1e10 * 2**i, seeds=8, seconds=1.0)
            row |= asdict(Hyperparameters()) | {"val_ce": error, "device": "CPU"}
            accuracy, ce = 1 - worse * error, worse * error
            row |= dict(test_accuracy=accuracy, test_accuracy_low=accuracy - 0.001, test_accuracy_high=accuracy + 0.001)
            row |= dict(test_ce=ce, test_ce_low=ce - 0.001, test_ce_high=ce + 0.001)
            row |= dict(route_accuracy=0.9, route_accuracy_low=0.89, route_accuracy_high=0.91)
            rows.append(row)
    return pd.DataFrame(rows)


def test_a_law_that_holds_is_said_to_hold_and_what_it_takes_is_said():
    front = points(0.3 * 2 ** (-0.5 * np.arange(8)))
    said = budgets.law_sentences(front)
    assert "multiplies the error by 0.71 over the 4 cheaper points" in said
    assert "1.00 times the predicted ones" in said
    # 0.3 x 2^(-i / 2) = 0.005 at i = 11.8, which is 2^4.8 times the cost of the last, i = 7
    (times,) = re.findall(r"99.5 % right is not reached.* ([\d,.]+) times its dearest", said)
    assert float(times) == pytest.approx(2**4.81, rel=0.03)
    flat = budgets.law_sentences(points(np.linspace(0.2, 0.3, 8)))
    assert "no cost reaches it" in flat
    assert "is reached by trial" in budgets.law_sentences(points(0.006 * 2 ** (-0.5 * np.arange(8))))
    assert "needs six" in budgets.law_sentences(points([0.3, 0.2, 0.1, 0.05]))


def test_advice_names_the_best_by_validation_and_the_best_at_the_cost_of_the_defaults():
    task = RoutingTask()
    front = points([0.3, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01])
    answers = {f"trial {i}": Answer(BETTER if i < 5 else UNDECIDED, at_most=0.0123) for i in range(8)}
    said = budgets.advice(front, answers, task, is_done=True)
    at_any, at_equal, beside = said.splitlines()
    assert "trial 7" in at_any and "99.0 %" in at_any
    usual = training_cost(Hyperparameters(), task, 500)
    assert f"trial {int(math.log2(1.05 * usual / 1e10))}**" in at_equal
    assert "5 better, 3 without a verdict" in beside
    assert "more minutes goes on" in budgets.advice(front, answers, task, is_done=False)
    with_rule = budgets.advice(front, answers, task, True, linear_rule=0.945).splitlines()[-1]
    assert "94.5 %" in with_rule and "is trial 3 for" in with_rule
    assert budgets.by_hand([], front) == ""
    assert "trial 3, trial 5 are among them" in budgets.by_hand(["trial 3", "trial 5", "trial 99"], front)
    pairs = {f"trial {i}": f"published trial 2, {i + 1} steps" for i in range(8)}
    table = budgets.front_table(front, answers, pairs).splitlines()
    assert len(table) == 10 and "undecided (at most 1.3 points)" in table[-1] and "98.8 %" in table[-1]


def test_what_fits_into_a_time_is_the_best_point_or_the_dearest_trained_for_longer(small_task):
    front = points([0.3, 0.2, 0.1])[:3]
    speeds = [1e10, 1e10, 1e10]  # so that they take 1, 2 and 4 seconds
    names = [frontier.within(front, speeds, seconds, small_task).name for seconds in (0.5, 1.5, 3, 5)]
    assert names == ["trial 0", "trial 0", "trial 1", "trial 2"]
    longer = frontier.within(front, speeds, 40, small_task)
    assert longer.name == "trial 2" and longer.n_steps > 400
    table = budgets.times_table(front, {1.0: longer}, {}, small_task)
    assert "not run" in table and "by the law" in table
    for times in ("", "a", "1,0", "1,inf"):
        with pytest.raises(InputError, match="minutes above 0 between commas"):
            frontier.numbers(times, "times", "minutes")


def test_the_dearest_point_is_trained_for_longer_at_multiples_of_its_cost(small_task):
    found, rivals = frontier.runs(trials([5.0, 9.0], [3.0, 2.0]), small_task, [2.0, 8.0])
    costs = [frontier.cost_of(run, small_task) for run in found]
    assert [run.name for run in found[:2]] == ["trial 0", "trial 1"] and len({run.name for run in found}) == 4
    assert costs[2:] == [2 * costs[1], 8 * costs[1]] and len(rivals) == 4
    assert found[3].hyperparameters == found[1].hyperparameters
    said = budgets.by_hand([], pd.DataFrame(dict(name=[], kind=[])), [run.name for run in found[2:]])
    assert said.startswith("Not from the search") and found[3].name in said
    with pytest.raises(InputError, match="factors above 1 between commas"):
        frontier.numbers("2,1", "longer", "factors", above=1)


def test_a_changed_point_counts_for_the_best_and_for_the_goal_and_is_shown_beside_the_point_itself(small_task):
    found, _ = frontier.runs(trials([5.0, 9.0], [3.0, 2.0]), small_task, [])
    others = frontier.changed(found, "gate_noise=0")
    assert [run.name for run in others] == ["trial 0, gate noise 0", "trial 1, gate noise 0"]
    assert others[0].hyperparameters == replace(found[0].hyperparameters, gate_noise=0.0)
    assert frontier.changed(found, "") == []
    for bad in ("noise=0", "gate_noise", "gate_noise=a", "gate_noise=-1", "gate_noise=1"):
        with pytest.raises(InputError, match=r"changed|gate_noise must be"):
            frontier.changed(found, bad)
    front = points([0.3, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01])
    quiet = front.iloc[[3]].assign(name="trial 3, gate noise 0", kind=frontier.CHANGED, val_ce=1e-4, test_ce=0.005)
    both = pd.concat([front, quiet.assign(test_accuracy=0.999, gate_noise=0.0)], ignore_index=True)
    best = frontier.best(both, RoutingTask())["any"]
    assert best["name"] == "trial 3, gate noise 0" and budgets.settings(best).endswith("gate noise 0, 800 steps")
    assert "99.5 % right is reached by trial 3, gate noise 0 for 8.0" in budgets.law_sentences(both)
    runs = pd.DataFrame([dict(name=name, seed=seed, test_accuracy=score + seed / 100) for seed in range(4)
                         for name, score in (("trial 3", 0.9), ("trial 3, gate noise 0", 0.92))])  # fmt: skip
    about = {"changed": {"trial 3, gate noise 0": "trial 3"}}
    same = runs[runs["name"] != "trial 3"].assign(gate_noise=0.0)
    pooled = frontier.pooled(pd.concat([same, same.assign(name="trial 3: without noise")]), about)
    assert (pooled["name"] == "trial 3, gate noise 0").sum() == 8 and pooled["seed"].nunique() == 8
    table = budgets.changed_table(both, runs, {"trial 3, gate noise 0": "trial 3"}).splitlines()
    assert len(table) == 3 and "+2.0 [" in table[2]


def test_a_study_over_cost_is_confirmed_by_its_own_notebook_and_no_other_study(project, run_here, capsys):
    (project / "cost.yaml").write_text(
        "d: [4]\nrank: [2]\nbatch_size: [4]\nn_layers: [1]\nseq_len: [8]\nn_steps: {low: 2, high: 60, log: true}\n"
    )
    project.shorten_report()
    how = dict(objective="ce_cost", pruner="equal_cost", space="cost.yaml", n_workers=1)
    run_here(project, "tune", study_name="front", n_replicas=2, n_trials=6, **how)
    small = dict(
        study_name="front",
        looks="2,4",
        changed="gate_noise=0",
        n_test=64,
        n_workers=1,
        times="0.001,1",
        timed_minutes=0.01,
    )
    shown = " ".join(text.data for text in run_here(project, "frontier", **small) if text)
    for said in (
        "The best that was trained again",
        "Beside the published trial 2",
        "You have",
        "not run",
        "Left out",
        "gate noise 0",
    ):
        assert said in shown
    front = pd.read_csv(project / "reports" / ".front.new" / "front.csv")
    following = yaml.safe_load((project / "reports" / ".front.new" / "next_space.yaml").read_text())
    assert following["gate_noise"] == [0.0, 1.0]
    assert set(front["kind"].fillna("")) == {frontier.FRONT, frontier.RIVAL, frontier.CHANGED, ""}
    with pytest.raises(InputError, match=r"frontier\.ipynb confirms such a study"):
        run_here(project, "confirm", study_name="front")
    facts = report.load("front", f"sqlite:///{project}/reports/front/optuna_studies/ctbprn_study.db")
    assert facts.confirmed is None  # its own report is of the search alone
    capsys.readouterr()


def test_a_hypervolume_is_the_area_that_a_front_dominates():
    rng = np.random.default_rng(0)
    points, reference = rng.random((12, 2)), np.array([0.9, 0.8])
    samples = rng.random((200_000, 2)) * reference
    dominated = ((points[:, None] <= samples[None]).all(-1)).any(0).mean() * reference.prod()
    assert samplers.hypervolume(points, reference) == pytest.approx(dominated, abs=0.005)
    assert samplers.hypervolume(points, np.array([0.0, 0.0])) == 0


def test_samplers_are_compared_on_the_same_searches(reports, small_task, monkeypatch):
    monkeypatch.setattr(search, "cost_space", lambda task: {
        "d": [4], "batch_size": [2, 4], "n_layers": [1], "rank": [2], "seq_len": [4],
        "n_steps": {"low": 1, "high": 6, "log": True}})  # fmt: skip
    budget = search.Budget(4, 1, n_evals=1, n_validation=32)
    fronts = {
        (name, seed): samplers.front_of(name, seed, 3, 1e9, small_task, budget)
        for name in samplers.SAMPLERS
        for seed in (0, 1)
    }
    made = samplers.table(fronts)
    assert len(made) == 4 and (made["hypervolume"] >= 0).all()
    assert "over 2 seeds" in samplers.sentence(made)


def test_reports_of_the_same_task_name_the_best_for_its_cost(reports):
    task, front = RoutingTask(), points([0.3, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01])
    assert frontier.known(task.description) is None
    (reports / "front").mkdir(parents=True)
    frontier.keep(front, task, reports / "front" / "front.json")
    found = frontier.known(task.description)
    assert found["study"] == "front" and found["any"]["name"] == "trial 7"
    assert found["equal"]["test_accuracy"] == pytest.approx(0.97)
    assert frontier.known(task.description, but="front") is None
    assert frontier.known(RoutingTask(n_areas=3).description) is None


def test_the_next_space_holds_the_front_and_goes_on_where_it_ends(small_task, tmp_path):
    space = search.cost_space(small_task)
    front = trials([1e9, 1e10], [0.2, 0.1]).assign(
        lr=[2e-3, 8e-3], d=[16, 32], temperature=[0.6, 1.9], n_steps=[200, 20000]
    )
    front = front.assign(rank=8, batch_size=16, seq_len=small_task.n_tokens, weight_decay=0.01)
    found = frontier.next_space(front, space)
    assert found["d"] == [16, 24, 32] and found["rank"] == [8] and found["n_steps"]["high"] == 80_000
    assert found["lr"]["low"] == pytest.approx(2e-3 / 1.5) and found["lr"]["high"] == pytest.approx(1.2e-2)
    assert 0 < found["temperature"]["low"] < 0.6 and found["temperature"]["high"] > 1.9
    (tmp_path / "next_space.yaml").write_text(yaml.safe_dump(found))
    assert search.load_space(tmp_path / "next_space.yaml", small_task, space) == found
