"""What solo-learn needs to run on today's stack."""
