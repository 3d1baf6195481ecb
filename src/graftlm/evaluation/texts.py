"""Scores of written answers against references: ROUGE-L, chrF, BLEU and exact match, by the libraries that define them.

ROUGE-L is rouge-score's F-measure without stemming (Lin 2004), chrF and BLEU are sacrebleu's (Popović 2015; Post 2018).
ROUGE-L, chrF and exact match are means over rows, so that they have intervals; BLEU is that of the whole set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graftlm.errors import EnvironmentFault, Finding
from graftlm.evaluation.statistics import mean_interval

__all__ = ["ROW_MEASURES", "answer_rows", "answer_scores", "need_text_metrics"]

#: What is measured row by row, with the name for people.
ROW_MEASURES = {"rouge_l": "ROUGE-L", "chrf": "chrF", "exact": "exact match"}


def need_text_metrics() -> None:
    """Raise EnvironmentFault where sacrebleu or rouge-score is not installed, before anything expensive."""
    _load()


def _load() -> tuple[Callable[..., Any], Any]:
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        message = f"scores of written answers need {error.name}, which is not installed"
        raise EnvironmentFault(Finding("E130", message, fix="pip install 'graftlm[scores]'")) from None
    return RougeScorer, sacrebleu


def answer_rows(written: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """The scores from 0 to 1 of each written answer, by measure.

    Example:
        >>> answer_rows(["the cat sat"], ["the cat sat"])["rouge_l"]
        [1.0]
    """
    scorer, sacrebleu = _load()
    rouge = scorer(["rougeL"])
    pairs = list(zip(written, references, strict=True))
    return {
        "rouge_l": [float(rouge.score(reference, text)["rougeL"].fmeasure) for text, reference in pairs],
        "chrf": [float(sacrebleu.sentence_chrf(text, [reference]).score) / 100 for text, reference in pairs],
        "exact": [float(" ".join(text.split()) == " ".join(reference.split())) for text, reference in pairs],
    }


def answer_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means of the row scores with `_low` and `_high` of their 95 % intervals, and `bleu` of the whole set; 0 to 1."""
    _, sacrebleu = _load()
    found: dict[str, float] = {}
    for name, values in answer_rows(written, references).items():
        estimate = mean_interval(values)
        found |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    found["bleu"] = float(sacrebleu.corpus_bleu(list(written), [list(references)]).score) / 100
    return found
