"""The fixtures of comparisons on tiny bases."""

from training.tiny_runs import answered, labelled, tiny_base, tiny_bert, tiny_t5

__all__ = ["answered", "labelled", "tiny_base", "tiny_bert", "tiny_t5"]
