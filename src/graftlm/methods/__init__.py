"""The catalogue of methods: one class a method, and the text that names them in run files and on the command line.

A text is a sum of calls, `lora(rank=16,targets=all-linear)+head`: names from `METHODS` or of an installed package
(`graftlm.methods.plugins`), settings by name (the first may go without), lists in square brackets, texts with or
without quotes.

Example:
    >>> read_method("lora(rank=4, targets=[query,value]) + head").parts[0].rank
    4
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import operator
import re
from typing import Any

from graftlm.core import Method
from graftlm.errors import Finding, GraftError, MethodError, nearest
from graftlm.methods.adalora import AdaLoRA
from graftlm.methods.attempt import Attempt
from graftlm.methods.bitfit import BitFit
from graftlm.methods.dora import DoRA
from graftlm.methods.full import Full
from graftlm.methods.gated import Gated
from graftlm.methods.head import Head
from graftlm.methods.hybrids import MAM, UniPELT
from graftlm.methods.ia3 import IA3
from graftlm.methods.last import Last
from graftlm.methods.layers import Layers
from graftlm.methods.lora import LoRA, LoRAPlus, OLoRA, PiSSA, RsLoRA
from graftlm.methods.modules import Modules
from graftlm.methods.norm import NormTuning
from graftlm.methods.parallel import ParallelAdapter
from graftlm.methods.plugins import load_plugin, plugin_names
from graftlm.methods.prefix import PrefixTuning
from graftlm.methods.prompt import PromptTuning
from graftlm.methods.prune import Prune
from graftlm.methods.ptuning import PTuning
from graftlm.methods.rezero import ReZero
from graftlm.methods.series import SeriesAdapter
from graftlm.methods.sparse import Sparse
from graftlm.methods.tokens import TrainableTokens
from graftlm.methods.value import Value
from graftlm.methods.vera import VeRA

__all__ = [
    "COMPANIONS",
    "IA3",
    "MAM",
    "METHODS",
    "AdaLoRA",
    "Attempt",
    "BitFit",
    "DoRA",
    "Full",
    "Gated",
    "Head",
    "Last",
    "Layers",
    "LoRA",
    "LoRAPlus",
    "Modules",
    "NormTuning",
    "OLoRA",
    "PTuning",
    "ParallelAdapter",
    "PiSSA",
    "PrefixTuning",
    "PromptTuning",
    "Prune",
    "ReZero",
    "RsLoRA",
    "SeriesAdapter",
    "Sparse",
    "TrainableTokens",
    "UniPELT",
    "Value",
    "VeRA",
    "find_method",
    "method",
    "method_names",
    "read_method",
]  # fmt: skip

METHODS: dict[str, type[Method]] = {
    "adalora": AdaLoRA,
    "attempt": Attempt,
    "bitfit": BitFit,
    "dora": DoRA,
    "full": Full,
    "gated": Gated,
    "head": Head,
    "ia3": IA3,
    "last": Last,
    "layers": Layers,
    "lora": LoRA,
    "loraplus": LoRAPlus,
    "mam": MAM,
    "modules": Modules,
    "norm": NormTuning,
    "olora": OLoRA,
    "parallel": ParallelAdapter,
    "pissa": PiSSA,
    "prefix": PrefixTuning,
    "prompt": PromptTuning,
    "prune": Prune,
    "ptuning": PTuning,
    "rezero": ReZero,
    "rslora": RsLoRA,
    "series": SeriesAdapter,
    "sparse": Sparse,
    "tokens": TrainableTokens,
    "unipelt": UniPELT,
    "vera": VeRA,
}

#: What tasks put beside a method, and no one chooses by itself.
COMPANIONS: dict[str, type[Method]] = {"value": Value}

#: Names that other tools use for settings of our methods.
_FOREIGN = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "token_indices": "ids",
}


#: Names that other tools and papers use for methods of ours.
_FOREIGN_METHODS = {
    "adapter": "series",
    "bottleneck": "series",
    "houlsby": "series",
    "pfeiffer": "series",
    "adapters": "series",
    "finetuning": "full",
    "features": "head",
    "probe": "head",
    "linearprobe": "head",
    "ln": "norm",
    "layernorm": "norm",
    "lntuning": "norm",
    "ptuningv2": "prefix",
    "prefixtuning": "prefix",
    "prompttuning": "prompt",
    "softprompt": "prompt",
    "fish": "sparse",
    "fisher": "sparse",
    "snip": "sparse",
    "trainabletokens": "tokens",
}


def find_method(name: str) -> type[Method] | None:
    """The class of the method `name`: graftlm's own, else that of an installed package; None where there is none.

    Raises MethodError where the package's method cannot be loaded.

    Example:
        >>> find_method("lora")
        <class 'graftlm.methods.lora.LoRA'>
    """
    return METHODS.get(name) or COMPANIONS.get(name) or load_plugin(name)


def method_names() -> list[str]:
    """The names of all methods, those of installed packages among them, sorted; no package's code is run."""
    return sorted(METHODS.keys() | plugin_names())


def read_method(text: str) -> Method:
    """The method that `text` names. Raises MethodError with every fault and the nearest right names.

    Example:
        >>> print(read_method("LoRA(16, targets=all-linear) + head"))
        lora(rank=16,targets=all-linear)+head
    """
    try:
        tree = _parsed(text.strip())
    except SyntaxError as error:
        at = f" at character {error.offset}" if error.offset else ""
        raise MethodError(Finding("T114", f"cannot read method {text!r}{at}", fix="lora(rank=16)+head")) from None
    faults: list[Finding] = []
    found = _read_sum(tree, faults)
    if found is None:
        raise MethodError(faults)
    return found


#: `read_method`, as it reads in `graftlm.method("lora(rank=8)")`.
method = read_method


def _parsed(text: str) -> ast.expr:
    """The text as Python reads it; values that Python cannot read (`global`, `-4:`, `2:4`) with quotes around them."""
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        quoted = re.sub(r"""('[^']*'|"[^"]*")|(?<==)\s*([^\s,()\[\]{}'"=+]+)""", _quoted, text)
        if quoted == text:
            raise
        with contextlib.suppress(SyntaxError):
            return ast.parse(quoted, mode="eval").body
        raise  # of the text as it was given


def _quoted(match: re.Match[str]) -> str:
    if match[1]:
        return match[1]
    try:
        ast.parse(match[2], mode="eval")
    except SyntaxError:
        return repr(match[2])
    return match[0]


def _read_sum(node: ast.expr, faults: list[Finding]) -> Method | None:
    """The method that a text or a part of it names; None, and what is wrong in `faults`, where it names none."""
    parts = [_read_part(summand, faults) for summand in _summands(node)]
    known = [part for part in parts if part is not None]
    return functools.reduce(operator.add, known) if len(known) == len(parts) else None


def _setting(kind: type[Method], key: str, node: ast.expr, faults: list[Finding]) -> Any:
    """The value of a setting; where it is a method itself, as in `rezero(lora)`, that method."""
    field = next(f for f in dataclasses.fields(kind) if f.name == key)
    return _read_sum(node, faults) if field.type == "Method" else _value(node)


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _read_part(node: ast.expr, faults: list[Finding]) -> Method | None:
    call = node if isinstance(node, ast.Call) else None
    name = _plain(call.func if call else node).lower()
    try:
        kind = find_method(name)
    except MethodError as error:
        faults += error.findings
        return None
    if kind is None:
        names = method_names()
        foreign = _FOREIGN_METHODS.get(re.sub(r"\(.*|[^a-z0-9]", "", name))
        close = [foreign] if foreign in METHODS else nearest(name, names)
        hint = f" Did you mean {close[0]}?" if close else ""
        faults.append(
            Finding(
                "T101",
                f"unknown method {name!r}.{hint} There are: {', '.join(names)}",
                fix=close[0] if close else "lora",
            )
        )
        return None
    fields = [field.name for field in dataclasses.fields(kind)]
    before = len(faults)
    given: dict[str, Any] = {}
    for position, argument in enumerate(call.args if call else []):
        if position < len(fields):
            given[fields[position]] = _setting(kind, fields[position], argument, faults)
    if call and len(call.args) > len(fields):
        faults.append(Finding("T112", f"{name} takes {len(fields)} settings, got {len(call.args)}"))
    for keyword in call.keywords if call else []:
        key = keyword.arg or "**"
        if key in given:
            faults.append(Finding("T112", f"{name}: {key} is given twice"))
        elif key in fields:
            given[key] = _setting(kind, key, keyword.value, faults)
        elif _FOREIGN.get(key) in fields:
            faults.append(Finding("T112", f"{name}: {key!r} is called {_FOREIGN[key]} here", fix=_FOREIGN[key]))
        else:
            close = nearest(key, fields)
            has = f"it has {', '.join(fields)}" if fields else "it has no settings"
            faults.append(Finding("T112", f"{name} has no {key!r}: {has}", fix=close[0] if close else ""))
    if len(faults) > before:
        return None
    faults += [
        Finding("T113", f"{name}: {key}={given[key]!r} is not {wanted}")
        for key in given
        if (wanted := _mistyped(kind, key, given[key]))
    ]
    try:
        return None if len(faults) > before else kind(**given)
    except GraftError as error:
        faults += error.findings
        return None


def _mistyped(kind: type[Method], key: str, value: Any) -> str | None:
    """What the setting should be, where the value is of the wrong kind; judged by the default's type."""
    field = next(f for f in dataclasses.fields(kind) if f.name == key)
    default = field.default
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if isinstance(default, float):
        return None if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
    return None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in ("true", "false"):
        return node.id.lower() == "true"
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_plain(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _plain(node)


def _plain(node: ast.expr) -> str:
    # `all-linear` and `encoder/attention` reach the parser as arithmetic on names: put the text together again.
    if isinstance(node, ast.Constant):
        return str(node.value)
    return ast.unparse(node).replace(" ", "")
