"""``python -m msa_eval``: the command line."""

from msa_eval.cli import main

main(prog_name="msa-eval")
