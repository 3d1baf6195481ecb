"""Pre-trains a small Llama-type language model from a folder of plain text on a CPU.

`python scripts/pretrain.py TEXT_FOLDER -o MODEL_FOLDER --minutes 60` trains a byte-level BPE tokenizer and a
model whose bf16 weights stay under --max-mb, and writes both as a Hugging Face folder with a model card made
from the numbers of the run. A text file may hold several documents with `<|end|><|begin|>` between them, and
chats written with the special tokens below. scripts/pretraining_text.py makes such folders.

Schedule: warm-up, constant rate, linear decay to 0 over the last part, in which about half of the windows
come from --late-text. Muon updates the matrices of the blocks, AdamW everything else; the weights are bf16
with f32 master copies. Every window starts with `<|begin|>`, as every encoded text does; that token is
never a target.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch is imported: threads that wait by spinning are several times slower on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BEGIN, END, PAD, USER, ASSISTANT, SYSTEM = SPECIAL = (
    "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"
)  # fmt: skip
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{% generation %}{{- message['content'] + '<|end|>' -}}{% endgeneration %}"
    "{%- else -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
WARM_UP, DECAY = 0.02, 0.3  # shares of the run
CHECKPOINT_EVERY_S, REPORT_EVERY_S = 300, 30
PROMPTS = ("Once upon a time", "The old man looked at", "It was a cold morning in November, and")
QUESTION = "Give three tips for staying healthy."


def documents(folder: Path) -> Iterator[str]:
    """The documents of a folder's text files, in the order of the file names."""
    for path in sorted(folder.glob("*.txt")):
        for document in path.read_text(encoding="utf-8").split(END + BEGIN):
            if document.strip():
                yield document


def n_parameters(config: LlamaConfig) -> int:
    """Number of parameters of a model with tied embeddings."""
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    block = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return config.vocab_size * hidden + config.num_hidden_layers * block + hidden


def train_tokenizer(folder: Path, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `<|begin|>` before every text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((without_special(text) for text in documents(folder)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B:1",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def without_special(text: str) -> str:
    """Text without special tokens, so that no merges are learned from their letters."""
    for token in SPECIAL:
        text = text.replace(token, "\n")
    return text


def encode(folder: Path, tokenizer: PreTrainedTokenizerFast, target: Path) -> int:
    """Writes a folder's documents as `<|begin|>` text `<|end|>` in uint16; returns the number of tokens."""
    begin_id, end_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    backend, n_tokens = tokenizer.backend_tokenizer, 0
    with target.open("wb") as file:
        for document in documents(folder):
            # Cut at paragraphs: the pieces are encoded in parallel, and no token spans a cut.
            pieces = document.replace("\n\n", "\n\n\0").split("\0")
            encoded = backend.encode_batch_fast(pieces, add_special_tokens=False)
            ids = np.concatenate([[begin_id], *(piece.ids for piece in encoded), [end_id]]).astype(np.uint16)
            file.write(ids.tobytes())
            n_tokens += len(ids)
    return n_tokens


class Windows:
    """Batches of random windows of encoded text; which ones depends on the seed and the step alone."""

    def __init__(self, main: Path, late: Path | None, options: argparse.Namespace, begin_id: int) -> None:
        self.main = np.memmap(main, np.uint16, "r")
        self.late = np.memmap(late, np.uint16, "r") if late else self.main
        self.batch, self.context, self.seed = options.batch, options.context, options.seed
        self.begin_id = begin_id

    def __call__(self, step: int, late_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (-100: none) of one step."""
        generator = np.random.default_rng([self.seed, step])
        windows = np.empty((self.batch, self.context + 1), np.int64)
        windows[:, 0] = self.begin_id
        for row in windows:
            tokens = self.late if generator.random() < late_share else self.main
            start = generator.integers(0, len(tokens) - self.context)
            row[1:] = tokens[start : start + self.context]
        targets = windows[:, 1:].copy()
        targets[targets == self.begin_id] = -100
        return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(targets)


class Trainer:
    """Master weights, optimizers and the state of a run."""

    def __init__(self, model: LlamaForCausalLM, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.step, self.elapsed_s = 0, 0.0
        self.commands: list[list] = []  # the step that each part of the run began at, and its command
        self.working = dict(model.named_parameters())  # bf16, tied weights once
        self.masters = {name: weight.detach().float() for name, weight in self.working.items()}
        matrices, embeddings, norms = [], [], []
        for name, weight in self.masters.items():
            (norms if weight.ndim < 2 else embeddings if "embed" in name else matrices).append(weight)
        adam = [{"params": embeddings, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
        rest = {"lr": options.learning_rate, "betas": (0.9, 0.95), "eps": 1e-10}
        if options.optimizer == "adamw":
            adam.append({"params": matrices, "weight_decay": 0.1})
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, **rest)]
        if options.optimizer == "muon":
            muon = {"lr": options.learning_rate, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
            self.optimizers.append(torch.optim.Muon(matrices, **muon))

    def progress(self) -> float:
        """Share of the run that is done."""
        if self.options.steps:
            return self.step / self.options.steps
        return self.elapsed_s / (60 * self.options.minutes)

    def update(self) -> None:
        """One optimizer step from the gradients of the working weights."""
        progress = self.progress()
        factor = max(0.0, min(1.0, (progress + 1e-3) / WARM_UP, (1 - progress) / DECAY))
        for name, weight in self.masters.items():
            weight.grad = self.working[name].grad.float()
            self.working[name].grad = None
        torch.nn.utils.clip_grad_norm_(list(self.masters.values()), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate * factor
            optimizer.step()
        with torch.no_grad():
            for name, weight in self.masters.items():
                self.working[name].copy_(weight)

    def save(self, folder: Path) -> None:
        """Writes the checkpoint."""
        tensors = {f"weight/{name}": weight for name, weight in self.masters.items()}
        names = {id(weight): name for name, weight in self.masters.items()}
        for optimizer in self.optimizers:
            for weight, state in optimizer.state.items():
                for key, value in state.items():
                    tensors[f"{key}/{names[id(weight)]}"] = value
        save_file(tensors, folder / "new.safetensors")
        os.replace(folder / "new.safetensors", folder / "state.safetensors")
        state = {"step": self.step, "elapsed_s": self.elapsed_s, "commands": self.commands}
        (folder / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Takes up the checkpoint."""
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.commands = state.get("commands", [])
        by_name: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.masters}
        for name, tensor in load_file(folder / "state.safetensors").items():
            key, _, weight = name.partition("/")
            by_name[weight][key] = tensor
        with torch.no_grad():
            for name, tensors in by_name.items():
                self.masters[name].copy_(tensors.pop("weight"))
                self.working[name].copy_(self.masters[name])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    name = next(name for name, master in self.masters.items() if master is weight)
                    optimizer.state[weight] = by_name[name]


def train(trainer: Trainer, windows: Windows, folder: Path) -> float:
    """Runs the steps that are left and returns the mean training loss of the last reports' steps."""
    model, options = trainer.model, trainer.options

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(model.model(input_ids=inputs, use_cache=False).last_hidden_state)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = loss_of
    if options.compile:
        compute = torch.compile(loss_of, dynamic=False)
    model.train()
    base_s, start_s = trainer.elapsed_s, time.monotonic()
    reported_s = saved_s = start_s
    step_tokens = options.batch * options.context
    losses: list[float] = []
    loss_mean, reported_step = math.nan, trainer.step
    while trainer.progress() < 1:
        late_share = options.late_share if trainer.progress() > 1 - DECAY else 0.0
        loss = compute(*windows(trainer.step, late_share))
        loss.backward()
        trainer.update()
        losses.append(loss.item())
        trainer.step += 1
        now_s = time.monotonic()
        trainer.elapsed_s = base_s + now_s - start_s
        if now_s - reported_s > REPORT_EVERY_S or trainer.progress() >= 1:
            tokens_per_s = (trainer.step - reported_step) * step_tokens / (now_s - reported_s)
            loss_mean = sum(losses) / len(losses)
            left_s = trainer.elapsed_s * (1 / trainer.progress() - 1)
            print(
                f"step {trainer.step}  {100 * trainer.progress():.1f} %  loss {loss_mean:.3f}  "
                f"{tokens_per_s:.0f} tokens/s  {trainer.elapsed_s:.0f} s  left {left_s:.0f} s",
                flush=True,
            )
            losses, reported_s, reported_step = [], now_s, trainer.step
        if now_s - saved_s > CHECKPOINT_EVERY_S:
            trainer.save(folder)
            saved_s = now_s
    trainer.save(folder)
    return loss_mean


@torch.no_grad()
def heldout_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> dict[str, tuple[float, int, int]]:
    """Summed loss in nats, number of tokens and of bytes for every held-out file."""
    results: dict[str, tuple[float, int, int]] = {}
    context = model.config.max_position_embeddings
    for path in sorted(folder.glob("*.txt")):
        nats, n_tokens, n_bytes = 0.0, 0, 0
        for document in path.read_text(encoding="utf-8").split(END + BEGIN):
            ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            n_bytes += len(document.encode("utf-8"))
            for start in range(0, len(ids), context - 1):
                window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + context - 1]]])
                logits = model(input_ids=window).logits[0, :-1].float()
                nats += functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
                n_tokens += window.shape[1] - 1
        results[path.name] = (nats, n_tokens, n_bytes)
    return results


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Continuations of the prompts and an answer to the question, sampled with a fixed seed."""
    question = [{"role": "user", "content": QUESTION}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    texts = []
    for prompt in (*PROMPTS, chat):
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=prompt is not chat)
        torch.manual_seed(0)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=0.7,
            top_k=40,
            max_new_tokens=70,
        )
        texts.append(tokenizer.decode(output[0, 1:]).replace(END, f"{END} ").strip())
    return texts


def save_model(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes configuration, bf16 weights and tokenizer."""
    trainer.model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # how the tokenizer of a resumed run was loaded
        entries.pop(key, None)
    entries["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older and newer transformers know
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def machine() -> str:
    """The processor's name and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    amx = ", AMX bf16" if any(" amx_bf16" in line for line in lines) else ""
    return f"{os.cpu_count()} cores ({name}{amx})"


def model_card(
    trainer: Trainer,
    n_text_tokens: dict[str, int],
    train_loss: float,
    heldout: dict[str, tuple[float, int, int]],
    texts: list[str],
    n_weight_bytes: int,
) -> str:
    """The README.md of the model folder."""
    config, options = trainer.model.config, trainer.options
    n_tokens = trainer.step * options.batch * options.context
    muon = options.optimizer == "muon"
    optimizer = "Muon (matrices of the blocks) and AdamW (the rest)" if muon else "AdamW"
    special = ", ".join(f"`{token}`" for token in SPECIAL)
    origin = f"Plain text files of the folder `{options.text.name}`."
    if options.sources:
        origin = options.sources.read_text(encoding="utf-8").strip()
    late = ""
    if options.late_text:
        late = f", in which {options.late_share:.0%} of the windows come from the late text"
    lines = [
        "---", "license: apache-2.0", "language: en", "library_name: transformers",
        "pipeline_tag: text-generation", "---", "",
        f"# {options.name}", "",
        f"A small English base model ({n_parameters(config) / 1e6:.2f} million parameters) of the Llama "
        "architecture, trained from scratch on public-domain text, to try fine-tuning methods with.", "",
        "## Architecture", "",
        f"`LlamaForCausalLM`: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, SwiGLU of "
        f"{config.intermediate_size}, {config.num_attention_heads} attention heads with "
        f"{config.num_key_value_heads} key-value heads, tied embeddings, context of "
        f"{config.max_position_embeddings} tokens. {n_parameters(config):,} parameters, "
        f"{n_weight_bytes:,} bytes in bf16. Byte-level BPE tokenizer with {config.vocab_size} entries; "
        f"special tokens {special}. `<|begin|>` starts every text, `<|end|>` ends a document and a chat "
        "turn.", "", "## Text", "", origin, "",
        "Tokens: " + ", ".join(f"{name} {count:,}" for name, count in n_text_tokens.items()) + ".", "",
        "## Training", "",
        f"{trainer.step:,} steps of {options.batch} windows of {options.context} tokens: {n_tokens:,} tokens "
        f"({n_tokens / n_text_tokens['main']:.2f} times the main text) in {trainer.elapsed_s:,.0f} seconds "
        f"on {machine()}, {n_tokens / trainer.elapsed_s:,.0f} tokens a "
        f"second. {optimizer}, peak rate {options.learning_rate:g}, warm-up over {WARM_UP:.0%} and linear "
        f"decay to 0 over the last {DECAY:.0%} of the run{late}. Seed {options.seed}. "
        f"Mean training loss at the end: {train_loss:.3f} nats a token.", "",
        "```", *(f"{command}  # from step {step}" for step, command in trainer.commands), "```", "",
    ]  # fmt: skip
    if heldout:
        lines += ["## Held-out loss", ""]
        lines += ["| text | tokens | nats per token | bits per byte |", "|---|---|---|---|"]
        total = tuple(map(sum, zip(*heldout.values(), strict=True)))
        for name, (nats, tokens, n_bytes) in {**heldout, "together": total}.items():
            bits = nats / n_bytes / math.log(2)
            lines.append(f"| {name} | {tokens:,} | {nats / tokens:.3f} | {bits:.3f} |")
        lines.append("")
    lines += ["## Samples", ""]
    lines += ["Sampled at temperature 0.7 from the 40 likeliest tokens, seed 0; not selected.", ""]
    for text in texts:
        lines += [f"    {line}" for line in text.split("\n")] + [""]
    lines += [
        "## Limits", "",
        f"The model is tiny and was trained for {trainer.elapsed_s / 60:.0f} minutes on a CPU: it writes "
        "English sentences, but follows no plot, knows no facts and answers few instructions properly. Its "
        "prose, its views and its prejudices are those of its texts. Do not use it for facts or advice.",
        "", "## Licence", "", "Apache-2.0.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="folder of plain text files (*.txt, UTF-8)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--late-text", type=Path, help="folder of text to be seen more in the last part")
    parser.add_argument("--late-share", type=float, default=0.5, help="share of late text in the last part")
    parser.add_argument("--heldout", type=Path, help="folder of text to measure the loss on")
    parser.add_argument("--sources", type=Path, help="Markdown on the origin of the text, for the model card")
    parser.add_argument("--name", default="graftlm base", help="title of the model card")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, help="width of the SwiGLU (default: 2.75 times --hidden)")
    parser.add_argument("--layers", type=int, help="default: as many as --max-mb allows")
    parser.add_argument("--max-mb", type=float, default=9.5, help="largest size of the weights, 10^6 bytes")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="length of the run in steps")
    length.add_argument("--minutes", type=float, help="length of the run in minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile")
    parser.add_argument("--resume", action="store_true", help="go on from MODEL_FOLDER/checkpoint")
    options = parser.parse_args()
    options.command = "python " + shlex.join(sys.argv)
    if options.vocabulary > 2**16:
        parser.error("--vocabulary: at most 65536")
    return options


def main() -> None:
    """Text in, model folder out."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    folder: Path = options.output
    checkpoint = folder / "checkpoint"
    if checkpoint.exists() and not options.resume:
        shutil.rmtree(checkpoint)
    checkpoint.mkdir(parents=True, exist_ok=True)

    start_s = time.monotonic()
    token_files = {"main": checkpoint / "main.uint16", "late": checkpoint / "late.uint16"}
    if (checkpoint / "tokens.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        n_text_tokens = json.loads((checkpoint / "tokens.json").read_text(encoding="utf-8"))
    else:
        tokenizer = train_tokenizer(options.text, options.vocabulary, options.context)
        tokenizer.save_pretrained(checkpoint)
        n_text_tokens = {"main": encode(options.text, tokenizer, token_files["main"])}
        if options.late_text:
            n_text_tokens["late"] = encode(options.late_text, tokenizer, token_files["late"])
        (checkpoint / "tokens.json").write_text(json.dumps(n_text_tokens) + "\n", encoding="utf-8")
    print(f"text encoded in {time.monotonic() - start_s:.0f} s: {n_text_tokens}", flush=True)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.intermediate or 32 * round(2.75 * options.hidden / 32),
        num_hidden_layers=options.layers or 1,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    while not options.layers and 2 * n_parameters(config) + 8192 <= 1e6 * options.max_mb:
        config.num_hidden_layers += 1
    if not options.layers:
        config.num_hidden_layers -= 1
    if config.num_hidden_layers < 1 or 2 * n_parameters(config) + 8192 > 1e6 * options.max_mb:
        raise SystemExit(f"the model would be larger than {options.max_mb} MB")
    trainer = Trainer(LlamaForCausalLM(config).to(torch.bfloat16), options)
    if options.resume and (checkpoint / "state.json").exists():
        trainer.load(checkpoint)
    trainer.commands.append([trainer.step, options.command])
    shape = f"{n_parameters(config):,} parameters, {config.num_hidden_layers} layers"
    print(f"{shape}, from step {trainer.step}", flush=True)
    late = token_files["late"] if options.late_text else None
    windows = Windows(token_files["main"], late, options, tokenizer.bos_token_id)
    train_loss = train(trainer, windows, checkpoint)

    save_model(trainer, tokenizer, folder)
    saved = AutoModelForCausalLM.from_pretrained(folder).eval()  # measure what was written
    saved_tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = heldout_loss(saved, saved_tokenizer, options.heldout) if options.heldout else {}
    n_weight_bytes = (folder / "model.safetensors").stat().st_size
    texts = samples(saved, saved_tokenizer)
    card = model_card(trainer, n_text_tokens, train_loss, heldout, texts, n_weight_bytes)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card, flush=True)


if __name__ == "__main__":
    main()
