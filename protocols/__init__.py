"""Protocols: which attacks, on which samples, in which batches, judged how. Nothing in here runs anything."""

if __name__ != "msa_eval.protocols":
    raise ImportError("import this package as msa_eval.protocols, after 'pip install' or 'pip install -e .'")

from msa_eval.protocols.spec import Protocol, load_protocol, make_protocol, shipped

__all__ = ["Protocol", "load_protocol", "make_protocol", "shipped"]
