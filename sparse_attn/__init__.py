"""AnchorAttention, stripe-sparse prefill. Nothing is public here yet: the package holds its name and place in the house."""

__all__: list[str] = []
