"""What a run stores, and how stored runs are compared, merged and paired."""
