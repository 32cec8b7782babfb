"""Generation of text from a language model."""

from jaxft.decoding.generate import Generation, generate
from jaxft.decoding.sampling import sample

__all__ = ["Generation", "generate", "sample"]
