"""Protocols: which attacks, on which samples, in which batches, judged how. Nothing in here runs anything."""

if __name__ != "msa_eval.protocols":
    raise ImportError("import this package as msa_eval.protocols, after 'pip install' or 'pip install -e .'")

from msa_eval.protocols.loading import load_protocol, make_protocol, shipped
from msa_eval.protocols.schema import Protocol

__all__ = ["Protocol", "load_protocol", "make_protocol", "shipped"]
