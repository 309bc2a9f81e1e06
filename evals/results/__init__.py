"""What a run stores, and what is made of stored runs: compared, merged, paired."""
