"""The stable codes of everything this room reports."""

from __future__ import annotations

__all__ = ["CODES"]

CODES: dict[str, str] = {
    "A201": "the folder of the adapter does not exist, or is a file",
    "A202": "the folder holds no adapter",
    "A203": "the adapter's weights are pickled, and nothing is unpickled",
    "A204": "adapter_config.json is missing or cannot be read",
    "A205": "adapters of this peft_type are not supported",
    "A206": "adapter_config.json has a setting of PEFT that is not supported",
    "A207": "adapter_model.safetensors is missing, damaged or cut short",
    "A208": "the adapter's file lacks a tensor",
    "A209": "the adapter's file has a tensor that does not belong to the adapter",
    "A210": "a tensor of the adapter's file has the wrong shape, as for another base",
    "A211": "the adapter's file has values that are NaN or infinite",
    "A212": "a tensor of the adapter's file was changed after graftlm wrote it",
    "A213": "the adapter was trained on another base than this one",
    "A214": "graftlm.json, which the adapter needs, is missing, damaged or incomplete",
    "A215": "graftlm.json names a method that this version does not know or cannot read",
    "A216": "a value in adapter_config.json is missing or wrong",
    "A217": "target_modules in adapter_config.json do not fit the modules of this base",
    "A218": "the vocabulary had another size when the adapter was trained",
    "A219": "the facts to be saved with an adapter cannot be written as JSON",
    "A220": "the adapter's file has one tensor twice, under two names",
    "A221": "the folder holds several adapters, so it cannot be told which one is meant",
    "A222": "the adapter was written by a newer version of graftlm, in a format that this one cannot read",
    "A231": "manifest.json, which lists a folder's files, is missing or cannot be read",
    "A232": "a file that the manifest lists is missing",
    "A233": "a file has another size than the manifest says",
    "A234": "a file was changed since the manifest was written",
    "A240": "an adapter is to be exported into a layout that there is not",
    "A241": "the folder of an export is there already",
    "A242": "an export cannot be proven: there are no rows to compare on",
    "A243": "the adapter cannot be exported for PEFT, which has no words for its method",
    "A244": "the adapter cannot be exported for vLLM: its method, rank or parts are beyond what vLLM takes",
    "A245": "what was exported is not the model that was trained: it was refused, and nothing is left of it",
    "E111": "the disk was full when a folder was to be written",
    "E112": "a folder cannot be written there: no permission, a read-only disk, or another fault of the system",
}
"""Code to meaning."""
