"""`write_report`: one self-contained HTML page on what a run has learned, and its figures as PNG files."""

from __future__ import annotations

from .baseline import independent_baseline, summary_sentence
from .page import write_report

__all__ = ["independent_baseline", "summary_sentence", "write_report"]
