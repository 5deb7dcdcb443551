"""Speed and memory, side by side with the peers, in one run, and only where the results are right."""
