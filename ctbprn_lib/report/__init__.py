"""The report of a study: load reads its facts, render writes a section of it, write_tables the files beside it.

facts.py has the facts, comparisons.py the tests and verdicts, report.md.j2 every sentence, claims.yaml the original's
claims, text.py the form of numbers, figures.py the pictures, tables.py the files, publish.py the pages.
"""

from ctbprn_lib.report.facts import Facts, load
from ctbprn_lib.report.tables import write_study, write_tables
from ctbprn_lib.report.text import render, sections

__all__ = ["Facts", "load", "render", "sections", "write_study", "write_tables"]
