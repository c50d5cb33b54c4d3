"""Protocols and the engine that runs them: which attacks, on which samples, in which batches, judged how."""

if __name__ != "msa_eval.protocols":
    raise ImportError("import this package as msa_eval.protocols, after 'pip install' or 'pip install -e .'")

from msa_eval.errors import AttackError
from msa_eval.protocols.engine import evaluate
from msa_eval.protocols.evidence import Results
from msa_eval.protocols.spec import Protocol, load_protocol, make_protocol, shipped

__all__ = ["AttackError", "Protocol", "Results", "evaluate", "load_protocol", "make_protocol", "shipped"]
