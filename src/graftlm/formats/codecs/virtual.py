"""PEFT's prompt methods: prompts, P-tuning and prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.core import Method, Part
from graftlm.core.kind import is_encoder_decoder
from graftlm.errors import AdapterError, Finding
from graftlm.formats.codecs.codec import Codec, Planned
from graftlm.methods import PrefixTuning, PromptTuning

__all__ = ["PTuningCodec", "PrefixTuningCodec", "PromptTuningCodec"]


class _VirtualCodec(Codec):
    """What PEFT's prompt methods share: one tensor `prompt_embeddings` for the whole model, and no wrapped modules."""

    prefix = "base_model."
    needs_task = True
    reads: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "modules_to_save": (list, type(None)),
        "num_transformer_submodules": (int, type(None)),
        "num_virtual_tokens": (int,),
    }
    _sizes: ClassVar[dict[str, Any]] = {
        "modules_to_save": None,
        "num_attention_heads": None,
        "num_layers": None,
        "num_transformer_submodules": None,
        "num_virtual_tokens": None,
        "token_dim": None,
    }
    _sizes_said_by_the_tensor: ClassVar[frozenset[str]] = frozenset({"num_attention_heads", "num_layers", "token_dim"})

    def key(self, path: str, name: str) -> str:  # noqa: ARG002
        """The one key there is."""
        return "prompt_embeddings"

    def _length(self, config: Mapping[str, Any]) -> int:
        length = config.get("num_virtual_tokens")
        if not isinstance(length, int) or length < 1:
            raise AdapterError(Finding("A216", f"num_virtual_tokens cannot be {length!r}"))
        return length


class PromptTuningCodec(_VirtualCodec):
    """Prompt tuning at the start of the sequence; in encoder-decoders of the encoder's.

    For those PEFT also stores, and never uses, as many vectors again for the decoder.
    """

    peft_type = "PROMPT_TUNING"
    method = PromptTuning
    defaults: ClassVar[Mapping[str, Any]] = {
        **_VirtualCodec._sizes,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    # How the prompt was started.
    inert = _VirtualCodec._sizes_said_by_the_tensor | frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
    )

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """Without the decoder's half, which PEFT never reads."""
        del model
        found, length = tensors.get("prompt_embeddings"), config.get("num_virtual_tokens")
        if found is None or not isinstance(length, int) or config.get("num_transformer_submodules") != 2:
            return tensors
        return {**tensors, "prompt_embeddings": found[:length]} if found.shape[:1] == (2 * length,) else tensors

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """PromptTuningConfig's fields for one prompt that stands at the start."""
        first, *others = parts
        method = first.method
        assert isinstance(method, PromptTuning)
        if others or method.position != "start":
            return None
        sizes = attention_sizes(model)
        return {
            "num_attention_heads": sizes[1] if sizes else None,
            "num_layers": sizes[0] if sizes else None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": method.length,
            "token_dim": first.site.in_features,
        }

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:  # noqa: ARG002
        """A prompt of the length that `config` says."""
        return PromptTuning(length=self._length(config))


class PTuningCodec(PromptTuningCodec):
    """P-tuning: PEFT stores what its network computes, which is a prompt; so it is read as one."""

    peft_type = "P_TUNING"
    defaults: ClassVar[Mapping[str, Any]] = {
        **_VirtualCodec._sizes,
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }
    inert = _VirtualCodec._sizes_said_by_the_tensor | frozenset(
        {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
    )


class PrefixTuningCodec(_VirtualCodec):
    """Prefix tuning with shifted positions: k and v of all layers side by side, [tokens, layers x 2 x heads x width].

    Of encoder-decoders PEFT's prefix is in the decoder's own attention alone. It splits its tensor, twice as long by
    repetition, into four pieces a layer, the last two of which (for cross attention) it throws away: layer i of L has
    the keys and values of layer 2i mod L, and half of the tensor is never used. Read so, a layer has values of its own.
    """

    peft_type = "PREFIX_TUNING"
    method = PrefixTuning
    defaults: ClassVar[Mapping[str, Any]] = {
        **_VirtualCodec._sizes,
        "encoder_hidden_size": None,
        "init_weights": None,
        "prefix_projection": False,
    }
    # What is stored is what the projection computes.
    inert = _VirtualCodec._sizes_said_by_the_tensor | frozenset(
        {"encoder_hidden_size", "init_weights", "prefix_projection"}
    )

    def shapes(self, parts: Sequence[Planned]) -> dict[str, tuple[int, ...]]:
        """The shape of the one tensor."""
        shapes = [shape for part in parts for _, shape in part.shapes]
        return {"prompt_embeddings": (shapes[0][0], sum(shape[1] for shape in shapes))}

    def pack(self, parts: Sequence[Planned], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keys and values of all layers side by side: k0, v0, k1, v1, ..."""
        names = [part.state_key(name) for part in parts for name in ("prefix_key", "prefix_value")]
        return {"prompt_embeddings": torch.cat([state[name] for name in names], dim=1)}

    def unpack(self, parts: Sequence[Planned], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each layer's own columns."""
        names = [part.state_key(name) for part in parts for name in ("prefix_key", "prefix_value")]
        widths = [dict(part.shapes)[name][1] for part in parts for name in ("prefix_key", "prefix_value")]
        return dict(zip(names, torch.split(tensors["prompt_embeddings"], widths, dim=1), strict=True))

    def effective(self, tensors: dict[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """In encoder-decoders each layer's columns are those that PEFT gives it."""
        found, layers = tensors.get("prompt_embeddings"), config.get("num_layers")
        if not is_encoder_decoder(model) or found is None or found.dim() != 2:
            return tensors
        if not isinstance(layers, int) or layers < 1 or found.shape[1] % (2 * layers):
            return tensors  # its shape is told of elsewhere
        pairs = found.view(len(found), layers, -1)
        used = pairs[:, [2 * layer % layers for layer in range(layers)]]
        return {**tensors, "prompt_embeddings": used.reshape(found.shape)}

    def describe(self, parts: Sequence[Part], model: nn.Module) -> dict[str, Any] | None:
        """PrefixTuningConfig's fields for a prefix of every layer with shifted positions."""
        method = parts[0].method
        assert isinstance(method, PrefixTuning)
        sizes = attention_sizes(model)
        widths = {(part.site.kv_heads, part.site.head_width) for part in parts}
        alike = all(part.method is method for part in parts) and len(widths) == 1
        if sizes is None or not alike or method.positions != "shifted" or sizes[0] != len(parts):
            return None
        if is_encoder_decoder(model):
            return None
        heads, width = widths.pop()
        return {
            "encoder_hidden_size": heads * width,
            "num_attention_heads": heads,
            "num_layers": len(parts),
            "num_transformer_submodules": 1,
            "num_virtual_tokens": method.length,
            "token_dim": heads * width,
        }

    def understand(self, config: Mapping[str, Any], model: nn.Module) -> Method:
        """A prefix of the length that `config` says, with shifted positions."""
        length = self._length(config)
        if not is_encoder_decoder(model):
            return PrefixTuning(length=length, positions="shifted")
        relative = any(getattr(module, "has_relative_attention_bias", False) for module in model.modules())
        if not relative or config.get("num_transformer_submodules") != 2:
            raise AdapterError(
                Finding(
                    "A206",
                    f"{self.peft_type} is read of encoder-decoders with relative positions alone, such as T5, and with "
                    "num_transformer_submodules 2",
                    fix="train it anew: prefix(length=...)",
                )
            )
        return PrefixTuning(length=length, positions="shifted", targets="decoder/attention")


def attention_sizes(model: nn.Module) -> tuple[int, int] | None:
    """How many layers and attention heads the model's configuration says; None where it has other words."""
    config = getattr(model, "config", None)
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    return (layers, heads) if isinstance(layers, int) and isinstance(heads, int) else None
