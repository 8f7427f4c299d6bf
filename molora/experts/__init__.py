"""What is computed: stacked factors of the experts, and how they start."""

from molora.experts.bank import Block, ExpertBank

__all__ = ["Block", "ExpertBank"]
