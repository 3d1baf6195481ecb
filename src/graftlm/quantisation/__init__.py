"""Quantisation: the weights of a base in fewer bits, through one storage interface and one linear module."""

from graftlm.quantisation.converting import quantize, quantized, reserve
from graftlm.quantisation.foreign import read_all
from graftlm.quantisation.linear import PACKED, QuantizedLinear
from graftlm.quantisation.merging import Repacked, merged_copy, repacked_copy
from graftlm.quantisation.storage import FORMATS, Format, as_format

__all__ = [
    "FORMATS", "PACKED", "Format", "QuantizedLinear", "Repacked", "as_format", "merged_copy", "quantize", "quantized",
    "repacked_copy", "reserve",
]  # fmt: skip

read_all()
