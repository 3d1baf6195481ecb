"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "A120": "the adapter does not say which base it belongs to",
    "A121": "the adapter is a classifier that does not name its classes",
    "E102": "the folder of the run cannot be made or written to",
    "E103": "the disk has too little space left to start a run",
    "E104": "a file could not be written in the middle of a run: the disk is full or failed",
    "E105": "the run needs more memory than the machine has",
    "U103": "the folder holds a run with other settings or other rows",
    "U104": "the folder holds this run already, and neither --resume nor another folder is given",
    "U105": "the run is done, so there is nothing to resume",
    "U106": "the folder has no run that could be resumed",
    "U107": "the folder for a new run holds other files",
    "U108": "the run has not finished, so it has no adapter yet",
    "U109": "the data or the base changed since the run was started, so it cannot be resumed",
    "U110": "training in several processes is not supported in this version",
    "U111": "the loss or the gradient of a step is NaN or infinite",
    "U112": "the adapter has nothing to train",
    "U113": "a part of the adapter has no influence on the loss, so it would never be trained",
    "U114": "the held-out loss is NaN or infinite",
    "U120": "the checkpoints to resume from are damaged",
    "U121": "a base model is given for evaluation without rows that it can be scored on",
    "U122": "the run's data changed since, so its held-out rows cannot be told any more",
    "U123": "options for a file with rows are given without such a file",
    "U124": "two models cannot be compared: they have other tasks, labels or tokens",
    "U125": "a model cannot be compared on rows that it was trained on",
    "U126": "the evaluation harness asks language models, and this model is none",
    "U130": "bundled data of that name do not exist",
    "U131": "--resume is given without the folder of the run",
    "U132": "max_length is more tokens than the base can take",
    "U133": "no rows are left for evaluation",
    "U134": "data.waive names a code that cannot be waived",
    "U135": "the method's virtual tokens leave no room for a row in the base's context",
    "U136": "texts cannot be packed into one row with this task, method or base",
    "U140": "the reward that answers are to be learnt by is missing or cannot be had",
    "U141": "the reward failed on an answer, or gave no finite number",
    "U142": "the reward of an adapter cannot be computed without its owner's code",
    "U143": "answers as long as they may be leave no room for a prompt",
}
"""Code to meaning."""
