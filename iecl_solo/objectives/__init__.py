"""What is added to a host's loss, in terms of views and embeddings."""
