"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "E101": "memory ran out as a model was loaded or trained",
    "E110": "the base is stored in a way that a package reads which is not installed",
    "M101": "the base model is given as a file; a folder or a hub id is wanted",
    "M102": "the folder of the base model does not exist",
    "M103": "the base model has pickled weights only, and nothing is unpickled",
    "M104": "the folder of the base model has no weights in safetensors files",
    "M105": "an adapter is given where its base model is wanted",
    "M106": "the folder has no config.json, so it is no transformers model",
    "M107": "the base is quantised already, and is to be quantised while it is read",
    "M108": "the dtype is unknown",
    "M109": "a model for the task classify needs the names of its classes",
    "M110": "the tokenizer has no token that could pad short rows",
    "M111": "the tokenizer has more tokens than the model has embeddings",
    "M112": "the base model has no tokenizer that can be loaded",
    "M113": "this kind of model cannot do the task",
    "M114": "the weights of the base model are not complete",
    "M115": "a weight of the base model has another shape than its config.json says",
    "M116": "the base model cannot be read: its config.json or a weights file is damaged or not understood",
    "M117": "the base model is no folder on this machine, and the hub did not give it",
    "M119": "where the parts of the base are to lie (device_map, max_memory, offload_folder) cannot be read",
    "M120": "the base does not fit: what a call starts with would lie on disk",
    "M118": "the tokenizer has no token that hides another, as masked language modelling needs",
}
"""Code to meaning."""
