"""The proof of a plan over all ranks: slots, pairs of transfers, coverage, no deadlock (`proof` puts them together)."""
