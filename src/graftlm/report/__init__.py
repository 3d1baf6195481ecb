"""The report of a finished run: `report.html` and a model card, written from the files of the run folder alone.

Example:
    >>> from graftlm.report import write_card, write_report
    >>> write_report(Path("runs/faq-1"))                                          # doctest: +SKIP
    PosixPath('runs/faq-1/report.html')
"""

from .card import write_card
from .folder import CODES
from .page import write_report

__all__ = ["CODES", "write_card", "write_report"]
