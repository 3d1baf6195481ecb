"""Turns public-domain novels, children's books and a CC0 instruction set into folders of plain text.

`python scripts/pretraining_text.py --data ../shared/data -o OUT` reads

    DATA/english_novels/*.txt              one novel a file, named Author_Title_Year.txt
    DATA/childrens_books/*.jsonl           passages of about 1,900 characters (author, title, text)
    DATA/alpaca_libre/train.jsonl          instruction, input, output

and writes OUT/main, OUT/late and OUT/heldout for scripts/pretrain.py, and OUT/sources.md, a list of what went
in. Every file holds one or more documents; `<|end|><|begin|>` stands between documents, and chats are written
with the special tokens of scripts/pretrain.py.

Left out of the novels: those published after --last-year, whose copyright may still run in the United States,
and those of which the children's books have passages, so that held-out passages stay unseen.
"""

import argparse
import json
import re
import statistics
from itertools import pairwise
from pathlib import Path

BEGIN, END = "<|begin|>", "<|end|>"
HELDOUT_NOVEL = "Burnett_Lord_1886"
LATE_NOVELS_FROM_YEAR = 1920
IN_CHILDRENS_BOOKS = (
    "Burnett_Garden_1911", "Burnett_Princess_1905", "Kipling_Captains_1896", "Kipling_Kim_1901"
)  # fmt: skip
AUTHORS = {
    "Anon": "anonymous (R. D. Blackmore)", "Bennet": "Arnold Bennett", "Cbronte": "Charlotte Bronte",
    "Lee": "Vernon Lee", "Lytton": "Edward Bulwer-Lytton", "Wcollins": "Wilkie Collins",
}  # fmt: skip

PLAIN = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
    "\u2013": "-", "\u2014": "--", "\u2015": "--", "\u2012": "-", "\u2212": "-", "\u2026": "...",
    "\u00a0": " ", "\u2009": " ", "\u200b": "", "\ufeff": "", "\u00ad": "", "\t": " ", "\f": "\n",
})  # fmt: skip


def plain(text: str) -> str:
    """Normalises line ends, quotation marks, dashes, dots and spaces."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(PLAIN)
    text = re.sub(r"(?<=\w)_|_(?=\w)|_(?=[^\w\s])", "", text)  # _emphasis_
    text = re.sub(r"\. \. \.( \.)?", "...", text)
    text = re.sub(r"(?<=n't|'ve|'ll) {2}", " ", text)
    return re.sub(r" {2,}", " ", re.sub(r" +\n", "\n", text))


def joined_lines(lines: list[str]) -> list[str]:
    """Joins the hard-wrapped lines of one block into paragraphs.

    A line ends its paragraph if the first word of the next line would have fitted on it and it ends like a
    sentence, or if it is much shorter than the rest (a heading, a verse)."""
    width = statistics.quantiles([len(line) for line in lines], n=20)[-1] if len(lines) > 1 else 0
    paragraphs: list[str] = []
    open_paragraph = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if not open_paragraph:
            paragraphs.append(line)
        elif re.search(r"[a-z]-$", paragraphs[-1]) and line[:1].islower():
            paragraphs[-1] += line
        else:
            paragraphs[-1] += " " + line
        room = width - len(line) - 1 - len(following.split(" ")[0])
        ends = bool(re.search(r"[.!?:;\"')*-]$", line))
        open_paragraph = bool(following) and room < (4 if ends else width * 0.35)
    return paragraphs


def novel_paragraphs(text: str) -> list[str]:
    """The paragraphs of a novel: one a line, or of wrapped lines with or without blank lines between them."""
    lines = [line.strip() for line in plain(text).split("\n")]
    filled = [line for line in lines if line]
    wrapped = statistics.quantiles([len(line) for line in filled], n=20)[-1] < 130
    if not wrapped:
        paragraphs = filled
    elif (len(lines) - len(filled)) > 0.02 * len(filled):  # blank lines stand between paragraphs
        paragraphs = []
        block: list[str] = []
        width = statistics.quantiles([len(line) for line in filled], n=20)[-1]
        for line in [*lines, ""]:
            if line:
                block.append(line)
            elif block:
                pairs = pairwise(block)  # verse, headings, addresses: no line is as full as it could be
                short = all(len(left) + len(right.split(" ")[0]) < 0.7 * width for left, right in pairs)
                paragraphs += block if short else [" ".join(block)]
                block = []
        paragraphs = [re.sub(r"([a-z])- (?=[a-z])", r"\1-", paragraph) for paragraph in paragraphs]
    else:
        paragraphs = joined_lines(filled)
    return without_front_matter([p for p in paragraphs if not re.fullmatch(r"[\d\W_]*", p)])


def without_front_matter(paragraphs: list[str]) -> list[str]:
    """Drops title pages, tables of contents and the like: what comes before the first run of real prose."""
    for start in range(min(150, len(paragraphs))):
        if len(paragraphs[start]) > 150 and sum(map(len, paragraphs[start : start + 8])) > 1200:
            paragraphs = paragraphs[start:]
            break
    if re.match(r"(the )?end\W*$|finis\W*$", paragraphs[-1], re.IGNORECASE):
        paragraphs = paragraphs[:-1]
    return paragraphs


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def chat(row: dict[str, str]) -> str:
    """An instruction and its answer as one chat turn each."""
    asked = "\n".join(part for part in (row["instruction"].strip(), row["input"].strip()) if part)
    return plain(f"<|user|>{asked}{END}<|assistant|>{row['output'].strip()}")


def write(path: Path, documents: list[str]) -> int:
    """Writes documents to one file and returns their number of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"{END}{BEGIN}".join(documents)
    path.write_text(text, encoding="utf-8")
    return len(text.encode("utf-8"))


def titled(stem: str) -> tuple[str, str, int]:
    """Author, short title and year from Author_Title_Year."""
    author, title, year = stem.split("_")
    return AUTHORS.get(author, author), title, int(year)


def main() -> None:
    """Reads the sets and writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the three sets")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--last-year", type=int, default=1930, help="leave out later novels")
    options = parser.parse_args()
    output: Path = options.output
    n_bytes = {"main": 0, "late": 0, "heldout": 0}
    used: dict[str, list[str]] = {}
    left_out: list[str] = []

    for path in sorted((options.data / "english_novels").glob("*.txt")):
        author, title, year = titled(path.stem)
        if year > options.last_year or path.stem in IN_CHILDRENS_BOOKS:
            left_out.append(f"{author}, {title} ({year})")
            continue
        document = "\n\n".join(novel_paragraphs(path.read_text(encoding="utf-8")))
        if path.stem == HELDOUT_NOVEL:
            folders = ["heldout"]
        else:
            used.setdefault(author, []).append(f"{title} ({year})")
            folders = ["main", "late"] if year >= LATE_NOVELS_FROM_YEAR else ["main"]
        for folder in folders:
            n_bytes[folder] += write(output / folder / path.name, [document])

    passages = rows(options.data / "childrens_books" / "train.jsonl")
    validation = rows(options.data / "childrens_books" / "validation.jsonl")
    texts = [plain(row["text"]).strip() for row in passages]
    chats = [chat(row) for row in rows(options.data / "alpaca_libre" / "train.jsonl")]
    for folder in ("main", "late"):
        n_bytes[folder] += write(output / folder / "childrens_books.txt", texts)
        n_bytes[folder] += write(output / folder / "alpaca_libre.txt", chats)
    n_bytes["heldout"] += write(
        output / "heldout" / "childrens_books.txt", [plain(row["text"]).strip() for row in validation]
    )

    children: dict[str, list[str]] = {}
    for row in passages:
        titles = children.setdefault(row["author"], [])
        if row["title"] not in titles:
            titles.append(row["title"])
    n_novels = sum(map(len, used.values()))
    author, title, year = titled(HELDOUT_NOVEL)
    lines = [
        f"- **{n_novels} English novels** in the public domain, mostly British and of the 19th "
        "century, from the collection "
        "GitHub: computationalstylistics/100_english_novels (short titles as there): "
        + "; ".join(f"{name}: {', '.join(titles)}" for name, titles in used.items()) + ".",
        f"- **{len(texts)} passages of public-domain children's books**, from "
        "GitHub: mlschmitt/classic-books-markdown: "
        + "; ".join(f"{name}: {', '.join(titles)}" for name, titles in children.items()) + ".",
        f"- **{len(chats)} instructions with answers** of alpaca_libre (CC0), "
        "GitHub: mobarski/alpaca-libre, written as chats.",
        f"- Held out: {author}, {title} ({year}), and {len(validation)} other passages of the children's "
        "books.",
        f"- Left out: {'; '.join(left_out)}. Those after {options.last_year} may still be in copyright in "
        "the United States; of the others the children's books hold passages.",
        f"- Seen more often in the last part of the training: the children's books, the instructions and the "
        f"novels of {LATE_NOVELS_FROM_YEAR} and later.",
    ]  # fmt: skip
    (output / "sources.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for folder, size in n_bytes.items():
        print(f"{folder}: {len(list((output / folder).glob('*.txt')))} files, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
