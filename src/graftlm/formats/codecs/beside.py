"""What may stand beside any of PEFT's methods: modules trained whole (`modules_to_save`), biases, rows of embeddings.

They are written and read here for all codecs alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from graftlm.core import Method, Part, Survey, WholeParameterDelta, survey
from graftlm.core.kind import head_kind, is_encoder_decoder
from graftlm.errors import AdapterError, Finding, GraftError
from graftlm.formats.codecs.codec import Codec, Planned
from graftlm.formats.codecs.parameters import input_embedding, tied_apart, tokens_at
from graftlm.formats.matching import exactly, kept
from graftlm.methods import BitFit, Head, Modules, NormTuning, TrainableTokens

__all__ = ["beside", "key_beside", "stands_beside", "understood"]


def stands_beside(method: Method) -> bool:
    """Whether PEFT has fields for `method` that stand in the configuration of another one."""
    return isinstance(method, (Head, Modules, NormTuning, BitFit, TrainableTokens))


def key_beside(prefix: str, path: str, part: Planned, name: str) -> str:
    """The key in PEFT's file of tensor `name` of a part that stands beside another method's, at module `path`."""
    own = part.site.key.removeprefix(part.site.path)  # a parameter's or a part's name
    if isinstance(part.method, TrainableTokens):
        return f"{prefix}{path}.token_adapter.trainable_tokens_delta"
    return f"{prefix}{path}{own}" if part.is_parameter else f"{prefix}{path}{own}.{name}"


def beside(codec: Codec, parts: Sequence[Part], targets: Iterable[str], model: nn.Module) -> dict[str, Any] | None:
    """`bias`, `modules_to_save`, `trainable_token_indices` and `task_type` for what `parts` train.

    None where PEFT has no words for it.
    """
    tokens = [part for part in parts if isinstance(part.method, TrainableTokens)]
    parts = [part for part in parts if part not in tokens]
    if not all(
        stands_beside(part.method) and isinstance(part.delta, WholeParameterDelta) and not part.site.aliases
        for part in parts
    ):
        return None
    indices = _indices(tokens, targets, model)
    if indices is None:
        return None
    names = _parameter_names(model)
    trained = {part.site.key for part in parts}
    whole: list[str] = []
    for path, _ in model.named_modules(remove_duplicate=False):
        own = [name for name in names if name.startswith(path + ".")]
        inside = any(path.startswith(outer + ".") for outer in whole)
        if path and own and not inside and trained.issuperset(own):
            if all(name.endswith(".bias") for name in own):
                continue  # left to `bias`
            whole.append(path)
    rest = {name for name in trained if not _under(whole, name)}
    bias = "none"
    if rest:
        if rest == {name for name in names if name.endswith(".bias") and not _under(whole, name)}:
            bias = "all"
        elif rest == {f"{path}.bias" for path in targets} & names.keys():
            bias = codec.own_biases
        else:
            return None
    words = _words_for(whole, model)
    if words is None:
        return None
    if any(_under(whole, f"{path}.{name}") for part in tokens for path, name in part.site.places):
        return None  # PEFT trains an embedding's rows or all of it
    fields: dict[str, Any] = {
        "bias": bias,
        "modules_to_save": words or None,
        "trainable_token_indices": indices or None,
    }
    if any(field not in codec.defaults and value not in ("none", None) for field, value in fields.items()):
        return None
    fields = {field: value for field, value in fields.items() if field in codec.defaults}
    task = _task_of(model)
    # PEFT keeps the head of these tasks by itself, and then wants it in the file.
    if _keeps_heads(codec) and any(path not in whole for path in kept(_HEADS.get(task or "", ()), model)):
        task = None
    if task is None:
        kind = type(model)
        fields["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {**fields, "task_type": task}


def understood(codec: Codec, config: Mapping[str, Any], model: nn.Module) -> Method:
    """The whole method that `config` says: the codec's own, and what `bias` and `modules_to_save` put beside it.

    Raises as `Codec.understand` does.
    """
    faults = []
    if (bias := config.get("bias", "none")) not in ("none", "all", codec.own_biases):
        faults.append(Finding("A216", f"bias cannot be {bias!r}", fix='"bias": "none"'))
    heads = _HEADS.get(str(config.get("task_type")), ()) if _keeps_heads(codec) else ()
    config = {**config, "modules_to_save": [*(config.get("modules_to_save") or []), *heads]}
    try:
        method = codec.understand(config, model)
    except GraftError as error:
        raise AdapterError([*faults, *error.findings]) from None
    if faults:
        raise AdapterError(faults)
    here = survey(model)
    targets = [site.path for part in method.parts for site in part.sites(here)]
    for other in _methods_beside(codec, config, targets, model, here):
        method = method + other
    return method


def _keeps_heads(codec: Codec) -> bool:
    """Whether PEFT keeps the head of a classifier with this method: where it can keep modules at all."""
    return "modules_to_save" in codec.defaults


def _indices(parts: Sequence[Part], targets: Iterable[str], model: nn.Module) -> list[int] | dict[str, Any] | None:
    """`trainable_token_indices` for `parts`; None where PEFT cannot train these rows beside what it targets."""
    places = {path for part in parts for path, _ in part.site.places}
    paths = [part.site.path for part in parts]
    if places & set(targets) or tied_apart(paths, model):
        return None
    found = {part.site.path: list(part.method.rows) for part in parts if isinstance(part.method, TrainableTokens)}
    entry = input_embedding(model)
    if any(kept([path], model) != [path] for path in found):
        return None
    return found[entry] if entry and found.keys() == {entry} else found


def _tokens(words: Any, model: nn.Module, peft_type: str) -> list[Method]:
    """The methods that `trainable_token_indices` says."""
    entry = input_embedding(model)
    by_word = words if isinstance(words, dict) else {entry or "embed_tokens": words}
    by_ids: dict[tuple[int, ...], list[str]] = {}
    faults = []
    for word, ids in by_word.items():
        paths = kept([word], model)
        if not isinstance(ids, list) or not all(isinstance(each, int) for each in ids) or not ids:
            faults.append(Finding("A216", f"trainable_token_indices cannot be {ids!r}"))
        elif not paths:
            faults.append(Finding("A217", f"trainable_token_indices ({word}) match nothing in {type(model).__name__}"))
        else:
            by_ids.setdefault(tuple(ids), []).extend(paths)
    if faults:
        raise AdapterError(faults)
    return [tokens_at(ids, paths, model, peft_type) for ids, paths in by_ids.items()]


def _methods_beside(
    codec: Codec, config: Mapping[str, Any], targets: Sequence[str], model: nn.Module, here: Survey
) -> list[Method]:
    found: list[Method] = []
    names = _parameter_names(model)
    words = config.get("modules_to_save") or []
    whole = [path for path in kept(words, model) if any(name.startswith(path + ".") for name in names)]
    if whole:
        found.append(_modules(words, whole, here))
    if "trainable_token_indices" in codec.reads and (tokens := config.get("trainable_token_indices")):
        found += _tokens(tokens, model, codec.peft_type)
    if (bias := config.get("bias", "none")) != "none":
        if bias == "all":
            keys = [name for name in names if name.endswith(".bias") and not _under(whole, name)]
        else:
            keys = [f"{path}.bias" for path in targets if f"{path}.bias" in names]
        everywhere: set[str] = set()
        with contextlib.suppress(GraftError):  # a model without biases: `bias` then says nothing
            everywhere = {site.key for site in BitFit(add=False).sites(here)}
        if keys:
            found.append(
                BitFit(add=False)
                if everywhere == set(keys)
                else BitFit([exactly(key.removesuffix(".bias")) for key in keys], add=False)
            )
    return found


def _modules(words: Sequence[str], paths: Sequence[str], here: Survey) -> Modules:
    """Modules by PEFT's own words where ours mean the same by them, else by exact paths."""
    exact = Modules([exactly(path) for path in paths])
    known = [word for word in dict.fromkeys(words) if any(path == word or path.endswith("." + word) for path in paths)]
    try:
        by_words = {site.key for site in Modules(known).sites(here)}
    except GraftError:
        return exact
    return Modules(known) if by_words == {site.key for site in exact.sites(here)} else exact


#: The modules that PEFT keeps for a task, whether or not its configuration says so.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "question": "QUESTION_ANS", "causal": "CAUSAL_LM"}


def _task_of(model: nn.Module) -> str | None:
    kind = head_kind(type(model).__name__)
    if kind == "conditional" and is_encoder_decoder(model):
        return "SEQ_2_SEQ_LM"
    return _TASKS.get(kind or "")


def _parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _under(paths: Iterable[str], name: str) -> bool:
    return any(name.startswith(path + ".") for path in paths)


def _words_for(whole: Sequence[str], model: nn.Module) -> list[str] | None:
    """Words that mean exactly the modules `whole` to PEFT, which also matches inside a name."""
    words: set[str] = set()
    for path in whole:
        parts = path.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        word = next((word for word in endings if set(kept([word], model)) <= set(whole)), None)
        if word is None:
            return None
        words.add(word)
    return sorted(words)
