"""What is shown inside sandboxes. It imports nothing of egressd, and no more than the standard library."""
