"""Turns rows into examples and reports every fault of the rows at once: nothing is dropped unless that was asked for.

A fault is told once with all its rows: `3 rows have null 'content' (rows 6, 21, 41)`. With `drop_bad_rows` faulty rows
become `Rejected` instead, each with its place and reason. Duplicates are counted and reported, never dropped.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graftlm.data.codes import WAIVABLE
from graftlm.data.labels import Label, is_number, label_name, truth
from graftlm.data.reading import Rejected, Row, Table
from graftlm.data.recognise import Reading
from graftlm.data.wording import counted, kind_of, listed, number, percent, quoted, rows
from graftlm.errors import DataError, Finding, nearest

__all__ = ["Checked", "Example", "Faults", "Message", "Notes", "check", "check_overlap"]

Message = dict[str, Any]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_OTHER_NAMES |= {"observation": "tool", "function_response": "tool"}
_DROP = "--set data.drop_bad_rows=true"
_OVERLAP_MOST = 0.2
_FREE_TEXT_ROWS = 10  # with fewer rows than this, mostly distinct labels are no sign of anything


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the task sees it.

    | kind | what is filled |
    |---|---|
    | chat, pairs | `messages` |
    | documents | `texts`, one |
    | labelled | `texts`, one or two, and `label`; a tuple of labels where there may be several |
    | scored | `texts` and `label`, a number |
    | tagged | `words`, `tags`, and `texts`, the words joined |
    | choices | `messages` that ask, `answers`, and `label`, the right answer's place |
    | preferences | `messages` that ask, and `answers`, chosen and rejected |
    | prompts | `messages` that ask |
    | judged | `messages` that ask, one of `answers`, and `label`, whether it is wanted |

    `row` counts from 1; `place` is where it stands in its file; `raw` is the row as it was read.
    """

    row: int
    place: str
    raw: Row
    messages: tuple[Message, ...] = ()
    texts: tuple[str, ...] = ()
    label: Any = None
    answers: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The texts as one, a line each, or what is asked: for baselines, tables and samples."""
        return "\n".join(self.texts) or "\n".join(str(message["content"]) for message in self.messages)

    @property
    def labels(self) -> tuple[Label, ...]:
        """Every label of the row: one, several, or a tag for each word."""
        if self.tags:
            return self.tags
        return self.label if isinstance(self.label, tuple) else (self.label,)

    @property
    def key(self) -> str:
        """What two rows share when they are the same row; a label is no part of it."""
        if self.messages:
            return json.dumps(self.messages, ensure_ascii=False, sort_keys=True)
        return "\x1f".join(self.texts)


@dataclass(slots=True)
class Notes:
    """Findings on their way: those that stop the run and those that are only told."""

    waived: Collection[str] = ()
    errors: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    def error(self, code: str, message: str, place: str = "", fix: str = "", detail: tuple[str, ...] = ()) -> None:
        """Stops the run, unless the code is one that may be waived and is."""
        waived = code in self.waived and code in WAIVABLE
        (self.notes if waived else self.errors).append(Finding(code, message, place, "" if waived else fix, detail))

    def note(self, code: str, message: str, place: str = "") -> None:
        """Tells and goes on."""
        self.notes.append(Finding(code, message, place))

    def settle(self) -> None:
        """Raises every error that has come together."""
        if self.errors:
            raise DataError(self.errors)


@dataclass(frozen=True, slots=True)
class Checked:
    """The sound rows of a table, the rows left out, and how many are exact duplicates of an earlier one."""

    examples: list[Example]
    rejected: list[Rejected]
    duplicates: int


@dataclass(slots=True)
class Faults:
    """Faults of rows, grouped so that each is told once."""

    found: dict[tuple[str, str, str], list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, row: int, code: str, what: str, fix: str = "") -> None:
        """`what` follows "3 rows have": `null 'content'`."""
        self.found[code, what, fix].append(row)
        self.reasons.setdefault(row, f"{what} [{code}]")

    def report(self, notes: Notes, place: str) -> None:
        """An error for each fault, with its rows."""
        for (code, what, fix), where in self.found.items():
            verb = "has" if len(where) == 1 else "have"
            notes.error(code, f"{counted(len(where), 'row')} {verb} {what} ({rows(where)})", place, fix or _DROP)


def check(
    table: Table,
    reading: Reading,
    notes: Notes,
    *,
    drop_bad_rows: bool = False,
    merge_labels: bool = False,
    count_tokens: Callable[[str], int] | None = None,
    is_eval: bool = False,
    group: str | None = None,
) -> Checked:
    """The examples of a table; faults go to `notes`, which the caller settles when every table has been checked.

    Args:
        table: from `read_rows`.
        reading: from `recognise`.
        notes: takes errors (D104, D120 to D129) and notes (D130, D134 to D136).
        drop_bad_rows: faulty rows are left out instead of being an error.
        merge_labels: labels that differ only by case or space become the most frequent of them.
        count_tokens: says how many tokens a text has, for the message of a file without any assistant turn.
        group: a column in which every row must have a value.
        is_eval: eval rows may have one label only, or a label once.
    """
    place, faults = table.path.name, Faults()
    made = [
        _example(at, row, spot, reading, faults)
        for at, (row, spot) in enumerate(zip(table.rows, table.places, strict=True), 1)
    ]
    if group is not None:
        for at, row in enumerate(table.rows, 1):
            if row.get(group) is None or isinstance(row[group], (list, dict)):
                faults.add(at, "D120", f"no single value in '{group}', which parts the rows")
    if reading.kind == "chat" and not drop_bad_rows and _all_silent(table, faults, notes, count_tokens):
        return Checked([], [], 0)
    examples = [example for example in made if example is not None and example.row not in faults.reasons]
    if reading.task == "classify":
        examples = _check_labels(examples, reading, faults, notes, place, merge_labels, is_eval)
    rejected = list(table.rejected)
    if drop_bad_rows:
        rejected += [
            Rejected(table.places[at - 1], at, why, table.rows[at - 1]) for at, why in sorted(faults.reasons.items())
        ]
        examples = [example for example in examples if example.row not in faults.reasons]
        if rejected:
            reasons = Counter(r.reason for r in rejected)
            told = listed([f"{number(n)} {why}" for why, n in reasons.most_common()], 3)
            notes.note("D136", f"{counted(len(rejected), 'row')} left out: {told}", place)
        if not examples:
            notes.error("D104", f"no row is left: all {number(len(rejected))} are faulty", place)
    else:
        faults.report(notes, place)
    if table.capped:
        notes.note("D135", f"only the first {counted(len(table), 'row')} were read (data.max_rows)", place)
    return Checked(examples, rejected, _duplicates(examples, notes, place))


def check_overlap(
    train: Sequence[Example],
    evaluation: Sequence[Example],
    notes: Notes,
    place: str = "",
    *,
    what: str = "eval rows",
    where: str = "train",
    fix: str = "leave eval_path out to split train: --set data.eval_path=null",
) -> None:
    """Eval rows that are also in train: an error (D131) above 20 %, a note below; `what`, `where` name both parts."""
    known = {example.key for example in train}
    both = sum(example.key in known for example in evaluation)
    if not both:
        return
    total = len(evaluation)
    message = f"{number(both)} of {number(total)} {what} ({percent(both, total)}) are also in {where}"
    if both > _OVERLAP_MOST * total:
        notes.error("D131", message, place, fix)
    else:
        notes.note("D131", message, place)


def _example(at: int, row: Row, place: str, reading: Reading, faults: Faults) -> Example | None:
    if reading.kind == "chat":
        messages = _messages(at, row, reading.columns["messages"], faults)
        return Example(at, place, row, messages=messages) if messages else None
    if reading.kind == "pairs":
        turns = []
        for role, column in (("system", "system"), ("user", "prompt"), ("assistant", "completion")):
            sources = reading.sources(column)
            if not sources:
                continue
            text = _text(at, row, sources, faults, may_be_empty=column == "system")
            if text is None:
                return None
            if text:
                turns.append({"role": role, "content": text})
        return Example(at, place, row, messages=tuple(turns))
    if reading.kind in ("choices", "preferences", "judged", "prompts"):
        return _asked(at, row, place, reading, faults)
    if reading.kind == "tagged":
        return _tagged(at, row, place, reading, faults)
    roles = [role for role in ("text", "text2") if role in reading.columns]
    texts = [_text(at, row, reading.sources(role), faults) for role in roles]
    label: Any = None
    if reading.kind == "labelled":
        label = _label(at, row, reading.columns["label"], faults)
    elif reading.kind == "scored":
        label = _score(at, row, reading.columns["score"], faults)
    if None in texts or (reading.kind in ("labelled", "scored") and label is None):
        return None
    return Example(at, place, row, texts=tuple(text for text in texts if text is not None), label=label)


def _text(at: int, row: Row, sources: tuple[str, ...], faults: Faults, *, may_be_empty: bool = False) -> str | None:
    """The text of one or several columns; of several, those may be missing or empty that come after the first."""
    parts = []
    for order, name in enumerate(sources):
        value = row.get(name)
        if value is None and (order or may_be_empty):
            continue
        if value is None:
            faults.add(at, "D120", f"null '{name}'" if name in row else f"no '{name}'")
            return None
        if not isinstance(value, str):
            faults.add(at, "D121", f"{kind_of(value)} in '{name}' where text is wanted")
            return None
        if value.strip():
            parts.append(value)
    if not parts and not may_be_empty:
        faults.add(at, "D122", f"empty '{'+'.join(sources)}'")
        return None
    return "\n\n".join(parts)


def _label(at: int, row: Row, name: str, faults: Faults) -> Any:
    value = row.get(name)
    if value is None or value == "":
        faults.add(at, "D120", f"null '{name}'" if name in row and value is None else f"no '{name}'")
    elif isinstance(value, float) and value.is_integer():  # whole numbers that a data frame has turned into floats
        return int(value)
    elif isinstance(value, float):
        faults.add(
            at,
            "D129",
            f"a fractional number as label in '{name}'; classes are names or whole numbers",
            "--task regress",
        )
    elif isinstance(value, (str, bool, int)):
        return value
    elif isinstance(value, list) and all(isinstance(one, (str, int)) and one != "" for one in value):
        return tuple(dict.fromkeys(map(label_name, value)))  # several labels, or none of them
    else:
        faults.add(at, "D121", f"{kind_of(value)} in '{name}' where a label is wanted")
    return None


def _score(at: int, row: Row, name: str, faults: Faults) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        faults.add(at, "D120", f"null '{name}'" if name in row and value is None else f"no '{name}'")
        return None
    if is_number(value):
        return float(value)
    faults.add(at, "D162", f"{quoted(value)} in '{name}' where a number is wanted")
    return None


def _tagged(at: int, row: Row, place: str, reading: Reading, faults: Faults) -> Example | None:
    found = []
    for role in ("tokens", "tags"):
        name = reading.columns[role]
        value = row.get(name)
        if value is None:
            faults.add(at, "D120", f"null '{name}'" if name in row else f"no '{name}'")
            return None
        kinds = str if role == "tokens" else (str, int)
        if not isinstance(value, list) or not all(isinstance(one, kinds) for one in value):
            wanted = "words" if role == "tokens" else "tags"
            faults.add(at, "D121", f"{kind_of(value)} in '{name}' where a list of {wanted} is wanted")
            return None
        found.append(tuple(map(str, value)))
    words, tags = found
    if len(words) != len(tags):
        faults.add(at, "D161", f"not as many '{reading.columns['tags']}' as '{reading.columns['tokens']}'")
    elif not words or not any(word.strip() for word in words):
        faults.add(at, "D122", f"empty '{reading.columns['tokens']}'")
    else:
        return Example(at, place, row, texts=(" ".join(words),), words=words, tags=tags)
    return None


def _asked(at: int, row: Row, place: str, reading: Reading, faults: Faults) -> Example | None:
    """A row with a question and answers to it, of which the label says something."""
    turns: list[Message] = []
    if reading.kind == "preferences" and isinstance(row.get(reading.columns["chosen"]), list):
        return _preferred_chats(at, row, place, reading, faults)
    for role, column in (("system", "system"), ("user", "prompt")):
        sources = reading.sources(column)
        if sources:
            text = _text(at, row, sources, faults, may_be_empty=column == "system")
            if text is None:
                return None
            turns += [{"role": role, "content": text}] if text else []
    if not turns:
        faults.add(at, "D164", "no question: 'chosen' and 'rejected' are texts, and there is no prompt")
        return None
    if reading.kind == "prompts":
        return Example(at, place, row, messages=tuple(turns))
    if reading.kind == "choices":
        return _choice(at, row, place, reading, faults, tuple(turns))
    columns = ("chosen", "rejected") if reading.kind == "preferences" else ("completion",)
    answers = [_text(at, row, reading.sources(column), faults) for column in columns]
    label: Any = None
    if reading.kind == "judged":
        name = reading.columns["desirable"]
        label = truth(row.get(name))
        if label is None:
            faults.add(at, "D121", f"{quoted(row.get(name))} in '{name}' where true or false is wanted")
            return None
    if None in answers:
        return None
    if len(answers) == 2 and answers[0] == answers[1]:
        faults.add(at, "D163", "the same answer chosen and rejected")
        return None
    return Example(at, place, row, messages=tuple(turns), answers=tuple(map(str, answers)), label=label)


def _preferred_chats(at: int, row: Row, place: str, reading: Reading, faults: Faults) -> Example | None:
    """Two conversations that differ in the last answer only."""
    both = [_messages(at, row, reading.columns[role], faults) for role in ("chosen", "rejected")]
    if not all(both):
        return None
    before = [list(chat[:-1]) for chat in both]
    if any(chat[-1]["role"] != "assistant" for chat in both) or before[0] != before[1]:
        faults.add(at, "D164", "conversations that differ before the last answer, or do not end with one")
        return None
    if not before[0] and reading.sources("prompt"):
        asked = row.get(reading.columns["prompt"])
        name = reading.columns["prompt"]
        text = None if isinstance(asked, list) else _text(at, row, reading.sources("prompt"), faults)
        turns = [_message(at, m, faults) for m in asked if isinstance(m, dict)] if isinstance(asked, list) else []
        if isinstance(asked, list) and (not turns or None in turns):
            faults.add(at, "D123", f"no messages in '{name}'")
            return None
        if text is None and not turns:
            return None
        before[0] = [turn for turn in turns if turn] or [{"role": "user", "content": text}]
    answers = tuple(str(chat[-1]["content"]) for chat in both)
    if answers[0] == answers[1]:
        faults.add(at, "D163", "the same answer chosen and rejected")
        return None
    if not before[0]:
        faults.add(at, "D164", "no question before the answers")
        return None
    return Example(at, place, row, messages=tuple(before[0]), answers=answers)


def _choice(
    at: int, row: Row, place: str, reading: Reading, faults: Faults, turns: tuple[Message, ...]
) -> Example | None:
    name, said = reading.columns["choices"], reading.columns["answer"]
    value, answer = row.get(name), row.get(said)
    letters: list[str] = []
    if isinstance(value, dict):  # {"text": [...], "label": ["A", ...]}, as ARC and OpenBookQA have it
        letters = [str(one) for one in value.get("label") or []]
        value = value.get("text")
    if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        empty = isinstance(value, list) and all(isinstance(one, str) for one in value)
        found = "a list with an empty text" if empty else kind_of(value)
        faults.add(at, "D121", f"{found} in '{name}' where a list of texts is wanted")
        return None
    if len(value) < 2:
        faults.add(at, "D160", f"fewer than two '{name}'")
        return None
    if len(set(value)) < len(value):
        faults.add(at, "D160", f"one of its '{name}' twice")
        return None
    if answer is None or answer == "":
        faults.add(at, "D120", f"null '{said}'" if said in row else f"no '{said}'")
        return None
    right = _right_answer(answer, value, letters)
    if right is None:
        faults.add(at, "D160", f"an '{said}' that is none of its '{name}'")
        return None
    return Example(at, place, row, messages=turns, answers=tuple(value), label=right)


def _right_answer(answer: Any, choices: list[str], letters: list[str]) -> int | None:
    """The place of the right answer, given by its text, its place from 0, or its letter."""
    text = str(answer).strip()
    if text in choices:
        return choices.index(text)
    if text in letters:
        return letters.index(text)
    if isinstance(answer, bool):
        return None
    if text.isdecimal() and int(text) < len(choices):
        return int(text)
    if len(text) == 1 and "A" <= text.upper() <= "Z" and ord(text.upper()) - ord("A") < len(choices):
        return ord(text.upper()) - ord("A")
    return None


def _messages(at: int, row: Row, name: str, faults: Faults) -> tuple[Message, ...]:
    value = row.get(name)
    if value is None:
        faults.add(at, "D120", f"null '{name}'" if name in row else f"no '{name}'")
        return ()
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        found = kind_of(value) if not isinstance(value, list) else "a list that is not of messages"
        faults.add(at, "D123", f'{found} in \'{name}\', wanted [{{"role": ..., "content": ...}}, ...]')
        return ()
    if not value:
        faults.add(at, "D123", f"an empty '{name}'")
        return ()
    messages = [_message(at, message, faults) for message in value]
    if any(message is None for message in messages):
        return ()
    turns = tuple(message for message in messages if message is not None)
    if all(turn["role"] != "assistant" for turn in turns):
        faults.add(at, "D124", "no assistant turn, so nothing would be trained")
        return ()
    return turns


def _message(at: int, message: Message, faults: Faults) -> Message | None:
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role, content = message.get(role_key), message.get(content_key)
    if not isinstance(role, str):
        faults.add(at, "D123", f"a message without '{role_key}'")
        return None
    known = _OTHER_NAMES.get(role.lower(), role.lower())
    if known not in _ROLES:
        close = nearest(role, [*_ROLES, *_OTHER_NAMES], most=1)
        hint = f" (meant {_OTHER_NAMES.get(close[0], close[0])}?)" if close else f"; known: {', '.join(_ROLES)}"
        faults.add(at, "D125", f"the unknown role '{role}'{hint}")
        return None
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)  # a list of text parts, as for models that also see images
    if content is None and not message.get("tool_calls"):
        faults.add(
            at, "D120", f"null '{content_key}'" if content_key in message else f"no '{content_key}' in a message"
        )
        return None
    if content is not None and not isinstance(content, str):
        faults.add(at, "D121", f"{kind_of(content)} in '{content_key}' where text is wanted")
        return None
    if known == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        faults.add(at, "D122", f"an empty assistant '{content_key}'")
        return None
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    return {"role": known, "content": content or "", **rest}


def _all_silent(table: Table, faults: Faults, notes: Notes, count_tokens: Callable[[str], int] | None) -> bool:
    """Whether no row at all has an assistant turn: one message then, with the roles that there are."""
    silent = [row for (code, _, _), where in faults.found.items() if code == "D124" for row in where]
    if len(silent) < len(table):
        return False
    chats = [message for row in table.rows for value in row.values() if isinstance(value, list) for message in value]
    roles = list(dict.fromkeys(str(message.get("role", message.get("from"))) for message in chats))
    of = ""
    if count_tokens is not None:
        of = f" of {number(sum(count_tokens(str(m.get('content', m.get('value', '')))) for m in chats))}"
    message = f"0{of} tokens would be trained: no row has an assistant turn (roles: {listed(roles)})"
    notes.error("D124", message, table.path.name, "name the answers' role 'assistant'")
    return True


def _check_labels(
    examples: list[Example],
    reading: Reading,
    faults: Faults,
    notes: Notes,
    place: str,
    merge_labels: bool,
    is_eval: bool,
) -> list[Example]:
    column = reading.columns["label"]
    kinds = {type(example.label) for example in examples}
    if kinds == {tuple}:
        if not is_eval and len({name for example in examples for name in example.label}) < 2:
            notes.error("D128", "there are fewer than two labels: there is nothing to tell apart", place)
        return examples
    if len(kinds) > 1:
        usual = Counter(type(e.label) for e in examples).most_common()[0][0]
        for example in examples:
            if type(example.label) is not usual:
                faults.add(
                    example.row, "D121", f"{kind_of(example.label)} in '{column}' where other rows have another type"
                )
        return examples
    names = Counter(label_name(e.label) for e in examples if e.label is not None)
    spellings: dict[str, list[str]] = defaultdict(list)
    for name, _ in names.most_common():
        spellings[" ".join(name.lower().split())].append(name)
    alike = [several for several in spellings.values() if len(several) > 1]
    free_text = len(examples) >= _FREE_TEXT_ROWS and 2 * len(names) > len(examples)
    if alike and merge_labels:
        best = {name: several[0] for several in spellings.values() for name in several}
        examples = [replace(e, label=best[label_name(e.label)]) if e.label is not None else e for e in examples]
        names = Counter({several[0]: sum(names[name] for name in several) for several in spellings.values()})
        notes.note("D126", f"labels merged that differ only by case or space: {_groups(alike)}", place)
    elif alike and not free_text:
        message = (
            f"labels differ only by case or space: {_groups(alike)}; merge? ({len(names)} to {len(spellings)} classes)"
        )
        notes.error("D126", message, place, "--set data.merge_labels=true")
    if is_eval:
        return examples
    if free_text:
        sample = listed([repr(name[:30]) for name in list(names)[:3]])
        message = (
            f"'{column}' has {number(len(names))} different values in {counted(len(examples), 'row')} ({sample}, ...)"
        )
        looks = "looks like measurements" if all(_is_float(name) for name in names) else "looks like free text"
        fix = f"--task sft --map prompt={reading.columns['text']},completion={column}"
        if looks == "looks like measurements":
            fix = f"--task regress --map text={reading.columns['text']},score={column}"
        notes.error("D129", f"{message}: {looks}, not like classes", place, fix)
    elif len(names) == 1:
        notes.error("D128", f"every row has the label '{next(iter(names))}': there is nothing to tell apart", place)
    else:
        lonely = {name for name, rows_ in names.items() if rows_ == 1}
        for example in examples:
            if example.label is not None and label_name(example.label) in lonely and "D127" not in notes.waived:
                faults.add(example.row, "D127", f"a label that no other row has ({listed(sorted(lonely), 3)})")
        if lonely and "D127" in notes.waived:
            notes.note("D127", f"{counted(len(lonely), 'label')} with one row: {listed(sorted(lonely))}", place)
    return examples


def _groups(alike: list[list[str]]) -> str:
    return listed([" ".join(map(repr, several)) for several in alike], 4)


def _duplicates(examples: list[Example], notes: Notes, place: str) -> int:
    """How many rows are exact copies of an earlier one, label included; texts with two labels are noted too."""
    copies: dict[tuple[str, Any], list[int]] = defaultdict(list)
    labels: dict[str, dict[Any, int]] = defaultdict(dict)
    for example in examples:
        copies[example.key, (example.label, example.answers, example.tags)].append(example.row)
        if not example.answers:
            labels[example.key].setdefault((example.label, example.tags), example.row)
    several = [where for where in copies.values() if len(where) > 1]
    count = sum(len(where) - 1 for where in several)
    if count:
        notes.note("D130", f"{counted(count, 'duplicate row')}, kept; such as {rows(several[0])}", place)
    torn = [list(by_label.values()) for by_label in labels.values() if len(by_label) > 1]
    if torn:
        notes.note("D134", f"{counted(len(torn), 'text')} with different labels, such as {rows(torn[0])}", place)
    return count


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
