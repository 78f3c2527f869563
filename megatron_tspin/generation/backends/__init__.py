"""Who answers prompts: this project's engine on the policy's own ranks, or another program."""
