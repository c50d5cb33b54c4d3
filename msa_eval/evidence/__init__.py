"""What is known of every sample, in memory and on disk."""
