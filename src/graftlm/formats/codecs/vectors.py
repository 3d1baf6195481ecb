"""Methods that train vectors in PEFT's words: (IA)^3, and VeRA around its shared maps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from graftlm.core import Method, Part, survey
from graftlm.core.junction import columns_of
from graftlm.errors import AdapterError, Finding
from graftlm.formats.codecs.codec import Codec, Planned
from graftlm.formats.matching import exactly, selectors_for, shortest_suffixes, targeted_or_faults
from graftlm.methods import IA3, VeRA
from graftlm.methods.ia3 import IA3Delta
from graftlm.methods.vera import Projection

__all__ = ["IA3Codec", "VeRACodec"]

_MAPS = ("linear", "conv1d")


class IA3Codec(Codec):
    """(IA)^3: one vector a map, [out, 1] on its output, or [1, in] on the input of those in `feedforward_modules`.

    PEFT knows no parts of fused maps: their vectors are written as one for the whole map, with ones for the parts that
    have none. It computes the same; who trains it further with PEFT trains those ones too.
    """

    peft_type = "IA3"
    method = IA3
    defaults: ClassVar[Mapping[str, Any]] = {
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "target_modules": None,
    }
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "exclude_modules": (str, list, type(None)),
        "feedforward_modules": (str, list, type(None)),
        "modules_to_save": (list, type(None)),
        "target_modules": (str, list, type(None)),
    }
    # How the vectors were started, and where to find a layout that our modules do not have.
    inert = frozenset({"fan_in_fan_out", "init_ia3_weights"})

    def as_written(self, parts: Sequence[Planned]) -> list[Planned]:
        """The parts of one fused map as a vector for the whole of it."""
        found: dict[str, Planned] = {}
        for part in parts:
            if part.whole is not None:
                part = replace(part, site=part.whole, whole=None, shapes=(("ia3_l", (part.whole.out_features, 1)),))
            found[part.site.path] = part
        return list(found.values())

    def shapes(self, parts: Sequence[Planned]) -> dict[str, tuple[int, ...]]:
        """The shape of each vector of the file."""
        return super().shapes(self.as_written(parts))

    def pack(self, parts: Sequence[Planned], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The vectors; of a fused map's parts one vector, with ones where no part has any."""
        found: dict[str, Tensor] = {}
        for part in parts:
            key, own = self.key(part.site.path, "ia3_l"), state[part.state_key("ia3_l")]
            if part.whole is None:
                found[key] = own
                continue
            if key not in found:
                found[key] = own.new_ones(part.whole.out_features, 1)
            found[key][columns_of(part.site.columns, own.device)] = own
        return found

    def unpack(self, parts: Sequence[Planned], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each map's vector, of a part its own numbers."""
        found = {}
        for part in parts:
            whole = tensors[self.key(part.site.path, "ia3_l")]
            own = whole if part.whole is None else whole[columns_of(part.site.columns, whole.device)]
            found[part.state_key("ia3_l")] = own
        return found

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """IA3Config's fields: all maps in `target_modules`, those with a vector on the input in both lists."""
        paths = {part.site.path for part in parts}
        inner = {part.site.path for part in parts if isinstance(part.delta, IA3Delta) and part.delta.inner}
        outer, within = (shortest_suffixes(chosen, model) for chosen in (paths - inner, inner))
        fused = any(part.site.kind == "conv1d" for part in parts)
        if isinstance(outer, str) or isinstance(within, str):
            # A pattern for one list must be one for both; PEFT wants it in both where it is a pattern.
            return {
                "fan_in_fan_out": fused,
                "feedforward_modules": "|".join(re.escape(path) for path in sorted(inner)),
                "target_modules": "|".join(re.escape(path) for path in sorted(paths)),
            }
        # Without a dot in front PEFT's own rule for `feedforward_modules` also matches inside a name.
        exact = all(not path.endswith(tuple(within)) for path in paths - inner)
        within = within if exact else sorted(inner)
        return {
            "fan_in_fan_out": fused,
            "feedforward_modules": within,
            "target_modules": sorted({*outer, *within}),
        }

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """(IA)^3 at the maps that PEFT would choose by `config`, on the side that it would choose."""
        words, within = config.get("target_modules"), config.get("feedforward_modules")
        faults = [
            Finding("A216", f"{field} is not set")
            for field, value in (("target_modules", words or None), ("feedforward_modules", within))
            if value is None
        ]
        paths, misplaced = targeted_or_faults(config, model, self.peft_type, _MAPS)
        if faults or misplaced:
            raise AdapterError([*faults, *misplaced])
        assert within is not None
        inner = [
            path
            for path in paths
            if (re.fullmatch(within, path) if isinstance(within, str) else path.endswith(tuple(within)))
        ]
        outer = [path for path in paths if path not in inner]
        here = survey(model)
        # The word "down" alone would mean our default, which some models may go without.
        named = within != ["down"]
        return IA3(
            targets=selectors_for(_without(words, within), outer, here) if outer else [],
            feedforward=selectors_for(within, inner, here) if named else [exactly(path) for path in inner],
        )


def _without(words: Any, others: Any) -> Any:
    """The words of one list that are not in the other; a pattern as it is."""
    return [word for word in words if word not in others] if isinstance(words, list) else words


class VeRACodec(Codec):
    """VeRA: two vectors a map, and the shared maps once, without the path of any module."""

    peft_type = "VERA"
    method = VeRA
    own_biases = "vera_only"
    defaults: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "projection_prng_key": 0,
        "r": 256,
        "save_projection": True,
        "target_modules": None,
        "vera_dropout": 0.0,
    }
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "bias": (str,),
        "d_initial": (int, float),
        "layers_pattern": (str, list, type(None)),
        "layers_to_transform": (int, list, type(None)),
        "modules_to_save": (list, type(None)),
        "projection_prng_key": (int,),
        "r": (int,),
        "save_projection": (bool,),
        "target_modules": (str, list, type(None)),
        "vera_dropout": (int, float),
    }
    # How the vectors were started, and where to find a layout that our modules do not have.
    inert = frozenset({"fan_in_fan_out", "init_weights"})

    def key(self, path: str, name: str) -> str:
        """The key in the file of tensor `name`; the shared maps (`projection.vera_A`) belong to no module."""
        return f"base_model.{name.rpartition('.')[2]}" if name.startswith("projection.") else super().key(path, name)

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """With the shared maps drawn anew from their key where `save_projection` says that the file has none."""
        if config.get("save_projection", True):
            return tensors
        method = self.understand(config, model)
        assert isinstance(method, VeRA)
        sites = method.sites(survey(model))
        widths = max(site.in_features for site in sites), max(site.out_features for site in sites)
        drawn = Projection(method.rank, *widths, method.seed)
        # Where they are in the file all the same, PEFT does not look at them.
        return {**tensors, "base_model.vera_A": drawn.vera_A, "base_model.vera_B": drawn.vera_B}

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """VeraConfig's fields for `parts` of one method; there are no parts of fused maps in PEFT."""
        method = parts[0].method
        assert isinstance(method, VeRA)
        if any(part.method is not method or part.site.part for part in parts):
            return None
        return {
            "d_initial": method.start,
            "fan_in_fan_out": any(part.site.kind == "conv1d" for part in parts),
            "projection_prng_key": method.seed,
            "r": method.rank,
            "target_modules": shortest_suffixes({part.site.path for part in parts}, model),
            "vera_dropout": method.dropout,
        }

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """VeRA at the maps that PEFT would choose by `config`."""
        if not config.get("target_modules"):
            raise AdapterError(Finding("A216", "target_modules is not set"))
        paths, faults = targeted_or_faults(config, model, self.peft_type, _MAPS)
        if faults:
            raise AdapterError(faults)
        return VeRA(
            rank=config.get("r", 256),
            targets=selectors_for(config["target_modules"], paths, survey(model)),
            # At zero only training would stand still.
            start=float(config.get("d_initial", 0.1)) or 0.1,
            dropout=float(config.get("vera_dropout", 0.0)),
            seed=config.get("projection_prng_key", 0),
        )
