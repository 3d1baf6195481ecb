"""The laboratory: methods compared on the same rows with the same means, and the one that fits chosen.

Example:
    >>> from graftlm.comparison import compare
    >>> found = compare("tickets.csv", methods=["lora", "ia3"], seeds=3)                        # doctest: +SKIP
    >>> found.folder, found.contestants[0]["score"]                                             # doctest: +SKIP
"""

from graftlm.comparison.choosing import Choice, choose
from graftlm.comparison.comparing import Comparison, compare
from graftlm.comparison.settings import ComparisonSettings

__all__ = ["Choice", "Comparison", "ComparisonSettings", "choose", "compare"]
