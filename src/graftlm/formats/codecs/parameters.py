"""Methods at existing parameters in PEFT's words: norm tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from graftlm.core import Method, Part, survey
from graftlm.errors import AdapterError, Finding
from graftlm.formats.codecs.codec import Codec
from graftlm.formats.matching import exactly, shortest_suffixes, targeted_or_faults
from graftlm.methods import NormTuning

__all__ = ["NormTuningCodec"]


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
