"""Training after a conversion: light fine-tuning, and ReLU for models that have another activation."""
