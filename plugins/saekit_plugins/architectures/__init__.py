"""SAE architectures."""
