"""Studies that others have touched, and users' own settings: told apart, left out and named, or refused."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from crew import SPACE, question, work_for
from test_report import made

from ctbprn_lib import InputError, confirm, evidence, parameters, report, search, storage, tasks, workers
from ctbprn_lib.report import publish, text
from ctbprn_lib.train import Budget

FLOAT = optuna.distributions.FloatDistribution
WAITING, RUNNING = optuna.trial.TrialState.WAITING, optuna.trial.TrialState.RUNNING


LOOKS = evidence.Schedule((2, 4), (0.5, 0.5))
PLAN = evidence.Plan((evidence.Question("one", (evidence.Contrast("trial 0", "defaults", False),)),), LOOKS)


def begun(n_trials=0, name="s", **more):
    """A study of a few steps, with so many trials, and its question."""
    asked = question(2)
    study = search.open_study(name, **asked, **{"pruner": "none"} | more)
    if n_trials:
        search.run_trials(study, n_trials, **asked, device="cpu")
    return study, asked


def outsider(name="s"):
    """The same study as another program opens it."""
    return optuna.load_study(study_name=name, storage=storage.connect(storage.storage_url(name)))


# ---- trials of others


def test_trials_that_another_program_asked_for_are_left_out_and_named(reports):
    study, asked = begun(2)
    theirs = outsider()
    done, running, failed = (theirs.ask({"lr": FLOAT(1e-4, 1, log=True)}) for _ in range(3))
    theirs.tell(done, -5.0)  # it would be the best
    theirs.tell(failed, state=optuna.trial.TrialState.FAIL)
    search.run_trials(study, 4, **asked, device="cpu")
    assert [t.number for t in study.trials] == [0, 1, 5, 6] and study.best_trials[0].number in (0, 1, 5, 6)
    assert len(optuna.search_space.intersection_search_space(study.trials)) == len(SPACE) + 1
    theirs.tell(running, 0.1)  # nobody has ended it meanwhile
    r = report.load("s")
    assert r.trials["trial"].tolist() == [0, 1, 5, 6]
    left_out = "outside the space): trial 2 (complete), trial 3 (complete), trial 4 (fail)."
    assert left_out in report.render(r, "all_trials") and "4 trials (4 complete)" in report.render(r, "summary")
    for piece in ("best_parameters", "key_findings", "recommendations", "measured", "undecided", "reproduce"):
        assert report.render(r, piece)
    assert "-p n_trials 4 " in report.render(r, "reproduce")
    report.write_tables(r, storage.study_folder("s"))
    steps, curves = r.curves
    assert steps and set(curves["val_ce"]) <= {f"trial {n}" for n in (0, 1, 5, 6)}
    task = asked["task"]
    roles = [run.role for run in confirm.candidates(search.records(study), task, 2, 4)]
    assert {role for role in roles if role.startswith("trial")} == {f"trial {n}" for n in (0, 1, 5, 6)}


def test_another_kind_of_the_same_parameter_which_optuna_cannot_hold_is_named(reports):
    study, asked = begun()
    outsider().ask({"lr": FLOAT(0, 1)})
    with pytest.raises(InputError, match=r"study 's' cannot hold this trial, .* another kind of the same .*study_name"):
        search.run_trials(study, 1, **asked, device="cpu")


def test_what_is_enqueued_outside_the_space_is_named_and_stops_no_worker(reports):
    values = [("d", 128), ("d", 8.0), ("d", "8"), ("lr", 0.5), ("lr", float("nan")), ("lr", True), ("placebo", 2)]
    reasons = [f"{name} = {value!r} lies outside the space" for name, value in values]
    study, asked = begun(1)
    for name, value in (*values, ("n_layers", 2)):  # more than a worker would take of its own
        outsider().enqueue_trial({name: value})
    search.run_trials(study, 2, **asked, device="cpu")
    assert [t.number for t in study.trials] == [0, 9]
    shown = report.render(report.load("s"), "all_trials")
    for number, reason in enumerate((*reasons, "n_layers is not searched"), 1):
        assert f"trial {number} (fail: {text.outside(reason)})" in shown


def test_what_is_enqueued_inside_the_space_is_run_like_any_other(reports):
    study, asked = begun(1)
    outsider().enqueue_trial({"d": 8, "lr": 2e-3, "placebo": 0.5})
    search.run_trials(study, 2, **asked, device="cpu")
    assert study.trials[1].params["d"] == 8 and study.trials[1].params["lr"] == 2e-3
    assert study.foreign() == [] and study.trials[1].user_attrs["sampler"] == "tpe"
    facts = report.load("s")
    assert "1 trial was put into the queue by hand. The other trials are" in report.render(facts, "measured")
    assert "the command gives a search of the same kind, not the same trials" in report.render(facts, "reproduce")


def test_a_search_of_one_call_says_that_its_command_gives_it_again(reports):
    begun(2)
    assert "not the same trials" not in report.render(report.load("s"), "reproduce")
    begun(3)
    assert "This search was begun 2 times: the command gives" in report.render(report.load("s"), "reproduce")


def test_trials_that_wait_are_no_trials_yet(reports):
    study, asked = begun(1)
    for _ in range(3):
        outsider().enqueue_trial({"d": 8})
    search.run_trials(study, 2, **asked, device="cpu")
    assert report.load("s").trials["state"].tolist() == ["complete"] * 2
    search.run_trials(study, 3, **asked, device="cpu")
    assert [t.params["d"] for t in study.trials[1:3]] == [8, 8]


def test_a_trial_whose_end_another_program_told_is_done_anew(reports):
    """It took the lost trial that waited, and told its end without any record."""
    study, asked = begun(1)
    workers.fail(study, workers.begin(study, work_for(2)))
    workers._care_for_the_lost(study, 2)
    theirs = outsider()
    taken = theirs.ask()
    assert taken.user_attrs["retry_of"] == 1
    theirs.tell(taken, 0.0)
    search.run_trials(study, 2, **asked, device="cpu")
    assert [t.number for t in study.trials if t.state in workers.FINISHED] == [0, 3]
    assert study.trials[-1].user_attrs["retry_of"] == 1 and [t.number for t in study.foreign()] == [2]


# ---- studies of others


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "maximize"]])
def test_a_study_made_beforehand_for_another_direction_is_refused(reports, directions):
    kept = storage.connect(storage.storage_url("s"))
    optuna.create_study(study_name="s", storage=kept, directions=directions)
    with pytest.raises(InputError, match=f"made by another program .*it is to {' and '.join(directions)}"):
        begun()
    assert optuna.load_study(study_name="s", storage=kept).user_attrs == {}


def test_a_study_in_which_another_program_has_worked_is_refused_and_an_empty_one_is_taken(reports):
    kept = storage.connect(storage.storage_url("s"))
    theirs = optuna.create_study(study_name="s", storage=kept)
    optuna.create_study(study_name="empty", storage=storage.connect(storage.storage_url("empty")))
    theirs.optimize(lambda trial: trial.suggest_float("lr", 0, 1), 1)
    with pytest.raises(InputError, match=r"made by another program \(1 trials"):
        begun()
    begun(1, "empty")


@pytest.mark.slow
def test_the_confirmation_of_a_deleted_study_is_told_apart(reports):
    study, asked = begun(1)
    first = confirm.Confirmation(study, asked["task"], LOOKS, 64, device="cpu")
    runs = confirm.candidates(search.records(study), asked["task"], 2, 1)[:2]
    first.train(runs)
    first.record_plan(PLAN, runs, baselines=asked["task"].baselines())
    assert len(confirm.records("s")[0]) == 4
    optuna.delete_study(study_name="s", storage=study._storage)
    again, _ = begun(2)
    r = report.load("s")
    assert not r.confirmed and confirm.records("s") == (None, None)
    assert "a confirmation of an earlier study of this name, which was deleted" in report.render(r, "summary")
    with pytest.raises(InputError, match=r"confirmation of a study 's' that has been deleted; delete it too"):
        confirm.Confirmation(again, asked["task"], LOOKS, 64, device="cpu")
    optuna.delete_study(study_name="s/confirm", storage=again._storage)
    assert confirm.Confirmation(again, asked["task"], LOOKS, 64, device="cpu").train(runs[:1])
    assert "earlier study" not in report.render(report.load("s"), "summary")


def test_a_confirmation_made_beforehand_is_taken_if_it_is_empty_and_refused_if_it_is_for_something_else(reports):
    study, asked = begun(1)
    theirs = optuna.create_study(study_name="s/confirm", storage=study._storage)
    theirs.add_trial(optuna.create_trial(value=0.0))
    assert "earlier study" not in report.render(report.load("s"), "summary")
    assert confirm.Confirmation(study, asked["task"], LOOKS, 64, device="cpu").study.user_attrs["of"]
    optuna.delete_study(study_name="s/confirm", storage=study._storage)
    optuna.create_study(study_name="s/confirm", storage=study._storage, directions=["minimize", "maximize"])
    with pytest.raises(InputError, match="'s/confirm' that another program made for something else"):
        confirm.Confirmation(study, asked["task"], LOOKS, 64, device="cpu")


def test_what_a_deleted_study_left_in_its_folder_is_set_aside_and_not_lost(reports):
    study, _ = begun(1)
    report.write_tables(report.load("s"), reports / "s")
    (reports / "s" / "best_ce.json").write_text("{}")
    begun(1)
    assert (reports / "s" / "best_ce.json").exists()  # the same study goes on
    optuna.delete_study(study_name="s", storage=study._storage)
    begun(1)
    assert sorted(path.name for path in (reports / "s").iterdir()) == ["earlier", "optuna_studies"]
    names = {path.name for path in (reports / "s" / "earlier").glob("*/*")}
    assert names == {"best_ce.json", "optuna_results_detailed.csv", "space.yaml"}


@pytest.mark.slow
def test_a_trial_put_into_the_confirmation_by_hand_is_passed_over(reports):
    study, asked = begun(1)
    confirmation = confirm.Confirmation(study, asked["task"], LOOKS, 64, device="cpu")
    runs = confirm.candidates(search.records(study), asked["task"], 2, 1)[:1]
    confirmation.study.add_trial(optuna.create_trial(value=0.0))
    confirmation.train(runs)
    confirmation.record_plan(PLAN, runs, baselines=asked["task"].baselines())
    assert len(confirm.records("s")[0]) == 2


def test_on_a_tie_the_report_names_the_configuration_that_the_files_hold(reports):
    study, asked = begun(1)
    confirmation = confirm.Confirmation(study, asked["task"], LOOKS, 64, device="cpu")
    run = confirm.candidates(search.records(study), asked["task"], 2, 1)[0]
    # trained once for both; by their names the second would be the first
    runs = [run, replace(run, role="defaults", name="defaults")]
    confirmation.train(runs)
    best = confirmation.best(runs)
    for name, role in best.items():
        confirmation.save(f"best_{name}", next(run for run in runs if run.role == role))
    confirmation.record_plan(PLAN, runs, baselines=asked["task"].baselines(), best=best)
    files = {name: json.loads((reports / "s" / f"best_{name}.json").read_text())["role"] for name in ("accuracy", "ce")}
    about = confirmation.study.user_attrs["about"]
    for kept in (about, {name: value for name, value in about.items() if name != "best"}):  # older records lack it
        confirmation.study.set_user_attr("about", kept)
        r = report.load("s")
        assert files == r.confirmed.best == {"accuracy": "trial 0", "ce": "trial 0"}
        best = "| **trial 0** (recommended, best accuracy and CE of the candidates) |"
        assert best in report.render(r, "best_parameters")
        assert "Use trial 0: " in report.render(r, "recommendations")


def test_every_sampler_and_pruner_that_was_used_is_said(reports):
    begun(2, sampler="random")
    begun(3, sampler="nsga2", pruner="median")
    r = report.load("s")
    assert r.trials["sampler"].tolist() == ["random", "random", "nsga2"]
    assert "sampler random, pruner none and then sampler nsga2, pruner median" in report.render(r, "measured")
    first, second = (line for line in report.render(r, "reproduce").splitlines() if line.startswith("papermill"))
    assert "-p n_trials 2 " in first and "-p sampler random -p pruner none" in first
    assert "-p n_trials 3 " in second and "-p sampler nsga2 -p pruner median" in second


def test_the_command_names_the_path_that_was_given(reports, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "my data").mkdir()
    np.savez(tmp_path / "my data" / "Set 1.NPZ", x=rng.normal(size=(60, 8, 4)), y=np.arange(60) % 2, areas=list("aabb"))
    monkeypatch.chdir(tmp_path)
    os.replace("my data/Set 1.NPZ.npz", "my data/Set 1.NPZ")
    asked = dict(task=tasks.load_task("my data/Set 1.NPZ"), space=SPACE, budget=Budget(2, 2))
    name = search.study_name_for(asked["task"])
    assert name == "Set-1"
    search.run_trials(search.open_study(name, **asked), 1, **asked, device="cpu")
    assert "-p task 'my data/Set 1.NPZ' " in report.render(report.load(name), "reproduce")


@pytest.mark.slow
@pytest.mark.parametrize("n_trials", [1, 6])
def test_with_one_replica_nothing_is_told_apart(reports, n_trials):
    made(reports, n_trials, n_replicas=1, failed=False)
    r = report.load("made")
    assert "2. **With one replica a trial nothing can be told apart**" in report.render(r, "key_findings")
    assert "**The best accuracy, of one replica, stands beside " in report.render(r, "key_findings")
    assert "Welch" not in report.render(r, "key_findings") and "distinguishable" not in report.render(r, "key_findings")
    assert "Which trial is best: with one replica a trial nothing can be told apart." in report.render(r, "undecided")


# ---- users' own settings and places


def test_the_commit_is_that_of_the_projects_own_checkout(tmp_path, monkeypatch):
    """A copy in another repository, tracked there or not, and git's own variables."""
    other, copy = tmp_path / "other", tmp_path / "other" / "third"
    (copy / "ctbprn_lib").mkdir(parents=True)
    code = shutil.copy(search.__file__, copy / "ctbprn_lib")
    (copy / "notebooks").mkdir()
    monkeypatch.setattr(search, "__file__", code)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def git(*args, cwd=other):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *who, *args], cwd=cwd, check=True, capture_output=True, text=True).stdout

    def in_a_hook():
        """The commit as a git hook of the other repository sees it."""
        with monkeypatch.context() as hook:
            hook.setenv("GIT_DIR", str(other / ".git"))
            hook.setenv("GIT_WORK_TREE", str(other))
            return search.commit()

    git("init", "-q", ".")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert search.commit() == "unknown"
    git("add", ".")
    git("commit", "-q", "-m", "y")
    assert search.commit() == in_a_hook() == "unknown"
    git("init", "-q", ".", cwd=copy)
    git("add", ".", cwd=copy)
    git("commit", "-q", "-m", "z", cwd=copy)
    assert search.commit() == in_a_hook() == git("rev-parse", "--short=10", "HEAD", cwd=copy).strip()
    with Path(code).open("a") as file:
        file.write("# changed\n")
    assert search.commit() == git("rev-parse", "--short=10", "HEAD", cwd=copy).strip() + "-dirty"


PLACES = ["what? now", "50%20 off", "%3F", "#{x}[y]'\"", "a:b@c&d=e", "new\nline", "back\\slash", "é☃", " "]


@pytest.mark.parametrize("place", PLACES)
def test_a_checkout_may_lie_in_any_folder(tmp_path, monkeypatch, place):
    root = tmp_path / place
    (root / "reports").mkdir(parents=True)
    monkeypatch.setattr(storage, "REPORTS", root / "reports")
    monkeypatch.delenv("CTBPRN_STORAGE", raising=False)
    begun()
    assert (root / "reports" / "s" / "optuna_studies" / "ctbprn_study.db").is_file()
    assert search.load_study("s").trials == [] and os.listdir(tmp_path) == [place]
    assert storage.sqlite_file(storage.storage_url("s", "sqlite:///mine.db?timeout=5")) == root / "mine.db"


def test_a_folder_whose_name_is_no_text_is_refused_before_any_training(tmp_path, monkeypatch):
    root = tmp_path / os.fsdecode(b"\xff")
    (root / "reports").mkdir(parents=True)
    monkeypatch.setattr(storage, "REPORTS", root / "reports")
    with pytest.raises(
        InputError, match="a path that is no text in UTF-8 cannot hold a database; set the variable CTBPRN_STOR"
    ):
        begun()


def test_a_question_mark_that_would_cut_a_path_is_refused(reports):
    with pytest.raises(InputError, match=r"a \? in its path is written %3F"):
        storage.storage_url("s", "sqlite:////tmp/what? now/study.db")


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_a_file_system_without_locks_is_named_before_any_training(reports, monkeypatch, call):
    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(storage.fcntl, call, none)
    with pytest.raises(InputError, match=r"optuna_studies: its file system has no file locks \(No locks available\)"):
        begun()
    monkeypatch.setattr(publish, "REPORTS", reports)
    if call == "flock":
        with pytest.raises(InputError, match=r"runs: nothing can be written or locked there \(No locks available\)"):
            publish.check_folders("s")


def test_the_page_is_the_same_whatever_the_users_own_settings_are(project, tmp_path, monkeypatch):
    """IPython that shows every expression and runs a start-up file, a matplotlibrc, a locale, another folder."""
    project.shorten_report()
    monkeypatch.setattr(storage, "REPORTS", project / "reports")
    monkeypatch.delenv("CTBPRN_STORAGE", raising=False)
    made(project / "reports", 4, failed=False)

    def page():
        folder = project / "reports" / "made"
        pictures = {path.name: path.read_bytes() for path in (folder / "optuna_plots").iterdir()}
        return (folder / "report.md").read_text(), pictures

    project.publish("made")
    plain = page()
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "mine.py").write_text("import pandas, matplotlib\nmatplotlib.rcParams['font.size'] = 30\n")
    (startup.parent / "ipython_config.py").write_text("c.InteractiveShell.ast_node_interactivity = 'all'\n")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\naxes.facecolor: red\n")
    own = dict(IPYTHONDIR=str(tmp_path / "ipython"), MPLCONFIGDIR=str(tmp_path), LC_ALL="C", HOME=str(tmp_path))
    done = project.python("-c", "from ctbprn_lib.report.publish import publish; publish('made')",
                          MATPLOTLIBRC=str(tmp_path / "matplotlibrc"), **own)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert page() == plain


# ---- messages that say what to do


def test_numbers_of_yaml_without_a_point_are_numbers(tmp_path, small_task):
    (tmp_path / "s.yaml").write_text("lr: {low: 1e-4, high: 1E-2, log: true}\ntemperature: [5e-1, 2]\n")
    space = search.load_space(tmp_path / "s.yaml", small_task)
    assert space["lr"]["low"] == 1e-4 and space["lr"]["high"] == 1e-2 and space["temperature"] == [0.5, 2]


def test_files_that_are_not_there_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"mine.npz: there is no such file in {tmp_path}, where relative paths begin"):
        tasks.load_task("mine.npz")
    with pytest.raises(InputError, match=rf"uea:Mine: expected BasicMotions, .* folder is looked for in {tmp_path}"):
        tasks.load_task("uea:Mine")
    (tmp_path / "Mine").mkdir()
    monkeypatch.chdir(tmp_path / "Mine")
    for name in ("uea:.", "uea:../Mine/", f"uea:{tmp_path}/Mine"):
        with pytest.raises(InputError, match=rf"{tmp_path}/Mine/Mine_TRAIN.ts: there is no such file"):
            tasks.load_task(name)
    with pytest.raises(InputError, match="task uea:: expected BasicMotions"):
        tasks.load_task("uea:")


def test_labels_that_pandas_made_objects_of_say_how_to_save_them(tmp_path):
    x, y = np.zeros((60, 4, 4)), np.array(["walk", "run"] * 30, dtype=object)
    np.savez(tmp_path / "o.npz", x=x, y=y, areas=list("aabb"))
    with pytest.raises(InputError, match=r"o.npz: y.npy: .*Python objects.*save y.astype\(str\)"):
        tasks.load_task(str(tmp_path / "o.npz"))
    with pytest.raises(InputError, match=r"y holds Python objects.*give y.astype\(str\)"):
        tasks.ArrayTask(x, y, areas=list("aabb"))


def test_a_name_of_digits_says_how_papermill_takes_it():
    namespace = {"__annotations__": {"study_name": str}, "study_name": 2024}
    with pytest.raises(InputError, match=r"study_name must be text, .*: write -r study_name 2024"):
        parameters.check(namespace)
