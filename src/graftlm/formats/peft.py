"""Adapters as folders in Hugging Face PEFT's format: saved for every other tool, loaded from PEFT and from graftlm.

A folder holds `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, and `graftlm.json`, which PEFT
ignores: the method as it was written, the base's fingerprint, a checksum of each tensor, and facts of the caller's.
What PEFT has no words for is written with the same keys under a method name that PEFT refuses (`GRAFTLM`). Nothing is
unpickled, and no code is taken from a folder. Loading checks everything before the model is touched.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graftlm import __version__
from graftlm.core import Adapter, Method, Part, WholeParameterDelta, attach, original_parameters, parts_of, survey
from graftlm.errors import AdapterError, Finding, GraftError, nearest
from graftlm.formats.atomic import atomic_folder, recover, write_json
from graftlm.formats.codecs import (
    CODECS,
    PREFIX,
    Codec,
    Planned,
    beside,
    codec_of,
    key_beside,
    lacks,
    stands_beside,
    understood,
)
from graftlm.formats.matching import exactly
from graftlm.methods import COMPANIONS, METHODS, Modules, TrainableTokens, find_method
from graftlm.methods.plugins import package_of
from graftlm.models.fingerprinting import fingerprint

__all__ = ["load_adapter", "read_facts", "save_adapter", "stored_method"]

_CONFIG, _WEIGHTS, _PICKLE, _OURS = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "graftlm.json",
)  # fmt: skip
_FORMAT = 1
_OWN_TYPE = "GRAFTLM"


# --- saving ---------------------------------------------------------------------------------------------------------


def save_adapter(adapter: Adapter, folder: str | Path, *, facts: Mapping[str, Any] | None = None) -> Path:
    """Write `adapter` to `folder`, whole or not at all, and return the folder.

    `facts` is anything JSON holds (task, labels, chat template); `read_facts` gives it back. The same adapter gives the
    same bytes. Tensors are float32, as trained. What only training needs (the MLP of a prefix) is left out: the file
    holds `adapter.baked()`. Raises AdapterError for facts that JSON cannot hold and EnvironmentFault where the folder
    cannot be written.

    Example:
        >>> save_adapter(adapter, "adapters/support", facts={"labels": ["no", "yes"]})      # doctest: +SKIP
    """
    try:
        kept_facts = json.loads(json.dumps(dict(facts or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AdapterError(Finding("A219", f"facts cannot be written as JSON: {error}")) from None
    model, adapter = adapter.model, adapter.baked()
    config = _describe(adapter)
    layout = _Layout(_seen(adapter.parts, model), CODECS.get(config["peft_type"]))
    tensors = {key: tensor.cpu().contiguous() for key, tensor in layout.pack(adapter.state()).items()}
    ours = {
        "base": {
            "class": type(model).__name__,
            "fingerprint": fingerprint(model),
            "name": getattr(model, "name_or_path", None) or None,
        },
        "facts": kept_facts,
        "format": _FORMAT,
        "graftlm": __version__,
        "method": {"parts": [_method_data(part) for part in adapter.method.parts], "text": str(adapter.method)},
        "name": adapter.name,
        "tensors": {key: _checksum(tensor) for key, tensor in tensors.items()},
    }
    with atomic_folder(folder) as fresh:
        write_json(fresh / _CONFIG, config)
        try:
            save_file(dict(sorted(tensors.items())), fresh / _WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _as_os_error(error) from error
        write_json(fresh / _OURS, ours)
    return Path(folder)


def _describe(adapter: Adapter) -> dict[str, Any]:
    """`adapter_config.json`: in PEFT's words where reading them back gives this very adapter, else in ours."""
    model, adapter = adapter.model, adapter.without_readers()  # PEFT passes over what it has no place for
    config = _in_peft_words(adapter)
    if config is not None:
        codec = CODECS[config["peft_type"]]
        try:
            back = _plan(model, understood(codec, json.loads(json.dumps(config)), model))
        except (GraftError, re.error):
            back = []
        if _as_set(back, codec) == _as_set(_seen(adapter.parts, model), codec):
            return config
    return {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "peft_type": _OWN_TYPE,
        "task_type": None,
    }


def _in_peft_words(adapter: Adapter) -> dict[str, Any] | None:
    own = {codec_of(part.method) for part in adapter.parts if not stands_beside(part.method)} - {None}
    # Of those that may stand beside another method, one alone has a name of its own.
    codecs = own or {codec_of(part.method) for part in adapter.parts} - {None}
    codec = codecs.pop() if len(codecs) == 1 else None
    if codec is None:
        return None
    owned = [part for part in adapter.parts if isinstance(part.method, codec.method)]
    others = [part for part in adapter.parts if not isinstance(part.method, codec.method)]
    fields = codec.describe(owned, adapter.model)
    extra = beside(codec, others, [part.site.path for part in owned], adapter.model)
    if fields is None or extra is None or (codec.needs_task and extra["task_type"] is None):
        return None
    return codec.configuration(adapter.model, **fields, **extra)


def _method_data(method: Method) -> dict[str, Any]:
    settings = {each.name: _to_data(getattr(method, each.name)) for each in dataclasses.fields(method)}
    package = "" if method.name in METHODS or method.name in COMPANIONS else package_of(method.name)
    return {"name": method.name, "settings": settings} | ({"package": package} if package else {})


def _to_data(value: Any) -> Any:
    """A setting as JSON holds it; a tuple stays apart from a list, so that the method comes back equal."""
    if isinstance(value, Method):
        return {"method": [_method_data(part) for part in value.parts]}
    if isinstance(value, tuple):
        return {"tuple": [_to_data(item) for item in value]}
    if isinstance(value, Mapping):
        return {str(key): _to_data(item) for key, item in value.items()}
    return [_to_data(item) for item in value] if isinstance(value, list) else value


def _from_data(value: Any) -> Any:
    if isinstance(value, dict):
        if isinstance(items := value.get("tuple"), list) and len(value) == 1:
            return tuple(_from_data(item) for item in items)
        if isinstance(items := value.get("method"), list) and len(value) == 1:
            return _inner_method(items)
        return {key: _from_data(item) for key, item in value.items()}
    return [_from_data(item) for item in value] if isinstance(value, list) else value


def _inner_method(items: list[Any]) -> Method:
    """The method that a method's setting is. Raises ValueError for one that is not known."""
    if not items:
        raise ValueError("no method inside")
    parts: list[Method] = []
    for item in items:
        name = item.get("name") if isinstance(item, dict) else None
        kind = find_method(str(name))
        if kind is None:
            raise ValueError(f"method {name!r}{_by_package(item)} is not known")
        parts.append(kind(**_from_data(item.get("settings", {}))))
    return functools.reduce(operator.add, parts)


def _by_package(item: Any) -> str:
    """Where a stored method came from, if not from graftlm itself."""
    package = item.get("package") if isinstance(item, dict) else None
    return f" of the package {package!s:.100}" if package else ""


def _as_os_error(error: SafetensorError) -> OSError:
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else 0, str(error))


# --- what an adapter holds, before there is one ---------------------------------------------------------------------


def _seen(parts: Sequence[Part], model: nn.Module) -> list[Planned]:
    maps = {site.path: site for site in survey(model)} if any(part.site.part for part in parts) else {}
    found = []
    for part in parts:
        tensors = [*part.delta.named_parameters(), *part.delta.named_buffers()]
        numbers = {k: v for k, v in vars(part.delta).items() if isinstance(v, (int, float)) and k != "training"}
        found.append(
            Planned(
                part.method,
                part.site,
                isinstance(part.delta, WholeParameterDelta),
                tuple((name, tuple(tensor.shape)) for name, tensor in tensors),
                tuple(sorted(numbers.items())),
                whole=maps[part.site.path] if part.site.part else None,
                sizes_from_file=part.delta.sizes_from_state,
            )
        )
    return found


def _plan(model: nn.Module, method: Method) -> list[Planned]:
    """What `attach` would build for `method`, without its values. Raises SiteError and MethodError as `attach` does."""
    return _seen(parts_of(model, method), model)


class _Layout:
    """Where each tensor of an adapter lies in the file: by the codec's rules, and plainly what it does not cover."""

    def __init__(self, parts: Sequence[Planned], codec: Codec | None) -> None:
        self.codec = codec
        self.owned: list[Planned] = []
        others: list[Planned] = []
        for part in parts:
            (self.owned if codec and isinstance(part.method, codec.method) else others).append(part)
        self.keys: dict[str, str] = {}  # names in the adapter's state -> keys in the file, for the other parts
        self.shapes: dict[str, tuple[int, ...]] = codec.shapes(self.owned) if codec else {}
        #: Keys of tensors whose sizes only the file tells.
        self.unsized: set[str] = set()
        for part in self.owned:
            if codec and part.sizes_from_file:
                self.unsized |= set(codec.keys([part]).values())
        prefix = codec.prefix if codec else PREFIX
        wrapped = {part.site.path for part in self.owned}
        for part in others:
            # PEFT wraps the modules that it targets: their own parameters lie one level deeper.
            path = f"{part.site.path}.base_layer" if part.site.path in wrapped else part.site.path
            for name, shape in part.shapes:
                key = key_beside(prefix, path, part, name)
                self.keys[part.state_key(name)] = key
                self.shapes[key] = shape
                if part.sizes_from_file:
                    self.unsized.add(key)

    def pack(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors."""
        owned = self.codec.pack(self.owned, state) if self.codec else {}
        return {**owned, **{key: state[name] for name, key in self.keys.items()}}

    def unpack(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The adapter's state on `model`."""
        owned: dict[str, Tensor] = {}
        if self.codec:
            owned = self.codec.complete(self.owned, self.codec.unpack(self.owned, tensors), model)
        return {**owned, **{name: tensors[key] for name, key in self.keys.items()}}


def _as_set(parts: Sequence[Planned], codec: Codec) -> set[tuple[Any, ...]]:
    found: set[tuple[Any, ...]] = set()
    owned = [part for part in parts if isinstance(part.method, codec.method)]
    for part in (*codec.as_written(owned), *(part for part in parts if part not in owned)):
        shapes: tuple[Any, ...] = tuple(name for name, _ in part.shapes) if part.sizes_from_file else part.shapes
        found.add((part.site.key, part.site.places, shapes, part.numbers))
    return found


# --- loading --------------------------------------------------------------------------------------------------------


@dataclass
class _Stored:
    """An adapter folder as read: PEFT's configuration, our file ({} in a folder of PEFT's), tensors by plain key."""

    folder: Path
    config: dict[str, Any]
    ours: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)

    @property
    def codec(self) -> Codec | None:
        """None where the file is in our own words."""
        return CODECS.get(self.config["peft_type"])

    def plain(self, key: str) -> str:
        """`key` without what PEFT and torch.compile put before it."""
        return key.replace("_orig_mod.", "").removeprefix(self.codec.prefix if self.codec else PREFIX)


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str | None = None, trainable: bool = False, check_base: bool = True
) -> Adapter:
    """Attach the adapter in `folder` to `model` and make it the acting one.

    Reads folders of PEFT's and of graftlm's. Without `name` it gets the name that it was saved under, or the folder's.
    `check_base=False` loads an adapter that was trained on another base, where its tensors fit.
    Raises AdapterError with everything that is wrong at once; the model is then as before.

    Example:
        >>> adapter = load_adapter(model, "adapters/support", name="support")                # doctest: +SKIP
    """
    stored = _read(_find(Path(folder)))
    faults = stored.faults
    if check_base and stored.ours:
        faults += _base_faults(stored.ours, model)
    state: dict[str, Tensor] = {}
    try:
        method = _method_of(stored, model)
        if stored.codec:
            stored.tensors = stored.codec.effective(stored.tensors, stored.config, model)
        method = _with_stored_embeddings(stored, method, model, check_base)
        layout = _Layout(_plan(model, method), stored.codec)
    except GraftError as error:
        faults += [dataclasses.replace(f, place=f.place or str(stored.folder)) for f in error.findings]
    else:
        state = _state(stored, layout, model)
    if stored.faults:
        raise AdapterError(stored.faults)
    chosen = name or stored.ours.get("name") or re.sub(r"^[\W_]+|[\W_]+$", "", re.sub(r"[^\w-]+", "-", _ascii(folder)))
    return attach(model, method, name=chosen or "adapter", trainable=trainable, state=state)


def read_facts(folder: str | Path) -> dict[str, Any]:
    """The facts that the adapter in `folder` was saved with; empty for a folder of PEFT's. Raises AdapterError."""
    facts: dict[str, Any] = _read_ours(_find(Path(folder))).get("facts", {})
    return facts


def stored_method(folder: str | Path, twin: Callable[[], nn.Module]) -> Method:
    """The method of the adapter in `folder`, before its base is loaded.

    `twin` gives the base without values, which the sites of a folder of PEFT's are told by. Raises AdapterError.
    """
    stored = _read(_find(Path(folder)))
    if stored.faults:
        raise AdapterError(stored.faults)
    return _method_of(stored, None if stored.ours else twin())


def _ascii(folder: str | Path) -> str:
    return Path(folder).resolve().name.encode("ascii", "ignore").decode()


def _find(folder: Path) -> Path:
    """The adapter folder: `folder` itself, or the only one below it. Raises AdapterError naming those nearby."""
    if not folder.exists():
        recover(folder)
    if not folder.is_dir():
        what = "is a file, wanted a folder" if folder.exists() else "does not exist"
        close = (
            nearest(folder.name, (p.name for p in folder.parent.iterdir() if p.is_dir()))
            if folder.parent.is_dir()
            else []
        )
        raise AdapterError(Finding("A201", what, place=str(folder), fix=str(folder.parent / close[0]) if close else ""))
    if (folder / _CONFIG).is_file() or (folder / _WEIGHTS).is_file():
        return folder
    below = sorted(
        {found.parent for depth in ("*", "*/*", "*/*/*") for found in folder.glob(f"{depth}/{_CONFIG}")},
        key=lambda path: (len(path.parts), str(path)),
    )
    below = [path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if len(below) == 1:
        return below[0]
    if below:
        shown = tuple(str(path) for path in below[:6])
        raise AdapterError(
            Finding("A221", f"holds {len(below)} adapters, wanted one", place=str(folder), fix=shown[0], detail=shown)
        )
    raise AdapterError(Finding("A202", f"holds no adapter: no {_CONFIG} there or below", place=str(folder)))


def _read(folder: Path) -> _Stored:
    """Everything in the folder. Raises AdapterError where a file cannot be read at all; other faults are noted."""
    faults: list[Finding] = []
    config: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    try:
        config = _read_json(folder / _CONFIG, "A204")
    except AdapterError as error:
        faults += error.findings
    try:
        ours = _read_ours(folder)
    except AdapterError as error:
        faults += error.findings
    if not (folder / _WEIGHTS).is_file() and (folder / _PICKLE).is_file():
        faults.append(
            Finding(
                "A203",
                "is a pickle, which can run code as it is read: nothing is unpickled here",
                place=str(folder / _PICKLE),
                fix=f"with peft, if you trust it: PeftModel.from_pretrained(base, {str(folder)!r})"
                f".save_pretrained({str(folder) + '-safe'!r})",
            )
        )
    else:
        try:
            tensors = _read_tensors(folder / _WEIGHTS)
        except AdapterError as error:
            faults += error.findings
    if faults:
        raise AdapterError(faults)
    kind = config.get("peft_type")
    kind = kind if isinstance(kind, str) else str(kind)
    if kind == _OWN_TYPE and not ours:
        faults.append(
            Finding("A214", f"is missing, and {_CONFIG} says too little without it", place=str(folder / _OURS))
        )
    elif kind != _OWN_TYPE and kind not in CODECS:
        faults.append(
            Finding("A205", f"peft_type {kind!r} is not supported here; there are: {', '.join(CODECS)}",
                    place=str(folder / _CONFIG))
        )  # fmt: skip
    elif kind != _OWN_TYPE:
        faults += lacks(CODECS[kind], config, str(folder / _CONFIG))
    if faults:
        raise AdapterError(faults)
    stored = _Stored(folder, config, ours)
    if ours:
        stored.faults += _damage(ours, tensors, str(folder / _WEIGHTS))
    _take(stored, tensors)
    return stored


def _read_json(path: Path, code: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(Finding(code, "is missing", place=str(path))) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(Finding(code, f"cannot be read: {error}", place=str(path))) from None
    if not isinstance(data, dict):
        raise AdapterError(Finding(code, f"holds {type(data).__name__}, wanted an object", place=str(path)))
    return data


def _read_ours(folder: Path) -> dict[str, Any]:
    if not (folder / _OURS).exists():
        return {}
    ours = _read_json(folder / _OURS, "A214")
    place = str(folder / _OURS)
    if not isinstance(ours.get("format"), int):
        raise AdapterError(Finding("A214", "has no format number", place=place))
    if ours["format"] > _FORMAT:
        raise AdapterError(
            Finding("A222", f"has format {ours['format']}, written by graftlm {ours.get('graftlm')}; this is "
                    f"{__version__}, which reads up to {_FORMAT}", place=place, fix="install a newer graftlm")
        )  # fmt: skip
    wanted = {"base": dict, "facts": dict, "method": dict, "name": str, "tensors": dict}
    if wrong := [key for key, kind in wanted.items() if not isinstance(ours.get(key), kind)]:
        raise AdapterError(Finding("A214", f"has no {', '.join(wrong)}", place=place))
    return ours


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(Finding("A207", "is missing", place=str(path))) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(Finding("A207", f"is damaged or cut short: {error}", place=str(path))) from None


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _damage(ours: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str) -> list[Finding]:
    """Tensors that are not as they were saved; missing and further ones are told with the others."""
    return [
        Finding("A212", f"{key} was changed after graftlm wrote it (its checksum differs)", place=place,
                fix=f"remove {_OURS} to load it as another tool's")
        for key, digest in sorted(ours["tensors"].items())
        if key in tensors and _checksum(tensors[key]) != digest
    ]  # fmt: skip


def _take(stored: _Stored, tensors: Mapping[str, Tensor]) -> None:
    """Note `tensors` by plain key: no prefixes, no wrappers' names, each once, none of the base's own heads."""
    from_wrapper: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if ".original_module." in key:
            continue  # the base's own head, which PEFT's bias="all" stores along
        plain = stored.plain(key)
        if ".modules_to_save." in plain:
            from_wrapper[re.sub(r"\.modules_to_save\.(default\.)?", ".", plain)] = tensor
        elif plain in stored.tensors:
            stored.faults.append(
                Finding("A220", f"{plain} is there twice, under two prefixes", place=str(stored.folder))
            )
        else:
            stored.tensors[plain] = tensor
    for plain, tensor in from_wrapper.items():
        stored.tensors.setdefault(plain, tensor)


def _base_faults(ours: Mapping[str, Any], model: nn.Module) -> list[Finding]:
    base = ours["base"]
    here = {"class": type(model).__name__, "fingerprint": fingerprint(model)}
    if all(base.get(key) == value for key, value in here.items()):
        return []
    was = " ".join(str(word) for word in (base.get("name"), base.get("class")) if word)
    now = " ".join(word for word in (getattr(model, "name_or_path", ""), here["class"]) if word)
    return [
        Finding(
            "A213",
            f"the adapter {ours['name']!r} was trained on {was} (fingerprint {base.get('fingerprint')}), "
            f"this is {now} (fingerprint {here['fingerprint']})",
            fix="its own base: -m MODEL (in Python, check_base=False takes this one all the same)",
        )
    ]


def _method_of(stored: _Stored, model: nn.Module | None) -> Method:
    if model is not None and not stored.ours:
        try:
            return understood(CODECS[stored.config["peft_type"]], stored.config, model)
        except (TypeError, ValueError, re.error) as error:
            if isinstance(error, GraftError):
                raise
            raise AdapterError(
                Finding("A216", f"cannot be understood: {error}", place=str(stored.folder / _CONFIG))
            ) from None
    faults: list[Finding] = []
    parts: list[Method] = []
    place = str(stored.folder / _OURS)
    data = stored.ours["method"].get("parts")
    for part in data if isinstance(data, list) and data else [{}]:
        name, settings = (part.get("name"), part.get("settings")) if isinstance(part, dict) else (None, None)
        try:
            kind = find_method(str(name))
            if kind is None or not isinstance(settings, dict):
                by = _by_package(part) or f" of graftlm {stored.ours.get('graftlm')}"
                faults.append(Finding("A215", f"method {name!r}{by} is not known to {__version__}", place=place))
                continue
            parts.append(kind(**_from_data(settings)))
        except GraftError as error:
            faults += error.findings
        except (TypeError, ValueError) as error:
            faults.append(Finding("A215", f"method {name!r} cannot be read: {error}", place=place))
    if faults:
        raise AdapterError(faults)
    return functools.reduce(operator.add, parts)


def _with_stored_embeddings(stored: _Stored, method: Method, model: nn.Module, check_base: bool) -> Method:
    """`method` with the embeddings that PEFT stored along without a word in the configuration.

    PEFT writes the base's own matrix beside a targeted embedding, and both embeddings of a resized vocabulary. Those
    equal to this base's are dropped; the others replace the base's, as in PEFT, wherever the weight is tied.
    """
    if stored.ours:
        return method
    expected = {stored.plain(key) for key in _Layout(_plan(model, method), stored.codec).shapes}
    originals = original_parameters(model)
    places = {
        f"{path}.{name}": (site.places, site)
        for site in survey(model).parameters
        for path, name in site.places
        if name == "weight" and (site.kind == "embedding" or site.role in ("embed", "head"))
    }
    rows = _trained_rows(method, model)
    replaced: dict[str, str] = {}
    faults: list[Finding] = []
    for key in sorted(stored.tensors.keys() - expected):
        inside = key.endswith(".base_layer.weight")
        own = re.sub(r"(\.token_adapter)?\.base_layer\.weight$", ".weight", key)
        if own not in places:
            continue
        path = own.removesuffix(".weight")
        base = originals.get((path, "weight")) or model.get_parameter(own)
        tensor = stored.tensors[key]
        if tensor.shape != base.shape:
            faults.append(
                Finding(
                    "A218",
                    f"{path} had {tensor.shape[0]} rows in training, this base has {base.shape[0]}",
                    fix=f"model.resize_token_embeddings({tensor.shape[0]}) first",
                )
            )
        elif _same(tensor, base, but=rows.get(path, ())):
            del stored.tensors[key]
        elif inside and check_base:
            faults.append(
                Finding(
                    "A213",
                    f"it was trained on a base with another {path} than this {type(model).__name__}",
                    fix="load_adapter(..., check_base=False) to take over its embedding too",
                )
            )
        else:
            for place, _ in places[own][0]:
                replaced.setdefault(place, key)
    if faults:
        raise AdapterError(faults)
    if not replaced:
        return method
    method = method + Modules([exactly(path) for path in replaced])
    keys = _Layout(_plan(model, method), stored.codec).keys
    found = {stored.plain(keys[f"{path}.weight"]): stored.tensors[key] for path, key in replaced.items()}
    for key in replaced.values():
        stored.tensors.pop(key, None)
    stored.tensors.update(found)
    return method


def _trained_rows(method: Method, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The rows of embeddings that `method` trains, by the path of each place; a grown vocabulary's are random."""
    return {
        path: part.rows
        for part in method.parts
        if isinstance(part, TrainableTokens)
        for site in part.sites(survey(model))
        for path, _ in site.places
    }


def _same(one: Tensor, other: Tensor, but: Sequence[int] = ()) -> bool:
    """True where the two are equal in the narrower of their types: one may have been loaded in bfloat16.

    Rows `but` do not count.
    """
    narrow = min((one.dtype, other.dtype), key=lambda kind: torch.finfo(kind).bits)
    equal = one.to(narrow) == other.detach().cpu().to(narrow)
    equal[list(but)] = True
    return bool(equal.all())


def _state(stored: _Stored, layout: _Layout, model: nn.Module) -> dict[str, Tensor]:
    """The adapter's state out of the tensors; every misfit is noted in `stored.faults`."""
    place = str(stored.folder / _WEIGHTS)
    wanted = {stored.plain(key): key for key in layout.shapes}
    buffers = dict(model.named_buffers())
    found: dict[str, Tensor] = {}
    for plain, key in sorted(wanted.items()):
        tensor = stored.tensors.get(plain)
        if tensor is None:
            stored.faults.append(Finding("A208", f"{key} is missing", place=place))
        elif key not in layout.unsized and tuple(tensor.shape) != layout.shapes[key]:
            stored.faults.append(
                Finding("A210", f"{key} has shape {tuple(tensor.shape)}, wanted {layout.shapes[key]}", place=place)
            )
        else:
            found[key] = tensor
    for plain in sorted(stored.tensors.keys() - wanted.keys()):
        if plain not in buffers:  # PEFT's bias="all" takes buffers of that name along
            stored.faults.append(Finding("A209", f"{plain} has no place in this adapter", place=place))
    for plain, tensor in sorted(stored.tensors.items()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            stored.faults.append(
                Finding("A211", f"{plain} has {count} of {tensor.numel()} values that are NaN or infinite", place=place)
            )
    return {} if stored.faults else layout.unpack(found, model)
