"""Options of sampling. Imports no JAX: `--help` needs this class."""

import dataclasses
import math

from moss_audio_jax.commands.options import require


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling of a token from its logits, in Hugging Face's order: penalty, temperature, top-k, top-p.

    Tokens of equal probability are kept together, or not at all.
    """

    temperature: float = 0.0
    """0: greedy, the most likely token, and top_k and top_p have no effect. The authors sample at 1."""
    top_k: int = 0
    """Draw from this many most likely tokens. 0: all. The authors use 50."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum. 1: all."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens in the prompt and the answer so far by this, and multiply negative ones. 1:
    off."""

    def __post_init__(self):
        require(self, None, ("temperature",), lambda value: 0 <= value < math.inf, "0 or more, and finite")
        whole = "a whole number, 0 (all) or more"
        require(self, None, ("top_k",), lambda value: value >= 0 and float(value).is_integer(), whole)
        require(self, None, ("top_p",), lambda value: 0 < value <= 1, "above 0 and at most 1")
        require(self, None, ("repetition_penalty",), lambda value: 0 < value < math.inf, "above 0, and finite")
