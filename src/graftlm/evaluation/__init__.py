"""Scores and sample outputs: losses, classification metrics with intervals, honest baselines, generated text."""

from graftlm.evaluation.baselines import majority_baseline, probe_baseline, tfidf_baseline
from graftlm.evaluation.classes import Prediction, classification_scores, classify_texts
from graftlm.evaluation.ensemble import Ensemble, ensemble
from graftlm.evaluation.generating import generate_texts, stream_text
from graftlm.evaluation.losses import losses, text_scores

__all__ = [
    "Ensemble",
    "Prediction",
    "classification_scores",
    "classify_texts",
    "ensemble",
    "generate_texts",
    "losses",
    "majority_baseline",
    "probe_baseline",
    "stream_text",
    "text_scores",
    "tfidf_baseline",
]
