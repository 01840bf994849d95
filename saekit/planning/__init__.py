"""What a run would do, need and take, without running it; runs know nothing of it."""
