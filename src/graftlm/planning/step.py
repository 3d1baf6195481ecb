"""One training step of a model that has shapes and no values: the base by its configuration, the method, the objective.

What runs is what training runs: the same model class, the same deltas, the same objective. Only the numbers are
missing, so a step of a model of any size takes seconds and no memory.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core import Adapter, Method, attach, parts_of, survey
from graftlm.data import MaskingCollator
from graftlm.kernels import Recompute, fuse
from graftlm.models import HEADS, head_of
from graftlm.objectives import OBJECTIVES, CausalLM, Objective
from graftlm.planning.operations import Operation
from graftlm.planning.tracing import Trace
from graftlm.quantisation import PACKED, as_format, quantized, reserve

__all__ = ["Shape", "Traced", "attached", "like", "meta_model", "objective_of", "trace"]

#: The share of tokens that masked language modelling hides.
_HIDDEN = next(float(each.default) for each in fields(MaskingCollator) if each.name == "share")  # type: ignore[arg-type]
#: Head to the task whose step is like that of any task with it.
_LIKE = {"causal": "sft", "sequence": "classify", "masked": "mlm", "token": "tag", "seq2seq": "seq2seq"}

#: The block that a parameter's name begins with, or all but its last word.
_BLOCK = re.compile(r".*?\.\d+(?=\.)|.*(?=\.)|.*")
#: What the optimizer keeps of each trained number: AdamW's two moments.
_MOMENTS = 2
#: bitsandbytes holds tensors of so many numbers in 8 bits, with a size in float32 for so many of them.
_LEAST_8BIT, _BLOCK_8BIT = 4096, 256


@dataclass(frozen=True)
class Shape:
    """How much a step computes at once: rows and tokens a row, and how they are held.

    `labelled` is the share of the tokens that the loss reads, counted from the end of each row; `evaluation_rows` are
    scored at once without gradients when a run evaluates (0: it does not); `target_length` are the tokens that an
    encoder-decoder writes (0: as many as it reads); `optimizer` is the run's setting; `on_processor`
    says where products are computed.
    """

    rows: int = 1
    length: int = 512
    dtype: torch.dtype = torch.float32
    recompute: Recompute = "none"
    quantize: str | None = None
    labelled: float = 1.0
    evaluation_rows: int = 0
    target_length: int = 0
    on_processor: bool = True
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Traced:
    """What one step took: `peaks` are bytes by phase and kind, `sizes` the bytes of what stays, by kind.

    `operations` has by phase how often each operation is called, `largest_bytes` are those of its largest block.
    """

    sizes: Counter[str]
    peaks: dict[str, Counter[str]]
    flops: Counter[str]
    operations: dict[str, Counter[Operation]]
    trainable: int
    trained_tensors: int
    parameters: int
    adapter_bytes: int
    largest_bytes: int = 0
    trained_by_role: dict[str, int] = field(default_factory=dict)


def meta_model(config: Any, task: str, dtype: torch.dtype, classes: int = 2) -> Any:
    """The model of `config` for `task` on the meta device; no random number is drawn.

    Raises ValueError where transformers has no such model.
    """
    import transformers

    config = copy.deepcopy(config)
    head = head_of(task, config)
    kind: Any = getattr(transformers, HEADS[head])
    if head in ("sequence", "token"):
        config.num_labels = classes
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    state = torch.random.get_rng_state()
    try:
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype)
    finally:
        torch.random.set_rng_state(state)


def like(task: str, config: Any) -> str:
    """The task whose step is counted for one of `task`: an answer that is preferred or chosen is a row as any other.

    Example:
        >>> from transformers import LlamaConfig
        >>> like("dpo", LlamaConfig()), like("regress", LlamaConfig())
        ('sft', 'classify')
    """
    return task if task == "lm" else _LIKE[head_of(task, config)]


def objective_of(task: str, model: Any) -> Objective:
    """The objective that a run of `task` minimises."""
    kind = OBJECTIVES[task]
    return CausalLM.of(model) if kind is CausalLM else kind()


def trace(config: Any, method: Method | None, task: str, shape: Shape, *, classes: int = 2) -> Traced:
    """Run one step of `method` on the model of `config` and count what it takes.

    With `method` None nothing is trained: only the base is counted, and its forward pass. Raises SiteError and
    MethodError where the method does not fit the model.

    Example:
        >>> from transformers import LlamaConfig
        >>> from graftlm.methods import LoRA
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        ...                      vocab_size=100)
        >>> trace(config, LoRA(rank=4), "lm", Shape(rows=2, length=16)).trainable
        4096
    """
    model = meta_model(config, task, shape.dtype, classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if shape.quantize:
        reserve(model, as_format(shape.quantize))
    packed = {path for path, _ in quantized(model)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    by_module: Counter[str] = Counter()
    for name, tensor in tensors.items():
        by_module[_BLOCK.match(name)[0]] += _bytes(tensor)  # type: ignore[index]
    largest = max(by_module.values(), default=0)
    constants = {name for name in tensors if name.rpartition(".")[0] in packed and name.rpartition(".")[2] in PACKED}
    adapter = attached(model, method) if method else None
    counted = Trace(None if task in ("classify", "tag") else _vocabulary(model))
    counted.hold("weights", [tensor for name, tensor in tensors.items() if name not in constants])
    counted.hold("quantisation", [tensors[name] for name in sorted(constants)])
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad] if adapter else []
    if adapter is not None:
        counted.hold("deltas", adapter.state().values())
        counted.hold("optimizer", _moments(trained, shape.optimizer.endswith("8bit")))
    sizes = +counted.alive
    objective = objective_of(task, model)
    batch = _batch(task, shape, shape.rows)
    device = "cpu" if shape.on_processor else "cuda"
    with fuse(model, recompute=shape.recompute, device=device), counted:
        if adapter is not None:
            model.train()
            with counted.phase("forward"):
                count = max(objective.count(batch), 1)
                loss = objective.loss_sum(objective.outputs(model, batch), batch) / count
            with counted.phase("backward"):
                if loss.requires_grad:  # a mask trains nothing
                    torch.autograd.backward(loss)
                del loss
            counted.hold("gradients", [parameter.grad for parameter in trained if parameter.grad is not None])
            with counted.phase("optimizer"):
                pass
        if shape.evaluation_rows or adapter is None:
            for parameter in trained:
                parameter.grad = None
            model.eval()
            held = _batch(task, shape, shape.evaluation_rows or shape.rows)
            with counted.phase("evaluation"), torch.no_grad():
                objective.loss_sum(objective.outputs(model, held), held)
    return Traced(
        sizes=sizes + Counter(gradients=sum(map(_bytes, trained))),
        peaks=counted.peaks,
        flops=counted.flops,
        operations=dict(counted.operations),
        trainable=sum(parameter.numel() for parameter in trained),
        trained_tensors=len(trained),
        parameters=parameters,
        adapter_bytes=sum(map(_bytes, adapter.baked().state().values())) if adapter else 0,
        largest_bytes=largest,
        trained_by_role=_by_role(adapter) if adapter else {},
    )


def attached(model: nn.Module, method: Method) -> Adapter:
    """The method on a model without values; methods that choose by data get as many entries as they would."""
    survey(model)  # before anything watches: it runs the model by itself
    state = Adapter(model, "default", method, parts_of(model, method)).state()
    return attach(model, method, state=state)


def _moments(trained: list[nn.Parameter], eight_bits: bool) -> list[Tensor]:
    """What the optimizer keeps: two moments of each trained tensor, in float32 or in 8 bits with their sizes."""
    kept: list[Tensor] = []
    for parameter in trained:
        if eight_bits and parameter.numel() >= _LEAST_8BIT:
            codes = torch.empty_like(parameter, dtype=torch.uint8, requires_grad=False)
            sizes = parameter.new_empty(-(-parameter.numel() // _BLOCK_8BIT), dtype=torch.float32)
            own = [torch.empty_like(each) for _ in range(_MOMENTS) for each in (codes, sizes)]
        else:
            own = [torch.empty_like(parameter, requires_grad=False) for _ in range(_MOMENTS)]
        parameter.__dict__["_planned_moments"] = own  # they live as long as it does
        kept += own
    return kept


def _batch(task: str, shape: Shape, rows: int) -> dict[str, Tensor]:
    """Rows of the full length with values, because labels and masks decide shapes."""
    ids = torch.ones(rows, shape.length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "classify":
        return batch | {"labels": torch.zeros(rows, dtype=torch.long)}
    if task == "seq2seq":
        written = torch.ones(rows, shape.target_length or shape.length, dtype=torch.long)
        return batch | {"decoder_input_ids": written, "labels": written}
    share = _HIDDEN if task == "mlm" else shape.labelled
    labels = torch.full_like(ids, -100)
    labels[:, -max(1, round(share * shape.length)) :] = 1
    return batch | {"labels": labels}


def _vocabulary(model: Any) -> int | None:
    head = model.get_output_embeddings()
    return int(head.weight.shape[0]) if head is not None else None


def _by_role(adapter: Adapter) -> dict[str, int]:
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for part in adapter.parts:
        for parameter in part.delta.parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                counts[part.site.role or part.site.path.rpartition(".")[2]] += parameter.numel()
    return dict(counts.most_common())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
