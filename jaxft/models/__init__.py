"""Models: from which config (`config`), made of what (`architecture`), computing what (`decoder`, `language_model`)."""

from jaxft.models.architecture import Decoder
from jaxft.models.attention import attention
from jaxft.models.config import DecoderConfig, RopeConfig
from jaxft.models.language_model import LanguageModel
from jaxft.models.presets import PRESETS, preset

__all__ = ["PRESETS", "Decoder", "DecoderConfig", "LanguageModel", "RopeConfig", "attention", "preset"]
