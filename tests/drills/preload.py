"""What the server of the drills imports once, so that its children need not."""

import transformers.models.llama.modeling_llama  # noqa: F401

import training.tiny_runs  # noqa: F401
