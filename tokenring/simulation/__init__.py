"""An event simulation of a plan on a topology."""
