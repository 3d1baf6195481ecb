"""Scores and sample outputs: losses, classification metrics with intervals, honest baselines, generated text."""

from graftlm.evaluation.baselines import majority_baseline, probe_baseline, tfidf_baseline
from graftlm.evaluation.classes import Prediction, calibration, classification_scores, classify_texts
from graftlm.evaluation.ensemble import Ensemble, ensemble
from graftlm.evaluation.generating import generate_texts, stream_text
from graftlm.evaluation.harness import harness_scores, need_harness
from graftlm.evaluation.losses import losses, text_scores
from graftlm.evaluation.numbers import tell_numbers
from graftlm.evaluation.spans import tag_words
from graftlm.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    crossed_mean,
    crossed_test,
    holm,
    mean_interval,
    paired_test,
    verdict_on,
)
from graftlm.evaluation.texts import answer_scores

__all__ = [
    "Ensemble",
    "Estimate",
    "Prediction",
    "answer_scores",
    "bootstrap_interval",
    "calibration",
    "classification_scores",
    "classify_texts",
    "crossed_mean",
    "crossed_test",
    "ensemble",
    "generate_texts",
    "harness_scores",
    "holm",
    "losses",
    "majority_baseline",
    "mean_interval",
    "need_harness",
    "paired_test",
    "probe_baseline",
    "stream_text",
    "tag_words",
    "tell_numbers",
    "text_scores",
    "tfidf_baseline",
    "verdict_on",
]
