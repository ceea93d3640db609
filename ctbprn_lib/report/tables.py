"""The files beside a report: every table as CSV, spaces as YAML, and the study as a pickle."""

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import optuna
import yaml

from ctbprn_lib import InputError, files
from ctbprn_lib.evidence import NOT_TESTED
from ctbprn_lib.report.comparisons import CLAIMS, VERDICTS, Decision
from ctbprn_lib.report.facts import Facts
from ctbprn_lib.report.text import claims_table, render
from ctbprn_lib.search import load_study
from ctbprn_lib.storage import study_folder


def write_tables(facts: Facts, folder: Path) -> None:
    """Write the tables, spaces and settings of a report to a folder; raw_data in report.md.j2 lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"optuna_results_detailed": facts.trials}
    spaces = {"space": facts.space}
    if c := facts.confirmed:
        tables |= {"confirmed": c.runs, "comparisons": c.comparisons.table, "importance": facts.importance}
        spaces["next_space"] = c.next_space
        if c.decisions:
            tables["claims"] = claims_table(c.decisions)
        (folder / "about.json").write_text(json.dumps(c.about, indent=1) + "\n", encoding="utf-8")
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    for name, space in spaces.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(space, sort_keys=False), encoding="utf-8")


def write_study(study_name: str, storage_url: str, folder: Path) -> None:
    """Write optuna_studies/ctbprn_study.pkl to a folder: the study with its trials, but not the way to a database."""
    copy = optuna.storages.InMemoryStorage()
    kept = load_study(study_name, storage_url)._storage
    optuna.copy_study(from_study_name=study_name, from_storage=kept, to_storage=copy)
    path = folder / "optuna_studies" / "ctbprn_study.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(optuna.load_study(study_name=study_name, storage=copy), file)


def recorded_claims(study_name: str, decided: Mapping[str, Decision]) -> Iterator[tuple[str, str, str, str]]:
    """(claim, decided by, verdict, detail) of every claim, from reports/<study_name>/claims.csv if that is there.

    decided: {record: Decision}, which is newer. Raises InputError for a file without a verdict on each claim.
    """
    path = study_folder(study_name) / "claims.csv"
    table = files.table(path, ("claim", "verdict", "detail"), {}) if path.exists() else None
    for claim in CLAIMS:
        verdict, detail = NOT_TESTED, ""
        if table is not None:
            is_verdict = table["verdict"].str.startswith((*VERDICTS, "the same within"))  # so many points
            row = table[is_verdict & (table["claim"] == claim.quote)]
            if len(row) != 1:
                raise InputError(f"{path}: expected one row with a verdict on {claim.quote!r}, got {len(row)}")
            verdict, detail = row["verdict"].item(), row["detail"].item()
        if claim.record in decided:
            decision = decided[claim.record]
            verdict, detail = decision.verdict, render(None, "claim_detail", decision)
        yield claim.quote, claim.decided_by, verdict, detail
