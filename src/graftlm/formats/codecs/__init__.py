"""The table from methods to PEFT's words and back: one codec a method of PEFT's.

`CODECS` lists them; a new one is a subclass of `Codec` in a file of its own or beside its kin, and one entry here.
"""

from __future__ import annotations

from graftlm.core import Method
from graftlm.formats.codecs.beside import beside, key_beside, stands_beside, understood
from graftlm.formats.codecs.codec import PREFIX, Codec, Planned, lacks
from graftlm.formats.codecs.lora import AdaLoRACodec, LoRACodec
from graftlm.formats.codecs.parameters import NormTuningCodec, TrainableTokensCodec
from graftlm.formats.codecs.vectors import IA3Codec, VeRACodec
from graftlm.formats.codecs.virtual import PrefixTuningCodec, PromptTuningCodec, PTuningCodec

__all__ = [
    "CODECS",
    "PREFIX",
    "Codec",
    "Planned",
    "beside",
    "codec_of",
    "key_beside",
    "lacks",
    "stands_beside",
    "understood",
]

#: Every codec by PEFT's name of its method.
CODECS: dict[str, Codec] = {
    codec.peft_type: codec
    for codec in (
        LoRACodec(),
        AdaLoRACodec(),
        IA3Codec(),
        VeRACodec(),
        NormTuningCodec(),
        TrainableTokensCodec(),
        PromptTuningCodec(),
        PTuningCodec(),
        PrefixTuningCodec(),
    )
}


def codec_of(method: Method) -> Codec | None:
    """The codec that writes `method`, if PEFT has a word for it."""
    return next((codec for codec in CODECS.values() if isinstance(method, codec.method)), None)
