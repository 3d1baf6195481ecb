"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "T101": "a method that does not exist",
    "T106": "an entry of rank_pattern or alpha_pattern fits none of the targets",
    "T107": "bias=True is asked for at an embedding, which has no bias",
    "T108": "the method trains weights themselves, and these are stored as whole numbers",
    "T109": "bitfit trains biases, and the model has none there",
    "T110": "head trains the model's head, or value reads what enters it, and the model has none",
    "T111": "the method layers is given a choice that holds no layer of the model",
    "T112": "a setting that the method does not have, or that is called otherwise in another tool",
    "T113": "a setting of a method has a value of the wrong type",
    "T114": "the text of a method cannot be read: a bracket, comma or quote is wrong, or it is empty",
    "T115": "a method of an installed package cannot be loaded",
    "T116": "what an installed package offers as a method is none, or is named otherwise",
    "T117": "several installed packages offer a method of one name",
    "T130": "dora is asked for at an embedding or at experts, or with a start from the weights or a bias",
    "T131": "a start from the weights (pissa, olora, loftq) is asked for at an embedding or at experts",
    "T132": "the rank is larger than the map whose directions the method starts from",
    "T133": "the method needs the values of weights that are stored as whole numbers",
    "T135": "the start loftq is asked for where the base is not packed, or the weight before packing is not known",
    "T134": "dropout or a bias is asked for at experts, whose weights are changed as such",
    "T140": "the method acts at sublayers or on the stream, and where these are in the model is not known",
    "T141": "a target of an adapter at sublayers is none of the model's: there are attention, cross and ffn",
    "T142": "a gate of zero is put around a method that starts as the base: neither would get a gradient",
    "T143": "a gate is put around a change that it cannot scale: virtual tokens, or what is not added",
    "T162": "tokens is given no token ids to train",
    "T161": "the method changes whole weights, and a part of a fused one was named",
    "T163": "sparse is given a threshold that no score reaches",
    "T166": "labels are to be drawn from a model's own distribution, and the model gives no logits",
    "T164": "whole heads are to be chosen where a map has none: not of an attention call, or several maps in one",
    "T165": "a head is to start from a regression, and the labels are not classes, or are all the same",
    "T160": "head is given a number of outputs in a model whose head stands for the vocabulary",
    "T150": "keys and values cannot be put into the attention code of this model",
    "T151": "a prefix is to shift positions in a model that counts them for itself",
    "T152": "virtual tokens cannot be put into a model that takes no input embeddings",
    "T153": "a token id that a method is given is not in the model's vocabulary",
    "T154": "prompts are to be mixed by the whole input in a model that predicts the next token",
    "T155": "the source prompts of attempt have the wrong shape",
}
"""Code to meaning."""
