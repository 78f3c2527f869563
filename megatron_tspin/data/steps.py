"""How many optimizer steps a self-play iteration has. No numpy here, the driver counts them too."""


def steps_per_epoch(num_examples: int, global_batch_size: int) -> int:
    """Optimizer steps of one pass; the last one may have fewer triplets."""
    return -(-num_examples // global_batch_size)


def steps_per_iteration(num_examples: int, global_batch_size: int, epochs: int, train_iters: int | None) -> int:
    """Optimizer steps of one self-play iteration; `train_iters` overrides the number of epochs."""
    if train_iters is not None:
        return train_iters
    return epochs * steps_per_epoch(num_examples, global_batch_size)
