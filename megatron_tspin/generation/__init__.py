"""Answers of the policy: the sampler, resumable shards of answers, and held-out evaluation."""
