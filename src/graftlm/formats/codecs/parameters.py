"""Methods at existing parameters in PEFT's words: norm tuning, and trained rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from graftlm.core import Method, Part, Site, survey
from graftlm.errors import AdapterError, Finding
from graftlm.formats.codecs.codec import Codec, Planned
from graftlm.formats.matching import exactly, shortest_suffixes, targeted_or_faults
from graftlm.methods import NormTuning, TrainableTokens

__all__ = ["NormTuningCodec", "TrainableTokensCodec", "input_embedding", "once_for_tied", "tied_apart", "tokens_at"]


class NormTuningCodec(Codec):
    """Norm tuning: trained copies of whole modules, norms or not, under `ln_tuning_layers`."""

    peft_type = "LN_TUNING"
    method = NormTuning
    defaults: ClassVar[Mapping[str, Any]] = {"exclude_modules": None, "modules_to_save": None, "target_modules": None}
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "exclude_modules": (str, list, type(None)),
        "modules_to_save": (list, type(None)),
        "target_modules": (str, list, type(None)),
    }

    def key(self, path: str, name: str) -> str:
        """The key in the file of the parameter `name` of the module at `path`."""
        return super().key(path, f"ln_tuning_layers.{name}")

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """LNTuningConfig's fields: the modules of `parts`."""
        return {"target_modules": shortest_suffixes({part.site.path for part in parts}, model)}

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """Norm tuning of the modules that PEFT would choose by `config`."""
        if not config.get("target_modules"):
            raise AdapterError(Finding("A216", "target_modules is not set"))
        paths, faults = targeted_or_faults(config, model, self.peft_type, None)
        modules = dict(model.named_modules())
        faults += [
            Finding("A217", f"{path} holds other modules, which {self.peft_type} cannot target here")
            for path in paths
            if any(True for _ in modules[path].children())
        ]
        if faults:
            raise AdapterError(faults)
        exact = NormTuning([exactly(path) for path in paths])
        every = NormTuning()
        here = survey(model)
        wanted = {site.key for site in exact.sites(here)}
        return every if here.with_role("norm") and {site.key for site in every.sites(here)} == wanted else exact


class TrainableTokensCodec(Codec):
    """Trained rows of embeddings: `token_indices`, and the rows at every place that shares the matrix."""

    peft_type = "TRAINABLE_TOKENS"
    method = TrainableTokens
    defaults: ClassVar[Mapping[str, Any]] = {"init_weights": True, "target_modules": None, "token_indices": []}
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "target_modules": (str, list, type(None)),
        "token_indices": (list,),
    }
    # How the rows were started.
    inert = frozenset({"init_weights"})

    def key(self, path: str, name: str) -> str:  # noqa: ARG002
        """The key in the file of the rows of the module at `path`."""
        return super().key(path, "trainable_tokens_delta")

    def keys(self, parts: Sequence[Planned]) -> dict[str, str]:
        """The rows' keys; of a tied matrix that of the first place."""
        return {part.state_key("rows"): self.key(part.site.path, "rows") for part in parts}

    def pack(self, parts: Sequence[Planned], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows at every place: PEFT wants them at each of those that are tied."""
        return {
            self.key(path, "rows"): state[part.state_key("rows")].clone()
            for part in parts
            for path, _ in part.site.places
        }

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """With each tied matrix's rows once, under the first of its places."""
        del config
        return once_for_tied(tensors, model, "trainable_tokens_delta")

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """TrainableTokensConfig's fields for `parts` that train the same rows."""
        methods = [part.method for part in parts if isinstance(part.method, TrainableTokens)]
        ids = methods[0].rows
        paths = [part.site.path for part in parts]
        if any(method.rows != ids for method in methods) or tied_apart(paths, model):
            return None
        return {"target_modules": shortest_suffixes(paths, model), "token_indices": list(ids)}

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """The rows of the embeddings that PEFT would choose by `config`."""
        given = config.get("token_indices") or []
        faults = []
        if not given or not all(isinstance(each, int) and not isinstance(each, bool) for each in given):
            faults.append(Finding("A216", f"token_indices cannot be {given!r}"))
        words = config.get("target_modules") or input_embedding(model)
        paths, misplaced = targeted_or_faults(
            {**config, "target_modules": words}, model, self.peft_type, ("embedding", "linear")
        )
        if faults or misplaced:
            raise AdapterError([*faults, *misplaced])
        return tokens_at(given, paths, model, self.peft_type)


def once_for_tied(tensors: Mapping[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """`tensors` with those that end with `name` at several places of one tied matrix under the first place alone."""
    found = dict(tensors)
    for site in survey(model).parameters if any(key.endswith(name) for key in found) else ():
        first, *others = (f"{path}.{name}" for path, _ in site.places)
        for other in others:
            if other in found and found[other].equal(found.setdefault(first, found[other])):
                del found[other]
    return found


def tokens_at(ids: Sequence[int], paths: Sequence[str], model: nn.Module, peft_type: str) -> TrainableTokens:
    """The rows `ids` of the embeddings at `paths`. Raises AdapterError where these are parts of tied ones."""
    if apart := tied_apart(paths, model):
        raise AdapterError(
            Finding(
                "A206",
                f"{peft_type} of rows of {apart[0].path}, which is tied to "
                f"{', '.join(path for path, _ in apart[0].aliases)}, without these, is not supported here",
            )
        )
    here = survey(model)
    plain, exact = TrainableTokens(tuple(ids)), TrainableTokens(tuple(ids), [exactly(path) for path in paths])
    same = here.with_role("embed") and {site.key for site in plain.sites(here)} == {
        site.key for site in exact.sites(here)
    }
    return plain if same else exact


def input_embedding(model: nn.Module) -> str | None:
    """The path of the input embedding."""
    find: Any = getattr(model, "get_input_embeddings", None)
    wanted = find() if callable(find) else None
    return next((path for path, module in model.named_modules() if module is wanted), None)


def tied_apart(paths: Sequence[str], model: nn.Module) -> list[Site]:
    """The tied matrices among those at `paths` that PEFT would change at these places alone.

    It takes what is tied together only where the model's configuration says that embeddings are, and the input
    embedding is among `paths`.
    """
    together = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    entry = (input_embedding(model), "weight")
    chosen = {(path, "weight") for path in paths}
    tied = [site for site in survey(model).parameters if site.aliases and chosen & set(site.places)]
    return [site for site in tied if not (together and entry in site.places and entry in chosen)]
