"""Attacks of other libraries, behind checks: pyautoattack, torchattacks and foolbox.

What they return is made sound by `msa_eval.attacks.external.sanitize` before anything is made of it.
"""

from msa_eval.attacks.external.adapter import Peer
from msa_eval.attacks.external.batch_model import Seat
from msa_eval.attacks.external.faults import Fault, PeerError, told
from msa_eval.attacks.external.libraries import LIBRARIES, find, installed, library_of
from msa_eval.attacks.external.sanitize import Found, meet

__all__ = [
    "LIBRARIES", "Fault", "Found", "Peer", "PeerError", "Seat", "find", "installed", "library_of", "meet", "told",
]  # fmt: skip
