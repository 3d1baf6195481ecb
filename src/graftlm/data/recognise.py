"""Decides from the columns what the rows of a table are, and never guesses between two answers.

| columns | kind | task |
|---|---|---|
| `messages` (role, content) or `conversations` (from, value) | chat | sft |
| `prompt, completion` (question/answer, input/output, instruction/response ...), perhaps `system` | pairs | sft |
| `instruction, input, output` (Alpaca) | pairs, prompt = instruction + input | sft |
| `text, label`, or two texts and `label` (premise/hypothesis ...); a list of labels for several | labelled | classify |
| one or two texts and a numeric `score` | scored | regress |
| `tokens, tags`, two lists | tagged | tag |
| `question, choices, answer`, choices a list | choices | choice |
| `prompt, chosen, rejected` | preferences | dpo |
| `prompt, completion, label` with true or false | judged | kto |
| `text` and none of these | documents | lm |
| `prompt`; what else there is, the reward may read | prompts | none by itself: grpo, ppo, rloo |

Some rows serve several tasks: pairs also seq2seq, documents mlm, choices tfew, preferences reward.

What a column holds is decided by most of its values: one `label` "maybe" among true and false is a fault of its row,
and does not turn judged answers into answers to learn. Where fewer than half fit the user says what is meant, and so
where 1 and 0 stand beside prompts and completions.

Example:
    >>> recognise(read_rows("faq.jsonl")).line                                                  # doctest: +SKIP
    'faq.jsonl  12 000 rows  prompt=question completion=answer'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from graftlm.data.labels import is_number, truth
from graftlm.data.reading import Table
from graftlm.data.wording import counted, listed, number, quoted
from graftlm.errors import DataError, Finding, nearest

__all__ = ["ROLES", "TASKS", "TEXT_PAIRS", "Reading", "recognise"]

TASKS: dict[str, str] = {
    "choice": "prompt, choices and answer",
    "classify": "text and label",
    "dpo": "prompt, chosen and rejected",
    "grpo": "prompt",
    "kto": "prompt, completion and desirable (true or false)",
    "lm": "text",
    "mlm": "text",
    "ppo": "prompt",
    "regress": "text and score",
    "reward": "prompt, chosen and rejected",
    "rloo": "prompt",
    "seq2seq": "prompt and completion",
    "sft": "prompt and completion (or messages)",
    "tag": "tokens and tags",
    "tfew": "prompt, choices and answer",
}
"""Task to the roles it needs, in words."""

ROLES: dict[str, tuple[str, ...]] = {
    "answer": ("answer", "label", "answerkey", "gold", "correct"),
    "choices": ("choices", "options", "endings", "candidates"),
    "chosen": ("chosen", "preferred"),
    "completion": ("completion", "answer", "output", "response", "reply", "assistant"),
    "desirable": ("desirable", "label", "liked", "thumbs_up"),
    "label": ("label", "labels", "label_text", "label_name", "class", "sentiment", "intent", "emotion"),
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue"),
    "prompt": ("prompt", "question", "query", "instruction", "input", "user"),
    "rejected": ("rejected", "dispreferred"),
    "score": ("score", "similarity", "relatedness"),
    "system": ("system", "system_prompt"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
    "text": ("text", "content", "document", "sentence", "review", "tweet"),
    "text2": ("text2",),
    "tokens": ("tokens", "words"),
}
"""Role to the column names that are understood without `--map`, compared without case."""

_CONTEXTS = ("context", "passage", "background", "document", "paragraph")
_PERHAPS_LABELS = ("category", "topic", "target", "y", "genre", "domain", "type", "rating", "stars")
TEXT_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("text", "text2"),
    ("question1", "question2"),
    ("question", "passage"),
    ("question", "sentence"),
)
_NEEDED = {
    "choice": ("prompt", "choices", "answer"),
    "classify": ("text", "label"),
    "dpo": ("prompt", "chosen", "rejected"),
    "grpo": ("prompt",),
    "kto": ("prompt", "completion", "desirable"),
    "lm": ("text",),
    "mlm": ("text",),
    "ppo": ("prompt",),
    "regress": ("text", "score"),
    "reward": ("prompt", "chosen", "rejected"),
    "rloo": ("prompt",),
    "seq2seq": ("prompt", "completion"),
    "sft": ("prompt", "completion"),
    "tag": ("tokens", "tags"),
    "tfew": ("prompt", "choices", "answer"),
}
#: Kind of rows to the tasks that they serve; the first is meant where none is named. Those above are looked for first:
#: what their columns hold leaves no doubt.
_KIND_TASKS: dict[str, tuple[str, ...]] = {
    "preferences": ("dpo", "reward"),
    "tagged": ("tag",),
    "choices": ("choice", "tfew"),
    "judged": ("kto",),
    "chat": ("sft",),
    "pairs": ("sft", "seq2seq"),
    "labelled": ("classify",),
    "scored": ("regress",),
    "documents": ("lm", "mlm"),
    "prompts": ("grpo", "ppo", "rloo"),
}
#: Role to what it takes of a column's values, where not just any text will do.
_TAKES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "choices": (lambda value: isinstance(value, (list, dict)), 'a list of texts, ["one", "two"],'),
    "desirable": (lambda value: truth(value) is not None, "true or false"),
    "score": (is_number, "a number"),
    "tags": (lambda value: isinstance(value, list), 'a list of tags, ["O", "B-PER"],'),
    "tokens": (lambda value: isinstance(value, list), 'a list of words, ["a", "word"],'),
}
_CERTAIN = ("preferences", "tagged", "choices", "judged")
_ONLY_NAMED = ("prompts",)  # almost any row has a prompt
_ONLY_ALONE = ("scored", "documents")  # one text, which many files have: looked for where nothing else fits


@dataclass(frozen=True, slots=True)
class Reading:
    """What the rows are: `task` (one of `TASKS`), `kind` of rows, `columns` (role to column), and one `line` of it.

    A role may be made of several columns, joined by a blank line: `instruction+input`; `sources` gives them one by one.
    """

    task: str
    kind: str
    columns: dict[str, str]
    unused: tuple[str, ...]
    line: str
    known: tuple[str, ...]

    def sources(self, role: str) -> tuple[str, ...]:
        """The columns that a role is made of; none for a role that this table does not have."""
        return _parts(self.columns[role], self.known) if role in self.columns else ()


def recognise(
    table: Table,
    task: str = "auto",
    mapping: Mapping[str, str] | None = None,
    *,
    instead: Mapping[str, str] | None = None,
) -> Reading:
    """What the rows of `table` are.

    Args:
        table: from `read_rows`.
        task: `auto`, or one of `TASKS` to look for that only.
        mapping: role to column, as in `--map prompt=question,completion=answer`; `a+b` joins two columns by a
            blank line. Roles that it does not name are found as usual.
        instead: with `auto`, tasks that the base does in place of others, such as {"sft": "seq2seq"}.

    Raises:
        DataError: D110 wrong columns, D111 several answers, D112 a mapping that does not fit.
    """
    given = dict(mapping or {})
    if task != "auto" and task not in TASKS:
        close = nearest(task, TASKS, most=1)
        raise DataError(
            Finding(
                "D110", f"unknown task '{task}'; known: auto, {', '.join(TASKS)}", fix=f"--task {(close or ['sft'])[0]}"
            )
        )
    _check_mapping(given, table)
    columns = _Columns(table, given, task)
    found: dict[str, list[dict[str, str]]] = {}
    for kind, serves in _KIND_TASKS.items():
        sure = found.keys() - columns.doubtful
        settled = sure and (kind in _ONLY_ALONE or any(certain in sure for certain in _CERTAIN))
        if task == "auto" and kind in _ONLY_NAMED:
            continue
        if (task == "auto" or task in serves) and columns.wanted(kind) and not settled:
            several = getattr(columns, kind)()
            if several:
                found[kind] = several
    ways = [(kind, way) for kind, several in found.items() for way in several]
    if not ways:
        raise DataError(_wrong_columns(table, task, given))
    perhaps = columns.perhaps_labelled() if task == "auto" and ways[0][0] == "documents" else []
    if len(ways) + len(perhaps) > 1:
        raise DataError(_ambiguous(table, ways, perhaps))
    kind, way = ways[0]
    used = {part for column in way.values() for part in _parts(column, table.columns)}
    unused = tuple(name for name in table.columns if name not in used | columns.twins)
    shown = " ".join(f"{role}={column}" for role, column in way.items())
    line = f"{table.path.name}  {counted(len(table), 'row')}  {shown}"
    if unused:
        line += f"  (not used: {listed(unused, 4)})"
    chosen = task if task != "auto" else (instead or {}).get(_KIND_TASKS[kind][0], _KIND_TASKS[kind][0])
    return Reading(chosen, kind, way, unused, line, table.columns)


class _Columns:
    """Finds, for each kind of rows, all ways in which the columns of a table can fill its roles."""

    def __init__(self, table: Table, given: Mapping[str, str], task: str) -> None:
        self.table, self.given, self.task = table, given, task
        self.taken = {part for column in given.values() for part in _parts(column, table.columns)}
        self.by_lower = {name.strip().lower(): name for name in table.columns}
        self.twins: set[str] = set()  # columns that say the same as the label in other words
        self.doubtful: set[str] = set()  # kinds that most values of a column do not fit

    def wanted(self, kind: str) -> bool:
        """Whether the mapping's roles, if there is one, belong to rows of this kind."""
        roles = {
            "chat": {"messages"},
            "choices": {"prompt", "choices", "answer", "system"},
            "documents": {"text"},
            "judged": {"prompt", "completion", "desirable", "system"},
            "labelled": {"text", "text2", "label"},
            "pairs": {"prompt", "completion", "system"},
            "prompts": {"prompt", "system"},
            "preferences": {"prompt", "chosen", "rejected", "system"},
            "scored": {"text", "text2", "score"},
            "tagged": {"tokens", "tags"},
        }
        return self.given.keys() <= roles[kind]

    def named(self, names: Iterable[str]) -> list[str]:
        return [self.by_lower[n] for n in names if n in self.by_lower and self.by_lower[n] not in self.taken]

    def role(self, role: str) -> list[str]:
        return [self.given[role]] if role in self.given else self.named(ROLES[role])

    def values(self, column: str) -> list[Any]:
        """What there is in the column, without what is missing."""
        return [value for row in self.table.rows if (value := row.get(column)) is not None and value != ""]

    def odd(self, column: str, role: str) -> list[Any]:
        """The values of the column that `role` does not take."""
        takes, _ = _TAKES[role]
        return [value for value in self.values(column) if not takes(value)]

    def taking(self, kind: str, role: str, names: Iterable[str] = ()) -> list[str]:
        """Columns with the role's names, or these, whose values it takes: most of them, or else some, with doubt."""
        if role in self.given:
            return [self.given[role]]
        shares: dict[str, float] = {}
        for name in self.named(names or ROLES[role]):
            values = self.values(name)
            shares[name] = 1 - len(self.odd(name, role)) / len(values) if values else 0.0
        sure = [name for name, share in shares.items() if share >= 0.5]
        perhaps = [name for name, share in shares.items() if share > 0]
        if perhaps and not sure:
            self.doubtful.add(kind)
        return sure or perhaps

    def chat(self) -> list[dict[str, str]]:
        return [{"messages": column} for column in self.role("messages")]

    def preferences(self) -> list[dict[str, str]]:
        ways = [{"chosen": c, "rejected": r} for c in self.role("chosen") for r in self.role("rejected")]
        if not ways:
            return []
        prompts = self.prompts() or [{}]
        return [{**prompt, **way} for prompt in prompts for way in ways]

    def choices(self) -> list[dict[str, str]]:
        choices = self.taking("choices", "choices")
        answers = self.role("answer")[:1]
        return [{**p, "choices": c, "answer": a} for p in self.prompts() for c in choices for a in answers]

    def judged(self) -> list[dict[str, str]]:
        wanted = self.taking("judged", "desirable")
        if "desirable" not in self.given and wanted and all(is_number(value) for value in self.values(wanted[0])):
            self.doubtful.add("judged")  # 1 and 0 may say anything
        return [{**way, "desirable": name} for name in wanted[:1] for way in self.pairs()]

    def tagged(self) -> list[dict[str, str]]:
        tokens, tags = self.taking("tagged", "tokens"), self.taking("tagged", "tags")
        return [{"tokens": t, "tags": g} for t in tokens for g in tags[:1] if t != g]

    def scored(self) -> list[dict[str, str]]:
        scores = self.taking("scored", "score")
        if not scores and self.task == "regress":
            scores = self.taking("scored", "score", ("label", "labels", *_PERHAPS_LABELS))
        return [{**text, "score": score} for text in self.texts() for score in scores]

    def prompts(self) -> list[dict[str, str]]:
        """Ways to find what is asked, with a passage before it where there is one, and a system prompt."""
        prompts, systems = self.asked(), self.role("system")
        if "prompt" not in self.given:
            contexts = self.named(_CONTEXTS)
            if len(prompts) == 1 and len(contexts) == 1:
                prompts = [f"{contexts[0]}+{prompts[0]}"]
        head = {"system": systems[0]} if len(systems) == 1 else {}
        return [{**head, "prompt": prompt} for prompt in prompts]

    def asked(self) -> list[str]:
        """Columns that may be the prompt; in Alpaca's rows the input belongs to the instruction."""
        prompts = self.role("prompt")
        first, extra = self.by_lower.get("instruction"), self.by_lower.get("input")
        if "prompt" not in self.given and first in prompts and extra in prompts:
            return [f"{first}+{extra}", *(name for name in prompts if name not in (first, extra))]
        return prompts

    def pairs(self) -> list[dict[str, str]]:
        prompts, completions, systems = self.asked(), self.role("completion"), self.role("system")
        if "prompt" not in self.given:
            contexts = self.named(_CONTEXTS)
            if completions and len(prompts) == 1 and len(contexts) == 1 and "completion" not in self.given:
                prompts = [f"{contexts[0]}+{prompts[0]}", *prompts]  # with the context or without it: the user says
        head = {"system": systems[0]} if len(systems) == 1 else {}
        return [{**head, "prompt": p, "completion": c} for p in prompts for c in completions if p != c]

    def labelled(self) -> list[dict[str, str]]:
        names = ROLES["label"] + (_PERHAPS_LABELS if self.task == "classify" else ())
        labels = [self.given["label"]] if "label" in self.given else self._without_twins(self.named(names))
        return [{**text, "label": label} for text in self.texts() for label in labels]

    def texts(self) -> list[dict[str, str]]:
        """Ways to find the one or two texts of labelled rows."""
        if "text" in self.given:
            return [{role: self.given[role] for role in ("text", "text2") if role in self.given}]
        both = [self.named(pair) for pair in TEXT_PAIRS]
        texts = [{"text": pair[0], "text2": pair[1]} for pair in both if len(pair) == 2]
        if texts:
            return texts
        more = {"text2": self.given["text2"]} if "text2" in self.given else {}
        return [{"text": name, **more} for name in self.named(ROLES["text"])]

    def documents(self) -> list[dict[str, str]]:
        names = ("text", "content", "document") if self.task in ("lm", "mlm") else ("text", "content")
        return [{"text": name} for name in ([self.given["text"]] if "text" in self.given else self.named(names))]

    def perhaps_labelled(self) -> list[tuple[str, dict[str, str]]]:
        """Ways of reading documents as labelled rows that need the user's word."""
        if self.given:
            return []
        return [
            ("labelled", {"text": way["text"], "label": label})
            for way in self.documents()
            for label in self.named(_PERHAPS_LABELS)
        ]

    def _without_twins(self, labels: list[str]) -> list[str]:
        """One of the label columns where all say the same, row by row; the one in words rather than in numbers."""
        rows = self.table.rows
        if len(labels) > 1:
            pairs = [{(repr(row.get(labels[0])), repr(row.get(other))) for row in rows} for other in labels[1:]]
            if all(len({a for a, _ in ab}) == len({b for _, b in ab}) == len(ab) for ab in pairs):
                words = [name for name in labels if isinstance(rows[0].get(name), str) and not rows[0][name].isdigit()]
                chosen = (words or labels)[0]
                self.twins = set(labels) - {chosen}
                return [chosen]
        return labels


def _parts(column: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of `a+b`; a column that is really called so comes first."""
    return (column,) if column in known else tuple(part.strip() for part in column.split("+"))


def _check_mapping(given: Mapping[str, str], table: Table) -> None:
    findings = []
    for role, column in given.items():
        if role not in ROLES:
            close = nearest(role, ROLES, most=1) or [
                r for r, c in given.items() if role in table.columns and c in ROLES
            ]
            swapped = (
                f"; is it the wrong way round? {column}={role}" if role in table.columns and column in ROLES else ""
            )
            fix = f"--map {column}={role}" if swapped else f"--map {close[0]}={column}" if close else ""
            message = f"unknown role '{role}' in {role}={column}; roles: {', '.join(ROLES)}{swapped}"
            findings.append(Finding("D112", message, fix=fix))
            continue
        for part in _parts(column, table.columns):
            if part not in table.columns:
                close = nearest(part, table.columns, most=1) or [c for c in table.columns if c.lower() in ROLES[role]]
                message = f"no column '{part}' for {role}; columns: {listed(table.columns)}"
                findings.append(Finding("D112", message, table.path.name, f"--map {role}={close[0]}" if close else ""))
    if findings:
        raise DataError(findings)


def _pasteable(way: Mapping[str, str]) -> str:
    return "--map " + ",".join(f"{role}={column}" for role, column in way.items())


def _ambiguous(
    table: Table, ways: list[tuple[str, dict[str, str]]], perhaps: list[tuple[str, dict[str, str]]]
) -> Finding:
    every = [*ways, *perhaps]
    several_tasks = len({_KIND_TASKS[kind][0] for kind, _ in every}) > 1
    choices = [(f"--task {_KIND_TASKS[kind][0]} " if several_tasks else "") + _pasteable(way) for kind, way in every]
    message = f"{listed(table.columns)} can be understood in {len(every)} ways; choose one"
    more = (f"... and {len(choices) - 5} more",) if len(choices) > 5 else ()
    return Finding("D111", message, table.path.name, choices[0], (*choices[:5], *more))


def _wrong_columns(table: Table, task: str, given: Mapping[str, str]) -> Finding:
    need = TASKS[task] if task != "auto" else "; or ".join(dict.fromkeys(TASKS.values()))
    if task == "sft" or (task == "auto" and {"prompt", "completion"} & given.keys()):
        need = "prompt and completion"
    message = f"need {need}, found {listed(table.columns)}"
    looks = _looks_like(table, task, given)
    columns = _Columns(table, given, task)
    if task == "regress" and "score" not in given:
        texts = given.get("text") or looks.get("text") or _by_name("text", list(table.columns)) or "..."
        for name in columns.named((*ROLES["score"], *ROLES["label"], *_PERHAPS_LABELS)):
            if columns.odd(name, "score") or not columns.values(name):
                return _wrong_values(columns, name, "score", f"--task classify --map text={texts},label={name}")
        numeric = [
            name
            for name in table.columns
            if columns.values(name) and not columns.odd(name, "score") and not name.lower().endswith("id")
        ]
        looks = {"text": texts, "score": numeric[0]} if texts != "..." and len(numeric) == 1 else {}
    for kind, serves in _KIND_TASKS.items():
        # The columns are there by name: it is what they hold.
        roles = _NEEDED[serves[0]] if task == "auto" else _NEEDED[task]
        if task in serves or (task == "auto" and kind in _CERTAIN and all(columns.role(role) for role in roles)):
            for role in roles:
                for name in columns.role(role) if role in _TAKES and role not in given else ():
                    if columns.odd(name, role) or not columns.values(name):
                        return _wrong_values(columns, name, role)
    if task in ("choice", "tfew") and not given and (labelled := _Columns(table, {}, "classify").labelled()):
        # Rows with labels: a prompt makes questions of them, and the labels are what there is to choose from.
        *fields, _ = labelled[0].values()
        prompt = " ".join(f"{{{name}}}" for name in fields)
        message += ". Rows with labels are asked by a prompt"
        return Finding("D110", message, table.path.name, f"--set 'data.prompt={prompt} Label:'")
    if looks:
        message += ". Looks like " + ", ".join(f"{role}={column}" for role, column in looks.items())
    return Finding(
        "D110",
        message,
        table.path.name,
        _pasteable(looks or dict.fromkeys(_NEEDED.get(task, ("prompt", "completion")), "...")),
    )


def _wrong_values(columns: _Columns, name: str, role: str, fix: str = "") -> Finding:
    """A column that has the role's name, and nothing in it that the role takes."""
    _, wanted = _TAKES[role]
    values, odd = columns.values(name), columns.odd(name, role)
    message = f"'{name}' has no value"
    if odd:
        message = f"'{name}' has {quoted(odd[0])} where {wanted} is wanted"
        message += f" ({number(len(odd))} of {counted(len(values), 'value')})"
    return Finding("D110", message, columns.table.path.name, fix)


def _looks_like(table: Table, task: str, given: Mapping[str, str]) -> dict[str, str]:
    """The most likely roles by nearness of names and by what the first row holds; empty when there is no good idea."""
    first = table.rows[0]
    texts = [name for name in table.columns if isinstance(first.get(name), str)]
    every = (("prompt", "completion"), ("text", "label"), ("text",))
    for roles in every if task == "auto" else (_NEEDED[task],):
        way: dict[str, str] = {}
        for role in roles:
            free = [name for name in (table.columns if role == "label" else texts) if name not in way.values()]
            guess = given.get(role) or _by_name(role, free)
            if guess:
                way[role] = guess
        left = [name for name in texts if name not in (*way.values(), *_CONTEXTS) and not name.lower().endswith("id")]
        if len(way) == 1 and "completion" in roles and len(left) == 1:  # one by its name, the other is what is left
            way[roles[0] if roles[1] in way else roles[1]] = left[0]
        if len(way) == len(roles):
            return {role: way[role] for role in roles}
    return {}


def _by_name(role: str, columns: list[str]) -> str | None:
    """The column whose name holds, or is near to, a name that is known for the role."""
    known = ROLES[role] + (_PERHAPS_LABELS if role == "label" else ())
    others = {word for other, words in ROLES.items() if other != role for word in words} - set(known)
    if role == "text":
        others |= set(_CONTEXTS) - set(ROLES["text"])  # "text" stands in "context"
    columns = [name for name in columns if name.strip().lower() not in others]
    for name in columns:
        if name.strip().lower() in known:
            return name
    for word in known:
        for name in columns:
            if len(word) > 2 and word in name.lower():
                return name
    for word in known:
        close = nearest(word, columns, most=1)
        if close:
            return close[0]
    return None
