"""Preference rows from photographs: from boxes, masks and options that people have.

`photos` holds what labels say of a photograph, `words` the questions and answers, `from_labels` and `from_options` the
rows, `on_policy` those of an MLLM's own answers, `counterfactuals` the images that are made, `balance` leaves rows out
so that text alone does not tell the answers, `blind_probe` checks that, and `write` makes the output.
"""

from pivot_hub.data.pairs.write import PairOptions, PairReport, write_pairs

__all__ = ["PairOptions", "PairReport", "write_pairs"]
