"""Hugging Face checkpoints in and out."""

from jaxft.hub.load import load_model, load_pretrained, resolve
from jaxft.hub.save import save_pretrained, to_host
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.hub.upcycle import upcycle

__all__ = ["load_model", "load_pretrained", "load_tokenizer", "resolve", "save_pretrained", "to_host", "upcycle"]
