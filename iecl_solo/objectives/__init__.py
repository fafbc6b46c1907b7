"""What is added to a host's loss, told in terms of views and embeddings."""
