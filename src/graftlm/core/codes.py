"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "A101": "a state given in Python lacks one of the adapter's tensors",
    "A102": "a state given in Python has a tensor that the adapter does not have",
    "A103": "a tensor of a state given in Python has another shape than the adapter's",
    "A104": "the adapter was detached, so nothing can be done with it on that model",
    "A105": "a name for an adapter has other characters than letters, digits, - and _",
    "A106": "the model has an adapter of that name already",
    "A107": "adapters are attached to a part of this model, or to a larger model that holds it",
    "A108": "something else than a model was given to attach",
    "C101": "targets or exclude name no module of the model",
    "C102": "layers and exclude leave nothing of the targets",
    "C103": "a choice of layers cannot be read",
    "C104": "a layer is named that the model does not have",
    "C105": "the target is one part of a fused weight, which can be adapted as a whole only",
    "C106": "a target is not a valid regular expression",
    "R101": "a routing has an empty list, so it says nothing about any row",
    "R102": "a routing names one adapter twice for the same row",
    "R103": "a routing is neither None, a name, a tuple of names nor a list with one of these a row",
    "R104": "the list of a routing has more or fewer entries than the batch has rows",
    "R105": "several forwards with different adapters wait for a backward, so what it recomputes cannot be told",
    "R106": "inside the model it cannot be told which entries belong to which row, so rows cannot differ in adapters",
    "R107": "a module returns something in which rows cannot be told apart",
    "R108": "an adapted module was called without a tensor as its input",
    "R109": "no adapter is attached to the model",
    "R110": "a routing names an adapter that is not attached",
    "R111": "a routing leaves out an adapter that is merged into the weights",
    "R112": "a prefix meets an attention implementation that takes no mask of ours",
    "R113": "cached keys and values were computed under other virtual tokens than those that act now",
    "R114": "a row has another number of slots for virtual tokens than the prompt has virtual tokens",
    "R115": "virtual tokens meet packed documents or a mask that they cannot be put into",
    "R117": "adapters of one batch give outputs of different widths, such as heads of different label counts",
    "R116": "positions must be moved for an adapter, and the model takes none",
    "R201": "the method's change cannot be folded into a weight, so the adapter cannot be merged",
    "R202": "a merged weight cannot be put in the place of one that another library holds, or that is offloaded",
    "T102": "a setting of a method has a value that it cannot take",
    "T103": "attach was given something that is not a method",
    "T104": "the method changes nothing in this model",
    "T105": "two parts of a sum of methods change the same place under the same name",
    "T120": "a prefix was asked for where keys and values cannot be added to the model's attention",
    "T121": "a method changes the input of one part of a fused map, which all parts share",
    "T122": "the method chooses by data what to change, and no data was given",
}
"""Code to meaning."""
