"""`graftlm generate`: answers to prompts, or texts continued, by a base model or with an adapter, or by both."""

from __future__ import annotations

import sys
from typing import Any

import click

from graftlm.cli.inputs import prompts_of
from graftlm.cli.output import console, harmless, json_line, say
from graftlm.cli.speaking import open_speaker, refusals_told, writing_flags
from graftlm.cli.usage import Verb

__all__ = ["verb"]


@click.command(
    "generate",
    cls=Verb,
    arguments=[
        ("RUN|MODEL", "folder of a run or an adapter; or a base model: bundled, a folder, a hub id"),
        ("PROMPT", "prompts; without any, the lines of standard input"),
    ],
    examples=[
        'graftlm generate runs/faq-1 "Can I return a lamp?" --vs base',
        "graftlm generate runs/faq-1 --file questions.csv --json > answers.jsonl",
        'graftlm generate bundled "It was a dark" --raw --temperature 0.8',
    ],
)
@click.argument("what", metavar="RUN|MODEL")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option("--file", metavar="FILE", help="File with prompts: a column prompt, messages, or a text file with lines.")
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without a chat template.")
@writing_flags
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each prompt.")
def verb(
    what: str,
    prompts: tuple[str, ...],
    file: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    vs: str | None,
    base: str | None,
    as_json: bool,
    **placing: Any,
) -> None:
    """Answer prompts, or continue texts."""
    asked = prompts_of(prompts, file, asked=f'graftlm generate {what} "a prompt"')
    speaker = open_speaker(what, base=base, vs=vs, temperature=temperature, top_p=top_p, **placing)
    template = None if raw else speaker.template
    if template is None and not raw:
        say("no chat template: the text is continued")
    conversations = [_conversation(prompt, template is not None) for prompt in asked]
    from graftlm.evaluation import generate_texts

    written: dict[str, list[str]] = {}
    for who in ("base", "tuned") if vs else ("answer",):
        with speaker.speaking(who), refusals_told():
            written[who] = generate_texts(
                speaker.model,
                speaker.tokenizer,
                template,
                conversations,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
    for at, prompt in enumerate(asked):
        answers = {who: texts[at] for who, texts in written.items()}
        if as_json:
            click.echo(json_line({"prompt": prompt, **answers}))
        else:
            _show(_last(prompt), answers, first=at == 0, several=len(asked) > 1)


def _conversation(prompt: Any, chat: bool) -> Any:
    """What the model is given: messages where there is a template, else a text to continue."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if chat else prompt
    return prompt if chat else _last(prompt)


def _last(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _show(prompt: str, answers: dict[str, str], *, first: bool, several: bool) -> None:
    if not first:
        click.echo()
    if several:
        click.echo(f"> {harmless(prompt)}")
    if len(answers) == 1:
        click.echo(harmless(answers["answer"]))
    elif sys.stdout.isatty():
        from rich.table import Table
        from rich.text import Text

        table = Table(expand=True, header_style="bold")
        for who in answers:
            table.add_column(who, ratio=1)
        table.add_row(*(Text(harmless(text)) for text in answers.values()))
        console().print(table)
    else:
        for who, text in answers.items():
            click.echo(f"{who}: {harmless(text)}")
