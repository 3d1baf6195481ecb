"""Quantisation: the weights of a base in fewer bits, through one storage interface and one linear module."""

from graftlm.quantisation.converting import quantize, quantized
from graftlm.quantisation.linear import QuantizedLinear
from graftlm.quantisation.storage import FORMATS, Format, as_format

__all__ = ["FORMATS", "Format", "QuantizedLinear", "as_format", "quantize", "quantized"]
