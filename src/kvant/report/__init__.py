"""Stored results as a page that a person can read: accuracy, memory and speed of KV formats.

stored.py    which kind a file is, what is read of it
names.py     formats for people, and their sizes
tasks.py  fidelity.py  speed.py    results measured alike, as charts and tables
verdict.py   which format to take       report.py    all of it, in order
charts.py  drawing.py    the pictures   page.py  markdown.py    the documents
"""

from kvant.report.markdown import render_markdown
from kvant.report.page import render_page
from kvant.report.report import Report, make_report
from kvant.report.stored import read_results

__all__ = ["Report", "make_report", "read_results", "render_markdown", "render_page"]
