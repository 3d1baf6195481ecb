"""`graftlm chat`: a conversation on the terminal, or line by line from a pipe, with the adapter, its base, or both."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import click

from graftlm.cli.output import harmless, say
from graftlm.cli.speaking import Speaker, open_speaker, refusals_told, writing_flags
from graftlm.cli.usage import Verb
from graftlm.errors import half_character, nearest

__all__ = ["verb"]

_COMMANDS = {
    "/base": "answer with the untouched base",
    "/tuned": "answer with the adapter",
    "/reset": "forget what was said",
    "/help": "list these words",
    "/exit": "leave (as does Ctrl-D)",
}


@click.command(
    "chat",
    cls=Verb,
    arguments=[("RUN|MODEL", "folder of a run or an adapter; or a base model: bundled, a folder, a hub id")],
    examples=[
        "graftlm chat runs/faq-1",
        "graftlm chat runs/faq-1 --vs base",
        "graftlm chat runs/faq-1 < questions.txt",
    ],
)
@click.argument("what", metavar="RUN|MODEL")
@writing_flags
def verb(
    what: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    vs: str | None,
    base: str | None,
    **placing: Any,
) -> None:
    """Talk with a model; its answer appears as it is written.

    While talking: /base and /tuned switch who answers, /reset forgets, /exit leaves, Ctrl-C stops an answer.
    """
    speaker = open_speaker(what, base=base, vs=vs, temperature=temperature, top_p=top_p, **placing)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    tuned = "tuned" if speaker.tuned else "base"
    _Talk(speaker, options, ["base", "tuned"] if vs else [tuned]).run()


@dataclass
class _Talk:
    """One conversation: who answers, and what each of them has heard and said."""

    speaker: Speaker
    options: dict[str, Any]
    answering: list[str]
    heard: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def run(self) -> None:
        if self.speaker.template is None:
            say("no chat template: each line is continued as it stands")
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            say("/help lists what can be said besides")
        for line in _lines(interactive):
            word = line.strip()
            if word in ("/exit", "/quit"):
                return
            if half_character(line):
                say("that was not UTF-8")
                continue
            if word.startswith("/"):
                self.obey(word)
            elif word:
                for who in list(self.answering):
                    self.answer(who, line)

    def obey(self, word: str) -> None:
        if word in ("/base", "/tuned"):
            if word == "/tuned" and not self.speaker.tuned:
                say("this is a base model: it has no adapter")
            else:
                self.answering = [word[1:]]
                say(f"{word[1:]} answers")
        elif word == "/reset":
            self.heard.clear()
            say("forgotten")
        elif word == "/help":
            say("\n".join(f"{name:8}{text}" for name, text in _COMMANDS.items()))
        else:
            close = nearest(word, _COMMANDS, most=1)
            said = f"Did you mean {close[0]}?" if close else f"There are: {' '.join(_COMMANDS)}"
            say(f"no such word {word}. {said}")

    def answer(self, who: str, question: str) -> None:
        """Stream one answer. Ctrl-C stops it; what was said until then counts."""
        from graftlm.evaluation import stream_text

        talk = self.heard.setdefault(who, [])
        talk.append({"role": "user", "content": question})
        asked: Any = list(talk) if self.speaker.template is not None else question
        if len(self.answering) > 1:
            print(f"{who}: ", end="", flush=True)
        said = ""
        try:
            with refusals_told(), self.speaker.speaking(who):
                speaker = self.speaker
                pieces: Any = stream_text(speaker.model, speaker.tokenizer, speaker.template, asked, **self.options)
                with closing(pieces):
                    for piece in pieces:
                        said += piece
                        print(harmless(piece), end="", flush=True)
        except KeyboardInterrupt:
            say(" (stopped)")
        print(flush=True)
        if said.strip():
            talk.append({"role": "assistant", "content": said.strip()})
        else:
            talk.pop()  # a question without an answer would leave two questions in a row


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit and recall lines
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            say("\n/exit or Ctrl-D leaves")
