"""Reports of runs and comparisons: `report.html`, a model card, tables, written from the files of the folder alone.

Example:
    >>> from graftlm.report import write_card, write_report
    >>> write_report(Path("runs/faq-1"))                                          # doctest: +SKIP
    PosixPath('runs/faq-1/report.html')
"""

from .card import write_card
from .comparison import write_comparison
from .folder import CODES
from .page import write_report

__all__ = ["CODES", "write_card", "write_comparison", "write_report"]
