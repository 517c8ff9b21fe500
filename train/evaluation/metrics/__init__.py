"""Scores of answers against references, of a whole test set.

text               normalization, edit distance, alignment; WER and CER
timelines          parsing of `[0.0]tone[1.5]`; accumulated average shift (AAS) of timestamps
events             F1, onset and offset errors of sound events
values             a time in seconds; a label or short reply
choices            the option that an answer to a multiple-choice question names

Counts are summed over the test set before they are divided, so a long clip weighs more than a short one. A rate whose
denominator is zero is None. An answer that can't be read is counted as wrong; nothing is raised.
"""
