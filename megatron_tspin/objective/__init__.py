"""What a step minimises: rows of triplets, log-probs, losses, and Megatron's forward step over them."""
