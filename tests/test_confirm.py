"""Confirmation and ablation: fresh seeds, a plan that covers the space, and nothing trained twice."""

import json
import math
from dataclasses import replace

import numpy as np
import optuna
import pytest

from ctbprn_lib import InputError, confirm, evidence, search, storage, tasks
from ctbprn_lib.model import CTBPRN
from ctbprn_lib.scoring import score
from ctbprn_lib.train import Budget, Hyperparameters, fit

LOOKS = evidence.Schedule((3, 6), (0.5, 0.5))
SMALL = {"lr": {"low": 1e-3, "high": 1e-2, "log": True}, "d": [4, 8], "rank": [2], "temperature": [1.0],
         "batch_size": [4], "seq_len": [4, 8]}  # fmt: skip
BUDGET = Budget(4, 2, n_evals=2, n_validation=64, precision="fp32")
TUNED = ("made", 4, dict(task=tasks.RoutingTask(n_areas=2, n_features=8, n_tokens=8), space=SMALL, budget=BUDGET))


@pytest.fixture
def confirmation(study, small_task):
    return confirm.Confirmation(study, small_task, LOOKS, n_test=64)


def records_of(confirmation):
    """{key: record} of what is done."""
    return confirm._by_key(confirmation.study)


def test_the_candidates_are_the_best_trials_the_published_two_and_the_defaults(study, small_task):
    trials = search.records(study)
    runs = confirm.candidates(trials, small_task, 4, n_top=1)
    best = {f"trial {trials.loc[trials['val_accuracy'].idxmax(), 'trial']}",
            f"trial {trials.loc[trials['val_ce'].idxmin(), 'trial']}"}  # fmt: skip
    assert {run.role for run in runs} == best | {"published trial 1", "published trial 2", "defaults"}
    assert all(run.hyperparameters.seq_len <= small_task.n_tokens and run.n_steps == 4 for run in runs)
    for run in runs:
        if run.role.startswith("trial"):
            params = study.trials[int(run.role.split()[1])].params
            assert all(getattr(run.hyperparameters, name) == params[name] for name in SMALL)
    fixed = confirm.candidates(trials, small_task, 4, n_top=1, space={"d": [16], "lr": [0.1, 0.2], "n_layers": [1]})
    assert fixed[-1].hyperparameters == replace(Hyperparameters(), d=16, n_layers=1, seq_len=small_task.n_tokens)


def test_an_ablation_moves_one_thing_at_a_time_through_four_levels_and_past_an_end_where_the_best_lies():
    task = tasks.RoutingTask()
    space = search.default_space(task)
    best = confirm.Run("trial 3", Hyperparameters(lr=9.9e-3, d=96, rank=4, temperature=0.51, seq_len=128), 500)
    runs = confirm.ablations(best, space, task)
    by_factor = {}
    for run in runs:
        by_factor.setdefault(run.factor, []).append(run)
        changed = {name for name in space if getattr(run.hyperparameters, name) != getattr(best.hyperparameters, name)}
        assert changed <= {run.factor.removesuffix(", equal samples")}
        assert run.base == "trial 3"
    for name in space:
        levels = [run.level for run in by_factor[name]]
        assert len(levels) >= 4 and sorted(set(levels)) == levels
        assert getattr(best.hyperparameters, name) in levels
    assert max(r.level for r in by_factor["lr"]) > 1e-2 and max(r.level for r in by_factor["d"]) > 96
    assert min(r.level for r in by_factor["temperature"]) < 0.5 and min(r.level for r in by_factor["rank"]) < 4
    assert max(r.level for r in by_factor["seq_len"]) == 128
    equal = {run.n_steps * run.level for run in by_factor["batch_size, equal samples"]}
    assert max(equal) - min(equal) <= 64
    assert [run.n_steps for run in by_factor["n_steps"]] == [250, 500, 1000, 2000]


def test_a_confirmed_score_is_that_of_a_training_with_seeds_that_tuning_never_had(confirmation, small_task):
    run = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 4)
    assert confirmation.train([run])
    record = records_of(confirmation)[confirmation.key(run)]
    assert len(record["test_accuracy"]) == 3
    seeds = np.random.SeedSequence(0, spawn_key=(confirm.CONFIRMING,))
    again = fit(run.hyperparameters, small_task, Budget(4, 3, n_evals=1, n_validation=64, precision="fp32"), seeds)
    expected = score(again.model, small_task, "test", 64, 8)
    assert record["test_ce"] == expected["test_ce"].tolist()
    used = [np.random.SeedSequence(0, spawn_key=(search.TUNING, n)).generate_state(2, np.uint64) for n in range(1000)]
    assert not set(seeds.generate_state(2, np.uint64).tolist()) & set(np.ravel(used).tolist())


def test_the_base_is_measured_afresh_when_it_is_ablated(confirmation):
    hp = Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8)
    chosen = confirm.Run("trial 3", hp, 2)
    own = [run for run in confirm.ablations(chosen, SMALL, confirmation.task) if run.name == "trial 3 again"]
    assert len(own) == len(SMALL) + 2  # its own level is one run, whatever is moved
    confirmation.train([chosen, *own])
    records = records_of(confirmation)
    assert len(records) == 2
    assert records[confirmation.key(chosen)]["test_ce"] != records[confirmation.key(own[0])]["test_ce"]


def test_a_later_block_has_seeds_of_its_own_and_continues_the_first(confirmation):
    run = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 4)
    confirmation.train([run])
    first = confirmation.scores([run])["test_ce"]["defaults"]
    confirmation.train([run], seeds={"defaults": 6})
    both = confirmation.scores([run])["test_ce"]["defaults"]
    assert both[:3].tolist() == first.tolist() and len(set(both.tolist())) == 6
    confirmation.record_plan(plan_of("defaults", "other"), [run])
    rows, about = confirm.records("made")
    assert rows["seed"].tolist() == [0, 1, 2, 3, 4, 5] and rows["test_ce"].tolist() == both.tolist()
    assert about["n_seed_runs"] == 6 and about["out_of_time"] is False


def plan_of(*names, paired=True):
    """A plan with one question: whether the first configuration is better than the second."""
    return evidence.Plan((evidence.Question("one", (evidence.Contrast(*names, paired),)),), LOOKS)


def test_a_machine_of_another_kind_goes_on_with_the_same_runs(confirmation, study, small_task, monkeypatch):
    run = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 2)
    confirmation.train([run])
    before = records_of(confirmation)
    monkeypatch.setattr(confirm, "resolve_precision", lambda precision, device: "bf16")
    for recorded in (True, False):  # False: the confirmation was begun before this was recorded
        joined = confirm.Confirmation(study, small_task, LOOKS, n_test=64)
        joined.train([run], lambda *words: pytest.fail("trained again"))
        assert joined.key(run) == confirmation.key(run) and records_of(joined) == before
        if recorded:
            joined.study.set_user_attr("began_on", None)


def test_runs_that_failed_are_tried_again(confirmation):
    run = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 2)
    key = confirmation.key(run)
    failed = dict(state=optuna.trial.TrialState.FAIL, user_attrs={"key": key, "failure": "oom"})
    confirmation.study.add_trial(optuna.create_trial(**failed))
    done = []
    confirmation.train([run], lambda *words: done.append(words))
    assert len(done) == 1
    confirmation.study.add_trial(optuna.create_trial(**failed))  # by a worker beside this one
    confirmation.train([run], lambda *words: pytest.fail("trained again"))
    confirmation.record_plan(plan_of("defaults", "other"), [run])
    assert confirm.records("made")[0]["test_ce"].tolist() == records_of(confirmation)[key]["test_ce"]


def test_what_is_done_is_kept_and_only_the_rest_is_trained(confirmation, monkeypatch):
    runs = [confirm.Run(str(n), Hyperparameters(lr=n * 1e-3, d=4, rank=2, batch_size=4, seq_len=8), 2) for n in (1, 2)]
    confirmation.train(runs[:1])
    first = records_of(confirmation)
    done = []
    confirmation.train(runs, lambda record, n, total: done.append((n, total)))
    assert done == [(2, 2)] and records_of(confirmation).items() > first.items()
    monkeypatch.setattr(confirm, "fit", lambda *_, **__: pytest.fail("trained again"))
    confirmation.train(runs)
    other = confirm.Confirmation(confirmation_study(confirmation), confirmation.task, n_test=64)
    assert other.key(runs[0]) != confirmation.key(runs[0])


class Scripted(confirm.Confirmation):
    """A confirmation whose scores are written beforehand: {configuration: mean}; nothing is trained."""

    def train(self, runs, on_done=None, seeds=None):
        for run in runs:
            self.have[run.name] = max(self.have.get(run.name, 0), (seeds or {}).get(run.name, self.block))
        self.trained.append(dict(seeds or {}))
        return True

    def scores(self, runs):
        rng = np.random.default_rng(0)
        noise = {run.name: rng.normal(0, 0.02, 99)[: self.have.get(run.name, 0)] for run in runs}
        values = {run.name: self.means[run.name] + noise[run.name] for run in runs if self.have.get(run.name)}
        return {"test_accuracy": values, "route_accuracy": values, "test_ce": values}


@pytest.fixture
def scripted(study, small_task):
    def make(means, **limits):
        looks = evidence.Schedule((4, 8, 16), (0.4, 0.3, 0.3))
        made = Scripted(study, small_task, looks, n_test=8192, **limits)
        made.means, made.have, made.trained = means, {}, []
        runs = [confirm.Run(name, Hyperparameters(d=4, rank=2, seq_len=8), 2) for name in means]
        questions = [evidence.Question(name, (evidence.Contrast(name, "base", False),)) for name in list(means)[1:]]
        made.train(runs)
        return made, runs, evidence.Plan(tuple(questions), looks)

    return make


def test_seeds_go_to_what_is_not_decided_until_it_is(scripted):
    made, runs, plan = scripted({"base": 0.90, "far": 0.70, "near": 0.885})
    looks = []
    answers = made.decide(plan, runs, on_look=lambda *words: looks.append(words))
    assert (answers["far"].verdict, answers["near"].verdict) == (evidence.WORSE, evidence.WORSE)
    assert made.have["far"] == 4 and made.have["near"] > 4  # one look was enough for the large effect
    assert not looks[-1][1] and all(purchases for _, purchases in looks[:-1])


@pytest.mark.parametrize("limit", [13, 16])
def test_no_more_seeds_are_bought_than_allowed(scripted, limit):
    made, runs, plan = scripted({"base": 0.90, "a": 0.899, "b": 0.894}, n_seed_runs=limit)
    answers = made.decide(plan, runs)
    assert sum(made.have.values()) <= limit
    assert not all(answer.decided for answer in answers.values())
    more, runs, plan = scripted({"base": 0.90, "a": 0.899, "b": 0.894})
    more.decide(plan, runs)
    assert sum(more.have.values()) > limit


def test_another_plan_than_the_recorded_one_is_refused_and_nothing_is_lost(confirmation):
    run = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 4)
    confirmation.train([run])
    confirmation.record_plan(plan_of("defaults", "other"), [run], n_top=1)
    confirmation.record_plan(plan_of("defaults", "other"), [run], n_top=1, best={"ce": "defaults", "accuracy": "x"})
    before = confirm.records("made")
    with pytest.raises(InputError, match="questions of this confirmation were recorded before it began, and these are"):
        confirmation.record_plan(plan_of("defaults", "another"), [run])
    after = confirm.records("made")
    assert after[0].equals(before[0]) and after[1] == before[1]


@pytest.mark.parametrize(
    ("looks", "message"),
    [
        ("8,8", "looks must rise"),
        ("16,8", "looks must rise"),
        ("8,x", "numbers of seeds between commas"),
        ("", "numbers of seeds between commas"),
        ("1,2", "of at least 2"),
    ],
)
def test_looks_that_are_none_are_refused(looks, message):
    with pytest.raises(InputError, match=message):
        evidence.schedule_of(looks)


def test_looks_must_be_whole_blocks(study, small_task):
    with pytest.raises(InputError, match="multiples of the first"):
        confirm.Confirmation(study, small_task, evidence.schedule_of("4,6"))
    assert evidence.schedule_of("8,16,32,64,128") == evidence.SCHEDULE
    assert evidence.schedule_of("4,8").weights == (0.5, 0.5)


def test_few_levels_are_those_nearest_to_the_best():
    assert confirm.nearest([1, 2, 4, 8], 2, 2) == [1, 2]
    assert confirm.nearest([1, 2, 4, 8], 1, 2) == [1, 2]
    assert confirm.nearest([1, 2, 4, 8], 8, 3) == [2, 4, 8]
    assert confirm.nearest([1, 2, 4, 8], 4, 0) == [1, 2, 4, 8]


def test_parts_are_left_out_one_at_a_time_and_once_more_after_longer_training(confirmation):
    base = confirm.Run("trial 3", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 4)
    runs = confirm.parts(base, 8)
    assert [(run.without, run.n_steps) for run in runs] == [
        *((part, 4) for part in ("routing", "message", "noise")),
        *((part, 8) for part in ("", "routing", "message", "noise")),
    ]
    assert len({run.name for run in runs}) == len({confirmation.key(run) for run in runs}) == 7
    own = next(run for run in confirm.ablations(base, SMALL, confirmation.task) if run.name == "trial 3 again")
    confirmation.train([own, *runs[:3]])
    scores = confirmation.scores([own, *runs[:3]])["test_ce"]
    assert len({tuple(values) for values in scores.values()}) == 4  # each part changes something
    assert confirm.parts(base, 4) == runs[:3]


def confirmation_study(confirmation):
    return search.load_study(confirmation.name)


def test_what_is_saved_loads_and_scores_as_its_file_says(confirmation, small_task):
    runs = [confirm.Run(f"trial {d}", Hyperparameters(d=d, rank=2, batch_size=4, seq_len=8), 6) for d in (4, 8)]
    confirmation.train(runs, seeds={"trial 4": 6})
    records, scores = records_of(confirmation), confirmation.scores(runs)
    for run in runs:
        confirmation.save("some", run)
        content = json.loads((storage.study_folder("made") / "some.json").read_text())
        assert content["role"] == content["configuration"] == run.role
        for metric in ("test_accuracy", "test_ce"):
            assert content[metric]["seeds"] == scores[metric][run.name].tolist()
            mean, low, high = evidence.mean_interval(content[metric]["seeds"], nats=metric == "test_ce")
            assert (content[metric]["mean"], content[metric]["low"], content[metric]["high"]) == (mean, low, high)
        model = CTBPRN.load(storage.study_folder("made") / content["weights"]["file"])
        val_ce = records[confirmation.key(run)]["val_ce"]
        assert val_ce[content["weights"]["seed"]] == min(val_ce) and len(set(val_ce)) == 3
        found = score(model, small_task, "test", 64, content["hyperparameters"]["seq_len"])
        assert found["test_ce"][0] == pytest.approx(content["weights"]["test_ce"], abs=1e-6)
    means = {name: values.mean() for name, values in scores["test_ce"].items()}
    assert confirmation.best(runs)["ce"] == min(means, key=means.get)
    first = {run.name: np.mean(records[confirmation.key(run)]["test_ce"]) for run in runs}
    assert confirmation.base(runs).name == min(first, key=first.get)


def test_the_recommended_is_the_level_that_is_decided_to_be_better_by_most():
    base = confirm.Run("trial 3", Hyperparameters(), 10)
    runs = confirm.ablations(base, search.default_space(tasks.RoutingTask()), tasks.RoutingTask())
    runs += confirm.parts(base, 10)
    names = ["trial 3: n_steps 20", "trial 3: n_steps 40", "trial 3: d 96", "trial 3: without noise"]
    questions = [evidence.Question(n, (evidence.Contrast(n, "trial 3 again", True),)) for n in names]
    plan = evidence.Plan(tuple(questions))

    def answer(verdict, effect):
        return evidence.Answer(verdict, looks=(evidence.Look(8, 0.4, effect, 0.01, 7, 0, 0, 0),))

    verdicts = [("better", 0.01), ("better", 0.02), ("undecided", 0.05), ("better", 0.03)]
    answers = {name: answer(*verdict) for name, verdict in zip(names, verdicts, strict=True)}
    assert evidence.BETTER == "better"
    assert confirm.recommended(base, runs, plan, answers).name == "trial 3: n_steps 40"
    nothing = {name: answer("worse", -0.1) for name in names}
    assert confirm.recommended(base, runs, plan, nothing).name == "trial 3 again"


def test_records_have_a_row_for_each_run_and_seed_and_chance_where_a_seed_diverged(confirmation, small_task):
    good = confirm.Run("defaults", Hyperparameters(d=4, rank=2, batch_size=4, seq_len=8), 2)
    bad = confirm.Run("", Hyperparameters(lr=1e30, d=4, rank=2, batch_size=4, seq_len=8), 3, "defaults", "lr", 1e30)
    assert confirm.records("made") == (None, None)
    confirmation.train([good, bad])
    confirmation.record_plan(plan_of("defaults", bad.name), [good, bad], baselines={"linear rule": 0.9})
    rows, about = confirm.records("made")
    assert len(rows) == 6 and about["n_seed_runs"] == 6 and about["baselines"] == {"linear rule": 0.9}
    worst = rows[rows["factor"] == "lr"]
    assert (worst["test_accuracy"] == 0.5).all() and (worst["test_ce"] == math.log(2)).all()
    assert worst["diverged_at"].notna().all() and rows.loc[rows["role"] == "defaults", "diverged_at"].isna().all()
    assert (confirmation.scores([bad])["route_accuracy"][bad.name] == 1 / small_task.n_areas).all()


def test_another_task_is_refused(study):
    with pytest.raises(InputError, match="study 'made' is of the task"):
        confirm.Confirmation(study, tasks.RoutingTask(n_features=12, n_tokens=8))


def test_confirmations_from_before_a_hyperparameter_was_added_keep_their_keys():
    """The keys are those that the code had when there were seven hyperparameters."""
    made = confirm.Confirmation.__new__(confirm.Confirmation)
    made.task, made.n_test, made.seed, made.budget = tasks.RoutingTask(), 8192, 0, Budget(500, 8, n_evals=1)
    made.began_on = ["bf16", "cpu"]
    hp = Hyperparameters(lr=0.00153, rank=16, temperature=1.71)
    assert made.key(confirm.Run("published trial 2", hp, 500)) == "c7e2956364ab520e"
    assert made.key(confirm.Run("", hp, 500, "published trial 2")) == "656a0a5605cb052e"
    assert made.key(confirm.Run("published trial 2", replace(hp, weight_decay=0.1), 500)) != "c7e2956364ab520e"
