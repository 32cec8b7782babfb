"""Tuning methods: the `Method` contract, `chain`, the registry, and a preset a paper."""

from jaxft.methods.base import Method, Signals, chain, count_trainable, wrap_optimizer
from jaxft.methods.merge import merge, unmerged_sites
from jaxft.methods.modules.prompt_tuning import prompt_tuning
from jaxft.methods.modules.ssf import ssf
from jaxft.methods.probe import Probe
from jaxft.methods.registry import MethodEntry, build, get_method, methods, register
from jaxft.methods.reparametrization.lora import lora
from jaxft.methods.selection.apet import apet
from jaxft.methods.selection.badam import badam
from jaxft.methods.selection.bitfit import bitfit
from jaxft.methods.selection.cofitune import cofitune
from jaxft.methods.selection.esft import esft
from jaxft.methods.selection.freezeasguard import freezeasguard
from jaxft.methods.selection.full import full
from jaxft.methods.selection.gmt import gmt
from jaxft.methods.selection.grafting import grafting
from jaxft.methods.selection.greentrainer import greentrainer
from jaxft.methods.selection.hft import hft
from jaxft.methods.selection.ist import ist
from jaxft.methods.selection.layer_freezing import layer_freezing
from jaxft.methods.selection.lift import lift_principal_weights
from jaxft.methods.selection.lisa import lisa
from jaxft.methods.selection.locft_bf import locft_bf
from jaxft.methods.selection.lt_sft import lt_sft
from jaxft.methods.selection.paca import paca
from jaxft.methods.selection.pivotal import pivotal_parameters_tuning
from jaxft.methods.selection.progressive_freezing import progressive_freezing
from jaxft.methods.selection.r_amt import r_amt
from jaxft.methods.selection.s2ft import s2ft
from jaxft.methods.selection.sara import sara
from jaxft.methods.selection.select import select
from jaxft.methods.selection.shira import shira
from jaxft.methods.selection.skip_tuning import skip_tuning
from jaxft.methods.selection.smt import smt
from jaxft.methods.selection.spafit import spafit
from jaxft.methods.selection.spiel import spiel
from jaxft.methods.selection.spt import spt

__all__ = [
    "Method",
    "MethodEntry",
    "Probe",
    "Signals",
    "apet",
    "badam",
    "bitfit",
    "build",
    "chain",
    "cofitune",
    "count_trainable",
    "esft",
    "freezeasguard",
    "full",
    "get_method",
    "gmt",
    "grafting",
    "greentrainer",
    "hft",
    "ist",
    "layer_freezing",
    "lift_principal_weights",
    "lisa",
    "locft_bf",
    "lora",
    "lt_sft",
    "merge",
    "methods",
    "paca",
    "pivotal_parameters_tuning",
    "progressive_freezing",
    "prompt_tuning",
    "r_amt",
    "register",
    "s2ft",
    "sara",
    "select",
    "shira",
    "skip_tuning",
    "smt",
    "spafit",
    "spiel",
    "spt",
    "ssf",
    "unmerged_sites",
    "wrap_optimizer",
]
