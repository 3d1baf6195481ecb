"""What the fused forms of DoRA, (IA)^3, added biases and LoRA gain, each against itself unfused, and against peft.

    python -m benchmarks.fused_forms

A training step's forward and backward on a random Llama (hidden size 256, 4 layers, float32, 2 rows of 256 tokens):
with everything fused, with all but the method's own maps and feed-forward parts fused, and by peft on plain
transformers where it has the method. All in one process and in turns: medians of processor time on one thread, and the
bytes kept for the backward, which are exact. Results go to benchmarks/results/fused_forms.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import graftlm
from graftlm.core.junction import Junction
from graftlm.kernels import fuse
from graftlm.objectives import CausalLM

MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": MAPS}
#: Our method's text, and peft's configuration.
METHODS: dict[str, tuple[str, Any]] = {
    "lora": ("lora(rank=16,alpha=32,targets=all-linear)", peft.LoraConfig(task_type="CAUSAL_LM", **LORA)),
    "lora-dropout": (
        "lora(rank=16,alpha=32,targets=all-linear,dropout=0.1)",
        peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **LORA),
    ),
    "dora": (
        "dora(rank=16,alpha=32,targets=all-linear)",
        peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **LORA),
    ),
    "ia3": (
        "ia3",
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "bitfit": ("bitfit", None),
}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def ours(text: str, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    model = llama()
    graftlm.attach(model, graftlm.method(text))
    objective = CausalLM.of(model)
    count = objective.count(batch)
    fuse(model)
    return lambda: objective.loss_sum(objective.outputs(model, batch), batch) / count


def unfused(loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same, with every map at which something acts on its class's own way."""

    def nothing(junction: Junction, module: Any, device: Any, weight: Any) -> Any:
        return None if junction.plan() else own(junction, module, device, weight)

    own = Junction.change

    def patched() -> torch.Tensor:
        Junction.change = nothing  # type: ignore[method-assign]
        try:
            return loss()
        finally:
            Junction.change = own  # type: ignore[method-assign]

    return patched


def theirs(config: Any, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    model = peft.get_peft_model(llama(), config).train()
    model.enable_input_require_grads()
    return lambda: model(**batch, use_cache=False).loss


def kept_bytes(loss: Callable[[], torch.Tensor]) -> int:
    """What is kept for the backward, without parameters."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = loss()
    del held
    return sum(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fused_forms.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ids = torch.randint(3, 4096, (options.rows, options.tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    results: dict[str, Any] = {"rows": options.rows, "tokens": options.tokens, "repeats": options.repeats}
    print("| method | fused, ms | of unfused | of peft | kept, MiB | of unfused | of peft |\n" + "|---" * 7 + "|")
    for name, (text, config) in METHODS.items():
        fused = ours(text, batch)
        contenders = {"fused": fused, "unfused": unfused(fused)}
        if config is not None:
            contenders["peft"] = theirs(config, batch)
        first = {each: float(loss()) for each, loss in contenders.items()}
        assert max(first.values()) - min(first.values()) < (0.05 if "dropout" in name else 1e-4), first
        times: dict[str, list[float]] = {each: [] for each in contenders}
        for repeat in range(options.repeats + 1):  # the first warms up
            for each, loss in contenders.items():
                began = time.process_time()
                loss().backward()
                if repeat:
                    times[each].append(1e3 * (time.process_time() - began))
        kept = {each: kept_bytes(loss) for each, loss in contenders.items()}
        ratio = {
            each: statistics.median(a / b for a, b in zip(times["fused"], other, strict=True))
            for each, other in times.items()
        }
        results[name] = {
            "ms": {each: round(statistics.median(own), 1) for each, own in times.items()},
            "fused_over": {each: round(value, 3) for each, value in ratio.items()},
            "kept_bytes": kept,
        }
        cells = [f"{results[name]['ms']['fused']:.0f}"]
        cells += [f"{ratio[each]:.2f}" if each in ratio else "" for each in ("unfused", "peft")]
        cells += [f"{kept['fused'] / 2**20:.1f}"]
        cells += [f"{kept['fused'] / kept[each]:.2f}" if each in kept else "" for each in ("unfused", "peft")]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
