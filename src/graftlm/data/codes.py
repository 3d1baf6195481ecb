"""The stable codes of everything this room reports, and which of them a user may waive."""

from __future__ import annotations

__all__ = ["CODES", "WAIVABLE"]

CODES: dict[str, str] = {
    "D101": "the data file does not exist",
    "D102": "a folder has no data file",
    "D103": "the kind of file is unknown, or not the one that was named",
    "D104": "the file is empty, or no row of it is left",
    "D105": "a line is not valid JSON or CSV",
    "D106": "the file is not UTF-8",
    "D107": "a row has more or fewer fields than the header",
    "D108": "the header has a column without a name, or one name twice",
    "D109": "a JSON value is not an object with named columns",
    "D110": "the columns are not those that the task needs",
    "D111": "the columns can be understood in several ways",
    "D112": "a mapping names an unknown role or a column that is not there",
    "D113": "the Parquet file is damaged",
    "D114": "the files of a folder do not belong together",
    "D115": "rows of a source are used as often as its weight says",
    "D116": "a data set cannot be fetched from a hub",
    "D120": "a value is missing where text is wanted",
    "D121": "a value has the wrong type",
    "D122": "a text is empty",
    "D123": "a conversation is not a list of messages with role and content",
    "D124": "a conversation has no assistant turn, so nothing of it would be trained",
    "D125": "a message has a role that no one knows",
    "D126": "labels differ only by case or space",
    "D127": "a label has one row only",
    "D128": "there is one label only, so nothing can be learnt",
    "D129": "the label column looks like free text or measurements",
    "D130": "rows occur more than once",
    "D131": "eval rows are also in train",
    "D132": "eval has labels that train does not have",
    "D133": "there are too few rows for an eval split",
    "D134": "the same text has different labels",
    "D135": "only the first rows were read",
    "D136": "rows were left out because they are faulty",
    "D140": "the chat template rewrites earlier turns, so what is trained cannot be told",
    "D141": "the chat template refuses a conversation",
    "D142": "no token would be trained",
    "D143": "rows lose their whole answer at max_length",
    "D144": "the tokenizer cannot say which characters a token stands for",
    "D145": "a text contains a control token of the tokenizer",
    "D146": "rows are longer than max_length and were cut",
    "D147": "the chat template ends assistant turns with nothing, so the model would not learn to stop",
    "D148": "conversations became one training row for each assistant turn",
    "D149": "the tokenizer has no chat template, so a built-in one is used",
    "D150": "the first token of an answer also holds the end of the prompt, so generation will see other tokens",
    "D160": "an answer is not among the row's choices, or there are too few of these",
    "D161": "a row has not as many tags as tokens",
    "D162": "a value is not a number where one is wanted",
    "D163": "chosen and rejected answer are the same",
    "D164": "a conversation of a preference has no answer at its end, or two different questions",
    "D165": "rows are left out because an answer of theirs is cut away at max_length",
    "D166": "a prompt template is broken, or names a column that is not there",
    "D167": "a label has no word in data.label_words",
}
"""Code to meaning."""

WAIVABLE = frozenset({"D126", "D127", "D129", "D131", "D132"})
"""Findings that are a judgement: with the code waived they become notes."""
