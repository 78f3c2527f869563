"""Training: optimizer, schedule, loop, and the stages that hold the policy in the training layout."""
