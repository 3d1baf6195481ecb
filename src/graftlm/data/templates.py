"""How a conversation becomes one text, and which characters of it the model learns to write.

A template is Jinja, as tokenizers carry it; the built-in ones are the same kind of thing, so what is saved with an
adapter is a chat template that other tools read too. What is trained comes from the structure: from the template's own
`{% generation %}` marks where it has them, else from rendering the messages before each assistant turn: that text is
what the model will be given when it generates, so what follows it, up to the end of the turn, is what it must learn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BUILT_IN", "Passage", "Span", "Template", "TemplateFault"]

Span = tuple[int, int]
Passage = tuple[str, list[Span]]
"""A text and the ranges of its characters that are trained."""

BUILT_IN: dict[str, str] = {
    # One prompt, one answer: prompt, newline, answer, end-of-sequence.
    "plain": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    ),
    # Conversations for a base that knows no roles: names in words, no new tokens. A newline before the answer, not a
    # space: a space would join the answer's first token in training, but stand alone when the prompt ends with it.
    "turns": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ 'Assistant:\\n' }}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\\n\\n' }}"
        "{% else %}{{ message['role'] | capitalize + ':\\n' + message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
    ),
}
"""Templates for tokenizers that bring none."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\u2039probe\u203a"


class TemplateFault(ValueError):
    """A template refuses a conversation (D141), or what is trained cannot be told from it (D140)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template with all that it needs: `render` gives text, `passages` gives text with what is trained.

    `name` is `tokenizer` for the tokenizer's own, a key of `BUILT_IN`, or `given`. `variables` are the special tokens
    that the Jinja source reads. `end_of_turn` is what closes an assistant turn (empty if nothing does): training
    includes it, and generation stops at it.

    Example:
        >>> template = Template.built_in("plain", eos_token="</s>")
        >>> template.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
        'Hi\\nYo</s>'
    """

    name: str
    source: str
    variables: dict[str, str] = field(default_factory=dict)
    end_of_turn: str = ""

    @classmethod
    def built_in(cls, name: str, *, eos_token: str, bos_token: str = "") -> Template:
        """One of `BUILT_IN`."""
        return cls._closed(name, BUILT_IN[name], {"bos_token": bos_token, "eos_token": eos_token})

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, choice: str | None = None, chat: bool = False) -> Template:
        """The template for a tokenizer: `choice` (a built-in name or Jinja text), else its own, else a built-in one.

        Args:
            tokenizer: of the base model.
            choice: overrides the tokenizer's own template.
            chat: without one, take `turns` (roles in words) rather than `plain`.
        """
        if choice not in BUILT_IN and (choice or tokenizer.chat_template):
            variables = {
                key: str(token) for key, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)
            }
            control = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
            source = choice or tokenizer.get_chat_template()
            return cls._closed("given" if choice else "tokenizer", source, variables, control)
        name = choice or ("turns" if chat else "plain")
        # A tokenizer that puts a start token before every text has taught the base to expect one.
        starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        bos_token = str(tokenizer.bos_token) if starts else ""
        return cls.built_in(
            name, eos_token=str(tokenizer.eos_token or tokenizer.sep_token or "\n\n"), bos_token=bos_token
        )

    @classmethod
    def _closed(cls, name: str, source: str, variables: dict[str, str], control: Iterable[str] = ()) -> Template:
        """The template with its end of turn: what a rendered answer is followed by, up to the first control token."""
        bare = cls(name, source, variables)
        try:
            text = bare.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}])
        except TemplateFault:
            return bare
        tail = text.rpartition(_PROBE)[2]
        ends = [tail.index(token) + len(token) for token in {*control, *variables.values()} if token and token in tail]
        return cls(name, source, variables, tail[: min(ends)] if ends else tail.rstrip() or tail)

    @property
    def marks_generation(self) -> bool:
        """Whether the template itself says what the assistant writes."""
        return _MARKS.search(self.source) is not None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with `add_generation_prompt`, up to where the assistant is to go on.

        Raises:
            TemplateFault: the template refuses the conversation, for instance two user turns in a row.
        """
        return self._rendered(messages, add_generation_prompt)[0]

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, answer: bool = True
    ) -> list[int]:
        """Token ids of a conversation for generation, exactly as training sees them; `answer` opens a new turn."""
        text = self.render(messages, add_generation_prompt=answer)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens at which generation stops: end of sequence, and the end of turn where it is one token."""
        ids = {tokenizer.eos_token_id} - {None}
        end = self.end_of_turn.strip()
        if end:
            pieces = tokenizer(end, add_special_tokens=False)["input_ids"]
            ids |= {pieces[0]} if len(pieces) == 1 else set()
        return sorted(ids)

    def passages(self, messages: Sequence[Mapping[str, Any]]) -> list[Passage]:
        """The texts to train on, with the characters that are trained: assistant turns and the end of each.

        There is one text, unless the template renders an earlier turn differently once others follow (some drop its
        reasoning). Then there is one text for each assistant turn, as it looks at the moment of answering, with only
        that turn trained. A message with `"weight": 0` is not trained.

        Raises:
            TemplateFault: D140, what is generated cannot be told even so; D141, the template refuses the conversation.
        """
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        silent = {order for order, at in enumerate(turns) if messages[at].get("weight", 1) == 0}
        if self.marks_generation:
            text, marked = self._rendered(messages, mark=True)
            if silent and len(marked) != len(turns):
                raise TemplateFault("D140", f"{len(marked)} generation marks for {len(turns)} assistant turns")
            return [(text, [self._closing(text, span) for order, span in enumerate(marked) if order not in silent])]
        texts = [self._turn(messages, at) for at in turns]
        whole = texts[-1][0] if turns[-1] == len(messages) - 1 else self.render(messages)
        if all(whole.startswith(text[: span[1]]) for text, span in texts):
            return [(whole, [span for order, (_, span) in enumerate(texts) if order not in silent])]
        return [(text, [span]) for order, (text, span) in enumerate(texts) if order not in silent]

    def _turn(self, messages: Sequence[Mapping[str, Any]], at: int) -> tuple[str, Span]:
        """The text that ends with the assistant turn `at`, and where that turn is in it."""
        text = self.render(messages[: at + 1])
        content = str(messages[at].get("content", "")).strip()
        if at:
            before = self.render(messages[:at], add_generation_prompt=True)
            if not text.startswith(before):
                shared = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
                raise TemplateFault(
                    "D140",
                    f"before the answer it writes {before[shared - 20 if shared > 20 else 0 : shared + 30]!r}, "
                    f"with the answer {text[shared - 20 if shared > 20 else 0 : shared + 30]!r}",
                )
            start = len(before)
        else:
            start = max(text.find(content), 0)  # nothing comes before, so nothing can be rendered up to it
        tail = text[start:]
        if self.end_of_turn.strip() and self.end_of_turn in tail:
            end = start + tail.rindex(self.end_of_turn) + len(self.end_of_turn)
        else:  # white space may be all that ends a turn; after something visible it is the template's own
            end = len(text) if tail.rstrip().endswith(content) else start + len(tail.rstrip())
        return text, (start, end)

    def _closing(self, text: str, span: Span) -> Span:
        """A marked range, up to the end of turn: some templates write it after their mark, some mark more."""
        start, end = span
        visible = start + len(text[start:end].rstrip())
        if text.endswith(self.end_of_turn, start, visible) and self.end_of_turn.strip():
            return start, visible
        return start, end + (len(self.end_of_turn) if text.startswith(self.end_of_turn, end) else 0)

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, mark: bool = False
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        render: Any = render_jinja_template  # annotated as returning a text, returns texts and spans
        try:
            texts, spans = render(
                conversations=[plain],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=mark,
                **self.variables,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise TemplateFault("D141", str(error)) from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if mark else []

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads back; plain JSON, kept with the adapter."""
        return {
            "name": self.name,
            "source": self.source,
            "variables": dict(self.variables),
            "end_of_turn": self.end_of_turn,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Template:
        """The template that `to_dict` wrote."""
        return cls(stored["name"], stored["source"], dict(stored["variables"]), stored["end_of_turn"])
